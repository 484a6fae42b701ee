"""Chains over weights against the closed form of linear regression, and their diagnostics against pyro's."""

import pytest
import torch

from fspace.errors import OptionError
from fspace.inference.weights import NUTS, SGHMC, SGLD, SWAG, CyclicalSGLD
from fspace.inference.weights.chains import effective_size, r_hat, split
from fspace.inference.weights.likelihoods import GaussianNoise
from fspace.inference.weights.problem import Training
from fspace.inference.weights.whitened import Whitened, preconditioned

SHORT = Training(epochs=200, batch_size=60, learning_rate=0.1)


def agrees(states, case, ess, bias=0.0):
    """Mean and variance of draws within five standard errors of the closed form; bias: known share of the variance."""
    variance = case.covariance.diagonal()
    mean_fits = ((states.mean(0) - case.mean).abs() < 5 * (variance / ess).sqrt()).all()
    ratio = states.var(0) / variance
    return bool(mean_fits) and bool(((ratio - 1).abs() < 5 * (2 / ess) ** 0.5 + bias).all())


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_linear_regression_has_the_closed_form(linear, method, temperature):
    case = linear(temperature=temperature, training=SHORT)
    if method == "sgld":
        sampler, bias = SGLD(samples=800, chains=40, thinning=60, step_size=0.2), 0.1 / 0.9
    else:
        sampler, bias = SGHMC(samples=1600, chains=40, thinning=8), 0.0
    points, _ = sampler.fit(case.problem)
    ess = case.problem.report.figures["ess"]
    assert ess > 300 and case.problem.report.figures["rhat"] < 1.1
    assert agrees(points.states, case, ess, bias)
    case.covariance = case.covariance * 2.5  # the twin: another temperature
    assert not agrees(points.states, case, ess, bias)


def test_cycles_sample_the_posterior(linear):
    case = linear(training=SHORT)
    points, _ = CyclicalSGLD(samples=2400, chains=60, thinning=20, cycles=2, step_size=0.3).fit(case.problem)
    assert agrees(points.states, case, 400, 0.15 / 0.85)


def test_diagnostics_are_pyros():
    stats = pytest.importorskip("pyro.ops.stats")
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 300, 3, generator=g, dtype=torch.float64)
    chains = torch.zeros_like(noise)
    for t in range(1, 300):
        chains[:, t] = torch.tensor([0.0, 0.5, 0.95]) * chains[:, t - 1] + noise[:, t]
    torch.testing.assert_close(r_hat(chains), stats.split_gelman_rubin(chains, 0, 1))
    # pyro divides the covariance at lag k by n - k, Stan and we by n: of 150 draws with tau below 40 some percent
    theirs = stats.effective_sample_size(split(chains), 0, 1)
    assert ((effective_size(chains) / theirs - 1).abs() < 0.03).all()
    assert ((effective_size(chains) / (2 * theirs) - 1).abs() > 0.03).all()
    apart = chains + torch.arange(4.0)[:, None, None] * 5
    assert (r_hat(apart) > 1.5).all()


def test_slopes_and_stiffness_are_those_of_the_log_joint(small):
    problem = small()
    space = preconditioned(problem, problem.start(1)[0])
    u = space.coordinates(problem.start(2))
    torch.testing.assert_close(space.theta(u), problem.start(2))
    rows = torch.arange(problem.n)

    def minus(v):
        theta = space.theta(v[None])
        return -(problem.log_likelihood(theta, problem.x, problem.y).sum() + problem.log_prior(theta)[0])

    slopes = torch.stack([torch.func.grad(minus)(v) for v in u])
    torch.testing.assert_close(space.gradient(u, rows), slopes)
    largest = torch.linalg.eigvalsh(torch.func.hessian(minus)(u[0])).abs().max().item()
    assert space.stiffness(u[0], rows) == pytest.approx(largest, rel=0.1)
    plain = Whitened(problem, torch.ones(problem.size).double())
    squares = plain.squares(plain.coordinates(problem.start(1)[0]), rows)
    torch.testing.assert_close(
        squares.sum(0) - plain.coordinates(problem.start(1)[0]),
        -plain.gradient(plain.coordinates(problem.start(1)), rows)[0],
    )


def test_settings_that_do_not_exist_are_refused():
    for options, words in (
        ({"samples": 0}, "samples"),
        ({"chains": 0}, "chains"),
        ({"warmup": 1.0}, "warmup"),
    ):
        with pytest.raises(OptionError, match=words):
            SGHMC(**options)


def test_nuts_has_the_closed_form_and_tells_of_its_chains(linear):
    pytest.importorskip("pyro")
    case = linear()
    points, _ = NUTS(samples=500, chains=2, warmup=100).fit(case.problem)
    figures = case.problem.report.figures
    assert figures["rhat"] < 1.05 and figures["ess"] > 100 and figures["divergences"] == 0
    assert agrees(points.states, case, figures["ess"])
    case.covariance = case.covariance * 2.5
    assert not agrees(points.states, case, figures["ess"])


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_sghmc_agrees_with_nuts(small, hidden):
    """Means and deviations of function values (and of the unknown log noise of a linear model), within Monte Carlo
    errors. Noise of the network is known and wide, so that chains cross between its modes."""
    pytest.importorskip("pyro")
    known = {"likelihood": GaussianNoise(1, torch.zeros(1).double())} if hidden else {}
    values, sizes = [], []
    for method in (
        NUTS(200, chains=2, warmup=100, max_tree_depth=6),
        SGHMC(samples=800, chains=40, thinning=20),
    ):
        problem = small(n=12, hidden=hidden, training=Training(epochs=50), **known)
        points, _ = method.fit(problem)
        w, tail = problem.split(points.states)
        values.append(torch.cat([problem.network.many(w, problem.x[:8])[..., 0], tail], 1))
        sizes.append(problem.report.figures["ess"])
    (a, b), ess = values, min(sizes)
    spread = b.std(0)
    assert ess > 40
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * spread * (2 / ess) ** 0.5).all()
    assert ((a.std(0) / spread).log().abs() < 5 / ess**0.5).all()


def test_nuts_refuses_what_is_too_large(small):
    with pytest.raises(OptionError, match="small"):
        NUTS().fit(small(hidden=(2000,)))


def test_swag_of_inputs_that_do_not_correlate_has_the_closed_form(linear):
    """Then, and with noise that is right, the gradients' covariance is the curvature, and Mandt's step is exact to
    first order in it: the stationary variance is 1 / (1 - step * curvature / 2) times the posterior's."""
    case = linear(n=400, d=3, orthogonal=True, noise=1.0, training=Training(batch_size=20, epochs=100))
    q, _ = SWAG(rank=400, collect=2000, every=2).fit(case.problem)
    scale = case.problem.scales.square()
    step = case.problem.report.figures["step_size"]
    curvature = (scale / case.covariance.diagonal()).max().item() / 400
    assert not case.problem.report.figures["capped"]
    bias = 1 / (1 - step * curvature / 2) - 1
    variance = q.variance[0]
    ess = 2000 * 2 * step * curvature / 2
    assert ess > 60
    # Mandt's step matches the trace; one weight's part of it is as uneven as the 400 rows' squared residuals
    assert ((variance / case.covariance.diagonal()).log().abs() < bias + 5 * (2 / ess) ** 0.5 + 0.35).all()
    assert ((q.mean[0] - case.mean).abs() < 5 * (case.covariance.diagonal() / ess).sqrt() + 1e-3).all()
    drawn = q.sample(20000, torch.Generator().manual_seed(0))
    assert ((drawn.var(0) / variance - 1).abs() < 0.15).all()
