"""GPRegressor under likelihoods that are not Gaussian: counts, heavy tails, refusals."""

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch import likelihoods

import fspace
from fspace.errors import DataError, ModelFileError, OptionError

X3 = np.arange(12.0).reshape(6, 2)


# ---- regression under other likelihoods ------------------------------------------------------------


def test_counts_have_honest_intervals_and_beat_gaussian_noise():
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, size=(900, 2))
    y = rng.poisson(np.exp(1.0 + np.sin(2 * X[:, 0])))
    scores = {}
    for likelihood in ("poisson", "negative_binomial", "gaussian"):
        model = fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X[:600], y[:600])
        predictive = model.predictive(X[600:])
        scores[likelihood] = predictive.log_prob(y[600:]).mean().item()
        if likelihood == "poisson":
            lower, upper = predictive.interval(0.9)
            inside = ((y[600:] >= lower.numpy()) & (y[600:] <= upper.numpy())).mean()
            assert 0.87 < inside < 0.99
            assert np.corrcoef(model.predict(X[600:]), np.exp(1 + np.sin(2 * X[600:, 0])))[0, 1] > 0.97
    assert scores["poisson"] > scores["gaussian"] + 0.05
    assert abs(scores["negative_binomial"] - scores["poisson"]) < 0.05


def test_heavy_tails_do_not_drag_the_function():
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(-3, 3, size=(300, 1)), axis=0)
    truth = np.sin(2 * X[:, 0])
    y = truth + 0.1 * rng.standard_normal(300)
    y[::10] += 8.0
    errors = {}
    for likelihood in ("student_t", "gaussian"):
        model = fspace.GPRegressor(kernel="rbf", likelihood=likelihood).fit(X, y)
        errors[likelihood] = np.sqrt(np.mean((model.posterior_.latent(X).mean.detach().numpy() - truth) ** 2))
    assert errors["student_t"] < 0.15 < 0.3 < errors["gaussian"]


@pytest.mark.parametrize(
    ("likelihood", "y", "words"),
    [
        ("poisson", [1, 2, 0.5, 1, 1, 1], "row 2"),
        ("poisson", [1, 2, -1, 1, 1, 1], "row 2"),
        ("gamma", [1.0, 0.0, 1.0, 1.0, 1.0, 2.0], "row 1"),
        ("beta", [0.1, 0.2, 1.0, 0.3, 0.4, 0.5], "row 2"),
    ],
)
def test_targets_that_a_likelihood_cannot_have_made_are_refused(likelihood, y, words):
    with pytest.raises(DataError, match=words):
        fspace.GPRegressor(likelihood=likelihood).fit(X3, y)


def test_a_likelihood_that_does_not_fit_the_options_is_refused():
    with pytest.raises(OptionError, match="sites"):
        fspace.GPRegressor(likelihood="poisson", inference="exact").fit(X3, [1, 2, 3, 4, 5, 6])
    with pytest.raises(OptionError, match="GPClassifier"):
        fspace.GPRegressor(likelihood="bernoulli").fit(X3, [0, 1, 0, 1, 0, 1])


def test_forget_takes_the_name_of_one_site():
    x = np.linspace(0, 1, 20)[:, None]
    model = fspace.GPRegressor(kernel="rbf").fit(x, x[:, 0])
    with pytest.raises(OptionError, match="name one site"):
        model.forget([0, 1])


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_that_are_all_zero_have_a_small_mean(likelihood):
    model = fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X3, np.zeros(6))
    mean, std = model.predict(X3, return_std=True)
    assert ((0 < mean) & (mean < 0.2)).all() and ((0 < std) & (std < 1)).all()


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "words"),
    [
        ("poisson", [1.0, 0, 3, 1, 0, 2], [1.0, 0.5], "row 1"),
        ("gamma", [1.0, 2, 3, 1, 4, 2], [1.0, -1.0], "row 1"),
        ("beta", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1, 1.0], "row 1"),
    ],
)
def test_later_rows_that_a_likelihood_cannot_have_made_are_refused(likelihood, good, bad, words):
    model = fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X3, good)
    before = model.predict(X3)
    with pytest.raises(DataError, match=words):
        model.partial_fit(X3[:2], bad)
    with pytest.raises(DataError, match=words):
        model.posterior_.condition(X3[:2], bad)
    assert (model.predict(X3) == before).all() and list(model.sites_) == ["data"]


def test_positions_that_are_no_class_are_refused():
    for y in ([0, 1] * 3, [0, 1, 2] * 2):
        posterior = fspace.GPClassifier(kernel="matern").fit(X3, y).posterior_
        for bad in (-1.0, 0.5, 3.0):
            with pytest.raises(DataError, match="row 1"):
                posterior.condition(X3[:2], np.array([0.0, bad]))


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.MultitaskGaussianLikelihood(num_tasks=2),
        likelihoods.FixedNoiseGaussianLikelihood(torch.ones(6)),
        likelihoods.LaplaceLikelihood(batch_shape=torch.Size([2])),
        likelihoods.LikelihoodList(likelihoods.GaussianLikelihood()),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_likelihoods_that_are_not_of_one_function_are_refused(likelihood):
    with pytest.raises(OptionError, match="batch_shape or tasks"):
        fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X3, [1, 2, 3, 4, 5, 6])


def test_a_likelihood_that_would_not_come_back_is_not_saved(tmp_path):
    prior = gpytorch.priors.GammaPrior(2.0, 1.0)
    model = fspace.GPRegressor(
        kernel="matern", likelihood=likelihoods.StudentTLikelihood(deg_free_prior=prior)
    ).fit(X3, [1, 2, 3, 4, 5, 6])
    with pytest.raises(ModelFileError, match="no priors"):
        model.save(tmp_path / "m.fspace")


def test_a_joint_covariance_that_is_not_known_is_refused():
    model = fspace.GPRegressor(kernel="matern", likelihood="poisson").fit(X3, [1, 2, 3, 4, 5, 6])
    with pytest.raises(OptionError, match="sample_y"):
        model.predict(X3, return_cov=True)
