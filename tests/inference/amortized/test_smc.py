"""Particle filter: ragged batches by hand, padding, axes, the bounds it contains, modules, devices, what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fspace.errors import DataError, NumericalError, OptionError
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


# ---- refusals --------------------------------------------------------------------------------------


def plain(particles=4, steps=5, series=3, lengths=None, change=lambda t, w: w, twist=None, **options):
    """A filter whose increments `change` may spoil."""

    def init(n, x, noise):
        return torch.zeros(n, series), change(0, torch.zeros(n, series))

    def step(z, x, t, noise):
        return z, change(t, torch.zeros(particles, series))

    return smc.filter(init, step, torch.zeros(steps, series), lengths, particles, twist=twist, **options)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([5, 0, 3], r"Series 1 is empty \(lengths\[1\] = 0\)"),
        ([5, 4, -1], r"lengths\[2\] = -1, but observations have 5 steps"),
        ([6, 4, 1], r"lengths\[0\] = 6, but observations have 5 steps"),
        ([5, 4], r"shape \(2,\), but there are 3 series"),
        (torch.tensor([[5, 4, 3]]), r"shape \(1, 3\)"),
        ([5.0, 4.0, 3.0], "whole numbers, not float32"),
        (torch.tensor([5.5, 4, 3]), "whole numbers, not float32"),
        ([True, True, True], "whole numbers, not bool"),
        (["5", "4", "3"], "whole numbers"),
        (5, r"shape \(\), but there are 3 series"),
    ],
)
def test_lengths_that_lie(lengths, words):
    with pytest.raises(DataError, match=words):
        plain(lengths=lengths)


def spoil(step, series, value, particles=slice(None)):
    def change(t, weight):
        if t == step:
            weight[particles, series] = value
        return weight

    return change


@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_weights_that_end_a_series_are_named(criterion, step):
    with pytest.raises(NumericalError, match=rf"Series 1, step {step} of 5: all log-weights are -inf"):
        plain(change=spoil(step, 1, -torch.inf), criterion=criterion)
    with pytest.raises(NumericalError, match=rf"Series 2, step {step} of 5: 1 of 4 log-weights are NaN"):
        plain(change=spoil(step, 2, torch.nan, 1), criterion=criterion)
    with pytest.raises(NumericalError, match=rf"Series 0, step {step} of 5: a log-weight is \+inf"):
        plain(change=spoil(step, 0, torch.inf, 1), criterion=criterion)
    with pytest.raises(NumericalError, match=r"3 series are affected: 0, 1, 2"):
        plain(change=spoil(step, slice(None), torch.nan), criterion=criterion)
    some = plain(
        change=spoil(step, 1, -torch.inf, slice(0, 2)), criterion=criterion
    )  # half of them is no end
    assert some.log_evidence.tolist() == pytest.approx([0.0, math.log(0.5), 0.0], abs=1e-12)


def test_what_stands_after_the_end_is_not_refused():
    found = plain(lengths=[5, 2, 5], change=spoil(3, 1, torch.nan))
    assert found.log_evidence.tolist() == [0.0, 0.0, 0.0]


def test_dead_particles_have_no_gradient_and_no_children():
    bias = torch.zeros(4, 3, requires_grad=True)

    def change(t, weight):
        weight = weight + bias
        return weight.masked_fill(torch.arange(4)[:, None] < 2, -torch.inf) if t == 1 else weight

    found = plain(change=change, criterion="always")
    found.log_evidence.sum().backward()
    assert bool(bias.grad.isfinite().all())
    assert bool((found.ancestors[2] >= 2).all())


@pytest.mark.parametrize(
    "options", [{"criterion": "always"}, {"resampling": "multinomial", "ancestor_grad": "relaxed"}]
)
def test_a_twist_that_is_not_finite_is_refused(options):
    with pytest.raises(NumericalError, match="Series 0, step 1 of 5"):
        plain(twist=lambda z, t: torch.full((4, 3), torch.nan if t == 1 else 0.0), **options)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda n: (torch.zeros(n, 3), torch.zeros(3, n)), r"step \(t = 1\) returned torch.float32 \[3, 4\]"),
        (lambda n: (torch.zeros(n, 3), torch.zeros(n, 1)), r"\[4, 1\] for the log-weights"),
        (lambda n: (torch.zeros(n, 3), torch.zeros(n, 3, dtype=torch.int64)), "real numbers"),
        (lambda n: (torch.zeros(n, 3), 0.0), "float for the log-weights"),
        (lambda n: (torch.zeros(3, n), torch.zeros(n, 3)), r"state with \[3, 4\]"),
        (lambda n: ({"z": torch.zeros(n, 3), "n": 1}, torch.zeros(n, 3)), "state with int"),
        (lambda n: torch.zeros(n, 3), r"must return \(state, log_weight\), not Tensor"),
        (lambda n: None, "not NoneType"),
    ],
)
def test_wrong_answers_of_step_and_init(answer, words):
    def right(n, x, noise):
        return torch.zeros(n, 3), torch.zeros(n, 3)

    x = torch.zeros(5, 3)
    with pytest.raises(OptionError, match=words):
        smc.filter(right, lambda z, x, t, noise: answer(4), x, None, 4)
    with pytest.raises(OptionError, match="^init"):
        smc.filter(lambda n, x, noise: answer(4), lambda z, x, t, noise: (z, z), x, None, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 0}, "particles=0"),
        ({"resampling": "best"}, "resampling='best' does not exist; there are 'systematic'"),
        ({"criterion": "sometimes"}, "criterion='sometimes'"),
        ({"ancestor_grad": "full"}, "ancestor_grad='full'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"twist": lambda z, t: torch.zeros(3)}, r"twist \(t = 0\) returned torch.float32 \[3\]"),
    ],
)
def test_options_that_do_not_exist(options, words):
    with pytest.raises(OptionError, match=words):
        plain(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": torch.zeros(5, 3, 4)}, r"noise is \(5, 3, 4\); it must be .* = \[5, 4, 3, ...\]"),
        ({"noise": {"z": 1.0}}, "noise is float"),
        ({"uniforms": torch.zeros(5, 4, 3)}, r"uniforms has shape \(5, 4, 3\); it must be \(5, 1, 3\)"),
        ({"baseline": torch.zeros(5)}, r"baseline has shape \(5,\); it must be \(5, 3\)"),
        ({"steps": 0}, "0 steps of 3 series"),
        ({"series": 0}, "5 steps of 0 series"),
    ],
)
def test_shapes_that_do_not_fit(options, words):
    with pytest.raises(DataError, match=words):
        plain(**options)


def test_observations_must_begin_alike():
    x = {"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)}
    with pytest.raises(DataError, match=r"different \[steps, series\]: \(5, 2\), \(5, 3\)"):
        smc.filter(lambda n, x, e: None, lambda z, x, t, e: None, x, None, 4)
    with pytest.raises(DataError, match="must be a tensor"):
        smc.filter(lambda n, x, e: None, lambda z, x, t, e: None, torch.zeros(5), None, 4)


def test_backward_simulation_refuses_what_it_cannot_use():
    found = plain()
    with pytest.raises(OptionError, match=r"log_transition \(t = 4\) returned \[4, 3\]; .* = \[4, 6, 3\]"):
        backward_simulation(found, lambda z, following, t: torch.zeros(4, 3), 6)
    with pytest.raises(OptionError, match="paths=0"):
        backward_simulation(found, lambda z, following, t: torch.zeros(4, 6, 3), 0)
    for value in (-torch.inf, torch.nan):

        def density(z, following, t, value=value):
            return torch.full((4, 6, 3), value) if t == 3 else torch.zeros(4, 6, 3)

        with pytest.raises(NumericalError, match="Series 0: log_transition gives no particle of step 2"):
            backward_simulation(found, density, 6)
