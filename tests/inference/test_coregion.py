"""Coregionalised outputs against the dense Kronecker formula, on simulated truth, and in all that a posterior does."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from botorch.acquisition import GenericMCObjective, qSimpleRegret
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from scipy.linalg import eigh
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal
from sklearn.utils.estimator_checks import check_regressor_multioutput

import fspace
from fspace import interpret
from fspace.errors import DataError, ModelFileError, OptionError
from fspace.inference import candidates
from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site, gather_whitened, log_evidence
from fspace.inference.coregion import Rotation, Spectrum, maximise
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.optimise import gaussian_likelihood
from fspace.posterior import MixturePosterior
from fspace.predictive import Gaussian, Mixture
from fspace.report import report_html
from fspace.report_outputs import correlations_of_outputs
from fspace.server import PosteriorServer
from fspace.server.wire import basis_bytes, basis_from_bytes
from fspace.server.workers import Update, Worker

T, N, D = 3, 12, 2
RNG = np.random.default_rng(5)
X, NEW = RNG.uniform(-3, 3, (N, D)), RNG.uniform(-3, 3, (4, D))
Y = 5.0 + 2.0 * RNG.standard_normal((N, T))
Y_NEW = 5.0 + 2.0 * RNG.standard_normal((4, T))
ROOTS = RNG.standard_normal((2, T, T))
B, SIGMA = (
    ROOTS[0] @ ROOTS[0].T + 0.2 * np.eye(T),
    0.5 * ROOTS[1] @ ROOTS[1].T + 0.3 * np.eye(T),
)  # of standardised y
SHIFT, SCALE = np.array([5.0, -1.0, 2.0]), np.array([2.0, 0.5, 3.0])
LENGTH, VARIANCE = 0.6, 1.7


def matern(a, b):
    """Matern-5/2 by its formula."""
    r = math.sqrt(5.0) * cdist(a, b) / LENGTH
    return VARIANCE * (1.0 + r + r**2 / 3.0) * np.exp(-r)


def built(x=X, y=Y, mixing=True, inducing=None):
    """A posterior with B, SIGMA and the kernel as they are, all rows inducing unless others are."""
    noise, w = eigh(SIGMA, B)  # w' B w = I, w' SIGMA w = diag(noise)
    kernel = ScaleKernel(MaternKernel(nu=2.5)).double().requires_grad_(False)
    kernel.outputscale = torch.tensor(VARIANCE, dtype=torch.float64)  # a float would be rounded
    kernel.base_kernel.lengthscale = torch.tensor(LENGTH, dtype=torch.float64)
    likelihood = gaussian_likelihood(T, 0.1, torch.device("cpu")).requires_grad_(False)
    likelihood.noise = torch.tensor(noise if mixing else np.diag(SIGMA))[:, None]
    one = torch.ones(D, dtype=torch.float64)
    m = torch.tensor(np.linalg.inv(w.T)) if mixing else None
    scaling = Scaling(one, one, 0 * one, one, torch.tensor(SHIFT), torch.tensor(SCALE), m)
    basis = Basis(kernel.eval(), torch.tensor(x if inducing is None else inducing), likelihood.eval())
    site = fit_site(basis, torch.tensor(x), scaling.modelled(torch.tensor(y)))
    return GPPosterior(basis, scaling.with_jacobian(site), scaling)


def dense(x, y, new):
    """Mean [n, t], covariance [n t, n t] of f at new, and log evidence of standardised y, by the formula of numpy."""
    b, sigma = (SCALE[:, None] * c * SCALE for c in (B, SIGMA))
    k = np.kron(matern(x, x), b) + np.kron(np.eye(len(x)), sigma)
    cross, prior = np.kron(matern(new, x), b), np.kron(matern(new, new), b)
    error = (y - SHIFT).reshape(-1)
    mean = (cross @ np.linalg.solve(k, error)).reshape(-1, T) + SHIFT
    covariance = prior - cross @ np.linalg.solve(k, cross.T)
    evidence = multivariate_normal(np.zeros(len(k)), k).logpdf(error) + len(x) * np.log(SCALE).sum()
    return mean, covariance, evidence


def dense_bound(inducing, jitter):
    """Titsias' bound of standardised y with all matrices whole: log N(y | 0, B x Q + Sigma x I) less the traces."""
    y = ((Y - SHIFT) / SCALE).reshape(-1)
    kuu, cross = matern(inducing, inducing), matern(X, inducing)
    q = cross @ np.linalg.solve(kuu + jitter * VARIANCE * np.eye(len(kuu)), cross.T)
    explained = np.kron(q, B) + np.kron(np.eye(N), SIGMA)
    left = np.trace(matern(X, X) - q)  # Cov[f | u] = B x (K - Q)
    return (
        multivariate_normal(np.zeros(N * T), explained).logpdf(y)
        - 0.5 * np.trace(np.linalg.solve(SIGMA, B)) * left
    )


def agree(got, want, tolerance=1e-8):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


# ---- the posterior at fixed B and Sigma --------------------------------------------------------------


def test_posterior_and_evidence_are_the_dense_kronecker_formula():
    posterior = built()
    mean, covariance, evidence = dense(X, Y, NEW)
    latent, observed = posterior.latent(NEW), posterior.observed(NEW)
    noise = np.kron(np.eye(len(NEW)), SCALE[:, None] * SIGMA * SCALE)
    agree(latent.mean, mean)
    agree(latent.joint_covariance, covariance)
    agree(observed.joint_covariance, covariance + noise)
    agree(latent.variance, np.diag(covariance).reshape(-1, T))
    agree(observed.aleatoric, np.diag(noise).reshape(-1, T))
    each = covariance.reshape(4, T, 4, T)
    agree(latent.covariance, np.stack([each[:, t, :, t] for t in range(T)]))
    assert log_evidence([posterior.site]) == pytest.approx(evidence, abs=1e-7)  # of K without jitter
    joint = multivariate_normal(mean.reshape(-1), covariance + noise)
    assert observed.joint_log_prob(Y_NEW).item() == pytest.approx(joint.logpdf(Y_NEW.reshape(-1)), abs=1e-8)
    total = (covariance + noise).reshape(4, T, 4, T)
    rows = [multivariate_normal(mean[i], total[i, :, i]).logpdf(Y_NEW[i]) for i in range(4)]
    agree(observed.row_log_prob(Y_NEW), rows)
    agree(posterior.coregionalisation, VARIANCE * SCALE[:, None] * B * SCALE)
    agree(posterior.noise_covariance, SCALE[:, None] * SIGMA * SCALE)
    agree(posterior.noise_variance, np.diag(SIGMA) * SCALE**2)
    without = built(mixing=False)  # the same variances, no correlation
    assert np.abs(without.latent(NEW).mean.numpy() - mean).max() > 0.05
    assert abs(log_evidence([without.site]) - evidence) > 0.5


@pytest.mark.parametrize("inducing", [X, X[:5] + 0.1])
def test_the_evidence_is_the_dense_bound(inducing):
    posterior = built(inducing=inducing)
    want = dense_bound(inducing, posterior.basis.jitter)
    assert log_evidence([posterior.site]) == pytest.approx(want, abs=1e-8)
    if len(inducing) < N:
        assert dense(X, Y, NEW)[2] > want + 0.5  # it is a bound


def test_the_bound_of_any_rotation_is_the_dense_evidence():
    posterior = built()
    y = torch.tensor((Y - SHIFT) / SCALE)
    spectrum = Spectrum.of(gather_whitened(posterior.basis, torch.tensor(X), y), y.mT @ y)
    w = torch.linalg.inv(posterior.scaling.mixing)
    evidence = dense_bound(X, posterior.basis.jitter)
    assert spectrum.bound(w, posterior.basis.noise).item() == pytest.approx(evidence, abs=1e-8)
    assert spectrum.bound(w * 1.1, posterior.basis.noise).item() != pytest.approx(evidence, abs=0.1)


def test_learning_climbs_the_bound_and_ends_where_its_slope_is_the_pull_s():
    y = torch.tensor((Y - Y.mean(0)) / Y.std(0))
    posterior = built()
    spectrum = Spectrum.of(gather_whitened(posterior.basis, torch.tensor(X), y), y.mT @ y)
    start = Rotation.none(gaussian_likelihood(T, 0.5, torch.device("cpu")))
    found = maximise(spectrum, start)
    assert spectrum.bound(found.unmixing, found.noise) > spectrum.bound(start.unmixing, start.noise)
    w, noise = found.unmixing.numpy(), found.noise.numpy()

    def objective(
        w, noise
    ):  # as the divergences from the start: KL(N(0, I) | N(0, B)), KL(N(0, I/2) | N(0, Sigma))
        b, sigma = np.linalg.inv(w.T @ w), np.linalg.inv(w.T @ np.diag(1 / noise) @ w)
        pull = 0.5 * (np.trace(np.linalg.inv(b)) + np.linalg.slogdet(b)[1])
        pull += 0.5 * (T + 1) * (0.5 * np.trace(np.linalg.inv(sigma)) + np.linalg.slogdet(sigma)[1])
        return spectrum.bound(torch.tensor(w), torch.tensor(noise)).item() - pull

    best = objective(w, noise)
    for _ in range(200):
        step = 0.03 * np.random.standard_normal((T, T))  # noqa: NPY002
        turn = np.exp(0.03 * np.random.standard_normal(T))  # noqa: NPY002
        assert objective(w + step @ w, noise * turn) < best + 1e-4


def test_draws_have_the_covariance_across_outputs():
    _, covariance, _ = dense(X, Y, NEW)
    want = covariance.reshape(4, T, 4, T)[0, 0, 0, 1]  # outputs 0 and 1 at one point
    draws = 600

    def deviation(posterior):
        """Sample covariance of draws against `want`, in its standard errors."""
        values = posterior.draw(draws, seed=1)(NEW)[:, 0, :2].numpy()
        product = np.prod(values - values.mean(0), axis=1)
        return abs(product.mean() - want) / (product.std() / math.sqrt(draws))

    assert deviation(built()) < 4
    assert deviation(built(mixing=False)) > 10


def test_samples_are_joint_over_points_and_outputs():
    observed = built().observed(NEW)
    samples = observed.rsample(100_000, seed=0).flatten(1)
    want = observed.joint_covariance
    error = (want.square() + want.diagonal()[:, None] * want.diagonal()).sqrt() / math.sqrt(len(samples))
    assert ((samples.T.cov() - want).abs() / error).max() < 5
    scaled = observed.affine(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, -1.0, 0.5]))
    change = np.kron(np.eye(4), np.diag([2.0, -1.0, 0.5]))
    agree(scaled.joint_covariance, change @ want.numpy() @ change.T)
    agree(scaled.mean, observed.mean.numpy() * [2.0, -1.0, 0.5] + [1.0, 2.0, 3.0])


def test_conditioning_is_the_formula_with_all_rows():
    both, y = np.concatenate([X, NEW[:2]]), np.concatenate([Y, Y_NEW[:2]])
    mean, covariance, evidence = dense(both, y, NEW)
    posterior = built().condition(NEW[:2], Y_NEW[:2])
    agree(posterior.latent(NEW).mean, mean, 1e-7)
    agree(posterior.latent(NEW).joint_covariance, covariance, 1e-7)
    assert log_evidence(list(posterior.sites.values())) == pytest.approx(evidence, abs=1e-6)


def test_a_mixture_is_joint_too():
    members = [built(), built(y=Y + 1.0)]
    mixture = MixturePosterior(members, [0.3, 0.7])
    said = mixture.observed(NEW)
    assert isinstance(said, Mixture)
    each = [m.observed(NEW) for m in members]
    want = np.logaddexp(*(math.log(w) + e.row_log_prob(Y_NEW).numpy() for w, e in zip((0.3, 0.7), each)))
    agree(said.row_log_prob(Y_NEW), want)
    samples = said.rsample(60_000, seed=0).flatten(1)
    assert torch.allclose(samples.T.cov(), said.joint_covariance, atol=0.15 * said.joint_covariance.max())
    flat = [e.mean.flatten() for e in each]
    between = 0.3 * 0.7 * torch.outer(flat[0] - flat[1], flat[0] - flat[1])
    agree(said.joint_covariance, 0.3 * each[0].joint_covariance + 0.7 * each[1].joint_covariance + between)


def test_joint_covariance_of_independent_outputs_is_block_diagonal():
    said = built(mixing=False).observed(NEW)
    blocks = said.joint_covariance.reshape(4, T, 4, T)
    for t in range(T):
        agree(blocks[:, t, :, t], said.covariance[t].numpy())
    assert blocks[:, 0, :, 1].abs().max() == 0
    agree(said.row_log_prob(Y_NEW), said.log_prob(Y_NEW).sum(-1).numpy())
    one = Gaussian(torch.zeros(3), torch.ones(3), torch.eye(3))
    assert torch.equal(one.joint_covariance, one.covariance)
    assert torch.equal(one.row_log_prob(torch.ones(3)), one.log_prob(torch.ones(3)))


# ---- in BoTorch ---------------------------------------------------------------------------------------


def test_the_botorch_joint_is_interleaved():
    posterior = built()
    model, x = posterior.as_botorch(), torch.tensor(NEW)
    got = model.posterior(x)
    assert isinstance(got.distribution, MultitaskMultivariateNormal)
    assert torch.allclose(got.mean, posterior.latent(x).mean)
    assert torch.allclose(
        got.distribution.covariance_matrix, posterior.latent(x).joint_covariance, atol=1e-10
    )
    noisy = model.posterior(x, observation_noise=True).distribution.covariance_matrix
    assert torch.allclose(noisy, posterior.observed(x).joint_covariance, atol=1e-10)
    given = model.posterior(x, observation_noise=torch.tensor([[0.7, 0.1, 0.2]]))
    assert torch.allclose(given.variance - got.variance, torch.tensor([0.7, 0.1, 0.2]).double().expand(4, 3))
    batch = model.posterior(torch.stack([x, x + 0.1])).distribution.covariance_matrix
    assert torch.allclose(batch[0], got.distribution.covariance_matrix, atol=1e-10)
    swapped = model.posterior(x, output_indices=[2, 0]).distribution.covariance_matrix.reshape(4, 2, 4, 2)
    whole = got.distribution.covariance_matrix.reshape(4, T, 4, T)
    assert torch.allclose(swapped[:, 0, :, 1], whole[:, 2, :, 0], atol=1e-10)
    single = model.subset_output([1]).posterior(x).distribution.covariance_matrix
    assert torch.allclose(single, whole[:, 1, :, 1], atol=1e-10)


def test_slopes_of_the_joint_reach_the_inputs():
    model, x = built().as_botorch(), torch.tensor(NEW[:2], requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.posterior(x).distribution.covariance_matrix, x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: model.posterior(x).mean, x, atol=1e-6)


def test_botorch_conditioning_on_all_and_on_some_outputs():
    model, x, y = built().as_botorch(), torch.tensor(NEW), torch.tensor(Y_NEW)
    at = torch.tensor(X[:3] + 0.2)
    prior = model.posterior(torch.cat([x, at]), observation_noise=False).distribution
    full, n = prior.covariance_matrix, 4
    mean = prior.mean.reshape(-1)

    def by_hand(seen, values, noise):
        rest = np.arange(n * T, (n + 3) * T)
        k = full.numpy()
        gain = k[np.ix_(rest, seen)] @ np.linalg.inv(k[np.ix_(seen, seen)] + noise)
        want = mean.numpy()[rest] + gain @ (values - mean.numpy()[seen])
        return want.reshape(3, T), k[np.ix_(rest, rest)] - gain @ k[np.ix_(seen, rest)]

    sigma = SCALE[:, None] * SIGMA * SCALE
    everything = np.arange(n * T), y.numpy().reshape(-1), np.kron(np.eye(n), sigma)
    for one in (
        model.condition_on_observations(x, y),  # through the site
        model.condition_on_observations(x[None], y[None]),  # by the joint
    ):
        got = one.posterior(at).distribution
        want = by_hand(*everything)
        agree(got.mean.reshape(3, T), want[0], 1e-6)
        agree(got.covariance_matrix.reshape(3 * T, 3 * T), want[1], 1e-6)
    variances = torch.tensor([0.3, 0.2, 0.5]).double().expand(1, n, T)
    own = model.condition_on_observations(x[None], y[None], noise=variances).posterior(at).distribution
    agree(
        own.mean[0], by_hand(everything[0], everything[1], np.diag(variances[0].flatten().numpy()))[0], 1e-6
    )
    # of one output alone, which says something about the others, but they are not in this model
    some = model.subset_output([2]).condition_on_observations(x, y[:, 2:]).posterior(at)
    want = by_hand(np.arange(2, n * T, T), y.numpy()[:, 2], sigma[2, 2] * np.eye(n))
    agree(some.mean[:, 0], want[0][:, 2], 1e-6)
    agree(some.distribution.covariance_matrix, want[1].reshape(3, T, 3, T)[:, 2, :, 2], 1e-6)


def test_acquisition_functions_see_the_correlation():
    posterior = built()
    model, x = posterior.as_botorch(), torch.tensor(NEW)[None, :1].requires_grad_()
    weights = torch.tensor([1.0, -1.0, 0.5]).double()
    linear = model.posterior(x[0], posterior_transform=ScalarizedPosteriorTransform(weights))
    want = weights @ posterior.latent(x[0]).joint_covariance @ weights
    assert linear.variance.item() == pytest.approx(want.item(), abs=1e-8)
    assert linear.variance.item() != pytest.approx(
        (weights.square() * posterior.latent(x[0]).variance).sum().item(), abs=1.0
    )
    objective = GenericMCObjective(lambda values, X=None: values @ weights)
    qSimpleRegret(model, objective=objective)(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    volume = qLogNoisyExpectedHypervolumeImprovement(model, SHIFT.tolist(), torch.tensor(X[:4]))
    assert volume(torch.tensor(NEW)[None, :2]).isfinite().all()


# ---- learned from data --------------------------------------------------------------------------------


def correlated(t, r):
    return (1.0 - r) * np.eye(t) + r * np.ones((t, t))


def simulated(seed, n, b, sigma, test=60):
    """Rows of a smooth kernel on [0, 4], and rows to test on."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 4, (n + test, 1))
    root = np.linalg.cholesky(np.exp(-0.5 * cdist(x, x, "sqeuclidean")) + 1e-9 * np.eye(n + test))
    y = root @ rng.standard_normal((n + test, len(b))) @ np.linalg.cholesky(b).T
    y = y + rng.standard_normal(y.shape) @ np.linalg.cholesky(sigma).T
    return x[:n], y[:n], x[n:], y[n:]


def fitted(x, y, outputs="coregionalised", **options):
    return fspace.GPRegressor(**{"kernel": "rbf", "outputs": outputs} | options).fit(x, y)


def gains(b, sigma, seeds=12, n=25):
    """Held-out joint log density a row, coregionalised less independent, seed by seed."""
    found = []
    for seed in range(seeds):
        x, y, x_test, y_test = simulated(seed, n, b, sigma)
        joint, apart = (
            fitted(x, y, o).predictive(x_test).joint_log_prob(y_test)
            for o in ("coregionalised", "independent")
        )
        found.append((joint - apart).item() / len(y_test))
    return np.mean(found), np.std(found, ddof=1) / math.sqrt(seeds)


def test_correlated_outputs_are_predicted_better_and_independent_ones_are_not():
    gain, error = gains(correlated(3, 0.9), 0.2 * correlated(3, 0.7))
    assert gain > 0.4 and gain > 5 * error
    gain, error = gains(np.eye(3), 0.2 * np.eye(3))
    assert gain >= -2 * error


def test_without_the_price_of_a_number_independent_outputs_are_predicted_worse(monkeypatch):
    monkeypatch.setattr(
        candidates,
        "learn_rotation",
        lambda basis, x, y, start: maximise(Spectrum.of(gather_whitened(basis, x, y), y.mT @ y), start),
    )
    gain, error = gains(np.eye(3), 0.2 * np.eye(3))
    assert gain < -2 * error


def test_outputs_that_do_not_go_together_stay_as_they_are():
    x, y, x_test, _ = simulated(0, 60, np.eye(3), 0.2 * np.eye(3))
    model, apart = fitted(x, y), fitted(x, y, "independent")
    assert np.array_equal(model.coregionalisation_, apart.coregionalisation_)
    agree(model.predictive(x_test).mean, apart.predictive(x_test).mean.numpy(), 0)
    assert "stay independent" in correlations_of_outputs(model, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("options", "n", "decide"),
    [
        ({}, 500, 500),
        pytest.param(
            {"inference": "collapsed", "inducing": 240}, 1500, 300, marks=pytest.mark.slow
        ),  # held-out rows set the noise
    ],
)
def test_what_made_the_data_is_recovered(options, n, decide):
    b, sigma = correlated(3, 0.8), 0.3 * correlated(3, -0.4)
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 0.06 * n, (n, 1))
    root = np.linalg.cholesky(np.exp(-0.5 * cdist(x, x, "sqeuclidean")) + 1e-9 * np.eye(n))
    y = root @ rng.standard_normal((n, 3)) @ np.linalg.cholesky(b).T
    y = 7.0 + 2.0 * (y + rng.standard_normal(y.shape) @ np.linalg.cholesky(sigma).T)
    model = fitted(x, y, **options)
    found, noise = model.coregionalisation_, model.noise_covariance_
    scale = np.sqrt(np.diag(found))
    agree((found / scale / scale[:, None])[np.triu_indices(3, 1)], 0.8, 0.15)
    agree(
        noise / 4.0, sigma, 4 * 0.3 * math.sqrt(2 / decide)
    )  # four standard errors of a variance: below 0.12
    assert np.all(np.abs(np.log(np.diag(found) / 4.0)) < 1.0)
    apart = fitted(x, y, "independent", **options)
    assert np.abs(apart.coregionalisation_ - np.diag(np.diag(apart.coregionalisation_))).max() == 0
    assert model.log_evidence_ > apart.log_evidence_ + 50


def test_evidence_of_a_fit_is_that_of_the_dense_formula():
    x, y, _, _ = simulated(1, 20, correlated(3, 0.8), 0.3 * correlated(3, 0.5))
    model = fitted(x, y)
    z = (x - x.mean(0)) / x.std(0)
    with torch.no_grad():
        k = model.posterior_.basis.kernel(torch.tensor(z)).to_dense().numpy()
    k = np.kron(k / k[0, 0], model.coregionalisation_) + np.kron(np.eye(20), model.noise_covariance_)
    want = (
        multivariate_normal(np.zeros(60), k).logpdf((y - y.mean(0)).reshape(-1)) + 20 * np.log(y.std(0)).sum()
    )
    assert model.log_evidence_ == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "auto", "members": 1},
        pytest.param({"kernel": "deep", "members": 2}, marks=pytest.mark.slow),
        {"likelihood": "heteroscedastic"},
        {"inference": "collapsed", "inducing": 20},
        {"inference": "sites", "inducing": 20},
        {"kernel": "additive"},
    ],
)
def test_every_kind_of_fit_learns_the_correlation_and_goes_on(options, tmp_path):
    x, y, x_test, y_test = simulated(3, 120, correlated(2, 0.9), 0.2 * correlated(2, 0.8))
    x, x_test = (np.column_stack([part, part**2]) for part in (x, x_test))
    model = fitted(x, y, **options)
    noise = model.noise_covariance_
    assert noise[0, 1] / math.sqrt(noise[0, 0] * noise[1, 1]) > 0.4
    apart = fitted(x, y, "independent", **options).predictive(x_test).row_log_prob(y_test).mean()
    assert model.predictive(x_test).row_log_prob(y_test).mean() > apart + 0.1
    before = model.predict(x_test)
    model.partial_fit(x_test, y_test, site="more")
    assert np.abs(model.predict(x_test) - before).max() > 1e-3
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    agree(loaded.predictive(x_test).mean, model.predictive(x_test).mean.numpy(), 0)
    agree(loaded.noise_covariance_, model.noise_covariance_, 0)
    assert model.sample_y(x_test[:5], 3).shape == (5, 2, 3)
    assert model.predict(x_test[:5], return_cov=True)[1].shape == (2, 5, 5)


def test_partial_fit_is_the_refit_at_fixed_parameters_and_forget_undoes_it():
    x, y, x_more, y_more = simulated(2, 25, correlated(3, 0.9), 0.2 * correlated(3, 0.7), test=10)
    model = fitted(x, y)
    old = model.posterior_
    first = model.predictive(x_more)
    mean, joint = first.mean, first.joint_covariance
    model.budget_ = 100
    model.partial_fit(x_more, y_more, site="more")
    rows, values = (torch.tensor(np.concatenate(pair)) for pair in ((x, x_more), (y, y_more)))
    basis = replace(old.basis, inducing_inputs=old.embedded(rows))
    site = fit_site(basis, old.scaling.inputs(rows), old.scaling.modelled(values))
    refit = GPPosterior(basis, old.scaling.with_jacobian(site), old.scaling)
    got = model.predictive(x_more)
    agree(
        got.mean, refit.observed(x_more).mean.numpy(), 2e-3
    )  # rows that explain each other are not all inducing
    agree(got.joint_covariance, refit.observed(x_more).joint_covariance.numpy(), 2e-3)
    assert (got.mean - mean).abs().max() > 0.02
    model.forget("more")
    agree(model.predictive(x_more).mean, mean.numpy(), 1e-6)
    agree(model.predictive(x_more).joint_covariance, joint.numpy(), 1e-6)


def test_a_saved_model_says_the_same_in_a_new_process(tmp_path):
    x, y, x_test, _ = simulated(4, 25, correlated(3, 0.9), 0.2 * correlated(3, 0.7))
    model = fitted(x, y)
    model.save(tmp_path / "m.fspace")
    np.save(tmp_path / "x.npy", x_test)
    code = (
        "import sys, numpy as np, fspace; d = sys.argv[1]; m = fspace.load(d + '/m.fspace'); "
        "p = m.predictive(np.load(d + '/x.npy')); "
        "np.savez(d + '/p.npz', mean=p.mean, joint=p.joint_covariance, b=m.coregionalisation_)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    said, here = np.load(tmp_path / "p.npz"), model.predictive(x_test)
    assert np.array_equal(said["mean"], here.mean.numpy())
    assert np.array_equal(said["joint"], here.joint_covariance.numpy())
    assert np.array_equal(said["b"], model.coregionalisation_)


def test_workers_that_share_a_basis_make_the_posterior_of_all_rows():
    whole = built()
    basis, scaling = basis_from_bytes(basis_bytes(whole.basis, whole.scaling))  # as it comes over the wire
    agree(scaling.mixing, whole.scaling.mixing.numpy(), 0)
    server = PosteriorServer()
    server.register_basis(basis, scaling)
    for name, rows in (("a", slice(0, 5)), ("b", slice(5, None))):
        worker = Worker(name, (X[rows], Y[rows]), basis, scaling, Update())
        empty = replace(
            whole.site, precision=0 * whole.site.precision, shift=0 * whole.site.shift, site_id=name
        )
        server.put(worker.step(replace(empty, basis_id=basis.id), empty))
    agree(server.posterior().latent(NEW).joint_covariance, whole.latent(NEW).joint_covariance.numpy())
    agree(server.posterior().latent(NEW).mean, whole.latent(NEW).mean.numpy())
    assert server.log_evidence() == pytest.approx(log_evidence([whole.site]), abs=1e-8)


def test_scikit_learn_s_check_of_several_outputs():
    model = fspace.GPRegressor(kernel="rbf", outputs="coregionalised", progress=False)
    check_regressor_multioutput("GPRegressor", model)


def test_a_mixing_that_is_no_matrix_to_mix_with_is_refused(tmp_path):
    x, y, _, _ = simulated(4, 20, correlated(2, 0.9), 0.2 * np.eye(2))
    model = fitted(x, y)
    for wrong in (torch.ones(2, 2).double(), torch.eye(3).double()):
        scaling = replace(model.posterior_.scaling)
        object.__setattr__(scaling, "mixing", wrong)  # which types would not let through
        broken = fspace.GPRegressor()
        broken.__dict__ |= model.__dict__
        broken.posterior_ = GPPosterior(model.posterior_.basis, model.posterior_.site, scaling)
        with pytest.raises(ModelFileError, match="invertible 2 x 2"):
            fspace.load(broken.save(tmp_path / "m.fspace"))


@pytest.mark.parametrize("copies", [2, 5])
def test_outputs_that_say_the_same_do_not_break_it(copies):
    x, y, x_test, y_test = simulated(6, 30, np.eye(1), 0.1 * np.eye(1))
    many = np.column_stack([y * (k + 1.0) for k in range(copies)])
    model = fitted(x, many)
    said = model.predictive(x_test)
    noise = model.noise_covariance_
    assert (
        noise[0, 1] / math.sqrt(noise[0, 0] * noise[1, 1]) > 0.75
    )  # the pull of a few rows keeps it below 1
    assert said.mean.isfinite().all() and said.row_log_prob(said.mean).isfinite().all()
    assert np.corrcoef(said.mean[:, 0].numpy(), y_test[:, 0])[0, 1] > 0.7


def test_fewer_rows_than_outputs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 2)), rng.standard_normal((4, 6))
    assert fitted(x, y).predictive(x).joint_log_prob(y).isfinite()


def test_parts_of_a_sum_add_up():
    x, y, _, _ = simulated(4, 40, correlated(2, 0.9), 0.2 * correlated(2, 0.7))
    model = fitted(np.column_stack([x, x**2]), y, kernel="additive")
    rows = np.column_stack([x, x**2])
    parts = interpret.components(model.posterior_, rows)
    total = sum(part.mean for part in parts.values()) + model.posterior_.scaling.y_shift
    agree(total, model.posterior_.latent(rows).mean.numpy(), 1e-6)


def test_the_report_shows_the_correlations():
    x, y, x_test, y_test = simulated(4, 40, correlated(2, 0.9), 0.2 * correlated(2, 0.7))
    model = fitted(x, y)
    text = correlations_of_outputs(model, ["height", "<width>"])
    noise = model.noise_covariance_
    assert f"{noise[0, 1] / math.sqrt(noise[0, 0] * noise[1, 1]):.2f}" in text and "&lt;width&gt;" in text
    assert correlations_of_outputs(fitted(x, y, "independent"), ["height", "width"]) == ""
    said = model.predictive(x_test)
    together, apart = said.row_log_prob(y_test).mean(), said.log_prob(y_test).sum(-1).mean()
    assert together > apart
    page = report_html(model, x_test, y_test, targets=["height", "width"])
    assert f"held out: {together:.4g} nats; as if they were independent: {apart:.4g}" in page


@pytest.mark.parametrize(
    ("options", "outputs", "message"),
    [
        ({"outputs": "x"}, 2, "choose one of independent, coregionalised"),
        ({"outputs": None}, 2, "choose one of independent, coregionalised"),
        ({"outputs": "coregionalised"}, 1, "several outputs, and y has one"),
        ({"outputs": "coregionalised", "likelihood": "poisson"}, 2, "'poisson' has not"),
        ({"outputs": "coregionalised", "likelihood": "student_t"}, 2, "'student_t' has not"),
        (
            {"outputs": "coregionalised", "likelihood": GaussianLikelihood()},
            2,
            "'GaussianLikelihood' has not",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, outputs, message):
    x = np.linspace(0, 1, 20)[:, None]
    y = np.round(5 + np.sin(5 * x + np.arange(outputs)))
    for target in (y, y[:, 0]) if outputs == 1 else (y,):
        with pytest.raises(OptionError, match=message):
            fspace.GPRegressor(kernel="rbf", **options).fit(x, target)


def test_a_constant_target_is_refused_by_name():
    y = pd.DataFrame({"a": np.arange(20.0), "b": np.full(20, 7.0)})
    with pytest.raises(DataError, match="'b' has the same value in every row"):
        fitted(np.linspace(0, 1, 20)[:, None], y)
    fitted(np.linspace(0, 1, 20)[:, None], y, "independent")


def test_a_missing_target_is_refused_with_its_row():
    y = np.column_stack([np.arange(20.0), np.arange(20.0)])
    y[3, 1] = np.nan
    with pytest.raises(DataError, match="Row 3, column 'y1'"):
        fitted(np.linspace(0, 1, 20)[:, None], y)


def test_other_noise_has_no_covariance():
    x = np.linspace(0, 1, 20)[:, None]
    model = fspace.GPRegressor(kernel="rbf", likelihood="poisson").fit(x, np.round(5 + np.sin(5 * x[:, 0])))
    for name in ("coregionalisation_", "noise_covariance_"):
        with pytest.raises(OptionError, match=f"{name} is of Gaussian noise"):
            getattr(model, name)
