"""Particle filter: ragged batches by hand, padding, axes, the bounds it contains, modules, derivatives, devices."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fspace.errors import OptionError
from fspace.inference.amortized import smc
from fspace.inference.amortized.resampling import SCHEMES
from fspace.inference.amortized.smoothing import backward_simulation, trajectories

STEPS, PARTICLES, SERIES = 7, 12, 5
LENGTHS = torch.tensor([7, 3, 1, 6, 7])
SCORE = {"resampling": "multinomial", "ancestor_grad": "score"}


def lse2(a, b):
    """log((e^a + e^b) / 2)."""
    return math.log((math.exp(a) + math.exp(b)) / 2)


# ---- ragged resampling, by hand -----------------------------------------------------------------------
# Two particles whose increments are the same at every step: 5 and 1 in series 0, 4 and 0.5 in series 1. The ESS is
# (1 + r)^2 / (1 + r^2) for a ratio r of the weights: after one step 1.037 and 1.059, after two 1.0007 and 1.0018.
INCREMENTS = torch.tensor([[5.0, 4.0], [1.0, 0.5]])
CASES = {
    "never, series 1 ends first": ([5, 3], "never", 0.5, [lse2(25, 5), lse2(12, 1.5)], [[], []]),
    "always, series 1 ends first": (
        [5, 3], "always", 0.5, [5 * lse2(5, 1), 3 * lse2(4, 0.5)], [[0, 1, 2, 3], [0, 1]],
    ),
    "every second step, one step left over in both": (
        [5, 3], "ess", 0.505, [2 * lse2(10, 2) + lse2(5, 1), lse2(8, 1) + lse2(4, 0.5)], [[1, 3], [1]],
    ),
    "every second step, due just at the end of both": (
        [4, 2], "ess", 0.505, [2 * lse2(10, 2), lse2(8, 1)], [[1], []],
    ),
    "series 0 ends before it is due, series 1 goes on": (
        [1, 5], "ess", 0.505, [lse2(5, 1), 2 * lse2(8, 1) + lse2(4, 0.5)], [[], [1, 3]],
    ),
    "only series 0 is due": (
        [4, 4], "ess", 0.525, [4 * lse2(5, 1), 2 * lse2(8, 1)], [[0, 1, 2], [1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ragged_resampling_by_hand(case, scheme):
    lengths, criterion, threshold, expected, resampled = CASES[case]
    steps = max(lengths)

    def init(particles, x, noise):
        return INCREMENTS, INCREMENTS

    def step(state, x, t, noise):
        return state, INCREMENTS

    found = smc.filter(
        init, step, torch.zeros(steps, 2), lengths, 2,
        criterion=criterion, threshold=threshold, resampling=scheme,
    )  # fmt: skip
    assert found.log_evidence.tolist() == pytest.approx(expected, rel=1e-14)
    assert [found.resampled[:, b].nonzero()[:, 0].tolist() for b in range(2)] == resampled


# ---- a small model with all it takes: a recurrent state in a pytree ------------------------------------


class Recurrent(torch.nn.Module):
    """A latent and a GRU's state for each particle, learned proposal and emission."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.cell = torch.nn.GRUCell(3, 6)
        self.prior, self.proposal, self.emission = (torch.nn.Linear(n, 4) for n in (6, 7, 8))

    def init(self, particles, x, noise):
        hidden = noise["z"].new_zeros(particles, len(x), 6)
        return self.move({"z": hidden[..., :2], "h": hidden, "age": hidden[..., 0].long()}, x, noise)

    def step(self, state, x, t, noise):
        return self.move(state, x, noise)

    def move(self, state, x, noise):
        x = x.expand(state["h"].shape[0], -1, -1)
        prior = self.normal(self.prior(state["h"]))
        proposal = self.normal(self.proposal(torch.cat([state["h"], x], -1)))
        z = proposal.mean + proposal.stddev * noise["z"]
        emission = self.normal(self.emission(torch.cat([state["h"], z], -1))[..., [0, 2]])
        h = self.cell(torch.cat([z, x], -1).flatten(0, 1), state["h"].flatten(0, 1)).view_as(state["h"])
        weight = (prior.log_prob(z) - proposal.log_prob(z)).sum(-1) + emission.log_prob(x).sum(-1)
        return {"z": z, "h": h, "age": state["age"] + 1}, weight

    @staticmethod
    def normal(parameters):
        mean, raw = parameters.chunk(2, -1)
        return torch.distributions.Normal(mean, torch.nn.functional.softplus(raw) + 0.1)


def inputs(steps=STEPS, series=SERIES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, series, 1, generator=generator, dtype=torch.float64)
    noise = {"z": torch.randn(steps, PARTICLES, series, 2, generator=generator, dtype=torch.float64)}
    return x, noise, torch.rand(steps, PARTICLES, series, generator=generator, dtype=torch.float64)


def evaluate(x, lengths, noise, uniforms, **options):
    """The run and the gradients of the sum over series by all parameters."""
    options = {"resampling": "stratified", "threshold": 0.9} | options
    uniforms = uniforms if options.get("criterion") != "never" else None
    model = Recurrent().double()
    found = smc.filter(
        model.init, model.step, x, lengths, PARTICLES, noise=noise, uniforms=uniforms, **options
    )
    gradients = torch.autograd.grad(found.surrogate.sum(), list(model.parameters()), materialize_grads=True)
    return found, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize(
    "options", [{}, {"criterion": "always"}, {"resampling": "multinomial", "ancestor_grad": "score"}]
)
def test_padding_changes_neither_value_nor_gradient(fill, options):
    x, noise, uniforms = inputs()
    for b, length in enumerate(LENGTHS):
        x[length:, b] = fill
    found, gradient = evaluate(x, LENGTHS, noise, uniforms, **options)
    assert bool(found.log_evidence.isfinite().all()) and bool(gradient.isfinite().all())
    values, total = [], torch.zeros_like(gradient)
    for b, length in enumerate(LENGTHS.tolist()):  # each alone, cut where it ends
        alone = {"z": noise["z"][:length, :, [b]]}
        single, one = evaluate(x[:length, [b]], None, alone, uniforms[:length, :, [b]], **options)
        values.append(single.log_evidence)
        total = total + one
        assert torch.allclose(single.ess, found.ess[:length, [b]], rtol=1e-10)
        assert torch.equal(single.ancestors, found.ancestors[:length, :, [b]])
        assert bool((found.ess[length:, b] == found.ess[length - 1, b]).all())
        assert not found.resampled[length - 1 :, b].any()
    assert torch.allclose(found.log_evidence, torch.cat(values), rtol=1e-12)
    assert torch.allclose(gradient, total, rtol=1e-9, atol=1e-11)
    assert bool(found.resampled.any())


def test_padding_of_many_lengths_of_noise_is_the_same_to_the_last_bit():
    x, noise, uniforms = inputs()
    x[LENGTHS[1] :, 1] = torch.nan
    first, gradient = evaluate(x, LENGTHS, noise, uniforms)
    x[LENGTHS[1] :, 1] = -3.0
    noise["z"][LENGTHS[1] :, :, 1] = 100.0
    second, again = evaluate(x, LENGTHS, noise, uniforms)
    assert torch.equal(first.log_evidence, second.log_evidence)
    assert torch.equal(gradient, again)
    x[LENGTHS[1] - 1, 1] = -3.0  # the twin: an observation that counts
    assert not torch.equal(first.log_evidence, evaluate(x, LENGTHS, noise, uniforms)[0].log_evidence)


def test_order_of_the_series_does_not_matter():
    x, noise, uniforms = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    found, _ = evaluate(x, LENGTHS, noise, uniforms)
    turned, _ = evaluate(x[:, order], LENGTHS[order], {"z": noise["z"][:, :, order]}, uniforms[:, :, order])
    assert torch.allclose(turned.log_evidence, found.log_evidence[order], rtol=1e-12)
    assert torch.equal(turned.ancestors, found.ancestors[:, :, order])


def test_never_resampling_is_the_importance_weighted_bound_to_the_last_bit():
    x, noise, uniforms = inputs()
    found, gradient = evaluate(x, None, noise, uniforms, criterion="never")
    model = Recurrent().double()
    state, summed = model.init(PARTICLES, x[0], {"z": noise["z"][0]})
    for t in range(1, STEPS):
        state, weight = model.step(state, x[t], t, {"z": noise["z"][t]})
        summed = summed + weight
    bound = summed.logsumexp(0) - math.log(PARTICLES)
    assert torch.equal(found.log_evidence, bound)
    expected = torch.autograd.grad(bound.sum(), list(model.parameters()), materialize_grads=True)
    assert torch.allclose(gradient, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert not torch.equal(found.log_evidence, evaluate(x, None, noise, uniforms)[0].log_evidence)


@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
def test_one_particle_is_the_evidence_lower_bound(criterion):
    x, noise, _ = inputs()
    noise = {"z": noise["z"][:, :1]}
    model = Recurrent().double()
    found = smc.filter(model.init, model.step, x, None, 1, noise=noise, criterion=criterion)
    state, summed = model.init(1, x[0], {"z": noise["z"][0]})
    for t in range(1, STEPS):
        state, weight = model.step(state, x[t], t, {"z": noise["z"][t]})
        summed = summed + weight
    assert torch.allclose(found.log_evidence, summed[0], rtol=1e-12)


def test_states_and_ancestors_tell_the_same_story():
    """The age of each particle is its number of steps, and lineages are those of the recurrent states."""
    x, noise, uniforms = inputs()
    found, _ = evaluate(x, LENGTHS, noise, uniforms)
    assert torch.equal(found.states[-1]["age"], LENGTHS.expand(PARTICLES, SERIES))
    assert torch.equal(found.ancestors[0], torch.arange(PARTICLES)[:, None].expand(PARTICLES, SERIES))
    kept = found.ancestors[1:] == torch.arange(PARTICLES)[:, None]
    assert bool(kept.all(1)[~found.resampled[:-1]].all())
    paths, weights = trajectories(found)
    assert paths["z"].shape == (STEPS, PARTICLES, SERIES, 2)
    assert torch.allclose(weights.sum(0), torch.ones(SERIES, dtype=torch.float64))
    assert torch.equal(paths["h"][-1], found.states[-1]["h"])
    last = found.states[STEPS - 2]["h"].gather(0, found.ancestors[-1][..., None].expand(-1, -1, 6))
    assert torch.equal(paths["h"][-2], last)


def test_history_is_kept_only_when_wanted():
    x, noise, uniforms = inputs()
    whole, gradient = evaluate(x, LENGTHS, noise, uniforms)
    lean, same = evaluate(x, LENGTHS, noise, uniforms, history=False)
    assert len(whole.states) == STEPS and len(lean.states) == 1
    assert torch.equal(whole.states[-1]["z"], lean.states[0]["z"]) and torch.equal(gradient, same)
    with pytest.raises(OptionError, match="history"):
        trajectories(lean)
    with pytest.raises(OptionError, match="history"):
        backward_simulation(lean, lambda z, f, t: z, 3)


def test_the_same_generator_gives_the_same_run_and_noise_may_be_the_models_own():
    x = torch.randn(STEPS, SERIES)

    def init(particles, x, noise):
        assert noise is None
        z = torch.randn(particles, len(x))
        return z, -((x - z) ** 2)

    def step(z, x, t, noise):
        z = z + torch.randn_like(z)
        return z, -((x - z) ** 2)

    def run(seed):
        torch.manual_seed(0)
        return smc.filter(init, step, x, None, 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1).log_evidence, run(1).log_evidence)
    assert not torch.equal(run(1).log_evidence, run(2).log_evidence)
    assert run(1).log_evidence.dtype == torch.float64


def test_first_order_gradients_also_by_functional_transforms():
    x, noise = torch.randn(STEPS, SERIES), torch.randn(STEPS, PARTICLES, SERIES)

    def bound(scale):
        def init(particles, x, noise):
            return noise, -((x - scale * noise) ** 2)

        def step(z, x, t, noise):
            return z + noise, -((x - scale * (z + noise)) ** 2)

        generator = torch.Generator().manual_seed(0)
        return smc.filter(init, step, x, None, PARTICLES, noise=noise, generator=generator).log_evidence.sum()

    scale = torch.tensor(0.7, requires_grad=True)
    (expected,) = torch.autograd.grad(bound(scale), scale)
    assert torch.equal(torch.func.grad(bound)(torch.tensor(0.7)), expected)


@pytest.mark.parametrize("criterion", ["always", "ess", "never"])
def test_second_derivatives_are_finite_differences_of_the_first(criterion):
    """A ragged batch, the same noise and uniforms; ancestors stay where a parameter moves by 1e-5."""
    x, noise, uniforms = inputs()
    x[LENGTHS[1] :, 1] = torch.nan
    e = noise["z"][..., 0]

    def value(theta):
        def weigh(z, x):
            return -0.5 * ((x[:, 0] - z) / theta[2]) ** 2 - theta[2].log()

        def init(n, x, e):
            return theta[1] * e, weigh(theta[1] * e, x)

        def step(z, x, t, e):
            z = theta[0] * z + theta[1] * e
            return z, weigh(z, x)

        held = None if criterion == "never" else uniforms[:, :1]
        return smc.filter(
            init, step, x, LENGTHS, PARTICLES, noise=e, uniforms=held, criterion=criterion, threshold=0.9
        )

    theta = torch.tensor([0.7, 0.9, 0.6], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.functional.hessian(lambda theta: value(theta).log_evidence.sum(), theta)
    for i, h in enumerate(1e-5 * torch.eye(3, dtype=torch.float64)):
        above, below = value(theta + h), value(theta - h)
        assert torch.equal(above.ancestors, below.ancestors)
        slopes = [torch.autograd.grad(run.log_evidence.sum(), theta)[0] for run in (above, below)]
        assert torch.allclose(found[i], (slopes[0] - slopes[1]) / 2e-5, rtol=1e-6, atol=1e-6)
    assert found.abs().min() > 0.1


def compare_compiled():
    """Values, ancestors and gradients of compiled steps; run by the test below."""
    for options in ({}, SCORE):
        x, noise, uniforms = inputs()
        x[LENGTHS[1] :, 1] = torch.nan
        plain, gradient = evaluate(x, LENGTHS, noise, uniforms, **options)
        fast, same = evaluate(x, LENGTHS, noise, uniforms, compiled=True, **options)
        assert torch.equal(plain.ancestors, fast.ancestors)
        assert torch.allclose(plain.log_evidence, fast.log_evidence, rtol=1e-10)
        assert torch.allclose(gradient, same, rtol=1e-8, atol=1e-10)
        assert not torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.slow
def test_compiled_steps_give_the_same():
    """In a process of its own: the checks of shapes that tests switch on cannot be compiled."""
    command = [sys.executable, "-W", "ignore", "-c", "import test_smc; test_smc.compare_compiled()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_device(device):
    """The same answer wherever it runs."""
    x, noise, uniforms = inputs()
    model = Recurrent().double().to(device)
    found = smc.filter(
        model.init, model.step, x.to(device), LENGTHS, PARTICLES, noise={"z": noise["z"].to(device)},
        uniforms=uniforms.to(device), resampling="stratified",
    )  # fmt: skip
    expected, _ = evaluate(x, LENGTHS, noise, uniforms, threshold=0.5)
    assert found.log_evidence.device.type == device.type
    assert torch.allclose(found.log_evidence.cpu(), expected.log_evidence, rtol=1e-9)
