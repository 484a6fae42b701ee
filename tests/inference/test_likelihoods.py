"""Expectations under likelihoods against Monte Carlo, autograd and closed forms."""

import math

import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood

from fspace.inference.likelihoods import (
    NAMED,
    OffsetLikelihood,
    expected_log_density,
    functions,
    local_terms,
    predictive_log_density,
    with_offset,
)

ONE = torch.ones(1, dtype=torch.float64)
Y = {
    "student_t": [-2.0, 0.1, 3.0],
    "laplace": [-2.0, 0.1, 3.0],
    "poisson": [0.0, 2.0, 7.0],
    "negative_binomial": [0.0, 2.0, 7.0],
    "gamma": [0.1, 1.0, 4.0],
    "beta": [0.05, 0.5, 0.9],
    "bernoulli": [0.0, 1.0, 1.0],
}


def moments(t=1):
    generator = torch.Generator().manual_seed(0)
    mean = 0.5 * torch.randn(t, 3, generator=generator, dtype=torch.float64)
    return mean, 0.2 + 0.5 * torch.rand(t, 3, generator=generator, dtype=torch.float64)


def case(name):
    likelihood = OffsetLikelihood(NAMED[name](), 0.3 * ONE)
    return likelihood, torch.tensor(Y[name], dtype=torch.float64)[:, None], *moments()


def sampled(likelihood, y, mean, variance, count=200_000):
    """Log densities at draws of f: [count, n]."""
    white = torch.randn(count, *mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return likelihood.log_density(y, mean + variance.sqrt() * white)[:, 0].detach()


@pytest.mark.parametrize("name", NAMED)
def test_expected_log_density_is_the_monte_carlo_mean(name):
    likelihood, y, mean, variance = case(name)
    draws = sampled(likelihood, y, mean, variance)
    error = draws.std(0) / math.sqrt(len(draws))
    ours = expected_log_density(likelihood, y, mean, variance)[0].detach()
    assert ((ours - draws.mean(0)).abs() < 4 * error + 1e-3).all()
    # the twin: at the mean of f, without its spread
    assert not ((likelihood.log_density(y, mean)[0].detach() - draws.mean(0)).abs() < 4 * error + 1e-3).all()


@pytest.mark.parametrize("name", NAMED)
def test_predictive_log_density_is_that_of_the_averaged_density(name):
    likelihood, y, mean, variance = case(name)
    draws = sampled(likelihood, y, mean, variance).exp()
    error = draws.std(0) / math.sqrt(len(draws))
    ours = predictive_log_density(likelihood, y, mean, variance).exp().detach()
    assert ((ours - draws.mean(0)).abs() < 4 * error + 2e-3 * ours).all()


@pytest.mark.parametrize("name", NAMED)
def test_local_terms_are_the_slopes_of_the_expectation(name):
    likelihood, y, mean, variance = case(name)
    value, slope, beta = local_terms(likelihood, y, mean, variance)
    step = 1e-5
    up, down = (expected_log_density(likelihood, y, mean + s, variance).detach() for s in (step, -step))
    assert torch.allclose(slope, (up - down) / (2 * step), atol=1e-6)
    up, down = (expected_log_density(likelihood, y, mean, variance + s).detach() for s in (step, -step))
    assert torch.allclose(beta, (-(up - down) / step).clamp(min=0.0), atol=1e-6)
    assert torch.allclose(value, expected_log_density(likelihood, y, mean, variance).detach())
    assert (beta >= 0).all()


def test_gaussian_terms_in_closed_form():
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-6), batch_shape=torch.Size([2])).double()
    likelihood.noise = torch.tensor([[0.3], [0.7]])
    mean, variance = moments(2)
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    value, slope, beta = local_terms(likelihood, y, mean, variance)
    m, v = mean.clone().requires_grad_(), variance.clone().requires_grad_()
    density = torch.distributions.Normal(m, likelihood.noise.detach().sqrt()).log_prob(y.mT)
    expected = density - 0.5 * v / likelihood.noise.detach()
    first, second = torch.autograd.grad(expected.sum(), (m, v))
    for ours, want in zip((value, slope, beta), (expected, first, -2.0 * second)):
        assert torch.allclose(ours, want, atol=1e-12)


def softmax(classes=4):
    generator = torch.Generator().manual_seed(4)
    offset = torch.randn(classes, generator=generator, dtype=torch.float64)
    return OffsetLikelihood(SoftmaxLikelihood(num_classes=classes, mixing_weights=False), offset)


def test_softmax_terms_are_those_of_independent_functions():
    likelihood, y = softmax(), torch.tensor([[0.0], [3.0], [1.0]], dtype=torch.float64)
    mean, variance = moments(4)
    white = torch.randn(400_000, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    f = mean + variance.sqrt() * white + likelihood.offset.detach()[:, None]
    logs = torch.log_softmax(f, 1)
    hit = torch.nn.functional.one_hot(y[:, 0].long(), 4).mT
    value, slope, beta = local_terms(likelihood, y, mean, variance)
    probs = logs.exp()
    assert torch.allclose(value.sum(0), (logs * hit).sum(1).mean(0), atol=0.03)
    assert torch.allclose(slope, (hit - probs).mean(0), atol=0.015)
    assert torch.allclose(beta, (probs * (1 - probs)).mean(0), atol=0.01)
    direct = (probs * hit).sum(1).mean(0).log()
    assert torch.allclose(predictive_log_density(likelihood, y, mean, variance).detach(), direct, atol=0.03)
    assert functions(likelihood) == 4 and likelihood.classes == 4


def test_a_misread_label_far_out_costs_a_finite_amount_and_has_a_slope():
    likelihood = OffsetLikelihood(BernoulliLikelihood(), 0 * ONE)
    mean = torch.full((1, 1), 40.0, dtype=torch.float64)  # gpytorch's own density rounds to log 0 there
    value, slope, beta = local_terms(likelihood, torch.zeros(1, 1).double(), mean, torch.ones_like(mean))
    assert -1000 < value.item() < -700 and slope.item() < -30 and 0.5 < beta.item() < 1.5


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "gamma"])
def test_the_offset_is_where_the_mean_is(name):
    y = torch.distributions.Poisson(torch.tensor(900.0)).sample((500, 1)).double() + 1.0
    likelihood = with_offset(NAMED[name](), y)
    assert likelihood.offset.exp().item() == pytest.approx(y.mean().item(), rel=1e-3)


def test_offsets_of_classes_are_their_logits_and_weights_count():
    y = torch.tensor([[0.0]] * 6 + [[1.0]] * 2 + [[2.0]], dtype=torch.float64)
    inner = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    plain = torch.softmax(with_offset(inner, y).offset, 0)
    assert torch.allclose(plain, torch.tensor([7.0, 3.0, 2.0]).double() / 12)
    weight = torch.tensor([1.0] * 6 + [3.0] * 2 + [6.0], dtype=torch.float64)
    assert torch.allclose(
        torch.softmax(with_offset(inner, y, weight).offset, 0), torch.full((3,), 1 / 3).double()
    )
    two = with_offset(BernoulliLikelihood(), (y > 0).double())
    assert torch.special.ndtr(two.offset).item() == pytest.approx(1 / 3, abs=1e-3)
