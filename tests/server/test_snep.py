"""Gaussians over weights from many workers: SNEP and PVI reach known posteriors, on every engine the same."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fspace.errors import OptionError, ServerError, SiteRefused
from fspace.inference.basis import Site
from fspace.server import (
    GaussianNoise,
    LocalEngine,
    PosteriorServer,
    Pvi,
    Snep,
    Softmax,
    fit_weights,
)
from fspace.server.natural import divergence, moments
from fspace.server.pvi import PviWorker
from fspace.server.snep import SnepWorker
from fspace.server.weight_fit import weight_basis
from fspace.server.weight_gaussians import Limits, Natural

NOISE = 2.0


def linear(n=60, workers=3, correlation=0.0):
    """Rows of a linear function of two inputs, dealt to workers; and the exact site of all of them."""
    torch.manual_seed(0)
    x = torch.randn(n, 2).double()
    x[:, 1] = correlation * x[:, 0] + (1.0 - correlation**2) ** 0.5 * x[:, 1]
    y = x @ torch.tensor([1.0, -0.5]).double() + 0.3 + NOISE**0.5 * torch.randn(n).double()
    design = torch.cat([x, torch.ones(n, 1).double()], 1)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(n).double(), NOISE * torch.eye(n).double() + design @ design.T
    ).log_prob(y)
    site = Site(
        "exact",
        (design.T @ design / NOISE)[None],
        (design.T @ y / NOISE)[None],
        torch.zeros(1).double(),
        n,
    )
    return [(x[k::workers], y[k::workers]) for k in range(workers)], site, evidence.item()


def line():
    torch.manual_seed(1)
    return nn.Linear(2, 1).double()


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def waves(workers=4, n=80):
    """Rows of a sine with noise of variance 0.04, dealt to workers."""
    torch.manual_seed(3)
    x = torch.linspace(-2, 2, n)[:, None]
    y = torch.sin(2 * x) + 0.2 * torch.randn(n, 1)
    return [(x[k::workers], y[k::workers]) for k in range(workers)]


# -- exact posteriors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", [True, False])
def test_full_pvi_is_the_exact_posterior_of_a_linear_model(synchronous):
    """One round a worker: the best q of a Gaussian model does not depend on what the others say. The evidence is that
    of all rows. The twin, one site taken twice, is far away."""
    shards, exact, evidence = linear()
    how = Pvi(steps=400, rate=0.03, damping=1.0)
    found = fit_weights(
        shards,
        line(),
        GaussianNoise(NOISE),
        update=how,
        diagonal=False,
        rounds=1,
        synchronous_rounds=synchronous,
    )
    assert found.rounds == {f"shard {k}": 1 for k in range(3)}
    assert divergence(found.server.total(), exact) < 1e-6
    assert found.log_evidence == pytest.approx(evidence, abs=1e-3)
    once = found.server.get("shard 1")
    twice = replace(exact, precision=exact.precision + once.precision, shift=exact.shift + once.shift)
    assert divergence(twice, exact) > 0.01


def test_diagonal_pvi_has_the_mean_field_optimum():
    """Of a linear model with correlated inputs: the exact mean, and the diagonal of the exact precision, as far as
    Adam's noise lets see; variances of the exact posterior are larger by up to 55%."""
    shards, exact, _ = linear(n=200, correlation=0.6)
    found = fit_weights(
        shards,
        line(),
        GaussianNoise(NOISE),
        update=Pvi(steps=60, rate=0.1, draws=2, damping=0.7),
        rounds=10,
        synchronous_rounds=True,
    )
    mean, covariance = moments(exact)
    precision = 1.0 + exact.precision[0].diagonal()
    posterior = found.posterior
    assert ((posterior.mean - mean[0]).abs() * precision.sqrt()).max() < 0.3  # of a standard deviation
    assert (posterior.covariance * precision - 1.0).abs().max() < 0.2
    assert (covariance[0].diagonal() * precision - 1.0).max() > 0.5


class Copies(nn.Module):
    """Outputs w_j x_j: as many one-dimensional problems as there are weights, of the same rows if columns are."""

    def __init__(self, count):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count).double())

    def forward(self, x):
        return x * self.w


def copies(how, count=200, synchronous=True, rounds=30):
    """Posterior means and variances of 200 equal problems with chains of their own, two workers; and the exact ones."""
    torch.manual_seed(0)
    x = torch.randn(30, 1).double()
    y = 0.8 * x + NOISE**0.5 * torch.randn(30, 1).double()
    shards = [(x[k::2].expand(-1, count), y[k::2].expand(-1, count)) for k in range(2)]
    variance = 1.0 / (1.0 + x.square().sum().item() / NOISE)
    mean = variance * (x * y).sum().item() / NOISE
    found = fit_weights(
        shards,
        Copies(count),
        GaussianNoise(NOISE),
        update=how,
        rounds=rounds,
        synchronous_rounds=synchronous,
        start_variance=0.05,
        seed=1,
    ).posterior
    return (found.mean, mean), (found.covariance, variance)


def worst_in_errors(pairs):
    """How many standard errors (from the spread over the 200 problems) the average is away from the exact value."""
    return max(
        abs(found.mean().item() - exact) / (found.std().item() / math.sqrt(len(found)))
        for found, exact in pairs
    )


HALF = Snep(
    steps=20, samples=4, rate=0.2, decay=0.02, step_size=0.25, damper_every=5, beta=0.5
)  # the bias of noisy steps falls with their size, below the standard error here


def test_snep_is_the_exact_posterior_within_its_standard_error():
    """Average over 200 problems of the posterior's mean and variance; standard errors about 0.001 and 0.0003."""
    assert worst_in_errors(copies(HALF)) < 4.0


def test_snep_with_all_of_the_site_out_of_the_tilted_distribution_is_refused(monkeypatch):
    """The twin: the cavity is damper - lambda where it should be damper - lambda / beta."""
    times = Natural.times
    monkeypatch.setattr(Natural, "times", lambda self, other, power=1.0: times(self, other, max(power, -1.0)))
    assert worst_in_errors(copies(HALF, rounds=15)) > 20.0


def test_a_mean_parameter_and_its_natural_parameter_are_one_gaussian():
    """Full and diagonal, both ways; outside the limits mean and variances of the principal axes are cut off."""
    wide = Limits(10.0, (1e-2, 1e2))
    root = torch.randn(4, 4).double()
    full = Natural(root @ root.mT + torch.eye(4).double(), torch.randn(4).double())
    for natural in (full, Natural(full.precision.diagonal().clone(), full.shift)):
        mean, back = natural.mean_parameter().projected(wide)
        torch.testing.assert_close(back.precision, natural.precision)
        torch.testing.assert_close(back.shift, natural.shift)
        torch.testing.assert_close(mean.first, natural.within(wide).first)
        torch.testing.assert_close(mean.second, natural.within(wide).second)
    v = torch.randn(4).double().requires_grad_(True)
    density = torch.distributions.MultivariateNormal(
        torch.linalg.solve(full.precision, full.shift), precision_matrix=full.precision
    )
    (gradient,) = torch.autograd.grad(density.log_prob(v), v)
    torch.testing.assert_close(full.gradient(v.detach()), gradient)
    narrow = Limits(0.1, (0.5, 2.0))
    axes = torch.linalg.qr(root).Q
    sharp = Natural(
        (axes * torch.tensor([0.1, 1.0, 1.9, 50.0]).double()) @ axes.mT, 100.0 * torch.ones(4).double()
    )
    mean, back = sharp.mean_parameter().projected(narrow)
    eigenvalues = torch.linalg.eigvalsh(back.precision)
    torch.testing.assert_close(eigenvalues, torch.tensor([0.5, 1.0, 1.9, 2.0]).double())
    assert mean.first.abs().max() == 0.1
    silent = Natural(torch.zeros(4).double(), torch.ones(4).double()).within(narrow)
    torch.testing.assert_close(silent.second - silent.first.square(), torch.full((4,), 2.0).double())


# -- one result on every engine --------------------------------------------------------------------------------

BRIEF = Snep(steps=5, samples=2, rate=0.1, step_size=0.02, batch=8)
SMALL = Pvi(steps=10, batch=8, damping=0.25)  # no site so indefinite that the server halves its step


def sequential(shards, module, likelihood, how, rounds):
    """What rounds are, without an engine: every worker's step against what the last round left, then every put."""
    basis = weight_basis(module, likelihood)
    kind = SnepWorker if isinstance(how, Snep) else PviWorker
    names = [f"shard {k}" for k in range(len(shards))]
    workers = {n: kind(n, rows, basis, module, likelihood, 0, how) for n, rows in zip(names, shards)}
    variance, count = 0.01, len(shards)
    precision = torch.full((1, basis.size), (1.0 / variance - 1.0) / count).double()
    shift = basis.coordinates(module)[None] / (variance * count)
    sites = {
        name: Site(basis.id, precision, shift, torch.zeros(1).double(), 0, name, "", 0) for name in names
    }
    for _ in range(rounds):
        total = sum(site.precision for site in sites.values()), sum(site.shift for site in sites.values())
        made = {}
        for name, own in sites.items():
            cavity = replace(own, precision=total[0] - own.precision, shift=total[1] - own.shift)
            made[name] = workers[name].step(own, cavity)
        sites = made
    return sites


@pytest.mark.parametrize("how", [BRIEF, SMALL], ids=["snep", "pvi"])
def test_synchronous_rounds_equal_the_sequential_run(how):
    """Four threads, one thread: the same bits. A loop without server or engine: the same to 1e-8, which leaves room for
    the server's compensated sums and float32 networks. Another seed is another result."""
    shards, likelihood = waves(), GaussianNoise(0.04)

    def run(threads, seed=0):
        return fit_weights(
            shards,
            network(),
            likelihood,
            LocalEngine(threads),
            update=how,
            rounds=6,
            synchronous_rounds=True,
            seed=seed,
        ).server

    one, four = run(1), run(4)
    alone = sequential(shards, network(), likelihood, how, 6)
    for name, site in alone.items():
        for part in ("precision", "shift", "log_scale"):
            found = getattr(one.get(name), part)
            assert torch.equal(found, getattr(four.get(name), part))
            torch.testing.assert_close(found, getattr(site, part), rtol=1e-8, atol=1e-8)
        assert one.get(name).version == four.get(name).version == site.version == 6
    assert not torch.equal(run(1, seed=1).total().shift, one.total().shift)


@pytest.mark.slow
def test_ray_gives_the_same():
    for how in (BRIEF, SMALL):
        totals = [
            fit_weights(
                waves(2),
                network(),
                GaussianNoise(0.04),
                engine,
                update=how,
                rounds=3,
                synchronous_rounds=True,
            ).server.total()
            for engine in ("local", "ray")
        ]
        for part in ("precision", "shift"):
            torch.testing.assert_close(
                getattr(totals[0], part), getattr(totals[1], part), rtol=1e-6, atol=1e-6
            )


def test_asynchronous_snep_agrees_with_synchronous_snep():
    """In function space: the mean functions are within 0.1 of each other (root mean square; half the noise's standard
    deviation) and of the sine, where that of the first round is more than 0.4 away from both. Cold chains, which stay
    at one mode of a network. One thread and four workers: every answer rests on what was at the server three answers
    before."""
    how = Snep(steps=10, rate=0.1, step_size=0.05, batch=20, beta=0.25, temperature=0.001)
    x = torch.linspace(-2, 2, 50)[:, None]

    def mean_function(synchronous, rounds):
        found = fit_weights(
            waves(),
            network(),
            GaussianNoise(0.04),
            LocalEngine(1),
            update=how,
            rounds=rounds,
            synchronous_rounds=synchronous,
        )
        assert not found.failures
        return found.posterior.outputs(network(), x, 100, seed=0).mean(0)

    def apart(one, other):
        return (one - other).square().mean().sqrt().item()

    together, each_when_it_can, first = (
        mean_function(True, 40),
        mean_function(False, 40),
        mean_function(True, 1),
    )
    for found in (together, each_when_it_can):
        assert apart(found, torch.sin(2 * x)) < 0.1
        assert apart(found, first) > 0.4
    assert apart(together, each_when_it_can) < 0.1


# -- workers that go and come ----------------------------------------------------------------------------------


def test_a_new_incarnation_goes_on_from_the_servers_site(tmp_path):
    """SNEP of two workers, one of which dies after ten rounds: its site stays, and the next incarnation takes the site
    up where it was. What the first one still sends is refused, and nothing is counted twice."""
    how = replace(BRIEF, beta=0.5, temperature=0.01)
    shards = dict(zip("ab", waves(2)))

    def go(server, names, rounds):
        return fit_weights(
            {name: shards[name] for name in names},
            network(),
            GaussianNoise(0.04),
            LocalEngine(1),
            update=how,
            rounds=rounds,
            server=server,
        )

    with PosteriorServer(tmp_path / "weights.db") as server:
        go(server, "ab", 10)
        before = server.get("b")
        go(server, "a", 2)  # while b is away, its site stays what it was
        assert torch.equal(server.get("b").shift, before.shift)
    with PosteriorServer(tmp_path / "weights.db") as server:
        held = server.get("b")
        assert torch.equal(held.shift, before.shift)
        moving, how = how, replace(how, steps=1, rate=1e-9)
        go(server, "b", 1)
        again = server.get("b")
        assert again.incarnation != before.incarnation and again.version == 0
        torch.testing.assert_close(again.precision, before.precision, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again.shift, before.shift, rtol=1e-6, atol=1e-6)
        with pytest.raises(SiteRefused) as refused:
            server.put(replace(before, version=before.version + 1))
        assert refused.value.reason == "incarnation"
        how = moving
        go(server, "ab", 5)
        total = server.get("a").precision + server.get("b").precision
        torch.testing.assert_close(server.total().precision, total)
        assert server.total().count == 80
        server.remove("b")
        torch.testing.assert_close(server.total().precision, server.get("a").precision)


def test_a_worker_that_comes_late_starts_from_nothing():
    """Its rows are not there yet, so its first site is as wide as the limits allow, not around the module's weights."""
    server, (early, late) = PosteriorServer(), waves(2)
    for name, rows in (("early", early), ("late", late)):
        how = Snep(steps=1, rate=1e-9, batch=20)
        fit_weights({name: rows}, network(), GaussianNoise(0.04), update=how, rounds=1, server=server)
    torch.testing.assert_close(server.get("late").precision, torch.full((1, 25), 0.01).double())
    assert server.get("early").precision.min() > 50


# -- classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [Snep(step_size=0.05, rate=0.1, beta=0.5, temperature=0.1), Pvi(steps=40, batch=30)],
    ids=["snep", "pvi"],
)
def test_classes_on_two_workers(how):
    """Three well separated classes: nearly all right, and sure of it; the module stays as it was."""
    torch.manual_seed(4)
    centres = torch.tensor([[3.0, 0.0], [-2.0, 2.0], [-2.0, -2.0]])
    y = torch.arange(120) % 3
    x = centres[y] + 0.6 * torch.randn(120, 2)
    module = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3))
    before = [p.clone() for p in module.parameters()]
    found = fit_weights(
        [(x[k::2], y[k::2]) for k in range(2)], module, Softmax(3), LocalEngine(1), update=how, rounds=20
    )
    outputs = found.posterior.outputs(module, x, 50, seed=0)
    probs = outputs.softmax(-1).mean(0)
    assert (probs.argmax(1) == y).float().mean() > 0.95
    assert -probs[torch.arange(120), y].log().mean() < 0.3
    assert math.isfinite(found.log_evidence) and not found.failures
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, words",
    [
        ("nan", "row 3 of x holds NaN"),
        ("huge", "row 3 of x holds NaN or infinite"),
        ("label", "row 5 of y is 3; classes are 0 to 2"),
        ("half", "row 5 of y is 0.5"),
        ("columns", "does not take x"),
        ("outputs", r"outputs are \[2\] a row"),
        ("short", "n rows each"),
        ("empty", "at least one"),
        ("two", "one class number a row"),
    ],
)
def test_bad_shards_are_named(what, words):
    x, y, outputs = torch.randn(12, 2).double(), torch.arange(12) % 3, 3
    if what in ("nan", "huge"):  # 1e300 is no float32
        x[3, 1] = {"nan": float("nan"), "huge": 1e300}[what]
    elif what in ("label", "half"):
        y = y.double()
        y[5] = {"label": 3.0, "half": 0.5}[what]
    elif what == "columns":
        x = x[:, :1]
    elif what == "outputs":
        outputs = 2
    elif what == "short":
        y = y[:-1]
    elif what == "empty":
        x, y = x[:0], y[:0]
    else:
        y = y[:, None].expand(-1, 2)
    for how in (Snep(), Pvi()):
        with pytest.raises(ServerError, match=words) as refused:
            fit_weights({"theirs": (x, y)}, nn.Linear(2, outputs), Softmax(3), update=how, rounds=1)
        assert "theirs" in str(refused.value)


def test_one_bad_shard_leaves_the_others_to_it():
    good, bad = waves(2)
    bad[1][7] = float("inf")
    found = fit_weights({"good": good, "bad": bad}, network(), GaussianNoise(0.04), update=BRIEF, rounds=3)
    assert found.rounds == {"good": 3, "bad": 0}
    assert "row 7 of y" in found.failures["bad"]


def test_bad_options_are_refused():
    shards, fine = waves(), GaussianNoise(0.04)
    for module in (network().half(), network().bfloat16()):
        with pytest.raises(OptionError, match="float32"):
            fit_weights(shards, module, fine)
    mixed = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1).double())
    with pytest.raises(OptionError, match="float32, torch.float64"):
        fit_weights(shards, mixed, fine)
    for wrong in (
        {"prior_scale": 0.0},
        {"start_variance": 1.0},
        {"rounds": 0},
        {"seed": -1},
        {"engine": "spark"},
    ):
        with pytest.raises(OptionError):
            fit_weights(shards, network(), fine, **wrong)
    with pytest.raises(OptionError, match="no shard"):
        fit_weights([], network(), fine)
    for wrong in ({"steps": 0}, {"batch": 0}, {"beta": 0.0}, {"rate": 1.5}, {"step_size": -1.0}, {"decay": -1.0},
                  {"temperature": float("nan")}, {"variance_limits": (1.0, 0.1)}, {"damper_every": 0}):  # fmt: skip
        with pytest.raises(OptionError):
            Snep(**wrong)
    for wrong in ({"steps": 0}, {"draws": 0}, {"damping": 0.0}, {"damping": 1.5}, {"rate": 0.0}):
        with pytest.raises(OptionError):
            Pvi(**wrong)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="positive"):
            GaussianNoise(wrong)
    for wrong in (1, True):
        with pytest.raises(OptionError, match="at least 2"):
            Softmax(wrong)


def test_an_unknown_loss_or_update_is_refused():
    unchecked = inspect.unwrap(fit_weights)  # outside of tests nothing checks the annotations
    with pytest.raises(OptionError, match="choose Softmax"):
        unchecked(waves(), network(), nn.MSELoss())
    with pytest.raises(OptionError, match="choose Snep"):
        unchecked(waves(), network(), GaussianNoise(0.04), update="adam")


def test_a_chain_that_leaves_for_infinity_says_so():
    how = Snep(step_size=1e6, batch=20)
    with pytest.raises(ServerError, match="left for infinity; take a smaller step_size"):
        fit_weights(waves(1), network(), GaussianNoise(0.04), update=how, rounds=5)


def test_another_noise_is_another_basis():
    """Sites found under one likelihood never add up with those of another."""
    one, other = (weight_basis(network(), GaussianNoise(v)) for v in (0.04, 0.05))
    assert one.id != other.id == weight_basis(network(), GaussianNoise(0.05)).id
    server = PosteriorServer()
    fit_weights(waves(), network(), GaussianNoise(0.04), update=BRIEF, rounds=1, server=server)
    fit_weights(waves(), network(), GaussianNoise(0.05), update=BRIEF, rounds=1, server=server)
    assert server.basis()[0].id == other.id


@pytest.mark.gpu
@pytest.mark.parametrize("how", [BRIEF, SMALL], ids=["snep", "pvi"])
def test_on_a_gpu(how):
    found = fit_weights(waves(2), network().cuda(), GaussianNoise(0.04), update=how, rounds=3)
    assert not found.failures and found.posterior.mean.device.type == "cpu"
