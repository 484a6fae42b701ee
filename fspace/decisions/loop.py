"""The loop of Bayesian optimisation: ask, evaluate, tell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from fspace.decisions.optimisation import Optimizer
from fspace.decisions.sources import check_callable
from fspace.decisions.space import Space
from fspace.errors import InfeasibleError
from fspace.predictive_base import check_whole


def optimize(
    f: Callable[[dict[str, Any]], Any],
    space: Space | Mapping[str, Any],
    evaluations: int = 30,
    batch: int = 1,
    progress: bool = True,
    **options: Any,
) -> Optimizer:
    """Evaluate f(configuration) until there are `evaluations` in all, or all of a finite space was tried; the returned
    Optimizer has `best` and `told`.

    f gives a number, or {outcome: number}. batch: configurations chosen at a time. progress: a line on stderr after
    every batch. options: of `Optimizer`; with state=... a run that was killed goes on where it was, what was pending
    is evaluated first. After Ctrl-C what was told is given back. Raises OptionError, and what `tell` raises.
    """
    check_callable(f, "f")
    optimizer = Optimizer(space, **options)
    check_whole("evaluations", evaluations, 2), check_whole("batch", batch)
    try:
        _evaluate(optimizer, f, evaluations, batch, progress)
    except KeyboardInterrupt:
        if not optimizer.told:
            raise
        print(f"Interrupted after {len(optimizer.told)} of {evaluations}.", file=sys.stderr)
    return optimizer


def _evaluate(
    optimizer: Optimizer, f: Callable[..., Any], evaluations: int, batch: int, progress: bool
) -> None:
    started = time.perf_counter()
    while len(optimizer.told) < evaluations:
        missing = min(batch, evaluations - len(optimizer.told)) - len(optimizer.pending)
        if missing > 0:
            _ask_for(optimizer, missing)
        if not optimizer.pending:
            break
        for configuration in list(optimizer.pending):
            optimizer.tell(configuration, f(dict(configuration)))
        if progress:
            print(_line(optimizer, evaluations, time.perf_counter() - started), file=sys.stderr, flush=True)


def _ask_for(optimizer: Optimizer, count: int) -> None:
    """Ask for `count`, or as many as a finite space has left. Raises InfeasibleError where it never had any."""
    while count:
        try:
            optimizer.ask(count)
            return
        except InfeasibleError:
            if count == 1 and not optimizer.told:
                raise
            count -= 1


def _line(optimizer: Optimizer, evaluations: int, seconds: float) -> str:
    last = ", ".join(f"{name} {value:.4g}" for name, value in optimizer.told[-1].values.items())
    try:
        best = (
            f"best {optimizer.best.values[optimizer.outcomes[0]]:.6g}"
            if len(optimizer.goals) == 1
            else f"{len(optimizer.pareto)} on the front"
        )
    except InfeasibleError:
        best = "none fulfils the constraints yet"
    return f"{len(optimizer.told)}/{evaluations}: {last}; {best}; {seconds:.1f} s"
