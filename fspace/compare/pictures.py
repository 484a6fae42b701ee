"""Pictures of a study, one for each question a reader has; each draws on what it is given and returns it.

bands               what does each method say between the data, beside a reference?
calibration_curves  are the stated probabilities right?
rank_diagram        who is better over all data sets, and is it more than chance?
cost_quality        what does a better score cost?
detection           who notices rows of another kind?
prior_draws         what does each prior say of functions, before any data?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fspace.canvas import BLUE, GREY, INK, ORANGE, PALE, SERIES, finish, legend, new_axes, shortened
from fspace.compare.ranks import Ranking, higher_is_better
from fspace.compare.results import Results
from fspace.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (*SERIES, "#c2478b", "#2a9d8f", "#7f5539", "#a7b1ba", "#111111", "#e0a458")
FEW = 15  # rows of classes below which a bin of a calibration curve says nothing
STYLES = ("-", (0, (5, 2)), (0, (1, 1.2)))
METRIC_WORDS = {
    "log_likelihood": "log-likelihood per point", "joint_log_likelihood": "joint log-likelihood per point",
    "rmse": "RMSE", "crps": "CRPS", "calibration_error": "calibration error", "coverage_90": "90% interval coverage",
    "width_90": "90% interval width", "sharpness": "sharpness", "accuracy": "accuracy", "brier": "Brier score",
    "calibration_error_width": "calibration error, equal width", "aurc": "AURC", "augrc": "AUGRC",
    "fit_seconds": "seconds to fit", "cpu_seconds": "processor seconds to fit", "predict_seconds": "seconds to predict",
}  # fmt: skip


def words(metric: str) -> str:
    """What a reader calls a score."""
    return METRIC_WORDS.get(metric, metric.replace("auroc", "AUROC").replace("fpr95", "FPR95"))


def looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of every method, the same in all pictures."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[(i // len(COLOURS)) % len(STYLES)]}
        for i, name in enumerate(methods)
    }


# ---- functions in one dimension --------------------------------------------------------------------


def bands(
    results: Results, dataset: str, reference: str | None = None, split: int = 0, truth: Any = None
) -> Figure:
    """Every method's bands on a problem in one dimension, side by side: 90% of f and of y, the mean, some draws.

    reference: a method whose mean and 90% of f are drawn into every panel (dashed); truth: the function behind the
    data. Raises DataError where no cell has functions.
    """
    rows = [
        row
        for row in results.rows
        if row["dataset"] == dataset and row["split"] == split and "functions" in row
    ]
    if not rows:
        raise DataError(f"No cell of {dataset!r}, split {split}, kept its functions.")
    guide = next((row["functions"] for row in rows if row["method"] == reference), None)
    low, high = _frame(rows, guide)
    figure, axes = _panels(len(rows))
    for place, (row, ax) in enumerate(zip(rows, axes)):
        kept = {name: np.array(values) for name, values in row["functions"].items()}
        ax.fill_between(kept["grid"], *kept["observed"], color="#e3ebf1", lw=0, label="90% of y")
        if "latent" in kept:
            ax.fill_between(kept["grid"], *kept["latent"], color=PALE, alpha=0.75, lw=0, label="90% of f")
            ax.plot(kept["grid"], kept["shown_draws"].T, color=BLUE, lw=0.6, alpha=0.5)
        ax.plot(kept["grid"], kept["mean"], color=INK, lw=1.8, label="mean")
        if guide is not None and row["method"] != reference:
            for bound, label in zip(guide.get("latent", []), (f"90% of f, {reference}", None)):
                ax.plot(guide["grid"], bound, color=ORANGE, lw=1.3, ls=(0, (4, 2)), label=label)
        if truth is not None:
            ax.plot(
                kept["grid"],
                truth(kept["grid"][:, None]),
                color=GREY,
                lw=1,
                ls=(0, (1, 1.5)),
                label="the function",
            )
        ax.plot(*kept["train"], ".", color=INK, ms=3.5, alpha=0.7, zorder=5)
        finish(ax, row["method"] + (" (the reference)" if row["method"] == reference else ""), "", "")
        ax.set(ylim=(low, high), xlim=(kept["grid"][0], kept["grid"][-1]))
        if place == (1 if len(rows) > 1 and rows[0]["method"] == reference else 0):
            handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _frame(rows: Sequence[Mapping[str, Any]], guide: Mapping[str, Any] | None) -> tuple[float, float]:
    """Heights to show: the data and the reference, with room; a method that leaves them runs out of the picture."""
    y = np.concatenate([np.array(row["functions"]["train"][1]) for row in rows])
    spans = [y] if guide is None else [y, np.array(guide["observed"]).ravel()]
    low, high = min(span.min() for span in spans), max(span.max() for span in spans)
    room = 0.35 * float(np.ptp(y)) or 1.0  # y may be constant
    return float(max(low - 0.1 * room, y.min() - 2 * room)), float(min(high + 0.1 * room, y.max() + 2 * room))


def prior_draws(grid: NDArray, priors: Mapping[str, NDArray], marked: Sequence[str] = ()) -> Figure:
    """Functions drawn from each prior over a grid [g]; priors: names to draws [s, g]. The band holds 90% of the draws.
    Each panel has its own height, for priors differ in size; marked: panels that stand for a limit of the others."""
    if not priors:
        raise DataError("There is no prior to draw from.")
    figure, axes = _panels(len(priors))
    for ax, (name, draws) in zip(axes, priors.items()):
        low, high = np.quantile(draws, [0.05, 0.95], axis=0)
        ax.fill_between(grid, low, high, color="#f6e3d9" if name in marked else "#e3ebf1", lw=0)
        ax.plot(grid, draws[:12].T, color=ORANGE if name in marked else BLUE, lw=0.9, alpha=0.8)
        finish(ax, name, "", "")
        ax.set_xlim(grid[0], grid[-1])
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Small axes, up to four in a row."""
    from matplotlib.figure import Figure

    columns = count if count <= 4 else min((4, 3), key=lambda c: -count % c)  # the fewest empty places
    lines = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * lines + 0.35), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


# ---- scores ----------------------------------------------------------------------------------------


def calibration_curves(results: Results, dataset: str, *, ax: Axes | None = None) -> Axes:
    """Share of observations below each stated quantile, minus the level, mean over the splits; of classes, share that
    is right minus stated probability, in bins. The line at zero is perfect."""
    ax = new_axes(ax)
    rows = [row for row in results.rows if row["dataset"] == dataset and "calibration" in row]
    if not rows:
        raise DataError(f"No cell of {dataset!r} has a calibration curve.")
    styles = looks(results.methods)
    ax.axhline(0, color=INK, lw=1, ls=(0, (4, 3)))
    numbers = rows[0]["task"] == "regression"
    if numbers:
        n = sum(row["rows"]["test"] for row in rows if row["method"] == rows[0]["method"])
        level = np.array(rows[0]["calibration"][0])
        chance = 1.96 * np.sqrt(level * (1 - level) / n)
        ax.fill_between(
            level,
            -chance,
            chance,
            color="#e6eaee",
            lw=0,
            label="chance alone (95%)",
        )
    for name in dict.fromkeys(row["method"] for row in rows):
        stated, gap = _curve([row["calibration"] for row in rows if row["method"] == name], numbers)
        ax.plot(
            stated,
            gap,
            lw=1.7,
            label=shortened(name) + ("" if len(stated) else ": too few rows"),
            marker=None if numbers else "o",
            ms=3.5,
            **styles[name],
        )
    ticks = [0, 0.25, 0.5, 0.75, 1] if numbers else [0.2, 0.4, 0.6, 0.8, 1]
    ax.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}%" if abs(value) > 1e-9 else "0%")
    if numbers:
        finish(ax, f"{dataset}: what falls below each quantile", "stated level", "observed share minus level")
    else:
        finish(
            ax,
            f"{dataset}: how often stated probabilities are right",
            f"stated probability, in bins of {FEW} rows or more",
            "share right minus stated",
        )
    legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _curve(curves: Sequence[Any], numbers: bool) -> tuple[NDArray, NDArray]:
    """Mean over splits; bins of classes weighed by their rows, those with fewer than FEW left out."""
    if numbers:
        level = np.array(curves[0][0])
        return level, np.mean([curve[1] for curve in curves], axis=0) - level
    stated, hit, count = (np.concatenate([np.array(curve[k]) for curve in curves]) for k in range(3))
    place = np.minimum((stated * 10).astype(int), 9)
    kept = [k for k in range(10) if count[place == k].sum() >= FEW]
    mean = [
        [np.average(values[place == k], weights=count[place == k]) for k in kept] for values in (stated, hit)
    ]
    return np.array(mean[0]), np.array(mean[1]) - np.array(mean[0])


def rank_diagram(ranking: Ranking, metric: str, *, ax: Axes | None = None) -> Axes:
    """Mean ranks on a line, best to the left; bars join methods whose ranks differ by less than the critical
    difference. Source: Demsar (2006), figure 1."""
    k = len(ranking.methods)
    ax = new_axes(ax, (8.0, 1.6 + 0.28 * ((k + 1) // 2)))
    order = np.argsort(ranking.ranks, kind="stable")
    ranks = ranking.ranks[order]
    left = (k + 1) // 2
    step, top = 1.0, 0.0
    ax.plot([1, k], [top, top], color=INK, lw=1.2)
    for tick in range(1, k + 1):
        ax.plot([tick, tick], [top, top + 0.25], color=INK, lw=1)
        ax.text(tick, top + 0.4, str(tick), ha="center", va="bottom", fontsize=9, color=INK)
    joined = _joined(ranks, ranking.critical_difference)
    for i, (first, last) in enumerate(joined):
        height = -0.35 - 0.3 * i
        ax.plot(
            [ranks[first] - 0.03, ranks[last] + 0.03],
            [height, height],
            color=ORANGE,
            lw=3,
            solid_capstyle="butt",
        )
    depth = 0.6 + 0.3 * len(joined)
    for place, method in enumerate(order):
        row = place if place < left else k - 1 - place
        height = -depth - step * row
        on_left = place < left
        edge = 0.85 if on_left else k + 0.15
        ax.plot([ranks[place], ranks[place], edge], [top, height, height], color=GREY, lw=0.9)
        text = f"{shortened(ranking.methods[method], 34)}  {ranks[place]:.2f}"
        ax.text(
            edge + (-0.05 if on_left else 0.05),
            height,
            text,
            ha="right" if on_left else "left",
            va="center",
            fontsize=9,
            color=INK,
        )
    room = 0.45 * k
    ax.set(xlim=(1 - room, k + room), ylim=(-depth - step * left, 3.0), xticks=[], yticks=[])
    width = ranking.critical_difference
    ax.plot([1, 1 + width], [1.7, 1.7], color=ORANGE, lw=3, solid_capstyle="butt")
    ax.text(1, 1.95, f"critical difference {width:.2f}", fontsize=8.5, color=INK, va="bottom")
    finish(ax, f"Mean ranks by {words(metric)} over {ranking.blocks} blocks, 1 is best", "", "")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    return ax


def _joined(ranks: NDArray, difference: float) -> list[tuple[int, int]]:
    """Longest runs of sorted ranks that differ by less than the critical difference, of two methods at least."""
    runs: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = int(np.searchsorted(ranks, ranks[first] + difference, side="right")) - 1
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def cost_quality(
    results: Results, dataset: str, metric: str = "log_likelihood", *, ax: Axes | None = None
) -> Axes:
    """Mean score over mean seconds to fit, with standard errors; better is up."""
    ax = new_axes(ax)
    seconds = results.values("fit_seconds", dataset=dataset).mean()
    styles = looks(results.methods)
    points = [
        (name, float(seconds[name]), mean, float(np.nan_to_num(error)))
        for name, (mean, error) in results.means(metric, dataset).items()
    ]
    ax.set_xscale("log")
    sign = 1 if higher_is_better(metric) else -1
    inside = _comparable([sign * mean for _, _, mean, _ in points])
    for (name, cost, mean, error), shown in zip(points, inside):
        if shown:
            marks = {"fmt": "o", "ms": 6, "capsize": 2.5, "lw": 1.2, "color": styles[name]["color"]}
            ax.errorbar(cost, mean, error, label=shortened(name), **marks)
        else:
            marks = {"marker": "v", "ls": "", "color": styles[name]["color"]}
            ax.plot([], [], label=f"{shortened(name)}: {mean:.3g}, below", **marks)
    spans = [(mean - error, mean + error) for (_, _, mean, error), shown in zip(points, inside) if shown]
    if spans:
        low, high = min(span[0] for span in spans), max(span[1] for span in spans)
        room = max(0.08 * (high - low), 1e-3 * (1 + abs(high)))
        ax.set_ylim(*((low - room, high + room)[::sign]))
    finish(ax, f"{dataset}: what a score costs", "seconds to fit (mean over splits)", words(metric))
    legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _comparable(goods: Sequence[float]) -> list[bool]:
    """Which of some scores, higher better, can be shown together: not those that are infinite, or so bad that they
    would flatten the others; the legend names these."""
    known = np.array([good for good in goods if np.isfinite(good)])
    if not len(known):
        return [False] * len(goods)
    worst = np.median(known) - 4 * max(np.ptp(known[known >= np.median(known)]), 1e-12)
    return [bool(np.isfinite(good) and good >= worst) for good in goods]


def detection(results: Results, dataset: str, measure: str = "entropy", *, ax: Axes | None = None) -> Axes:
    """AUROC of every method for rows of another kind, with standard errors; 0.5 is guessing."""
    metric = f"auroc, {measure}"
    found = results.means(metric, dataset)
    names = sorted(found, key=lambda name: found[name][0])
    ax = new_axes(ax, (6.4, 1.3 + 0.32 * len(names)))
    places, styles = np.arange(len(names)), looks(results.methods)
    means = np.array([found[name][0] for name in names])
    errors = np.nan_to_num([found[name][1] for name in names])  # of one split there is none
    for place, name in enumerate(names):
        ax.errorbar(
            means[place], place, xerr=errors[place], fmt="o", ms=7, capsize=3, color=styles[name]["color"]
        )
    ax.set_yticks(places, [shortened(name) for name in names])
    ax.set_xlim(max(0.0, min(0.5, float(np.nanmin(means - errors)) - 0.02)), 1.005)
    finish(ax, f"{dataset}: rows of another kind by {measure}", "AUROC", "")
    ax.tick_params(axis="y", length=0)
    return ax
