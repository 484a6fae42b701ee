"""Chains over weights against the closed form of linear regression, and their diagnostics against pyro's."""

import pytest
import torch

from fspace.errors import OptionError
from fspace.inference.weights import HMC, NUTS, SGHMC, SGLD, SWAG, CyclicalSGLD, hmc
from fspace.inference.weights.chains import effective_size, r_hat, split, watch
from fspace.inference.weights.likelihoods import GaussianNoise
from fspace.inference.weights.problem import Training
from fspace.inference.weights.whitened import Whitened, preconditioned
from fspace.kernels import MLP

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
        ({"samples": True}, "samples=True must be a whole number of at least 1"),
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


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_hmc_has_the_closed_form(linear, temperature):
    case = linear(temperature=temperature)
    points, _ = HMC(samples=1600, chains=16, warmup=60).fit(case.problem)
    figures = case.problem.report.figures
    assert figures["rhat"] < 1.05 and figures["rhat_weights"] < 1.05 and figures["divergences"] == 0
    assert 0.6 < figures["acceptance"] < 0.95 and figures["ess"] > 300
    assert agrees(points.states, case, figures["ess"])
    case.covariance = case.covariance * 1.5
    assert not agrees(points.states, case, figures["ess"])


def test_hmc_without_its_acceptance_step_is_wrong(linear, monkeypatch):
    """The twin: every proposal taken, at a step at which three in ten should be. Leapfrog steps alone sample variances
    1 / (1 - (step * frequency / 2)^2) times too large."""
    sampler = HMC(samples=1600, chains=16, warmup=60, acceptance=0.3)
    case = linear()
    points, _ = sampler.fit(case.problem)
    assert agrees(points.states, case, case.problem.report.figures["ess"])
    whole = hmc._Point.moved
    monkeypatch.setattr(hmc._Point, "moved", lambda self, other, where: whole(self, other, where | True))
    case = linear()
    points, _ = sampler.fit(case.problem)
    assert not agrees(points.states, case, case.problem.report.figures["ess"])


def test_trajectories_turn_back_and_keep_their_energy(small):
    """What leapfrog steps promise: reversible, of second order; energies are minus the log joint density."""
    problem = small(hidden=(5,))
    target = hmc._Target(problem)
    u = target.space.coordinates(problem.start(3))
    at = hmc._Point(u, *target(u))
    momentum = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=u.dtype)
    end, gain = hmc.trajectory(target, at, momentum, 1e-3, 64)
    _, finer = hmc.trajectory(target, at, momentum, 5e-4, 128)
    torch.testing.assert_close(gain / finer, torch.full((3,), 4.0).double(), rtol=0.05, atol=0)
    theta = target.space.theta(u)
    joint = problem.log_likelihood(theta, problem.x, problem.y).sum(-1) + problem.log_prior(theta)
    torch.testing.assert_close(at.energy - at.energy[0], joint[0] - joint)
    # the momentum at the end, which is not returned: u(last step) = u(before) + h (p + h / 2 slope), p at the end
    before, _ = hmc.trajectory(target, at, momentum, 1e-3, 63)
    last = (end.u - before.u) / 1e-3 - 0.5e-3 * end.slope
    assert (last - momentum).norm() > 0.1  # the slope has been felt
    back, loss = hmc.trajectory(target, end, -last, 1e-3, 64)
    torch.testing.assert_close(back.u, u, atol=1e-8, rtol=0)
    torch.testing.assert_close(loss, -gain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_hmc_and_sghmc_agree_with_nuts(small, hidden):
    """Means and deviations of function values (and of the unknown log noise of a linear model), within Monte Carlo
    errors; those of a colder posterior do not. Noise of the network is known and wide, so that chains cross between
    its modes."""
    pytest.importorskip("pyro")
    options = {"n": 12, "hidden": hidden, "training": Training(epochs=50)}
    if hidden:
        options["likelihood"] = GaussianNoise(1, torch.zeros(1).double())
    theirs, other = values_of(NUTS(300, chains=2, warmup=100, max_tree_depth=6), small(**options))
    for sampler in (HMC(samples=1600, warmup=60), SGHMC(samples=800, chains=40, thinning=20)):
        ours, size = values_of(sampler, small(**options))
        assert min(size, other) > 40 and same_moments(ours, theirs, min(size, other))
    cold, _ = values_of(HMC(samples=1600, warmup=60), small(temperature=0.3, **options))
    assert not same_moments(cold, theirs, other)


def values_of(method, problem):
    """Function values at eight rows and log noises of all draws, and their effective size."""
    points, _ = method.fit(problem)
    w, tail = problem.split(points.states)
    return torch.cat([problem.network.many(w, problem.x[:8])[..., 0], tail], 1), problem.report.figures["ess"]


def same_moments(a, b, ess):
    """Means within five standard errors, deviations within five of theirs."""
    spread = b.std(0)
    near = ((a.mean(0) - b.mean(0)).abs() < 5 * spread * (2 / ess) ** 0.5).all()
    return bool(near) and bool(((a.std(0) / spread).log().abs() < 5 / ess**0.5).all())


def test_hmc_refuses_what_it_cannot_do(small):
    with pytest.raises(OptionError, match="small"):
        HMC().fit(small(hidden=(2000,)))
    for options, words in (
        ({"samples": 0}, "samples"),
        ({"length": 0.0}, "length"),
        ({"acceptance": 1.0}, "acceptance"),
    ):
        with pytest.raises(OptionError, match=words):
            HMC(**options)


def test_chains_that_agree_at_the_rows_and_not_between_are_told(made):
    """Functions with a tooth between the rows, whose height depends on the chain."""
    x = torch.tensor([-1.0, 1.0]).double().repeat(8)[:, None]
    problem = made(MLP(1, (3,), 1, "relu"), x, 0 * x, likelihood=GaussianNoise(1, torch.zeros(1).double()))
    g = torch.Generator().manual_seed(0)
    height = torch.arange(4.0).double()[:, None] + 0.1 * torch.randn(4, 50, generator=g, dtype=torch.float64)
    base = 0.1 * torch.randn(4, 50, generator=g, dtype=torch.float64)
    one, half = torch.ones(4, 50).double(), torch.full((4, 50), 0.5).double()
    first = torch.stack([one, one, one, half, 0 * one, -half], -1)  # relu(x + 1/2), relu(x), relu(x - 1/2)
    states = torch.cat([first, torch.stack([2 * height, -4 * height, 2 * height, base], -1)], -1)
    at_rows = problem.network.many(states.flatten(0, 1), x)[..., 0].reshape(4, 50, -1)
    assert r_hat(at_rows).max() < 1.05
    watch(problem, states)
    assert problem.report.figures["rhat"] > 5


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
