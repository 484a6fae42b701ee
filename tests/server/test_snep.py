"""Gaussians over weights from many workers: SNEP and PVI reach known posteriors, on every engine the same."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fspace.errors import OptionError, ServerError
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
from fspace.server.weight_gaussians import Limits, Mean, Natural

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
    """One round a worker: the best q of a Gaussian model does not depend on what the others say. The evidence is that of
    all rows. The twin, one site taken twice, is far away."""
    shards, exact, evidence = linear()
    how = Pvi(steps=300, damping=1.0)
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
    twice = replace(
        exact, precision=exact.precision + once.precision, shift=exact.shift + once.shift
    )
    assert divergence(twice, exact) > 0.01


def test_diagonal_pvi_has_the_mean_field_optimum():
    """Of a linear model with correlated inputs: the exact mean, and the diagonal of the exact precision, as far as Adam's
    noise lets see; variances of the exact posterior are larger by up to 75%."""
    shards, exact, _ = linear(n=200, correlation=0.6)
    found = fit_weights(
        shards,
        line(),
        GaussianNoise(NOISE),
        update=Pvi(steps=60, rate=0.1, draws=4, damping=0.7),
        rounds=10,
        synchronous_rounds=True,
    )
    mean, covariance = moments(exact)
    precision = 1.0 + exact.precision[0].diagonal()
    posterior = found.posterior
    assert ((posterior.mean - mean[0]).abs() * precision.sqrt()).max() < 0.3  # of a standard deviation
    assert (posterior.covariance * precision - 1.0).abs().max() < 0.2
    assert (covariance[0].diagonal() * precision - 1.0).max() > 0.7


class Copies(nn.Module):
    """Outputs w_j x_j: as many one-dimensional problems as there are weights, of the same rows if columns are."""

    def __init__(self, count):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count).double())

    def forward(self, x):
        return x * self.w


def copies(how, count=200, synchronous=True, rounds=50):
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
        abs(found.mean().item() - exact) / (found.std().item() / math.sqrt(len(found))) for found, exact in pairs
    )


HALF = Snep(
    steps=20, samples=4, rate=0.2, decay=0.02, step_size=0.25, damper_every=5, beta=0.5
)  # the bias of noisy steps falls with their size, below the standard error here


def test_snep_is_the_exact_posterior_within_its_standard_error():
    """Average over 200 problems of the posterior's mean and variance; standard errors about 0.0006 and 0.0002."""
    assert worst_in_errors(copies(HALF)) < 4.0


def test_snep_with_all_of_the_site_out_of_the_tilted_distribution_is_refused(monkeypatch):
    """The twin: the cavity is damper - lambda where it should be damper - lambda / beta."""
    times = Natural.times
    monkeypatch.setattr(Natural, "times", lambda self, other, power=1.0: times(self, other, max(power, -1.0)))
    assert worst_in_errors(copies(HALF, rounds=30)) > 20.0


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
    sharp = Natural((axes * torch.tensor([0.1, 1.0, 1.9, 50.0]).double()) @ axes.mT, 100.0 * torch.ones(4).double())
    mean, back = sharp.mean_parameter().projected(narrow)
    eigenvalues = torch.linalg.eigvalsh(back.precision)
    torch.testing.assert_close(eigenvalues, torch.tensor([0.5, 1.0, 1.9, 2.0]).double())
    assert mean.first.abs().max() == 0.1
    silent = Natural(torch.zeros(4).double(), torch.ones(4).double()).within(narrow)
    torch.testing.assert_close(silent.second - silent.first.square(), torch.full((4,), 2.0).double())


# -- one result on every engine --------------------------------------------------------------------------------

BRIEF = Snep(steps=5, samples=2, rate=0.1, step_size=0.02, batch=8)
SMALL = Pvi(steps=10, batch=8)


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
    """Four threads, one thread: the same bits. A loop without server or engine: the same to 1e-8, which leaves room for the
    server's compensated sums and float32 networks. Another seed is another result."""
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
    pytest.importorskip("ray")
    for how in (BRIEF, SMALL):
        totals = [
            fit_weights(
                waves(2), network(), GaussianNoise(0.04), engine, update=how, rounds=3, synchronous_rounds=True
            ).server.total()
            for engine in ("local", "ray")
        ]
        for part in ("precision", "shift"):
            torch.testing.assert_close(getattr(totals[0], part), getattr(totals[1], part), rtol=1e-6, atol=1e-6)
