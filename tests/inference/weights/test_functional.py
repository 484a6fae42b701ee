"""Methods that look at the network as a function: tangent kernels, functional priors, infinitely wide limits."""

import math

import pytest
import torch
from gpytorch.kernels import LinearKernel, ScaleKernel

from fspace.errors import OptionError
from fspace.inference.gp import Scaling
from fspace.inference.weights import FunctionalLaplace, FunctionalPrior, FunctionVI, GaussianPrior, Laplace
from fspace.inference.weights.curvature import jacobian, region_of
from fspace.inference.weights.functional_prior import sliced_wasserstein, tuned_scales
from fspace.inference.weights.fvi import _divergence, fit_functions
from fspace.inference.weights.network import Network
from fspace.inference.weights.posterior import posterior_of
from fspace.inference.weights.problem import Training
from fspace.kernels import MLP, NeuralKernel


def posterior(problem, method):
    distribution, likelihood = method.fit(problem)
    d = problem.x.shape[1]
    one, zero = torch.ones(d).double(), torch.zeros(d).double()
    t = likelihood.outputs
    scaling = Scaling(one, one, zero, one, torch.zeros(t).double(), torch.ones(t).double())
    return posterior_of(problem.network, distribution, likelihood, scaling, True, method.name)


def test_functional_laplace_is_the_process_of_the_tangent_kernel(small):
    problem = small(training=Training(epochs=50))
    found = posterior(problem, FunctionalLaplace(tune=False))
    grid = torch.randn(9, 2).double()
    theta = found.distribution.mean
    region = region_of(problem.network, "all")
    a, b = (jacobian(problem.network, theta, x, region)[:, 0] * problem.scales for x in (grid, problem.x))
    noise = found.likelihood.log_variance.exp() * torch.eye(40).double()
    exact = a @ a.mT - a @ b.mT @ torch.linalg.solve(b @ b.mT + noise, b @ a.mT)
    torch.testing.assert_close(found.latent(grid).covariance, exact, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.latent(grid).mean, problem.network(theta, grid)[:, 0])


def test_functional_laplace_of_all_rows_is_laplace_and_of_few_is_wider(small):
    full = posterior(small(training=Training(epochs=50)), Laplace("full", tune=False))
    all_, few = (
        posterior(small(training=Training(epochs=50)), FunctionalLaplace(r, tune=False)) for r in (40, 8)
    )
    x = torch.randn(9, 2).double()
    torch.testing.assert_close(all_.latent(x).covariance, full.latent(x).covariance, atol=1e-9, rtol=1e-7)
    assert (few.latent(x).variance > full.latent(x).variance).all()


def test_linear_regression_has_the_closed_form(linear):
    case = linear(training=Training(600, 60, 0.1))
    found = posterior(case.problem, FunctionalLaplace(tune=False))
    design = torch.cat([case.problem.x, torch.ones(60, 1).double()], 1)
    torch.testing.assert_close(found.latent(case.problem.x).mean, design @ case.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.latent(case.problem.x).covariance, design @ case.covariance @ design.mT, atol=1e-10, rtol=1e-8
    )


def test_function_space_inference_of_linear_regression_is_mean_field(linear):
    """At as many points as weights the functions of a linear model are its weights, and the divergences are equal."""
    case = linear(training=Training(500, 60, 0.1))
    g = torch.Generator().manual_seed(0)
    scales = case.problem.scales

    def points():
        x = torch.randn(4, 3, generator=g, dtype=torch.float64) * 2
        design = torch.cat([x, torch.ones(4, 1).double()], 1) * scales
        return x, design @ design.mT

    q = fit_functions(case.problem, points, 0.1)
    assert ((q.mean - case.mean).abs() < 0.25 * case.diagonal.sqrt()).all()
    torch.testing.assert_close(q.scale.square(), case.diagonal, rtol=0.2, atol=0)
    assert (case.covariance.diagonal() / q.scale.square()).max() > 1.5


def test_the_divergence_is_that_of_two_gaussians():
    g = torch.Generator().manual_seed(0)
    mean, root = torch.randn(5, 2, generator=g).double(), torch.randn(5, 2, 7, generator=g).double()
    half = torch.randn(5, 5, generator=g).double()
    k = half @ half.mT + torch.eye(5).double()
    jitter = 1e-6 * k.diagonal().mean() * torch.eye(5).double()
    normal = torch.distributions.MultivariateNormal
    exact = sum(
        torch.distributions.kl_divergence(
            normal(mean[:, c], root[:, c] @ root[:, c].mT + jitter),
            normal(torch.zeros(5).double(), k + jitter),
        )
        for c in range(2)
    )
    torch.testing.assert_close(_divergence(mean, root, k, 1.0), exact, rtol=1e-6, atol=0)


def test_a_tuned_prior_finds_the_variances_of_a_linear_process(linear):
    """The process is linear with a variance of 4 on every weight and none on the bias; the tuned network too."""
    case = linear(d=2, n=80)
    kernel = ScaleKernel(LinearKernel()).double()
    kernel.outputscale, kernel.base_kernel.variance = 1.0, 4.0
    found = tuned_scales(case.problem, kernel.requires_grad_(False), 150)
    # distances of 128 draws of each: a deviation is known to 1 / sqrt(2 * 128) each step, averaged over the last steps
    assert ((found[:2] / 2.0).log().abs() < 0.2).all() and found[2] < 0.5
    figures = case.problem.report.figures
    assert figures["distance_after"] < 0.5 * figures["distance_before"]


def test_the_posterior_under_a_tuned_prior_is_that_prior_s(linear):
    """Tuned on a linear process by `learned_kernel`'s stand-in, the rest is SGHMC with these deviations."""
    case = linear(d=2, training=Training(200, 60, 0.1))
    points, _ = FunctionalPrior(steps=40, samples=400, chains=40, thinning=8).fit(case.problem)
    factors = torch.tensor(case.problem.report.figures["prior_factors"]).double()
    scales = case.problem.scales * factors[[0, 0, 1]]
    design = case.design
    covariance = torch.linalg.inv(design.mT @ design / 0.3 + torch.diag(scales**-2))
    mean = covariance @ design.mT @ case.problem.y[:, 0] / 0.3
    ess = case.problem.report.figures["ess"]
    assert ess > 100
    assert ((points.states.mean(0) - mean).abs() < 5 * (covariance.diagonal() / ess).sqrt()).all()
    assert ((points.states.var(0) / covariance.diagonal() - 1).abs() < 5 * (2 / ess) ** 0.5).all()


def test_sliced_distances_of_equal_draws_are_small():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2000, 3, generator=g).double()
    near, far = sliced_wasserstein(a, b, g), sliced_wasserstein(a, 2 * b, g)
    assert near < 0.02 and far == pytest.approx(1.0, abs=0.3)  # one-dimensional: (2 - 1)^2


@pytest.mark.parametrize("depth", [1, 2])
def test_wide_random_networks_have_the_neural_kernel(depth):
    """Covariance of outputs over draws from `GaussianPrior` of a network of width 256, within Monte Carlo error."""
    torch.manual_seed(0)
    network = Network.of(MLP(3, (256,) * depth, 1, "relu").double())
    x = torch.randn(5, 3).double()
    prior, count = GaussianPrior(1.6, 0.7), 1500
    scales = prior.scales(network)
    g = torch.Generator().manual_seed(1)
    f = []
    for _ in range(60):
        w = torch.randn(count // 60, network.size, generator=g, dtype=torch.float64) * scales
        f.append(network.many(w, x)[..., 0])
    f = torch.cat(f)
    empirical = f.mT @ f / count
    kernel = NeuralKernel(depth=depth, activation="relu").double()
    kernel.weight_variance, kernel.bias_variance = 1.6, 0.7
    exact = kernel(x).to_dense().detach()
    error = ((exact.square() + torch.outer(exact.diagonal(), exact.diagonal())) / count).sqrt()
    assert ((empirical - exact).abs() < 5 * error).all()
    kernel.weight_variance = 2.4
    assert not ((empirical - kernel(x).to_dense().detach()).abs() < 5 * error).all()
    assert math.isfinite(error.max().item())


def test_settings_that_do_not_exist_are_refused():
    for make, words in (
        (lambda: FunctionVI(kernel="cubic"), "kernel"),
        (lambda: FunctionVI(points=1), "points"),
        (lambda: FunctionalPrior(steps=0), "steps"),
        (lambda: FunctionalLaplace(rows=0), "rows"),
        (lambda: GaussianPrior(-1.0), "weight_variance"),
    ):
        with pytest.raises(OptionError, match=words):
            make()
