"""Particle filter over a batch of series of different lengths; its log evidence is FIVO, and with a twist SIXO.

A model is two pure functions; N particles, B series, observations a tensor or a pytree of tensors [T, B, ...]:

    init(particles, observation, noise)  -> state, log_weight    z_0 and p(z_0) p(x_0 | z_0) / q(z_0)
    step(state, observation, t, noise)   -> state, log_weight    z_t and p(z_t | z_<t) p(x_t | z_t) / q(z_t)

state is a tensor or a pytree of tensors [N, B, ...] with whatever the next step needs: the latent, a recurrent state, a
function drawn for each particle. log_weight is [N, B], a log density ratio. observation is the slice [B, ...] of step
t, and noise the slice [N, B, ...] of `noise` [T, N, B, ...], random numbers drawn beforehand; where none are given it
is None, and a model that needs some draws them itself. A twist is twist(state, t) -> log r_t(z_t) [N, B], finite; it is
called at every step, and what it says where a series ends is not used: r_T = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fspace.errors import FspaceError, OptionError
from fspace.inference.amortized import particle_checks as checks
from fspace.inference.amortized.resampling import SCHEMES, relaxed

State = Any  # a tensor, or a pytree of tensors


@dataclass(frozen=True)
class Filtered:
    """What a filter found: T steps, N particles, B series. After a series' end all is as it was at its last step.

    log_evidence `[B]`    log of an unbiased estimate of p(x_1:T); its mean is a lower bound of log p (FIVO).
    surrogate `[B]`       the same value, with the gradient that ancestor_grad asks for.
    ess `[T, B]`          effective sample size of the weights of step t, before resampling.
    resampled `[T, B]`    whether particles were resampled after step t.
    lengths `[B]`         observations in each series.
    states                one a step, as log_weights[t] weigh them; with history=False the last step's only.
    """

    log_evidence: Float[Tensor, " b"]
    surrogate: Float[Tensor, " b"]
    ess: Float[Tensor, "t b"]
    resampled: Bool[Tensor, "t b"]
    lengths: Int[Tensor, " b"]
    states: list[State]
    ancestors_by_step: list[Tensor]
    log_weights_by_step: list[Tensor]

    @property
    def ancestors(self) -> Int[Tensor, "t n b"]:
        """Particle n of step t goes on from particle ancestors[t, n] of step t - 1; at step 0 it is n."""
        return torch.stack(self.ancestors_by_step)

    @property
    def log_weights(self) -> Float[Tensor, "t n b"]:
        """Of step t before resampling, since the last resampling, the twist taken off; with states[t] an estimate of
        p(z_t | x_1:t). Not normalised, without gradient."""
        return torch.stack(self.log_weights_by_step)

    @property
    def weights(self) -> Float[Tensor, "t n b"]:
        """log_weights, normalised: a filtered mean is (weights[t] * f(states[t])).sum(0)."""
        return self.log_weights.softmax(1)


def filter(
    init: Callable[..., Any],
    step: Callable[..., Any],
    observations: Any,
    lengths: Any,
    particles: int,
    *,
    resampling: str = "systematic",
    criterion: str = "ess",
    threshold: float = 0.5,
    ancestor_grad: str | None = None,
    temperature: float = 0.5,
    baseline: Tensor | None = None,
    twist: Callable[[State, int], Tensor] | None = None,
    noise: Any = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    history: bool = True,
    compiled: bool = False,
) -> Filtered:
    """Run `particles` particles through each series; init, step and twist are as the module says.

    observations [T, B, ...]; lengths [B] whole numbers in 1..T, or None where all series have T steps. What stands
    after a series' end is not looked at: step then sees its last observation, and what it answers is dropped.
    resampling: "systematic", "stratified", "multinomial" or "residual". criterion: a series is resampled where its
    effective sample size is at most threshold * N ("ess"), after every step ("always"), or "never", which makes the
    log evidence the importance-weighted bound (IWAE). No series is resampled after its last step. Where observations
    say much, a threshold nearer to 1 gives a tighter bound.

    ancestor_grad says what the gradient of `surrogate` does about the choice of ancestors:
      None       nothing: low variance, biased.
      "score"    adds the score function of the ancestors times the log evidence gathered after them, less `baseline`
                 [T, B], any guess at that made without these particles. Unbiased with criterion "always" and "never";
                 with "ess" when to resample depends on the parameters too, and that is left out.
      "relaxed"  Concrete ancestors at `temperature`: states are averaged with the rows of resampling.relaxed. The log
                 evidence is that of the relaxed filter, no bound: report the one of ancestor_grad=None beside it.
    The last two need resampling="multinomial", whose ancestors are independent. Under the others the probability of
    what was drawn is the length of an interval that may be arbitrarily short, and its score has infinite variance.

    uniforms are resampling's random numbers, [T, 1, B] for "systematic", [T, N, B] for the others, [T, N, N, B] for
    relaxed ancestors; drawn from `generator` (on the observations' device) where not given. compiled=True puts each
    step, the model's and the filter's, through torch.compile, anew for every `step` object and shape.
    Weights are float64. Second derivatives of log_evidence are right where ancestors stay; those of a score surrogate
    mean nothing. Raises DataError for lengths, observations or noise that do not fit and for what the model's
    distributions refuse, naming the step; OptionError for an option and for what init, step or twist return;
    NumericalError where a series' weights are NaN, +inf or all -inf, naming series and step.
    Sources: Maddison et al. 2017 (Filtering Variational Objectives); Lawson et al. 2022 (SIXO).
    """
    checks.options(particles, resampling, criterion, threshold, ancestor_grad, temperature)
    steps, series, device = checks.batch(observations)
    length = checks.lengths(lengths, steps, series, device)
    checks.noise(noise, steps, particles, series)
    limit = {"ess": threshold * particles, "always": math.inf, "never": -math.inf}[criterion]
    time = torch.arange(steps, device=device)[:, None]
    last = time == length - 1
    inner = (time < length - 1).unbind()  # the steps after which a series may be resampled
    alive: Sequence[Tensor | None] = [None] * steps
    if bool((length < steps).any()):
        alive = (time < length).unbind()
        observations = each(lambda leaf: _last_held(leaf, length), observations)
    numbers: Sequence[Tensor | None] = [None] * steps
    if criterion != "never":
        each_step = (1,) if resampling == "systematic" else (particles,)
        shape = (steps, *(each_step if ancestor_grad != "relaxed" else (particles, particles)), series)
        if uniforms is None:
            uniforms = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
        else:
            checks.numbers("uniforms", uniforms, shape, below=1.0)
        numbers = uniforms.unbind()
    if baseline is not None:
        checks.numbers("baseline", baseline, (steps, series))

    plan = _Plan(
        step, twist, particles, series, resampling, criterion, limit, ancestor_grad, temperature,
        stay=torch.arange(particles, device=device)[:, None].expand(particles, series),
    )  # fmt: skip
    advance = torch.compile(_advance) if compiled else _advance
    nothing = torch.zeros(particles, series, dtype=torch.float64, device=device)
    carried = _Carried(None, nothing, nothing, plan.stay)
    trace: list[_Step] = []
    for t, (observation, random) in enumerate(zip(_by_step(observations, steps), _by_step(noise, steps))):
        given = (observation, random, alive[t], inner[t], numbers[t])
        try:
            if t:
                carried, done = advance(plan, carried, t, *given)
            else:
                state, increment = checks.answer(init(particles, observation, random), 0, particles, series)
                carried, done = _weigh(plan, carried, 0, state, increment, *given[3:])
        except FspaceError:
            raise
        except ValueError as error:
            raise checks.refused(error, t, observation) from error
        if t and not history:
            trace[-1] = trace[-1]._replace(state=None)
        trace.append(done)

    kept = _Step(*map(list, zip(*trace)))
    resampled = torch.stack(kept.chosen)
    closed = resampled | last  # a resampling closes an account, and the end of the series the last one
    summed = torch.stack(kept.peak) + torch.stack(kept.total).log() - math.log(particles)
    checks.weights(summed, kept.untwisted, length)
    gathered = torch.where(closed, summed, 0.0)
    log_evidence = _LogEvidence.apply(gathered.sum(0), closed, kept.mass, kept.total, *kept.increment)
    surrogate = log_evidence
    if ancestor_grad == "score" and criterion != "never":
        reward = gathered.sum(0) - gathered.cumsum(0)
        reward = reward if baseline is None else reward - baseline.detach()
        score = torch.stack(kept.score)
        surrogate = log_evidence + (reward * (score - score.detach())).sum(0)
    return Filtered(
        log_evidence,
        surrogate,
        torch.stack(kept.size),
        resampled,
        length,
        kept.state if history else kept.state[-1:],
        kept.parents,
        kept.untwisted,
    )


@dataclass(frozen=True)
class _Plan:
    """What is the same at every step."""

    step: Callable[..., Any]
    twist: Callable[..., Any] | None
    particles: int
    series: int
    resampling: str
    criterion: str
    limit: float  # resampled where the effective sample size is at most this
    ancestor_grad: str | None
    temperature: float
    stay: Tensor  # [N, B], each particle its own parent


class _Carried(NamedTuple):
    """What a step hands to the next, resampled."""

    state: Any
    log_weight: Any  # [N, B]
    log_twist: Any  # [N, B]
    parents: Any  # [N, B], where each was before resampling


class _Step(NamedTuple):
    """What is kept of a step; after the loop, lists over steps."""

    state: Any
    parents: Any
    increment: Any  # [N, B], the twist in it, with its gradient
    untwisted: Any  # log-weights [N, B]
    peak: Any  # largest log-weight [B]
    mass: Any  # exp(log-weight - peak) [N, B]
    total: Any  # sum of mass [B]
    size: Any  # effective sample size [B]
    chosen: Any  # resampled [B]
    score: Any  # log-probability of the ancestors [B]


def _advance(
    plan: _Plan, before: _Carried, t: int, observation: Any, random: Any, alive: Any, inner: Any, numbers: Any
) -> tuple[_Carried, _Step]:
    """One step of the model, then of the filter."""
    answer = plan.step(before.state, observation, t, random)
    state, increment = checks.answer(answer, t, plan.particles, plan.series)
    if alive is not None:  # a series that has ended stands still
        checks.alike(state, before.state, t)
        state = each(lambda new, old: torch.where(against(alive, new), new, old), state, before.state)
        increment = torch.where(alive, increment, 0.0)
    return _weigh(plan, before, t, state, increment, inner, numbers)


def _weigh(
    plan: _Plan, before: _Carried, t: int, state: Any, increment: Tensor, inner: Tensor, numbers: Any
) -> tuple[_Carried, _Step]:
    """Weights after an increment, and the particles resampled where they have become too uneven."""
    log_twist = before.log_twist
    if plan.twist is not None:
        log_twist = checks.density("twist", t, plan.twist(state, t), plan.particles, plan.series).double()
        log_twist = torch.where(inner, log_twist, 0.0)  # r_T = 1
        increment = increment + log_twist - before.log_twist
    log_weight = before.log_weight + (increment if plan.ancestor_grad else increment.detach()).double()
    known = log_weight.detach()
    peak = known.amax(0)
    mass = (known - peak).exp()
    total = mass.sum(0)
    size = total.square() / mass.square().sum(0)
    chosen = inner & (size <= plan.limit)
    untwisted = known if plan.twist is None else known - log_twist.detach()

    score = None
    parents = plan.stay
    if plan.criterion != "never":
        if plan.ancestor_grad == "relaxed":
            mix = relaxed(log_weight.log_softmax(0), numbers, plan.temperature)
            parents = torch.where(chosen, mix.argmax(1), plan.stay)
            unmixed = torch.eye(plan.particles, dtype=mix.dtype, device=mix.device)[:, :, None]
            carry = partial(_mixed, mix=torch.where(chosen, mix, unmixed))
        else:
            parents = torch.where(chosen, SCHEMES[plan.resampling](mass, numbers), plan.stay)
            carry = partial(gather, index=parents)
        resampled = each(carry, state)
        log_twist = log_twist if plan.twist is None else carry(log_twist)
        if plan.ancestor_grad == "score":
            score = torch.where(chosen, log_weight.log_softmax(0).gather(0, parents).sum(0), 0.0)
        log_weight = torch.where(chosen, 0.0, log_weight)
    else:
        resampled = state
    done = _Step(state, before.parents, increment, untwisted, peak, mass, total, size, chosen, score)
    return _Carried(resampled, log_weight, log_twist, parents), done


class _LogEvidence(torch.autograd.Function):
    """Sum over accounts of log mean exp(sum of the increments in it), as a function of the increments [N, B].

    The loop has found the value; the derivative by an increment is the particle's normalised weight where its account
    is closed. Written out because autograd would keep several tensors a step for it.
    """

    @staticmethod
    def forward(
        value: Tensor, closed: Tensor, masses: list[Tensor], totals: list[Tensor], *increments: Tensor
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.closed, ctx.masses, ctx.totals, *increments = inputs
        ctx.save_for_backward(*increments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        increments, masses, totals = ctx.saved_tensors, ctx.masses, ctx.totals
        if (
            torch.is_grad_enabled()
        ):  # second derivatives are wanted: weights must be functions of the increments
            masses, totals = _weights(increments, ctx.closed), [1.0] * len(masses)
        share = torch.zeros_like(masses[0])
        found = []
        for closed, mass, total, increment in reversed(list(zip(ctx.closed, masses, totals, increments))):
            share = torch.where(closed, mass * (grad / total), share)
            found.append(share.to(increment.dtype))
        return None, None, None, None, *reversed(found)


def _weights(increments: Sequence[Tensor], closed: Bool[Tensor, "t b"]) -> list[Tensor]:
    """Normalised weights [N, B] of each step: summed increments, anew after each account that is closed."""
    log_weight, found = torch.zeros_like(increments[0], dtype=torch.float64), []
    for increment, ends in zip(increments, closed):
        log_weight = log_weight + increment
        found.append(log_weight.softmax(0))
        log_weight = torch.where(ends, 0.0, log_weight)
    return found


def gather(leaf: Tensor, index: Int[Tensor, "m b"]) -> Tensor:
    """leaf[index[m, b], b] of a tensor [N, B, ...]: [M, B, ...]."""
    if leaf.ndim == 2:
        return leaf.gather(0, index)
    particles, series = leaf.shape[:2]
    if leaf.numel() == particles * series:
        return leaf.gather(0, index.reshape(*index.shape, *[1] * (leaf.ndim - 2)))
    rows = (index * series + torch.arange(series, device=index.device)).reshape(
        -1
    )  # whole rows are copied faster
    return leaf.reshape(particles * series, -1).index_select(0, rows).reshape(*index.shape, *leaf.shape[2:])


def each(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """`function` of every tensor of a pytree (and those at the same place of others)."""
    return function(tree, *others) if isinstance(tree, Tensor) else tree_map(function, tree, *others)


def against(flags: Bool[Tensor, " b"], leaf: Tensor) -> Tensor:
    """Flags [B] shaped to be broadcast against a tensor [N, B, ...]."""
    return flags.reshape(-1, *[1] * (leaf.ndim - 2))


def _mixed(leaf: Tensor, mix: Float[Tensor, "n n b"]) -> Tensor:
    """Averages of a tensor [N, B, ...] over parents, with the weights of each child."""
    if not leaf.is_floating_point():
        raise OptionError(
            f"ancestor_grad='relaxed' averages states, but one holds {leaf.dtype}; make it real numbers "
            "(one-hot or Concrete), or use ancestor_grad='score'."
        )
    return torch.einsum("ckb,kb...->cb...", mix.to(leaf.dtype), leaf)


def _by_step(tree: Any, steps: int) -> list[Any]:
    """The slices of every tensor [T, ...] of a pytree; unbound at once, so that the gradient is stacked once."""
    if tree is None:
        return [None] * steps
    leaves, form = tree_flatten(tree)
    return [tree_unflatten(list(slices), form) for slices in zip(*(leaf.unbind() for leaf in leaves))]


def _last_held(leaf: Tensor, length: Int[Tensor, " b"]) -> Tensor:
    """Observations [T, B, ...] in which each series repeats its last one after its end: inside the likelihood's support
    and finite, so that no NaN reaches a gradient."""
    time = torch.arange(len(leaf), device=leaf.device)[:, None]
    index = torch.minimum(time, length - 1)
    return leaf.gather(0, index.reshape(*index.shape, *[1] * (leaf.ndim - 2)).expand_as(leaf))
