"""Noise that varies: the function against the truth, its place in site and evidence against direct formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import fspace
from fspace.inference.basis import Basis
from fspace.inference.candidates import named_kernel
from fspace.inference.choice import stacking_weights
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.inference.finish import finish_exact, finish_sparse, vary_exact
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.noise import fit_noise_function
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.evaluate import covariance

CPU = torch.device("cpu")


def table(n, seed=0, varying=True):
    """x [n, 2], y [n, 1], the true standard deviation of the noise [n]."""
    g = torch.Generator().manual_seed(seed)
    x = 4.0 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 2.0
    std = 0.1 * (0.8 * x[:, 0]).exp() if varying else torch.full((n,), 0.3).double()
    y = (2.0 * x[:, 1]).sin() + std * torch.randn(n, generator=g, dtype=torch.float64)
    return x, y[:, None], std


def identity(d):
    one, zero = torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    return Scaling(one, one, zero, one, zero[:1], one[:1])


def test_the_function_finds_the_noise_and_constant_noise_stays_constant():
    x, _, std = table(1200)
    g = torch.Generator().manual_seed(1)
    squares = (std * torch.randn(1200, generator=g, dtype=torch.float64)).square()[:, None]
    function, left_out = fit_noise_function(x, squares, seed=0)
    truth = 2.0 * std.log()
    centred = function(x) - function(x).mean() - (truth - truth.mean())
    assert (
        centred.square().mean().sqrt() < 0.35 < truth.std()
    )  # the spread of the truth is what guessing leaves
    assert (left_out - function(x)).abs().max() > 0  # a row's own residual is not in what is said of it
    flat, _ = fit_noise_function(x, squares / std.square()[:, None], seed=0)
    assert flat(x).std() < 0.3


def test_site_and_evidence_with_varying_noise_equal_the_direct_formulas():
    x, y, _ = table(40)
    kernel, likelihood = named_kernel("matern", 2), gaussian_likelihood(1, 0.04, CPU)
    function, _ = fit_noise_function(x, y.square() + 0.01, seed=0)
    basis = Basis(kernel.requires_grad_(False), x, likelihood.requires_grad_(False), function)
    site = fit_site(basis, x, y)
    noise = 0.04 * function(x).exp()
    k = covariance(kernel, x)
    direct = MultivariateNormal(torch.zeros(40).double(), k + torch.diag(noise)).log_prob(y[:, 0])
    assert log_evidence([site]) == pytest.approx(direct.item(), abs=1e-6)
    query = torch.randn(7, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = GPPosterior(basis, site, identity(2)).observed(query)
    cross = covariance(kernel, query, x)
    weights = torch.linalg.solve(k + torch.diag(noise), cross.T)
    torch.testing.assert_close(got.mean, weights.T @ y[:, 0], atol=1e-6, rtol=0)
    latent = covariance(kernel, query).diagonal() - (cross.T * weights).sum(0)
    torch.testing.assert_close(got.epistemic, latent, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.aleatoric, 0.04 * function(query).exp(), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.covariance.diagonal(), got.variance, atol=1e-7, rtol=0)


def test_basis_id_knows_the_noise_function():
    x, y, _ = table(30)
    kernel, likelihood = named_kernel("matern", 2), gaussian_likelihood(1, 0.04, CPU)
    function, _ = fit_noise_function(x, y.square() + 0.01, seed=0)
    other = copy.deepcopy(function)
    other.weights = other.weights + 1e-9
    ids = {Basis(kernel, x, likelihood, f).id for f in (None, function, other)}
    assert len(ids) == 3


@pytest.mark.parametrize("way", ["exact", "sparse"])
def test_the_data_decide_whether_the_noise_varies(way):
    for varying in (True, False):
        x, y, _ = table(400, varying=varying)
        y = y / y.std()
        kernel, likelihood = named_kernel("matern", 2), gaussian_likelihood(1, 0.1, CPU)
        rows = torch.arange(400)
        if way == "exact":
            constant = finish_exact(kernel, likelihood, x, y)
            other = vary_exact(constant, x, y, seed=0)
            gain = other.densities - constant.densities
            assert (gain.mean() > 3 * gain.std() / math.sqrt(400)) == varying
        else:
            done = finish_sparse(kernel, likelihood, x, y, rows[:150], 60, 0.0, None, seed=0)
            assert (done.basis.noise_function is not None) == varying


def test_heteroscedastic_intervals_hold_where_the_noise_is_small_and_where_it_is_large():
    x, y, std = table(1000, seed=3)
    X, target = x.numpy(), y[:, 0].numpy()
    test_x, test_y, test_std = table(2000, seed=4)
    small = (test_std < test_std.median()).numpy()
    truth = test_y[:, 0].numpy()
    coverages = {}
    for likelihood in ("heteroscedastic", "gaussian"):
        model = fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X, target)
        lower, upper = (b.numpy() for b in model.predictive(test_x.numpy()).interval(0.9))
        inside = (truth >= lower) & (truth <= upper)
        coverages[likelihood] = inside[small].mean(), inside[~small].mean()
    error = math.sqrt(0.9 * 0.1 / 1000)
    assert max(abs(c - 0.9) for c in coverages["heteroscedastic"]) < 0.03 + 2 * error
    # the twin with constant noise covers too much where the noise is small
    assert coverages["gaussian"][0] > 0.9 + 5 * error


def test_a_model_with_varying_noise_loads_as_it_was_saved(tmp_path):
    x, y, _ = table(120)
    model = fspace.GPRegressor(kernel="matern", likelihood="heteroscedastic").fit(x.numpy(), y[:, 0].numpy())
    assert model.posterior_.basis.noise_function is not None
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    a, b = (m.predict(x.numpy(), return_std=True) for m in (model, loaded))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def test_stacking_weights_equal_a_search_over_the_simplex():
    g = torch.Generator().manual_seed(0)
    densities = torch.randn(2, 300, generator=g, dtype=torch.float64)
    weights = stacking_weights(densities)
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    values = torch.stack(
        [torch.logsumexp(densities + torch.stack([w, 1 - w]).log()[:, None], 0).mean() for w in grid]
    )
    assert weights[0] == pytest.approx(grid[values.argmax()].item(), abs=0.01)
    # one candidate that is better everywhere takes all
    sure = stacking_weights(torch.stack([densities[0], densities[0] - 1.0]))
    torch.testing.assert_close(sure, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=0.03, rtol=0)
