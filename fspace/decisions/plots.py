"""One function per question about a decision; each returns the Axes it drew on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from fspace.canvas import BLUE, GREY, INK, ORANGE, PALE, SERIES, array, finish, legend, new_axes, shortened
from fspace.decisions.acquisitions import fulfilled
from fspace.decisions.optimisation import Optimizer
from fspace.decisions.rejecting import RiskCoverage
from fspace.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(optimizer: Optimizer, *, ax: Axes | None = None) -> Axes:
    """What was observed at every evaluation, and the best so far; of several objectives the front."""
    if not optimizer.told:
        raise DataError("Nothing was told yet; there is nothing to show.")
    ax = new_axes(ax)
    good = fulfilled(optimizer._data()[1], optimizer.constraints).numpy()
    names = list(optimizer.goals)
    if len(names) > 1:
        first, second = (np.array([t.values[name] for t in optimizer.told]) for name in names[:2])
        ax.scatter(first[good], second[good], s=22, color=PALE, label="tried")
        if not good.all():
            ax.scatter(first[~good], second[~good], s=22, color=GREY, marker="x", label="breaks a constraint")
        front = (
            sorted((t.values[names[0]], t.values[names[1]]) for t in optimizer.pareto) if good.any() else []
        )
        if front:
            ax.plot(*zip(*front, strict=True), "o-", color=BLUE, lw=1.6, ms=5, label="not worse in all")
        finish(
            ax,
            f"{len(front)} of {len(good)} are on the front",
            *(f"{n} ({optimizer.goals[n]})" for n in names[:2]),
        )
        legend(ax)
        return ax
    name = names[0]
    y, steps = np.array([t.values[name] for t in optimizer.told]), np.arange(1, len(good) + 1)
    sign = 1.0 if optimizer.goals[name] == "maximize" else -1.0
    best = sign * np.maximum.accumulate(np.where(good, sign * y, -np.inf))
    known = np.isfinite(best)
    ax.scatter(steps[good], y[good], s=24, color=PALE, zorder=3, label="observed")
    if not good.all():
        ax.scatter(
            steps[~good], y[~good], s=24, color=GREY, marker="x", zorder=3, label="breaks a constraint"
        )
    ax.step(steps[known], best[known], where="post", color=BLUE, lw=2, zorder=4, label="best so far")
    start = optimizer.initial
    if 0 < start < len(steps):
        words = f"the model is asked from {start + 1} on"  # whoever made the experiments of a table
        ax.axvline(start + 0.5, color=INK, lw=0.8, ls=(0, (4, 3)), label=words)
    title = (
        f"{optimizer.goals[name]} {name}: {best[-1]:.4g} after {len(steps)}"
        if known.any()
        else "none is feasible yet"
    )
    finish(ax, title, "evaluation", name)
    ax.locator_params(axis="x", integer=True)
    legend(ax)
    return ax


def ranked(gain: Any, pool: Any, chosen: Any, names: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """The chosen rows among the pool, over two of its inputs. Shapes: gain [k], pool [n, 2], chosen [k, 2]."""
    ax = new_axes(ax)
    pool, chosen, gains = array(pool), array(chosen), array(gain)
    ax.scatter(pool[:, 0], pool[:, 1], s=9, color=PALE, lw=0, label=f"pool ({len(pool):,} shown)")
    size = 80 + 120 * (gains - gains.min()) / max(float(np.ptp(gains)), 1e-12)
    ax.scatter(
        chosen[:, 0], chosen[:, 1], s=size, color=ORANGE, alpha=0.85, lw=0, label="chosen, larger: first"
    )
    if len(chosen) <= 30:
        for i, place in enumerate(chosen):
            ax.annotate(str(i + 1), place, fontsize=7.5, color=INK, ha="center", va="center")
    finish(ax, f"{len(chosen)} rows to label next", names[0], names[1])
    legend(ax)
    return ax


def actions(decision: Any, labels: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """How often each action is best, or (numbers) the actions over the rows' expected utility."""
    ax = new_axes(ax)
    index = array(decision.index)
    if labels is None:
        action = array(decision.action).astype(np.float64)
        ax.hist(action, bins=min(40, max(8, len(action) // 10)), color=BLUE)
        finish(ax, f"Best actions of {len(action):,} rows", "action", "rows")
        ax.locator_params(axis="y", integer=True)
        return ax
    close = array(decision.margin) < 2 * array(decision.margin_error)
    places = np.arange(len(labels))
    sure = [int(((index == k) & ~close).sum()) for k in places]
    open_ = [int(((index == k) & close).sum()) for k in places]
    ax.barh(places, sure, color=BLUE, height=0.66, label="best")
    if sum(open_):
        ax.barh(
            places,
            open_,
            left=sure,
            color=PALE,
            height=0.66,
            label="best, but within Monte Carlo error of the next",
        )
        legend(ax)
    for k in range(len(labels)):
        ax.text(sure[k] + open_[k], k, f" {sure[k] + open_[k]:,}", va="center", fontsize=9, color=INK)
    ax.set_yticks(places, [fill(shortened(str(label), 60), 22) for label in labels])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.locator_params(axis="x", integer=True)
    finish(ax, f"Best action of {len(index):,} rows", "rows", "")
    return ax


def risk_coverage(
    curves: Mapping[str, RiskCoverage], *, target: float | None = None, ax: Axes | None = None
) -> Axes:
    """Risk of the cases kept over how many are kept, a curve a model; smaller AURC is better."""
    ax = new_axes(ax)
    for (name, curve), colour in zip(curves.items(), SERIES * len(curves), strict=False):
        ax.plot(curve.coverage, curve.risk, color=colour, lw=2, label=f"{name}: AURC {curve.aurc:.3g}")
    if target is not None:
        ax.axhline(target, color=INK, lw=1, ls=(0, (4, 3)), label=f"target {target:g}")
    finish(ax, "What is kept, and how wrong it is", "share kept, the surest first", "mean loss of those kept")
    ax.set_ylim(bottom=0)
    legend(ax)
    return ax


def learning_curves(
    curves: Mapping[str, Sequence[Any]], name: str = "score", *, ax: Axes | None = None
) -> Axes:
    """Score over the labels bought, of one or several runs of `learning_curve` a criterion: their mean and spread."""
    ax = new_axes(ax)
    for (criterion, runs), colour in zip(curves.items(), SERIES * len(curves), strict=False):
        runs = [runs] if runs and isinstance(runs[0], dict) else list(runs)
        labels = [entry["labels"] for entry in runs[0]]
        scores = np.array([[entry["score"] for entry in run] for run in runs])
        mean = scores.mean(0)
        if len(runs) > 1:
            error = scores.std(0, ddof=1) / np.sqrt(len(runs))
            ax.fill_between(labels, mean - error, mean + error, color=colour, alpha=0.18, lw=0)
        ax.plot(labels, mean, "o-", color=colour, lw=1.8, ms=4, label=criterion)
    finish(ax, "What labels buy", "labels", name)
    legend(ax, loc="lower right")
    return ax


def regrets(curves: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Cumulative regret over steps: each [steps], or [runs, steps] (mean and standard error)."""
    ax = new_axes(ax)
    for (name, regret), colour in zip(curves.items(), SERIES * len(curves), strict=False):
        total = np.atleast_2d(array(regret)).cumsum(1)
        mean, steps = total.mean(0), np.arange(1, total.shape[1] + 1)
        if len(total) > 1:
            error = total.std(0, ddof=1) / np.sqrt(len(total))
            ax.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.18, lw=0)
        ax.plot(
            steps,
            mean,
            color=colour,
            lw=1.9,
            label=f"{name}: {mean[-1]:{',.0f' if mean[-1] >= 100 else '.3g'}}",
        )
    finish(ax, "Regret so far", "step", "cumulative regret")
    ax.set_ylim(bottom=0)
    legend(ax, loc="upper left")
    return ax
