"""Sites that come, go and fade: against the fit of the rows that are left, and through the estimators."""

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

import fspace
from fspace.errors import DataError, OptionError
from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.streaming import forget, pruned, take_in


def scaling(d=2):
    one, zero = torch.ones(d, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return Scaling(one, one, 0 * one, one, zero, zero + 1.0)


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)


def posterior(x, y, inducing):
    kernel = ScaleKernel(MaternKernel(2.5)).double().requires_grad_(False)
    likelihood = gaussian_likelihood(1, 0.02, torch.device("cpu")).requires_grad_(False)
    basis = Basis(kernel, x[:inducing], likelihood)
    return GPPosterior(basis, fit_site(basis, x, y[:, None]), scaling())


def same(a, b, x, tolerance=1e-7):
    p, q = a.latent(x), b.latent(x)
    return torch.allclose(p.mean, q.mean, atol=tolerance) and torch.allclose(
        p.variance, q.variance, atol=tolerance
    )


def test_rows_taken_in_on_a_basis_that_explains_them_are_as_if_they_had_been_there():
    x, y = data(200)
    whole = posterior(x, y, 150)
    part = posterior(x[:150], y[:150], 150)
    basis = part.basis
    streamed = take_in(part, x[:50] + 1e-9, y[150:], "more", budget=400)
    assert len(streamed.basis.inducing_inputs) == len(basis.inducing_inputs)  # nothing new to explain
    direct = GPPosterior(
        basis,
        fit_site(basis, torch.cat([x[:150], x[:50]]), torch.cat([y[:150], y[150:]])[:, None]),
        scaling(),
    )
    assert same(streamed, direct, x, 1e-5)
    assert not same(streamed, part, x, 1e-3)  # the twin: nothing was taken in
    assert set(streamed.sites) == {"data", "more"} and whole.num_outputs == 1


def test_what_is_forgotten_was_never_there():
    x, y = data(120)
    before = posterior(x[:60], y[:60], 60)
    after = take_in(take_in(before, x[60:90], y[60:90], "a", 500), x[90:], y[90:], "b", 500)
    back = forget(forget(after, "b"), "a")
    assert same(back, before, x[:60], 1e-6)
    assert not same(forget(after, "b"), before, x[:60], 1e-4)
    only_b = forget(after, "a")
    direct = take_in(before, x[90:], y[90:], "b", 500)
    assert (only_b.latent(x).mean - direct.latent(x).mean).abs().max() < 0.05


def test_inducing_inputs_grow_where_needed_and_stay_within_the_budget():
    x, y = data(100)
    far = x + 6.0
    start = posterior(x, y, 100)
    grown = take_in(start, far, torch.cos(far[:, 0]), "far", budget=300)
    assert 100 < len(grown.basis.inducing_inputs) <= 200
    error = (grown.latent(far).mean - torch.cos(far[:, 0])).square().mean().sqrt()
    assert error < 0.15
    tight = take_in(start, far, torch.cos(far[:, 0]), "far", budget=120)
    assert len(tight.basis.inducing_inputs) == 120
    assert (tight.latent(x).mean - start.latent(x).mean).abs().mean() < 0.2  # the old data are not lost
    assert (tight.latent(far).mean - torch.cos(far[:, 0])).square().mean().sqrt() < 0.4


def test_pruning_what_others_explain_changes_little():
    x, y = data(150)
    close = torch.cat([x[:75], x[:75] + 1e-4])
    start = posterior(close, torch.cat([y[:75], y[:75]]), 150)
    basis, sites = pruned(start.basis, start.sites, 75)
    after = start.with_sites(basis, sites)
    assert (after.latent(x).mean - start.latent(x).mean).abs().max() < 0.02
    basis, sites = pruned(start.basis, start.sites, 10)  # the twin
    assert (start.with_sites(basis, sites).latent(x).mean - start.latent(x).mean).abs().max() > 0.1


def test_discounting_follows_drift():
    x, y = data(200)
    start = posterior(x, y, 100)
    kept = take_in(start, x, -y, "new", budget=300)
    faded = take_in(start, x, -y, "new", budget=300, discount=0.05)
    wrong, right = (float((p.latent(x).mean + y).square().mean().sqrt()) for p in (kept, faded))
    assert right < 0.25 < 0.5 < wrong
    assert (faded.latent(x).variance > 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x, y: take_in(p, x, y, "data", 100), "already"),
        (lambda p, x, y: take_in(p, x, y, "a", 100, discount=0.0), "discount"),
        (lambda p, x, y: take_in(p, x, y, "a", 100, discount=1.5), "discount"),
        (lambda p, x, y: take_in(p, x, y, "a", 100, discount=None), "discount"),
        (lambda p, x, y: take_in(p, x, y, ["a"], 100), "name"),
        (lambda p, x, y: forget(p, "nothing"), "no site"),
        (lambda p, x, y: forget(p, ["data"]), "no site"),
        (lambda p, x, y: forget(p, "data"), "only site"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    x, y = data(20)
    with pytest.raises(OptionError, match=words):
        call(posterior(x, y, 10), x, y)


def test_rows_of_another_shape_are_refused_and_nothing_changes():
    x, y = data(20)
    start = posterior(x, y, 10)
    for rows, values in ((x[:, :1], y), (x, y[:5]), (x * torch.nan, y)):
        with pytest.raises(DataError):
            take_in(start, rows, values, "a", 100)
    assert set(start.sites) == {"data"}


# ---- through the estimators ------------------------------------------------------------------------


def wave(n, seed):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-3, 3, (n, 2))
    return X, np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(n)


def test_a_regression_goes_on_learning_and_forgets(tmp_path):
    (X, y), (X_new, y_new), (X_test, y_test) = wave(150, 0), wave(600, 1), wave(300, 2)
    model = fspace.GPRegressor(kernel="matern", inducing=300).fit(X, y)
    before = model.predictive(X_test).log_prob(y_test).mean().item()
    first = model.predict(X_test)
    for k in range(3):
        model.partial_fit(X_new[200 * k : 200 * (k + 1)], y_new[200 * k : 200 * (k + 1)])
    assert (
        list(model.sites_) == ["data", "batch 1", "batch 2", "batch 3"] and sum(model.sites_.values()) == 750
    )
    after = model.predictive(X_test).log_prob(y_test).mean().item()
    refit = fspace.GPRegressor(kernel="matern", inducing=300).fit(
        np.concatenate([X, X_new]), np.concatenate([y, y_new])
    )
    best = refit.predictive(X_test).log_prob(y_test).mean().item()
    assert after > before + 0.5 * (best - before)
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    for one in (model, loaded):
        for k in range(1, 4):
            one.forget(f"batch {k}")
        assert np.abs(one.predict(X_test) - first).max() < 1e-2 and list(one.sites_) == ["data"]


@pytest.mark.parametrize("inference", ["exact", "collapsed", "sites"])
def test_what_fit_saw_is_the_site_data(inference, tmp_path):
    X, y = wave(200, 0)
    model = fspace.GPRegressor(kernel="matern", inference=inference, inducing=30).fit(X, y)
    assert model.sites_ == {"data": 200}
    model.partial_fit(X[:20] + 0.1, y[:20]).forget("data")
    assert model.sites_ == {"batch 1": 20}


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        (["data+held out", "monday"], ["data", "monday"]),
        (["data+held out", "data"], ["data+held out", "data"]),
    ],
)
def test_files_in_which_that_site_had_another_name_load(saved, read, tmp_path):
    X, y = wave(100, 0)
    model = fspace.GPRegressor(kernel="matern", inference="collapsed", inducing=20).fit(X, y)
    model.partial_fit(X[:20] + 0.1, y[:20], site="monday")
    posterior = model.posterior_
    sites = dict(zip(saved, posterior.sites.values()))
    model.posterior_ = posterior.with_sites(posterior.basis, sites)
    loaded = fspace.load(model.save(tmp_path / "old.fspace"))
    assert list(loaded.sites_) == read
    assert np.array_equal(loaded.predict(X), model.predict(X))


def test_a_mixture_and_a_classifier_go_on_learning():
    (X, y), (X_new, y_new) = wave(400, 0), wave(300, 1)
    model = fspace.GPRegressor(members=1).partial_fit(X, y)
    model.partial_fit(X_new, y_new, site="monday").forget("monday")
    labels, more = (y > 0).astype(int), (y_new > 0).astype(int)
    classifier = fspace.GPClassifier(kernel="matern").partial_fit(X[:100], labels[:100])
    before = classifier.score(X[100:], labels[100:])
    classifier.partial_fit(X_new, more)
    assert classifier.score(X[100:], labels[100:]) > min(before, 0.95) - 0.01
    with pytest.raises(DataError, match="not among the classes"):
        classifier.partial_fit(X_new, more + 5)
    words = np.where(labels[:50] > 0, "b", "a")
    three = fspace.GPClassifier(kernel="matern").partial_fit(X[:50], words, classes=["a", "b", "c"])
    assert three.predict_proba(X[:5]).shape == (5, 3)
    three.partial_fit(X_new[:50], np.where(more[:50] > 0, "c", "a"))
    assert three.predict_proba(X_new)[:, 2].mean() > 0.15
