"""Minibatch sites against the collapsed bound, which they must reach, and against wrong estimators, which must not."""

import math

import numpy as np
import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import Basis
from fspace.inference.collapsed import backward_bound, fit_site, log_evidence
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.site_training import POOL, fit_sites
from fspace.inference.sites import Rows, batch_site, blend, elbo, empty_site, moved, natural_step
from fspace.kernels.deep import DeepKernel
from fspace.kernels.evaluate import covariance
from fspace.kernels.extractors import MLP


def gaussian(*noise):
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-6), batch_shape=torch.Size([len(noise)]))
    likelihood.double().noise = torch.tensor(noise, dtype=torch.float64)[:, None]
    return likelihood


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    error = 0.1 * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + error
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=3)).double()
    kernel.base_kernel.lengthscale = 1.3
    return kernel, gaussian(0.05, 0.2), x, y


def assert_same(site, want, tolerance=1e-8):
    assert site.count == want.count and site.basis_id == want.basis_id
    for name in ("precision", "shift", "log_scale"):
        assert torch.allclose(getattr(site, name), getattr(want, name), rtol=tolerance, atol=tolerance), name


# One step


def test_all_rows_at_rate_one_are_the_collapsed_site_whatever_came_before(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    want = fit_site(basis, x, y)
    first = natural_step(empty_site(basis, 2), basis, x[:9], y[:9], 60, 0.7)
    for start in (empty_site(basis, 2), first):
        assert_same(natural_step(start, basis, x, y, 60, 1.0), want)


def test_a_step_is_the_weighted_sum_of_the_rows_outer_products(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    start = fit_site(basis, x[:30], y[:30])
    site = natural_step(start, basis, x[30:37], y[30:37], 60, 0.3)
    a = torch.linalg.solve(basis.factor, kernel(x[:20], x[30:37]).to_dense().detach())
    for t, s in enumerate(likelihood.noise[:, 0].detach()):
        want = 0.7 * start.precision[t] + 0.3 * 60 / 7 * sum(torch.outer(c, c) / s for c in a.mT)
        assert torch.allclose(site.precision[t], want, rtol=1e-9, atol=1e-9)
        want = 0.7 * start.shift[t] + 0.3 * 60 / 7 * a @ y[30:37, t] / s
        assert torch.allclose(site.shift[t], want, rtol=1e-9, atol=1e-9)


def test_steps_over_the_parts_with_falling_rates_average_to_the_whole(case):
    kernel, likelihood, x, y = case
    basis, site = Basis(kernel, x[:20], likelihood), None
    for k, (xb, yb) in enumerate(zip(x.split(12), y.split(12))):
        site = natural_step(site or empty_site(basis, 2), basis, xb, yb, 60, 1.0 / (k + 1))
    assert_same(site, fit_site(basis, x, y))


def test_precision_stays_positive_semi_definite(case):
    _, likelihood, x, y = case
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale = 30.0  # K_uu is singular to rounding
    basis = Basis(kernel, x[:20], likelihood)
    site, generator = empty_site(basis, 2), torch.Generator().manual_seed(1)
    for _ in range(40):
        rows = torch.randperm(60, generator=generator)[:3]
        site = natural_step(site, basis, x[rows], y[rows], 60, torch.rand((), generator=generator).item())
        values = torch.linalg.eigvalsh(site.precision)
        assert (values[:, 0] >= -1e-13 * values[:, -1]).all()


def test_a_site_of_another_basis_is_refused(case):
    kernel, likelihood, x, y = case
    site = empty_site(Basis(kernel, x[:20], likelihood), 2)
    with pytest.raises(OptionError, match="empty_site"):
        natural_step(site, Basis(kernel, x[:21], likelihood), x, y, 60, 1.0)


# The bound


def test_at_the_collapsed_site_the_elbo_is_the_collapsed_bound_and_elsewhere_below(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    site = fit_site(basis, x, y)
    best = log_evidence([site])
    assert elbo(site, likelihood, Rows.of(basis, x, y), 60).item() == pytest.approx(best, rel=1e-8)
    for other in (empty_site(basis, 2), natural_step(site, basis, x[:30], y[:30], 60, 0.2)):
        assert elbo(other, likelihood, Rows.of(basis, x, y), 60).item() < best - 1e-3


def test_elbo_is_expected_log_likelihood_less_divergence(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    site = fit_site(basis, x[:25], y[:25])
    posterior = GPPosterior(basis, site, units(3, 2), vector=False)
    latent, direct = posterior.latent(x), 0.0
    for t, s in enumerate(likelihood.noise[:, 0].detach()):
        covariance_of_v = torch.linalg.inv(torch.eye(20) + site.precision[t])
        q = torch.distributions.MultivariateNormal(covariance_of_v @ site.shift[t], covariance_of_v)
        prior = torch.distributions.MultivariateNormal(
            torch.zeros(20).double(), torch.eye(20, dtype=torch.float64)
        )
        fit = torch.distributions.Normal(latent.mean[:, t], s.sqrt()).log_prob(y[:, t])
        direct += (fit - latent.variance[:, t] / (2 * s)).sum() - torch.distributions.kl_divergence(q, prior)
    assert elbo(site, likelihood, Rows.of(basis, x, y), 60).item() == pytest.approx(direct.item(), rel=1e-9)


def bound_gradient(case, site, factor, rows, total):
    """Gradient of the ELBO on some rows in kernel and noise, the site held fixed as a function of u."""
    kernel, likelihood, x, y = case
    parameters = [*kernel.parameters(), *likelihood.parameters()]
    new = torch.linalg.cholesky(covariance(kernel, x[:20]))
    here = moved(site, torch.linalg.solve_triangular(factor, new, upper=False))
    v = torch.linalg.solve_triangular(new, covariance(kernel, x[:20], x[rows]), upper=False)
    value = elbo(here, likelihood, Rows(v, kernel(x[rows], diag=True), y[rows]), total)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])


def test_at_the_collapsed_site_the_gradient_is_that_of_the_collapsed_bound(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    ours = bound_gradient(case, fit_site(basis, x, y), basis.factor, torch.arange(60), 60)
    backward_bound(kernel, x[:20], likelihood.noise[:, 0], x, y)
    want = torch.cat([p.grad.reshape(-1) for p in (*kernel.parameters(), *likelihood.parameters())])
    assert torch.allclose(ours, want, rtol=1e-6, atol=1e-5)


def test_minibatch_gradients_are_unbiased(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    generator = torch.Generator().manual_seed(2)
    site = natural_step(empty_site(basis, 2), basis, x[:30], y[:30], 60, 1.0)
    full = bound_gradient(case, site, basis.factor, torch.arange(60), 60)
    unscaled, after, right = [], [], []
    for _ in range(250):
        rows = torch.randperm(60, generator=generator)[:12]
        right.append(bound_gradient(case, site, basis.factor, rows, 60))
        unscaled.append(bound_gradient(case, site, basis.factor, rows, 12))
        spoilt = natural_step(site, basis, x[rows], y[rows], 60, 0.5)
        after.append(bound_gradient(case, spoilt, basis.factor, rows, 60))

    def within_four_standard_errors(gradients):
        gradients = torch.stack(gradients)
        error = gradients.std(0) / math.sqrt(len(gradients))
        return ((gradients.mean(0) - full).abs() < 4 * error).all()

    assert within_four_standard_errors(right)
    assert not within_four_standard_errors(unscaled)  # the twin: no N / B
    assert not within_four_standard_errors(after)  # the twin: the site has seen the batch


def test_a_site_fixed_as_a_function_of_u_follows_the_signal_variance(case):
    """With a_i = K^-1 k_u(x_i), no part of a Gaussian site depends on the signal variance: the bound stays exact."""
    kernel, likelihood, x, y = case
    old = Basis(kernel, x[:20], likelihood)
    site, factor = fit_site(old, x, y), old.factor
    kernel.outputscale = 3.0 * kernel.outputscale.detach()
    new = Basis(kernel, x[:20], likelihood)
    best = log_evidence([fit_site(new, x, y)])
    with torch.no_grad():
        across = torch.linalg.solve_triangular(factor, new.factor, upper=False)
        value = elbo(moved(site, across), likelihood, Rows.of(new, x, y), 60).item()
        held_in_v = elbo(site, likelihood, Rows.of(new, x, y), 60).item()
    assert value == pytest.approx(best, rel=1e-8)
    assert held_in_v < best - 1.0  # the twin: fixed in whitened coordinates


def test_a_site_read_off_more_inducing_values_says_the_same(case):
    kernel, likelihood, x, y = case
    small, large = Basis(kernel, x[:10], likelihood), Basis(kernel, x[:25].flip(0), likelihood)
    site = fit_site(small, x, y)
    cross = torch.linalg.solve_triangular(
        large.factor, covariance(kernel, x[:25].flip(0), x[:10]), upper=False
    )
    across = torch.linalg.solve_triangular(small.factor, cross.mT, upper=False).detach()
    before = GPPosterior(small, site, units(3, 2), vector=False).latent(x)
    after = GPPosterior(large, moved(site, across), units(3, 2), vector=False).latent(x)
    assert torch.allclose(before.mean, after.mean, atol=1e-6)
    assert torch.allclose(before.variance, after.variance, atol=1e-6)


def test_blending_with_a_batch_is_linear_in_the_rate(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    site = fit_site(basis, x, y)
    batch = batch_site(site, likelihood, Rows.of(basis, x[:5], y[:5]), 60)
    assert_same(blend(site, batch, 0.0), site)
    assert_same(blend(site, batch, 1.0), batch)


# Training


def units(d, t):
    one, zero = torch.ones(d, dtype=torch.float64), torch.zeros(t, dtype=torch.float64)
    return Scaling(one, one, 0 * one, one, zero, zero + 1.0)


def smooth_data(n, seed=0):
    """Draws of a smooth Gaussian process in two inputs, with noise of variance .09; 500 more rows to test on."""
    generator = torch.Generator().manual_seed(seed)
    x = 4.0 * torch.rand(n + 500, 2, generator=generator, dtype=torch.float64)
    k = 1.5 * torch.exp(-0.5 * torch.cdist(x / torch.tensor([0.9, 1.6]), x / torch.tensor([0.9, 1.6])) ** 2)
    root = torch.linalg.cholesky(k + 1e-7 * torch.eye(len(x), dtype=torch.float64))
    f, error = torch.randn(2, len(x), 1, generator=generator, dtype=torch.float64).unbind()
    y = root @ f + 0.3 * error
    return x[:n], y[:n], x[n:], y[n:]


def start():
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = math.sqrt(2)
    return kernel, gaussian(0.5)


def held_out(kernel, likelihood, x, y, new_x, new_y, inducing):
    basis = Basis(kernel, x[greedy_variance(kernel, x, inducing)], likelihood)
    posterior = GPPosterior(basis, fit_site(basis, x, y), units(2, 1))
    return posterior.observed(new_x).log_prob(new_y[:, 0]).mean().item()


def collapsed_fit(kernel, likelihood, x, y, inducing):
    parameters = [*kernel.parameters(), *likelihood.parameters()]
    for _ in range(3):
        z = x[greedy_variance(kernel, x, inducing)]
        optimiser = torch.optim.LBFGS(parameters, max_iter=40, line_search_fn="strong_wolfe")

        def loss(z=z, optimiser=optimiser):
            optimiser.zero_grad()
            value = -backward_bound(kernel, z, likelihood.noise[:, 0], x, y) / len(x)
            for p in parameters:
                p.grad /= -len(x)
            return value

        optimiser.step(loss)


def test_training_finds_what_the_collapsed_bound_finds():
    data = smooth_data(2000)
    x, y = data[:2]
    ours, theirs, untrained = start(), start(), start()
    before = held_out(*untrained, *data, 64)
    fit_sites(*ours, x, y, 64, 30, 256, torch.Generator().manual_seed(0), lambda **_: None)
    collapsed_fit(*theirs, x, y, 64)
    assert torch.allclose(ours[0].base_kernel.lengthscale, theirs[0].base_kernel.lengthscale, rtol=0.1)
    assert ours[1].noise.item() == pytest.approx(theirs[1].noise.item(), rel=0.03)
    best = held_out(*theirs, *data, 64)
    assert abs(held_out(*ours, *data, 64) - best) < 0.02
    assert best - before > 0.1  # the twin: the start is rejected
    assert ours[0].base_kernel.lengthscale.requires_grad


class Counted(np.memmap):
    """Rows on disk; remembers the most that were ever read at once."""

    most = 0

    def __getitem__(self, index):
        picked = super().__getitem__(index)
        Counted.most = max(Counted.most, len(picked))
        return picked


def test_rows_may_stay_on_disk(tmp_path):
    n = 6000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    y = x.sin().sum(1, keepdim=True) + 0.1 * torch.randn(n, 1, generator=generator)
    files = []
    for name, values in (("x", x), ("y", y)):
        values.numpy().tofile(tmp_path / name)
        files.append(Counted(tmp_path / name, np.float32, "r", shape=tuple(values.shape)))
    kernels = []
    for rows in ((x, y), files):
        kernel, likelihood = start()
        fit_sites(kernel, likelihood, *rows, 16, 1, 300, torch.Generator().manual_seed(0), lambda **_: None)
        kernels.append(
            torch.cat([p.detach().reshape(-1) for p in (*kernel.parameters(), *likelihood.parameters())])
        )
    assert torch.equal(*kernels)
    assert 300 <= Counted.most <= POOL


def test_a_deep_kernel_learns_features():
    """A step along a diagonal: no stationary kernel on the inputs does it well."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    y = torch.sign(x.sum(1, keepdim=True)) + 0.1 * torch.randn(
        1500, 1, generator=generator, dtype=torch.float64
    )
    scores, losses = {}, []
    for name in ("plain", "deep"):
        kernel, likelihood = start()
        if name == "deep":
            base = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
            kernel = DeepKernel(MLP(2, hidden=(32, 32), out_features=2), base, kernel)
        losses.clear()
        fit_sites(
            kernel,
            likelihood,
            x[:1000],
            y[:1000],
            32,
            40,
            200,
            torch.Generator().manual_seed(0),
            lambda **entry: losses.append(entry["loss"]),
        )
        assert not kernel.training and losses[-1] < losses[0]
        if name == "deep":
            kernel.fix_statistics(x[:1000])
        basis = Basis(kernel, kernel.embed(x[:32]) if name == "deep" else x[:32], likelihood)
        posterior = GPPosterior(basis, fit_site(basis, x[:1000], y[:1000]), units(2, 1))
        scores[name] = posterior.observed(x[1000:]).log_prob(y[1000:, 0]).mean().item()
    assert scores["deep"] > scores["plain"] + 0.3


def test_the_same_seed_gives_the_same_fit():
    x, y, _, _ = smooth_data(300)
    results = []
    for seed in (0, 0, 1):
        kernel, likelihood = start()
        fit_sites(kernel, likelihood, x, y, 16, 3, 64, torch.Generator().manual_seed(seed), lambda **_: None)
        results.append(likelihood.noise.item())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("what", ["interrupted", "failed"])
def test_a_fit_that_ends_early_keeps_the_last_whole_epoch(what):
    x, y, _, _ = smooth_data(300)
    kernel, likelihood = start()
    entries, noise = [], []

    def record(**entry):
        entries.append(entry)
        noise.append(likelihood.noise.item())
        if len(entries) == 3:
            if what == "interrupted":
                raise KeyboardInterrupt
            with torch.no_grad():
                likelihood.raw_noise.fill_(math.nan)

    fit_sites(kernel, likelihood, x, y, 16, 10, 64, torch.Generator().manual_seed(0), record)
    assert len(entries) == 4 and entries[3][what] and entries[3]["stage"] == "sites"
    assert likelihood.noise.item() == noise[2]
    assert not kernel.training


def test_a_fit_that_fails_at_once_says_so():
    x, y, _, _ = smooth_data(300)
    kernel, likelihood = start()
    with torch.no_grad():
        kernel.raw_outputscale.fill_(math.nan)
    with pytest.raises(NumericalError, match="inducing inputs"):
        fit_sites(kernel, likelihood, x, y, 16, 2, 64, torch.Generator().manual_seed(0), lambda **_: None)
