"""Statistics, bound, sites and posterior against the direct formulas."""

import math

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import Basis
from fspace.inference.collapsed import (
    backward_bound,
    bound_from,
    fit_site,
    gather,
    log_evidence,
    statistics,
)
from fspace.inference.exact import leave_one_out, log_marginal_likelihood
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.evaluate import covariance


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + noise
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=3)).double()
    kernel.base_kernel.lengthscale = 1.3
    return kernel, gaussian_likelihood(2, 0.05, torch.device("cpu")), x, y


def plain_scaling():
    one = torch.ones(3, dtype=torch.float64)
    two = torch.ones(2, dtype=torch.float64)
    return Scaling(one, one, 0 * one, one, 0 * two, two)


def test_bound_in_chunks_is_titsias_formula(case):
    kernel, likelihood, x, y = case
    z, noise = x[:20], likelihood.noise[:, 0].detach()
    kuu, kuf = kernel(z).to_dense().detach(), kernel(z, x).to_dense().detach()
    q = kuf.T @ torch.linalg.solve(kuu, kuf)
    trace = (kernel(x, diag=True).detach() - q.diagonal()).sum()
    eye = torch.eye(60, dtype=torch.float64)
    direct = sum(
        torch.distributions.MultivariateNormal(torch.zeros(60).double(), q + s * eye).log_prob(y[:, t])
        - trace / (2 * s)
        for t, s in enumerate(noise)
    )
    site = fit_site(Basis(kernel, z, likelihood), x, y, chunk=7)
    assert bound_from(gather(kernel, z, x, y, 7), kuu, noise).item() == pytest.approx(direct.item(), rel=1e-8)
    assert log_evidence([site]) == pytest.approx(direct.item(), rel=1e-8)
    without_trace = direct + sum(trace / (2 * s) for s in noise)  # the twin: DTC's evidence is not the bound
    assert abs(log_evidence([site]) - without_trace.item()) > 1.0


def test_two_pass_gradients_are_those_of_autograd(case):
    kernel, likelihood, x, y = case
    z = x[:20].clone().requires_grad_()
    parameters = [*kernel.parameters(), *likelihood.parameters(), z]
    bound_from(statistics(kernel, z, x, y), covariance(kernel, z), likelihood.noise[:, 0]).backward()
    direct = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    backward_bound(kernel, z, likelihood.noise[:, 0], x, y, chunk=7)
    for p, want in zip(parameters, direct):
        assert torch.allclose(p.grad, want, rtol=1e-8, atol=1e-8)


def test_posterior_on_every_row_is_the_exact_one(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x, likelihood)
    posterior = GPPosterior(basis, fit_site(basis, x, y), plain_scaling())
    new = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    k, cross = kernel(x).to_dense().detach(), kernel(x, new).to_dense().detach()
    a = k + likelihood.noise[0, 0].detach() * torch.eye(60)
    assert torch.allclose(
        posterior.latent(new).mean[:, 0], cross.T @ torch.linalg.solve(a, y[:, 0]), atol=1e-7
    )
    want = kernel(new).to_dense().detach() - cross.T @ torch.linalg.solve(a, cross)
    assert torch.allclose(posterior.latent(new).covariance[0], want, atol=1e-7)
    exact = log_marginal_likelihood(k, y, likelihood.noise[:, 0].detach()).item()
    assert log_evidence([fit_site(basis, x, y)]) == pytest.approx(exact, rel=1e-6)


def test_sites_of_parts_add_up_and_bases_do_not_mix(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x[:20], likelihood)
    whole, parts = fit_site(basis, x, y), fit_site(basis, x[:25], y[:25]) + fit_site(basis, x[25:], y[25:])
    assert torch.allclose(whole.precision, parts.precision, rtol=1e-10)
    assert torch.allclose(whole.shift, parts.shift, rtol=1e-9, atol=1e-9)
    assert log_evidence([parts]) == pytest.approx(log_evidence([whole]), rel=1e-10)
    with pytest.raises(OptionError, match="different bases"):
        whole + fit_site(Basis(kernel, x[:21], likelihood), x, y)


def test_conditioning_is_refitting(case):
    kernel, likelihood, x, y = case
    first, whole = Basis(kernel, x[:40], likelihood), Basis(kernel, x, likelihood)
    later = GPPosterior(first, fit_site(first, x[:40], y[:40]), plain_scaling()).condition(x[40:], y[40:])
    once = GPPosterior(whole, fit_site(whole, x, y), plain_scaling())
    assert torch.allclose(later.latent(x + 0.1).mean, once.latent(x + 0.1).mean, atol=1e-7)


def test_draws_have_the_posterior_s_moments_and_stay_the_same_function(case):
    kernel, likelihood, x, y = case
    basis = Basis(kernel, x, likelihood)
    posterior = GPPosterior(basis, fit_site(basis, x, y), plain_scaling())
    new = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    draws, want = posterior.draw(500, seed=0), posterior.latent(new)
    values = draws(new)
    error = (want.variance / 500).sqrt()
    assert ((values.mean(0) - want.mean).abs() < 4 * error + 1e-6).all()
    assert ((values.var(0) / want.variance - 1).abs() < 4 * math.sqrt(2 / 500) + 0.05).all()
    assert torch.equal(draws[3](new), draws[3](new))
    assert not (values.mean(0).abs() < 4 * error + 1e-6).all()  # the twin: the prior's mean is rejected


@pytest.mark.parametrize(
    "kernel",
    [
        RBFKernel(ard_num_dims=3),
        MaternKernel(0.5),
        MaternKernel(1.5),
        MaternKernel(2.5),
        RBFKernel(active_dims=(2,)),
    ],
)
def test_covariance_and_its_gradient_are_gpytorch_s(kernel):
    kernel = ScaleKernel(kernel).double()
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64).unbind()
    weights = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    results = []
    for matrix in (covariance(kernel, x, z), kernel(x, z).to_dense()):
        kernel.zero_grad()
        (weights * matrix).sum().backward()
        results.append((matrix.detach(), *[p.grad.clone() for p in kernel.parameters()]))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_leave_one_out_is_refitting_without_the_row(case):
    kernel, likelihood, x, y = case
    k, noise = kernel(x).to_dense().detach(), likelihood.noise[:, 0].detach()
    mean, variance = leave_one_out(k, y, noise)
    rest = torch.arange(60) != 11
    a = k[rest][:, rest] + noise[0] * torch.eye(59)
    assert mean[11, 0].item() == pytest.approx((k[11, rest] @ torch.linalg.solve(a, y[rest, 0])).item())
    want = k[11, 11] + noise[0] - k[11, rest] @ torch.linalg.solve(a, k[rest, 11])
    assert variance[11, 0].item() == pytest.approx(want.item())


def test_greedy_choice_takes_the_least_explained_row_and_stops(case):
    kernel, _, x, _ = case
    chosen = greedy_variance(kernel, x, 10).tolist()
    k = kernel(x).to_dense().detach()
    left = k - k[:, chosen[:9]] @ torch.linalg.solve(k[chosen[:9]][:, chosen[:9]], k[chosen[:9]])
    assert left.diagonal().argmax().item() == chosen[9]
    assert len(greedy_variance(kernel, x, 60, tolerance=0.2)) < 60
    assert len(greedy_variance(kernel, torch.cat([x, x]), 120)) <= 60


def test_a_failed_factorisation_names_the_matrix():
    with pytest.raises(NumericalError, match="my matrix"):
        cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), "my matrix")
    assert cholesky(torch.ones(2, 2, dtype=torch.float64), "ones")[1] > 0
