"""Exact regression: evidence, its gradients and leave-one-out against formulas that share no code with it."""

import math

import numpy as np
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior, LogNormalPrior
from torch.distributions import MultivariateNormal

import fspace
from fspace.errors import NumericalError
from fspace.inference.exact import leave_one_out, log_marginal_likelihood
from fspace.inference.optimise import kernel_penalty, log_prior

NOISE = torch.tensor([0.05, 0.3, 1.2], dtype=torch.float64)


@pytest.fixture
def case():
    """Kernel matrix [n, n] and outputs [n, 3] that have little to do with it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(25, 2, generator=generator, dtype=torch.float64)
    k = ScaleKernel(RBFKernel()).double()(x).to_dense().detach()
    return k, torch.randn(25, 3, generator=generator, dtype=torch.float64)


def density(k, y, noise):
    """sum_t log N(y_t; 0, K + noise_t I), by torch's own multivariate normal."""
    eye = torch.eye(len(k), dtype=k.dtype)
    return sum(
        MultivariateNormal(torch.zeros_like(y[:, t]), k + s * eye).log_prob(y[:, t])
        for t, s in enumerate(noise)
    )


def test_evidence_is_the_density_of_all_outputs_each_with_its_noise(case):
    k, y = case
    value = log_marginal_likelihood(k, y, NOISE).item()
    assert value == pytest.approx(density(k, y, NOISE).item(), rel=1e-12)
    assert abs(value - density(k, y, NOISE.flip(0)).item()) > 1.0  # the twin: noises of the wrong outputs


def test_gradients_are_those_of_autograd_through_the_density(case):
    arguments = [[t.clone().requires_grad_() for t in (*case, NOISE)] for _ in range(2)]
    (3.0 * log_marginal_likelihood(*arguments[0])).backward()
    (3.0 * density(*arguments[1])).backward()
    for ours, theirs in zip(*arguments):
        want = theirs.grad
        if want.shape == (25, 25):  # as a function of a symmetric matrix
            want = 0.5 * (want + want.mT)
        assert torch.allclose(ours.grad, want, rtol=1e-9, atol=1e-9)


def test_gradients_are_finite_differences(case):
    k, y = case[0][:6, :6], case[1][:6, :2]
    root = torch.linalg.cholesky(k + 0.1 * torch.eye(6, dtype=torch.float64)).requires_grad_()

    def value(root, y, log_noise):
        return log_marginal_likelihood(root @ root.mT, y, log_noise.exp())

    assert torch.autograd.gradcheck(
        value, (root, y.clone().requires_grad_(), NOISE[:2].log().requires_grad_())
    )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_only_where_they_are_asked_for(case, wanted):
    arguments = [*case, NOISE]
    alone = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(arguments)]
    together = [t.clone().requires_grad_() for t in arguments]
    for group in (alone, together):
        log_marginal_likelihood(*group).backward()
    for i in range(3):
        assert (alone[i].grad is None) == (i != wanted)
    assert torch.equal(alone[wanted].grad, together[wanted].grad)


def test_leave_one_out_is_refitting_without_each_row(case):
    k, y = case
    mean, variance = leave_one_out(k, y, NOISE)
    for i in range(25):
        rest = torch.arange(25) != i
        for t, s in enumerate(NOISE):
            a = k[rest][:, rest] + s * torch.eye(24, dtype=torch.float64)
            weights = torch.linalg.solve(a, k[rest, i])
            assert mean[i, t].item() == pytest.approx((weights @ y[rest, t]).item(), abs=1e-9)
            want = k[i, i] + s - weights @ k[rest, i]
            assert variance[i, t].item() == pytest.approx(want.item(), rel=1e-9)


def test_chain_rule_ties_leave_one_out_to_the_evidence(case):
    """log p(y) = log p(y_rest) + log p(y_i | y_rest) for every row, in both functions."""
    k, y = case
    mean, variance = leave_one_out(k, y, NOISE)
    gain = -0.5 * (2 * math.pi * variance).log() - 0.5 * (y - mean).square() / variance
    whole = log_marginal_likelihood(k, y, NOISE)
    for i in (0, 12, 24):
        rest = torch.arange(25) != i
        part = log_marginal_likelihood(k[rest][:, rest], y[rest], NOISE)
        assert (whole - part).item() == pytest.approx(gain[i].sum().item(), rel=1e-9)


def test_one_row_is_enough():
    k, y, noise = (torch.full(s, 2.0, dtype=torch.float64) for s in ((1, 1), (1, 1), (1,)))
    want = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(2.0)).item()
    assert log_marginal_likelihood(k, y, noise).item() == pytest.approx(want)
    mean, variance = leave_one_out(k, y, noise)
    assert (mean.item(), variance.item()) == pytest.approx((0.0, 4.0))


@pytest.mark.parametrize("function", [log_marginal_likelihood, leave_one_out])
def test_a_matrix_that_is_no_covariance_is_refused_by_name(case, function):
    k, y = case
    with pytest.raises(NumericalError, match=r"covariance of the observations \(3 x 25 x 25\)"):
        function(k - 2.0 * torch.eye(25, dtype=torch.float64), y, NOISE)
    k = k.clone()
    k[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        function(k, y, NOISE)


def test_a_prior_that_is_registered_on_a_kernel_counts():
    """Minus its log density takes the place of the weak pull on that lengthscale; other parameters' are added."""

    def kernel(own=None, scale=None):
        made = ScaleKernel(RBFKernel(ard_num_dims=2, lengthscale_prior=own), outputscale_prior=scale).double()
        made.outputscale, made.base_kernel.lengthscale = 1.7, torch.tensor([[0.5, 3.0]])
        return made

    logs = torch.tensor([0.5, 3.0]).double().log()
    pull = 0.125 * (logs - 0.5 * math.log(2)).square().sum()
    torch.testing.assert_close(kernel_penalty(kernel()), pull)
    assert log_prior(kernel()) == 0
    density = -(
        logs + 0.5 * math.log(2 * math.pi) + math.log(0.3) + 0.5 * ((logs - 1.0) / 0.3).square()
    ).sum()
    torch.testing.assert_close(kernel_penalty(kernel(LogNormalPrior(1.0, 0.3))), -density)
    gamma = 3.0 * math.log(6.0) - math.lgamma(3.0) + 2.0 * math.log(1.7) - 6.0 * 1.7
    expected = pull - torch.tensor(gamma).double()
    torch.testing.assert_close(kernel_penalty(kernel(scale=GammaPrior(3.0, 6.0))), expected)


@pytest.mark.parametrize("inference", ["exact", "sites"])
def test_a_strong_prior_decides_a_lengthscale(inference):
    X = np.random.default_rng(0).normal(size=(80, 1))
    y = np.sin(3 * X[:, 0])
    found = []
    for prior in (None, LogNormalPrior(2.0, 0.01)):
        base = RBFKernel(ard_num_dims=1, lengthscale_prior=prior)
        base.lengthscale = math.exp(2.0)
        model = fspace.GPRegressor(kernel=ScaleKernel(base), inference=inference, progress=False).fit(X, y)
        found.append(model.posterior_.basis.kernel.base_kernel.lengthscale.item())
    assert found[1] == pytest.approx(math.exp(2.0), rel=0.1)
    assert (
        found[0] < 0.75 * found[1]
    )  # the twin: without it the rows pull it away, by few steps of sites not to the end
