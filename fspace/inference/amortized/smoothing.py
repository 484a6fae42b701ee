"""States given all observations of their series, from what a particle filter kept.

Unwinding ancestors is free, but the paths meet: far from the end all go through few particles. Backward simulation
draws each step anew among all N particles and needs the transition density, N M evaluations a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.amortized.checks import asked, count
from fspace.inference.amortized.resampling import inverse_cdf
from fspace.inference.amortized.smc import Filtered, each, gather


def trajectories(filtered: Filtered) -> tuple[Any, Float[Tensor, "n b"]]:
    """The N paths that lead to the last step's particles, each tensor [T, N, B, ...], and their weights [N, B].

    After a series' end a path stays where it was. Raises OptionError where the filter kept no history.
    """
    _check_history(filtered)
    ancestors = filtered.ancestors_by_step
    index = ancestors[0]  # the particles themselves
    path = []
    for state, parents in zip(reversed(filtered.states), reversed(ancestors)):
        path.append(each(lambda leaf, index=index: gather(leaf, index), state))
        index = parents.gather(0, index)
    return _in_time(path), filtered.log_weights_by_step[-1].softmax(0)


@torch.no_grad()
def backward_simulation(
    filtered: Filtered,
    log_transition: Callable[[Any, Any, int], Tensor],
    paths: int,
    generator: torch.Generator | None = None,
) -> Any:
    """`paths` equally weighted paths [T, M, B, ...] given all observations: forward filtering, backward simulation.

    log_transition(state, following, t) -> [N, M, B]: log density of `following` [1, M, B, ...] at step t given `state`
    [N, 1, B, ...] at step t - 1, which must be all that it depends on. A deterministic part of a state has no density
    and no place there. After a series' end a path stays where it was.
    Raises OptionError for a wrong shape, for paths below 1 and where the filter kept no history, NumericalError where
    no particle can have led to the following state, naming series and step.
    Source: Godsill, Doucet and West 2004.
    """
    _check_history(filtered)
    count(paths, "paths")
    steps = len(filtered.states)
    particles, series = filtered.log_weights_by_step[0].shape
    device = filtered.lengths.device
    uniforms = torch.rand(steps, paths, series, dtype=torch.float64, generator=generator, device=device)
    index = inverse_cdf(filtered.log_weights_by_step[-1].softmax(0), uniforms[-1])
    path = [each(lambda leaf: gather(leaf, index), filtered.states[-1])]
    possible = []
    for t in range(steps - 1, 0, -1):
        state, log_weight = filtered.states[t - 1], filtered.log_weights_by_step[t - 1]
        before, after = each(lambda leaf: leaf[:, None], state), each(lambda leaf: leaf[None], path[-1])
        density = asked(f"log_transition (t = {t})", log_transition, before, after, t)
        if not isinstance(density, Tensor) or density.shape != (particles, paths, series):
            found = list(density.shape) if isinstance(density, Tensor) else type(density).__name__
            raise OptionError(
                f"log_transition (t = {t}) returned {found}; it must be [particles, paths, series] = "
                f"[{particles}, {paths}, {series}]."
            )
        backward = log_weight.log_softmax(0)[:, None] + density.double()
        moves = t < filtered.lengths
        possible.append(~moves | backward.logsumexp(0).isfinite().all(0))
        drawn = inverse_cdf(backward.softmax(0), uniforms[t - 1][None])[0].clamp(
            max=particles - 1
        )  # NaN: refused
        index = torch.where(moves, drawn, index)
        path.append(each(lambda leaf, index=index: gather(leaf, index), state))
    _check_possible(possible)
    return _in_time(path)


def _in_time(path: list[Any]) -> Any:
    """One tensor [T, ...] of states from the last to the first."""
    path = path[::-1]
    return each(lambda *leaves: torch.stack(leaves), *path)


def _check_history(filtered: Filtered) -> None:
    if len(filtered.states) < len(filtered.ancestors_by_step):
        raise OptionError("The filter kept only the last states; smoothing needs filter(..., history=True).")


def _check_possible(possible: list[Tensor]) -> None:
    if not possible:
        return
    bad = ~torch.stack(possible[::-1])
    if bad.any():
        t, b = bad.nonzero()[0].tolist()
        raise NumericalError(
            f"Series {b}: log_transition gives no particle of step {t} a finite probability of leading to the state "
            f"drawn at step {t + 1}. Is it the density p(following | state) of the model that was filtered?"
        )
