"""What a particle filter refuses, and in which words."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference.amortized.checks import count
from fspace.inference.amortized.resampling import SCHEMES


def options(
    particles: Any, resampling: Any, criterion: Any, threshold: Any, ancestor_grad: Any, temperature: Any
) -> None:
    """Raises OptionError for the first that does not exist or does not fit the others."""
    count(particles, "particles")
    for name, value, known in (
        ("resampling", resampling, tuple(SCHEMES)),
        ("criterion", criterion, ("ess", "always", "never")),
        ("ancestor_grad", ancestor_grad, (None, "score", "relaxed")),
    ):
        if value not in known:
            raise OptionError(f"{name}={value!r} does not exist; there are {', '.join(map(repr, known))}.")
    if not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise OptionError(f"threshold={threshold!r} must be a share of the particles, above 0 and at most 1.")
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise OptionError(f"temperature={temperature!r} must be a finite number above 0.")
    if ancestor_grad is not None and resampling != "multinomial":
        raise OptionError(
            f"ancestor_grad={ancestor_grad!r} needs resampling='multinomial', not {resampling!r}: only there the "
            "ancestors are independent and their probability is a product of weights."
        )


def batch(observations: Any) -> tuple[int, int, torch.device]:
    """Steps T, series B and device of observations [T, B, ...]."""
    leaves = tree_leaves(observations)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim >= 2 for leaf in leaves):
        raise DataError(
            "observations must be a tensor, or a pytree of tensors, of shape [steps, series, ...]."
        )
    shapes = sorted({tuple(leaf.shape[:2]) for leaf in leaves})
    if len(shapes) > 1:
        raise DataError(f"observations begin with different [steps, series]: {', '.join(map(str, shapes))}.")
    steps, series = shapes[0]
    if not steps or not series:
        raise DataError(f"observations hold {steps} steps of {series} series; there must be one of each.")
    return steps, series, leaves[0].device


def lengths(given: Any, steps: int, series: int, device: torch.device) -> Int[Tensor, " b"]:
    """Observations in each series, checked; all have T where None is given."""
    if given is None:
        return torch.full((series,), steps, device=device)
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"lengths must be whole numbers, one a series ({error}).") from error
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise DataError(f"lengths must be whole numbers, not {str(found.dtype).removeprefix('torch.')}.")
    if found.shape != (series,):
        raise DataError(f"lengths has shape {tuple(found.shape)}, but there are {series} series.")
    for b, length in enumerate(found.tolist()):
        if length == 0:
            raise DataError(f"Series {b} is empty (lengths[{b}] = 0); leave it out of the batch.")
        if not 0 < length <= steps:
            raise DataError(
                f"lengths[{b}] = {length}, but observations have {steps} steps: it must be 1..{steps}."
            )
    return found.to(device=device, dtype=torch.int64)


def noise(given: Any, steps: int, particles: int, series: int) -> None:
    """Raises DataError unless every leaf is [T, N, B, ...]."""
    for leaf in tree_leaves(given) if given is not None else []:
        found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        if not isinstance(leaf, Tensor) or leaf.shape[:3] != (steps, particles, series):
            raise DataError(
                f"noise is {found}; it must be [steps, particles, series, ...] = [{steps}, {particles}, {series}, ...]."
            )


def numbers(name: str, given: Any, shape: tuple[int, ...], below: float = float("inf")) -> None:
    """Raises DataError for what is no tensor of that shape, or holds NaN, an infinity or what is not in [0, below)."""
    if not isinstance(given, Tensor):
        raise DataError(f"{name} must be a tensor of shape {shape}, not {type(given).__name__}.")
    if given.shape != shape:
        raise DataError(f"{name} has shape {tuple(given.shape)}; it must be {shape}.")
    fine = given.isfinite() if below == float("inf") else (given >= 0) & (given < below)
    if not bool(fine.all()):
        place = (~fine).nonzero()[0].tolist()
        must = "must be finite" if below == float("inf") else f"must lie in [0, {below:g})"
        raise DataError(f"{name}{place} is {given[tuple(place)].item():g}; it {must}.")


def refused(error: ValueError, t: int, observation: Any) -> DataError:
    """What a ValueError of init, step or twist becomes: torch.distributions has one for NaN and for what is outside the
    support. Names the step, and the first series whose observation is not finite."""
    where = ""
    for leaf in tree_leaves(observation):
        wrong = ~leaf.isfinite().reshape(len(leaf), -1).all(1)
        if not where and bool(wrong.any()):
            where = f" The observation of series {int(wrong.nonzero()[0])} is not finite."
    return DataError(
        f"{_source('step', t)} of the model refused its values.{where} Is an observation outside the support of the "
        f"likelihood, or NaN? It said: {error}"
    )


def alike(state: Any, before: Any, t: int) -> None:
    """Raises OptionError where a state has not the form of the one before: a series that has ended keeps the latter."""
    forms = [(form, [leaf.shape for leaf in leaves]) for leaves, form in map(tree_flatten, (state, before))]
    if forms[0] != forms[1]:
        raise OptionError(
            f"step (t = {t}) returned a state of another form than the one it was given. In a batch of series of "
            "different lengths it must keep its keys and shapes, for a series that has ended keeps its last state."
        )


def answer(found: Any, t: int, particles: int, series: int) -> tuple[Any, Tensor]:
    """The state and log-weight that init (t = 0) or step returned; OptionError where they are not such."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise OptionError(
            f"{_source('step', t)} must return (state, log_weight), not {type(found).__name__}."
        )
    state, log_weight = found
    for leaf in [state] if isinstance(state, Tensor) else tree_leaves(state):
        if not isinstance(leaf, Tensor) or leaf.shape[:2] != (particles, series):
            shape = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise OptionError(
                f"{_source('step', t)} returned a state with {shape}; every tensor of it must be [particles, series, "
                f"...] = [{particles}, {series}, ...]."
            )
    return state, density("step", t, log_weight, particles, series)


def density(source: str, t: int, found: Any, particles: int, series: int) -> Tensor:
    """A log-weight or log twist [N, B]; OptionError where it is not."""
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != (particles, series):
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"{_source(source, t)} returned {shape} for the log-weights; they must be real numbers of shape "
            f"[particles, series] = [{particles}, {series}]."
        )
    return found


def _source(name: str, t: int) -> str:
    return "init" if name == "step" and t == 0 else f"{name} (t = {t})"


def weights(summed: Float[Tensor, "t b"], log_weights: list[Tensor], length: Int[Tensor, " b"]) -> None:
    """Raises NumericalError, naming series and step, where weights, [N, B] a step, have no finite log-sum [T, B]."""
    bad = ~summed.isfinite()
    if not bad.any():
        return
    wrong = bad.any(0).nonzero()[:, 0].tolist()
    b = wrong[0]
    t = int(bad[:, b].nonzero()[0])
    column = log_weights[t][:, b]
    if column.isnan().any():
        what = f"{int(column.isnan().sum())} of {len(column)} log-weights are NaN"
        advice = "Is the observation NaN, or outside the support of the likelihood?"
    elif (column == torch.inf).any():
        what = "a log-weight is +inf"
        advice = "Does the proposal's density underflow, or a likelihood's scale reach 0?"
    elif bool((column == -torch.inf).all()):
        what = "all log-weights are -inf: no particle could have given the observation"
        advice = (
            "Is it inside the support of the likelihood? More particles or a proposal that sees it may help."
        )
    else:
        what = "the twist has left no finite weight"
        advice = "A log twist must be finite for some particle that has a weight, and never NaN or +inf."
    others = (
        f" ({len(wrong)} series are affected: {', '.join(map(str, wrong[:10]))})" if len(wrong) > 1 else ""
    )
    raise NumericalError(f"Series {b}, step {t} of {int(length[b])}: {what}{others}. {advice}")
