"""Gradients written by hand against finite differences and automatic differentiation; passes that start from an eighth
of many rows against passes over all of them."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood, StudentTLikelihood

from fspace.inference import sites
from fspace.inference.basis import Basis, Site
from fspace.inference.likelihoods import NegativeBinomialLikelihood, with_offset
from fspace.inference.moments import MovedMoments
from fspace.inference.numerics import solve_lower
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.sites import Rows, backward_elbo, batch_site, converge, elbo, empty_site, moved
from fspace.kernels.evaluate import covariance, diagonal


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_site(functions, m):
    root = normal(functions, m, m, seed=1)
    zeros = root.new_zeros(functions)
    return Site("moving", root @ root.mT, normal(functions, m, seed=2), zeros, 0)


def test_gradients_of_the_moments_are_those_of_finite_differences():
    site = some_site(3, 4)
    v, across = normal(4, 5, seed=3).requires_grad_(), normal(4, 4, seed=4).tril().requires_grad_()

    def moments(v, across):
        return MovedMoments.apply(v, across, site.precision, site.shift)[:3]

    assert torch.autograd.gradcheck(moments, (v, across), atol=1e-7)


LIKELIHOODS = {
    "bernoulli": lambda y: (BernoulliLikelihood(), (y > 0).double()),
    "negative binomial": lambda y: (NegativeBinomialLikelihood(), y.exp().round()),
    "student t": lambda y: (StudentTLikelihood(), y),
    "softmax": lambda y: (
        SoftmaxLikelihood(num_classes=3, mixing_weights=False),
        (y > -0.5).double() + (y > 0.5),
    ),
}


@pytest.mark.parametrize("name", [*LIKELIHOODS, "gaussian"])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_look_at_the_rows_gives_bound_gradients_and_site(name, weighted):
    x, y = normal(30, 2), normal(30, 1, seed=5)
    if name == "gaussian":
        likelihood = gaussian_likelihood(1, 0.3, y.device)
    else:
        inner, y = LIKELIHOODS[name](y)
        likelihood = with_offset(inner, y)
    weight = 1.0 + normal(30, seed=6).square() if weighted else None
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=2)).double()
    site = some_site(3 if name == "softmax" else 1, 8)
    with torch.no_grad():
        before = torch.linalg.cholesky(covariance(kernel, x[:8]))
    kernel.outputscale = 2.0  # it has moved since
    parameters = [*kernel.parameters(), *likelihood.parameters()]

    def prepared():
        factor = torch.linalg.cholesky(covariance(kernel, x[:8]))
        v = solve_lower(factor, covariance(kernel, x[:8], x))
        return Rows(v, diagonal(kernel, x), y, weight), solve_lower(before, factor)

    rows, across = prepared()
    there = moved(site, across)
    want = elbo(there, likelihood, rows, 70)
    gradients = torch.autograd.grad(-0.1 * want, parameters)

    rows, across = prepared()
    bound, still, batch = backward_elbo(site, across, likelihood, rows, 70, -0.1)
    assert torch.allclose(bound, want)
    for p, gradient in zip(parameters, gradients):
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(p.grad, gradient, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        expected = batch_site(there, likelihood, rows, 70)
    for ours, other in ((still, there), (batch, expected)):
        assert torch.allclose(ours.precision, other.precision) and torch.allclose(ours.shift, other.shift)
    assert torch.allclose(batch.log_scale, expected.log_scale) and batch.count == 70


@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_seen_less_often_and_say_the_same(weighted, monkeypatch):
    x = normal(20_000, 1)
    y = (torch.sin(2 * x) + 0.5 * normal(20_000, 1, seed=7) > 0).double()
    weight = 0.5 + normal(20_000, seed=8).square() if weighted else None
    kernel = ScaleKernel(MaternKernel(2.5)).double()
    inducing = torch.linspace(-3, 3, 12, dtype=torch.float64)[:, None]
    basis = Basis(kernel, inducing, with_offset(BernoulliLikelihood(), y))
    seen, whole = [], sites._whole
    monkeypatch.setattr(sites, "_whole", lambda *args: (seen.append(len(args[4])), whole(*args))[1])

    want, best = converge(basis, x, y, weight, start=empty_site(basis, 1), tolerance=1e-10)
    usual, seen[:] = seen.count(20_000), []
    site, bound = converge(basis, x, y, weight, tolerance=1e-6)
    assert seen.count(20_000) <= 4 < usual
    assert best - 0.01 < bound <= best + 1e-6  # nats, of 20,000 rows
    assert site.count == 20_000

    grid = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    with torch.no_grad():
        at = Rows.of(basis, grid, torch.zeros(21, 1).double())
        (mean, variance), (other, spread) = sites.marginals(site, at), sites.marginals(want, at)
        few, _ = converge(basis, x[::8], y[::8], None if weight is None else weight[::8])
        rough, _ = sites.marginals(few, at)
    assert ((mean - other).abs() / spread.sqrt()).max() < 0.02
    assert torch.allclose(variance, spread, rtol=0.02)
    assert ((rough - other).abs() / spread.sqrt()).max() > 0.5  # an eighth of the rows would not do
