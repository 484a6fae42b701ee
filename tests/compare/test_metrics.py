"""Metrics against other libraries, closed forms and enumeration; and the wrong estimators they must be told from."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss

from fspace.compare import metrics
from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical, Gaussian, Mixture, Samples

rng = np.random.default_rng(0)
N, K = 40, 5
Y = rng.normal(size=N)
MEAN, STD = rng.normal(size=(K, N)), rng.uniform(0.2, 2.0, (K, N))
WEIGHTS = rng.dirichlet(np.ones(K))


def tensor(a):
    return torch.tensor(a, dtype=torch.float64)


GAUSSIAN = Gaussian(tensor(MEAN[0]), tensor(STD[0] ** 2))
MIXTURE = Mixture([Gaussian(tensor(m), tensor(s**2)) for m, s in zip(MEAN, STD)], tensor(WEIGHTS))
ENSEMBLE = Samples(tensor(MEAN), tensor(STD**2))


def test_mixture_likelihood_is_not_that_of_the_matched_moments():
    density = WEIGHTS @ stats.norm.pdf(Y, MEAN, STD)
    assert metrics.log_likelihood(Y, MIXTURE) == pytest.approx(np.log(density).mean(), abs=1e-10)
    apart = Mixture([Gaussian(tensor([m]), tensor([0.04])) for m in (-2.0, 2.0)])
    matched = Gaussian(
        apart.mean, apart.variance
    )  # the twin: all its probability is where the members have none
    assert metrics.log_likelihood([2.0], apart) > metrics.log_likelihood([2.0], matched) + 1
    assert metrics.log_likelihood([0.0], apart) < metrics.log_likelihood([0.0], matched) - 10
    equal = stats.norm.pdf(Y, MEAN, STD).mean(0)
    assert metrics.log_likelihood(Y, ENSEMBLE) == pytest.approx(np.log(equal).mean(), abs=1e-10)


def test_rmse_sharpness_coverage_and_width():
    assert metrics.rmse(Y, GAUSSIAN) == pytest.approx(np.sqrt(np.mean((Y - MEAN[0]) ** 2)))
    assert metrics.sharpness(GAUSSIAN) == pytest.approx(np.sqrt(np.mean(STD[0] ** 2)))
    half = stats.norm.ppf(0.95) * STD[0]
    assert metrics.coverage(Y, GAUSSIAN) == np.mean(np.abs(Y - MEAN[0]) <= half)
    assert metrics.interval_width(GAUSSIAN) == pytest.approx(2 * half.mean())


def test_crps_equals_scoringrules():
    scoringrules = pytest.importorskip("scoringrules")
    assert metrics.crps(Y, GAUSSIAN) == pytest.approx(
        scoringrules.crps_normal(Y, MEAN[0], STD[0]).mean(), abs=1e-12
    )
    theirs = scoringrules.crps_mixnorm(Y, MEAN.T, STD.T, np.tile(WEIGHTS, (N, 1)))
    assert metrics.crps(Y, MIXTURE) == pytest.approx(np.mean(theirs), abs=1e-12)
    draws = rng.normal(size=(30, N))
    for fair, estimator in ((True, "fair"), (False, "nrg")):
        theirs = scoringrules.crps_ensemble(Y, draws.T, estimator=estimator)
        assert np.allclose(metrics.crps_samples(Y, draws, fair), theirs, atol=1e-12)


def test_crps_closed_forms_are_the_integral_of_squared_distance():
    """CRPS is the integral of (F(z) - 1{y <= z})^2, for every form of a predictive."""
    grid = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    for predictive in (GAUSSIAN, MIXTURE, ENSEMBLE):
        parts = metrics.gaussian_parts(predictive)
        cdf = parts[2] @ stats.norm.cdf(grid.numpy()[:, None, None], parts[0][:, :3], parts[1][:, :3])
        square = (cdf - (Y[:3] <= grid.numpy()[:, None])) ** 2
        ours = metrics.crps_mixture(Y, *parts)[:3]
        assert np.allclose(ours, square.sum(0) * (grid[1] - grid[0]).item(), atol=1e-3)


def test_fair_crps_is_unbiased_and_the_plain_one_is_not():
    """2,000 ensembles of four draws each: standard error 0.005; the plain estimator is off by 10 of them."""
    draws = np.random.default_rng(1).normal(size=(4, 2000))
    y = np.full(2000, 0.5)
    truth = metrics.crps_gaussian(y[:1], np.zeros(1), np.ones(1))[0]
    fair, plain = (metrics.crps_samples(y, draws, fair) for fair in (True, False))
    error = fair.std() / math.sqrt(2000)
    assert abs(fair.mean() - truth) < 3 * error < abs(plain.mean() - truth) / 2


def test_crps_of_samples_without_noise_takes_them_for_draws():
    draws = tensor(rng.normal(size=(200, N)))
    assert metrics.crps(Y, Samples(draws)) == pytest.approx(metrics.crps_samples(Y, draws.numpy()).mean())
    with pytest.raises(DataError, match="at least 2 draws"):
        metrics.crps(Y, Samples(draws[:1]))


def test_calibration_curve_counts_quantiles_and_finds_the_too_sure():
    n = 4000
    y = np.random.default_rng(2).normal(size=n)
    sure = {s: Gaussian(torch.zeros(n).double(), torch.full((n,), s**2).double()) for s in (1.0, 0.5)}
    stated, found = metrics.calibration_curve(y, sure[0.5], [0.1, 0.9])
    below = [np.mean(y <= 0.5 * stats.norm.ppf(p)) for p in (0.1, 0.9)]
    assert stated.tolist() == [0.1, 0.9] and found.tolist() == below
    assert (
        metrics.calibration_error(y, sure[1.0])
        < 3 * 0.31 / math.sqrt(n)
        < metrics.calibration_error(y, sure[0.5])
    )
    with pytest.raises(OptionError, match="strictly between"):
        metrics.calibration_curve(y, sure[1.0], [0.0, 0.5])


PROBS = np.random.default_rng(3).dirichlet(np.ones(4) * 0.7, 300)
LABELS = np.array([np.random.default_rng(i).choice(4, p=p) for i, p in enumerate(PROBS)])


def test_class_scores_equal_scikit_learn():
    categorical = Categorical(tensor(PROBS))
    assert metrics.log_likelihood(LABELS, categorical) == pytest.approx(-log_loss(LABELS, PROBS))
    by_class = sum(brier_score_loss(LABELS == k, PROBS[:, k]) for k in range(4))
    assert metrics.brier(LABELS, categorical) == pytest.approx(by_class)
    assert metrics.accuracy(LABELS, PROBS) == np.mean(PROBS.argmax(1) == LABELS)


def test_class_calibration_error_by_hand():
    """Two bins of width one half and two of three rows each, worked out on paper."""
    probs = np.array([[0.6, 0.4], [0.7, 0.3], [0.55, 0.45], [0.9, 0.1], [0.95, 0.05], [0.8, 0.2]])
    labels = np.array([0, 1, 0, 0, 0, 1])
    stated = probs.max(1)
    width = abs(4 / 6 - stated.mean())  # all stated probabilities are in the upper half
    low, high = np.array([0.55, 0.6, 0.7]), np.array([0.8, 0.9, 0.95])
    mass = 0.5 * abs(2 / 3 - low.mean()) + 0.5 * abs(2 / 3 - high.mean())
    assert metrics.class_calibration_error(labels, probs, 2, "width") == pytest.approx(width)
    assert metrics.class_calibration_error(labels, probs, 2, "mass") == pytest.approx(mass)
    with pytest.raises(OptionError, match="'mass' or 'width'"):
        metrics.class_calibration_error(labels, probs, equal="heaps")


# ---- batches of points -----------------------------------------------------------------------------


def joint_gaussian(n=30, noise=0.1):
    x = np.linspace(0, 3, n)
    latent = np.exp(-0.5 * (x[:, None] - x) ** 2)
    mean = np.sin(x)
    covariance = latent + noise * np.eye(n)
    made = Gaussian(tensor(mean), tensor(np.diag(covariance)), tensor(covariance), tensor(np.full(n, noise)))
    return made, latent, mean, noise


def test_joint_likelihood_of_repeated_points_shares_the_function_not_the_noise():
    predictive, latent, mean, noise = joint_gaussian()
    y = mean + 0.3
    batch = np.array([[3, 3, 20, 3], [1, 2, 5, 9]])
    expected = []
    for rows in batch:
        covariance = latent[np.ix_(rows, rows)] + noise * np.eye(4)
        expected.append(stats.multivariate_normal(mean[rows], covariance).logpdf(y[rows]) / 4)
    assert metrics.joint_log_likelihood(y, predictive, batch) == pytest.approx(np.mean(expected), abs=1e-9)
    single = metrics.joint_log_likelihood(y, predictive, np.arange(30)[:, None])
    assert single == pytest.approx(metrics.log_likelihood(y, predictive))


def test_joint_likelihood_of_samples_and_classes_by_enumeration():
    batch = np.array([[0, 1, 1], [4, 2, 0]])
    expected = [
        np.log(np.mean(np.prod(stats.norm.pdf(Y[b], MEAN[:, b], STD[:, b]), axis=1))) / 3 for b in batch
    ]
    assert metrics.joint_log_likelihood(Y, ENSEMBLE, batch) == pytest.approx(np.mean(expected), abs=1e-9)
    mixture = Mixture(
        [Gaussian(tensor(m), tensor(s**2), torch.diag(tensor(s**2)), tensor(s**2)) for m, s in zip(MEAN, STD)]
    )
    assert metrics.joint_log_likelihood(Y, mixture, batch) == pytest.approx(np.mean(expected), abs=1e-9)
    probs = rng.dirichlet(np.ones(3), (K, 6))
    labels = np.array([0, 2, 1, 1, 0, 2])
    expected = [np.log(WEIGHTS @ np.prod(probs[:, b, labels[b]], axis=1)) / 3 for b in batch]
    found = metrics.joint_log_likelihood(labels, Categorical(tensor(probs), tensor(WEIGHTS)), batch)
    assert found == pytest.approx(np.mean(expected), abs=1e-9)


def test_joint_likelihood_tells_a_joint_prediction_from_its_marginals():
    """The twin: equal marginals, no dependence. Marginal scores cannot tell them apart, dyadic batches can."""
    truth, _, mean, _ = joint_gaussian()
    apart = Samples(tensor(mean)[None], truth.variance)
    batches = metrics.dyadic_batches(30, seed=5)
    gains = []
    for y in truth.rsample(20, seed=4):
        assert metrics.log_likelihood(y, truth) == pytest.approx(metrics.log_likelihood(y, apart))
        gains.append(
            metrics.joint_log_likelihood(y, truth, batches) - metrics.joint_log_likelihood(y, apart, batches)
        )
    assert np.mean(gains) > 5 * np.std(gains) / math.sqrt(20)


def test_dyadic_batches_have_two_anchors_and_refuse_one_point():
    batches = metrics.dyadic_batches(7, size=10, count=100, seed=1)
    assert batches.shape == (100, 10) and batches.min() >= 0 and batches.max() < 7
    assert {len(set(row)) for row in batches.tolist()} <= {1, 2} and len(
        {tuple(sorted(set(r))) for r in batches.tolist()}
    ) > 10
    with pytest.raises(OptionError, match="two points"):
        metrics.dyadic_batches(1)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y, words",
    [(Y[:3], "shape"), (np.where(np.arange(N) == 7, np.nan, Y), "row 7"), (Y[:, None], "one at a time")],
)
def test_numbers_that_do_not_fit_are_refused(y, words):
    for metric in (
        metrics.rmse,
        metrics.crps,
        metrics.coverage,
        metrics.log_likelihood,
        metrics.calibration_error,
    ):
        with pytest.raises(DataError, match=words):
            metric(y, GAUSSIAN)


@pytest.mark.parametrize(
    "labels, probs, words",
    [
        (LABELS[:5], PROBS, "5 labels"),
        (LABELS + 1, PROBS, "from 0 to 3"),
        (LABELS + 0.5, PROBS, "positions of classes"),
        (LABELS, np.where(np.arange(300)[:, None] == 4, np.nan, PROBS), "row 4"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, probs, words):
    for metric in (metrics.accuracy, metrics.brier, metrics.class_calibration_error):
        with pytest.raises(DataError, match=words):
            metric(labels, probs)


@pytest.mark.parametrize("variance", [math.nan, -1.0])
def test_a_variance_that_is_none_is_not_counted_as_a_miss(variance):
    bad = Gaussian(GAUSSIAN.mean, torch.where(torch.arange(N) == 7, variance, GAUSSIAN.variance))
    for metric in (metrics.coverage, metrics.calibration_error, metrics.calibration_curve):
        with pytest.raises(DataError, match="NaN in row 7"):
            metric(Y, bad)
    assert math.isnan(metrics.log_likelihood(Y, bad)) and math.isnan(metrics.crps(Y, bad))


@pytest.mark.parametrize(
    "probs", [2 * PROBS, PROBS - 1, np.zeros_like(PROBS), np.log(PROBS), PROBS.astype("f2") + 0.01]
)
def test_what_is_no_probability_is_refused(probs):
    for metric in (metrics.accuracy, metrics.brier, metrics.class_calibration_error):
        with pytest.raises(DataError, match="Row 0 holds no probabilities"):
            metric(LABELS, probs)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: metrics.rmse(Y, MEAN[0]), r"ndarray is no predictive; pass model.predictive\(X\)"),
        (lambda: metrics.coverage(Y, None), "NoneType is no predictive"),
        (lambda: metrics.rmse(["a"] * N, GAUSSIAN), "y must hold numbers"),
        (lambda: metrics.accuracy(LABELS, GAUSSIAN), "probabilities must hold numbers"),
        (lambda: metrics.calibration_error(Y, GAUSSIAN, []), "levels="),
        (lambda: metrics.calibration_curve(Y, GAUSSIAN, "high"), "levels="),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(call, words):
    with pytest.raises((DataError, OptionError), match=words):
        call()


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="positions from 0 to 99"):
        metrics.joint_log_likelihood(Y, ENSEMBLE, np.array([[0, 99]]))
    with pytest.raises(DataError, match="whole numbers"):
        metrics.joint_log_likelihood(Y, ENSEMBLE, np.array([[0.5, 1.0]]))
    with pytest.raises(DataError, match="no joint density"):
        metrics.joint_log_likelihood(Y, Samples(tensor(MEAN)), np.array([[0, 1]]))


def test_predictives_may_be_on_any_device(device):
    """The same figures, wherever the tensors are."""
    moved = Gaussian(GAUSSIAN.mean.to(device), GAUSSIAN.variance.to(device))
    for metric in (
        metrics.log_likelihood,
        metrics.rmse,
        metrics.crps,
        metrics.coverage,
        metrics.calibration_error,
    ):
        assert metric(torch.as_tensor(Y, device=device), moved) == pytest.approx(
            metric(Y, GAUSSIAN), rel=1e-9
        )
    probs = Categorical(tensor(PROBS).to(device))
    assert metrics.log_likelihood(LABELS, probs) == pytest.approx(-log_loss(LABELS, PROBS))
    assert metrics.brier(LABELS, probs) == metrics.brier(LABELS, PROBS)
