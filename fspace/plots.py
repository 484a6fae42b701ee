"""One plot for each question a reader has; each draws on the Axes given (or new ones) and returns them.

predicted_vs_observed   how near are the predictions, and do the intervals hold the observations?
calibration             are the stated probabilities right?
residuals_vs_std        does the model know where it is wrong?
training_curve          did the fit settle?
relevance               which inputs matter?
draws_along             what does the function look like along one input, and how sure is it?

Plots about classes are in class_plots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from .canvas import (
    BLUE,
    GREY,
    INK,
    MANY,
    ORANGE,
    PALE,
    array,
    binned,
    column_of,
    curves_of,
    finish,
    frame_of,
    legend,
    like,
    marker,
    new_axes,
    rasterise,
    rug,
    same_exponent,
    same_length,
    share_an_axis,
    short,
    shortened,
)
from .columns import suggest
from .errors import DataError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LEVELS = 20  # of one category, the most frequent


def predicted_vs_observed(
    y: Any, predictive: Any, *, level: float = 0.9, output: int = 0, name: str = "y", ax: Axes | None = None
) -> Axes:
    """Observed y over predicted mean, with the central intervals; what falls outside its interval is marked.

    y `[n]` or `[n, t]`; predictive: an observed Predictive at the same points; output: which of the t.
    """
    ax = new_axes(ax)
    observed, mean = column_of(y, output), column_of(predictive.mean, output)
    lower, upper = (column_of(bound, output) for bound in predictive.interval(level))
    same_length(observed, mean)
    inside = (observed >= lower) & (observed <= upper)
    size, alpha = marker(len(mean))
    if len(mean) <= MANY:
        width = 2.4 if len(mean) <= 100 else 1.2
        ax.vlines(mean, lower, upper, color=PALE, lw=width, alpha=0.7, label=f"{level:.0%} interval")
    else:
        middle, low, high = binned(mean, [mean, lower, upper], np.mean)
        for bound, label in ((low, f"{level:.0%} interval (mean in bins)"), (high, None)):
            ax.plot(middle, bound, color=INK, lw=1.2, zorder=6, label=label)
    ax.plot([mean.min(), mean.max()], [mean.min(), mean.max()], color=INK, lw=1, ls=(0, (4, 3)), zorder=3)
    for these, colour, opacity, label in (
        (inside, BLUE, alpha, "inside"),
        (~inside, ORANGE, min(1.0, 1.5 * alpha), "outside"),
    ):
        if these.any():
            ax.scatter(
                mean[these], observed[these], s=size, color=colour, alpha=opacity, lw=0, zorder=5, label=label
            )
    rasterise(ax, len(mean))
    title = f"{inside.mean():.1%} of {len(mean):,} observations lie in their {level:.0%} interval"
    finish(ax, title, f"predicted {name}", f"observed {name}")
    _headroom(ax, 0.1)
    same_exponent(ax)
    legend(ax, loc="upper left", ncols=3)
    return ax


def calibration(y: Any, predictive: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Share of observations inside the central interval over the interval's stated probability.

    The band holds 95% of perfectly calibrated models over the whole curve (Kolmogorov's distribution), for
    independent points. y `[n]` or `[n, t]`; predictive: an observed Predictive at the same points.
    """
    ax = new_axes(ax)
    observed = like(predictive.mean, y)
    below = column_of(predictive.cdf(observed), output)
    if predictive.counts:  # the middle of the step that the cdf takes there
        below = below - 0.5 * np.exp(column_of(predictive.log_prob(observed), output))
    level = np.sort(np.abs(2 * below - 1))  # an observation is inside every interval wider than this
    n = len(level)
    grid = np.linspace(0, 1, 201)
    share = np.searchsorted(level, grid, side="right") / n
    band = 1.358 / (np.sqrt(n) + 0.12 + 0.11 / np.sqrt(n))
    ax.fill_between(
        grid,
        np.clip(grid - band, 0, 1),
        np.clip(grid + band, 0, 1),
        color="#e6eaee",
        lw=0,
        label="chance alone (95%)",
    )
    ax.plot([0, 1], [0, 1], color=INK, lw=1, ls=(0, (4, 3)), label="perfect")
    ax.step(grid, share, where="mid", color=BLUE, lw=2.2, label=f"this model, {n:,} points")
    ax.text(0.03, 0.95, "too cautious", color=GREY, fontsize=9, style="italic", va="top")
    ax.text(0.97, 0.05, "too sure", color=GREY, fontsize=9, style="italic", ha="right")
    stated = {p: float(np.mean(level <= p)) for p in (0.5, 0.9)}
    ax.scatter(list(stated), list(stated.values()), s=34, color=BLUE, zorder=5)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [f"{tick:.0%}" for tick in ticks])
    title = "; ".join(f"{p:.0%} intervals hold {found:.0%}" for p, found in stated.items())
    finish(ax, title, "stated probability of the interval", "observations inside")
    legend(ax, loc="upper left", bbox_to_anchor=(0.0, 0.9))
    return ax


def residuals_vs_std(y: Any, predictive: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Size of the error over the predicted standard deviation, with the root mean square error in bins of it.

    Where the model knows its errors, the bins lie on the diagonal. y `[n]` or `[n, t]`; predictive: observed.
    """
    ax = new_axes(ax)
    mean, std = column_of(predictive.mean, output), column_of(predictive.stddev, output)
    error = np.abs(column_of(y, output) - mean)
    size, alpha = marker(len(error))
    ax.scatter(std, error, s=size, color=PALE, alpha=max(alpha, 0.35), lw=0)
    edge = [float(std.min()), float(std.max())]
    if edge[1] - edge[0] < 1e-9 * edge[1]:
        edge = [0.5 * edge[0], 1.5 * edge[1]]
    ax.plot(edge, edge, color=INK, lw=1, ls=(0, (4, 3)), label="error = predicted std")
    ax.plot(
        edge,
        [1.96 * e for e in edge],
        color=GREY,
        lw=1,
        ls=(0, (1, 2)),
        label="1.96 of them: 95% below if Gaussian",
    )
    bins = int(np.clip(len(error) // 15, 1, 12))
    middle, spread = binned(std, [std, error], lambda v: np.sqrt(np.mean(v**2)), bins)
    # the standard error of a root mean square over m points is about rms / sqrt(2 m)
    half = 1.96 * spread / np.sqrt(2 * len(error) / len(middle))
    ax.errorbar(middle, spread, half, color=BLUE, lw=1.6, marker="o", ms=5, label="RMS error in bins (95%)")
    ax.set_ylim(0, max(float(np.quantile(error, 0.995)), 2.1 * edge[1]) * 1.03)
    _headroom(ax, 0.22)
    outside = int((error > ax.get_ylim()[1]).sum())
    rasterise(ax, len(error))
    if outside:
        note = f"{outside} more above"
        ax.text(0.99, 0.985, note, transform=ax.transAxes, ha="right", va="top", fontsize=8.5, color=GREY)
    same_exponent(ax)
    finish(
        ax, "Errors against their predicted size", "predicted standard deviation", "|observed - predicted|"
    )
    legend(ax, loc="upper left")
    return ax


def training_curve(history: Sequence[dict[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Loss (and held-out loss, dashed) over the steps, one colour for each stage of the fit.

    history: dicts with "stage", "step", "loss" and maybe "heldout", in order. Curves on scales too different
    to share an axis are each drawn on a scale of their own, and the legend tells first and last value.
    """
    ax = new_axes(ax)
    curves = curves_of(history)
    own = len(curves) > 1 and not share_an_axis([values for _, _, values, _, _ in curves])
    frames = [frame_of(values) for _, _, values, _, _ in curves]
    for label, steps, values, colour, dashed in curves:
        low, high = frame_of(values) if own else (0.0, 1.0)
        top = 1.0 if own else max(frame[1] for frame in frames)
        shown = np.minimum((values - low) / (high - low), top)  # a spike ends below the legend
        style: Any = (0, (4, 2)) if dashed else "-"
        end = f"{label}: {short(values[0])} to {short(values[-1])}"
        ax.plot(
            steps, shown, color=colour, lw=1.8, ls=style, label=end, marker="o" if len(steps) == 1 else None
        )
        if dashed and len(values) > 1:
            best = int(np.argmin(values))
            ax.scatter(steps[best], shown[best], s=36, color=colour, zorder=5)
    if own:
        ax.set_yticks([])
    elif curves:
        low, high = min(f[0] for f in frames), max(f[1] for f in frames)
        ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    else:
        ax.text(0.5, 0.5, "nothing was trained", transform=ax.transAxes, ha="center", color=GREY)
        ax.set(xticks=[], yticks=[])
    finish(ax, "Training", "step", "loss, each curve on its own scale" if own else "loss")
    if curves:
        columns = 1 if len(curves) < 4 else 2
        _headroom(ax, 0.07 * -(-len(curves) // columns))
        narrow: dict[str, Any] = {
            "fontsize": 7,
            "handlelength": 1.3,
            "handletextpad": 0.5,
            "columnspacing": 1.0,
        }
        legend(ax, loc="upper right", ncols=columns, **(narrow if columns > 1 else {}))
    return ax


def relevance(names: Sequence[str], values: Any, *, most: int = 15, ax: Axes | None = None) -> Axes:
    """Bars of the inputs' relevance, largest first; beyond `most` inputs the rest are one bar.

    names: d names; values `[d]`, shares of one. Raises DataError if their numbers differ.
    """
    share = array(values).astype(np.float64).ravel()
    if len(names) != len(share):
        raise DataError(f"There are {len(names)} names for {len(share)} relevances.")
    order = np.argsort(-share, kind="stable")
    labels = [str(names[i]) for i in order[:most]]
    lengths = list(share[order[:most]])
    if len(order) > most:
        labels.append(f"{len(order) - most} others")
        lengths.append(float(share[order[most:]].sum()))
    ax = new_axes(ax, (6.4, 1.2 + 0.32 * len(labels)))
    colours = [BLUE] * min(most, len(order)) + [GREY] * (len(labels) - min(most, len(order)))
    places = np.arange(len(labels))
    ax.barh(places, lengths, color=colours, height=0.68)
    for place, length in zip(places, lengths, strict=True):
        text = f" {length:.0%}" if length >= 0.005 else " <1%"
        ax.text(length, place, text, va="center", fontsize=9, color=INK)
    ax.set_yticks(places, [shortened(label) for label in labels])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max([*lengths, 1e-12]))
    ax.set_xticks([])
    finish(ax, "How much each input matters", "", "")
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def draws_along(
    model: Any,
    X: Any,
    column: int | str,
    *,
    draws: int = 8,
    level: float = 0.9,
    points: int = 200,
    output: int = 0,
    seed: int = 0,
    name: str = "y",
    ax: Axes | None = None,
) -> Axes:
    """Functions drawn from the posterior along one input, the others as in the most typical row of X.

    model: a fitted estimator (X as it was fitted; column: name or number) or a FunctionPosterior (X `[n, d]`,
    column: number). Shown with the mean, the central interval of f and that of y, and where the data lie.
    Categories and inputs with two values are drawn as points, one place each.
    """
    import torch

    along = places_along(model, X, column, points)
    places, ticks, title = along.places, along.ticks, along.name
    posterior = getattr(model, "posterior_", model)
    x = torch.from_numpy(along.rows)
    with torch.no_grad():
        latent, observed = posterior.latent(x), posterior.observed(x)
        functions = array(posterior.response(posterior.draw(draws, seed=seed)(x)))
        mean = column_of(observed.mean, output)
        inner = [column_of(posterior.response(bound), output) for bound in latent.interval(level)]
        outer = [column_of(bound, output) for bound in observed.interval(level)]
    functions = functions[..., output] if functions.ndim == 3 else functions
    ax = new_axes(ax)
    if ticks is None:
        ax.fill_between(places, *outer, color="#e3ebf1", lw=0, label=f"{level:.0%} of y")
        ax.fill_between(places, *inner, color=PALE, alpha=0.75, lw=0, label=f"{level:.0%} of f")
        for i, f in enumerate(functions):
            ax.plot(places, f, color=ORANGE, lw=0.9, alpha=0.75, label="draws of f" if i == 0 else None)
        ax.plot(places, mean, color=INK, lw=2, label="mean")
        rug(ax, along.seen[(along.seen >= places[0]) & (along.seen <= places[-1])])
    else:
        ax.use_sticky_edges = False
        for (low, high), colour, what in ((outer, "#e3ebf1", "y"), (inner, PALE, "f")):
            ax.bar(places, high - low, 0.3, low, color=colour, label=f"{level:.0%} of {what}")
        aside = np.linspace(-0.12, 0.12, len(functions))
        for i, f in enumerate(functions):
            label = "draws of f" if i == 0 else None
            ax.scatter(places + aside[i], f, s=12, color=ORANGE, lw=0, zorder=4, label=label)
        ax.hlines(mean, places - 0.15, places + 0.15, lw=2, color=INK, zorder=5, label="mean")
        ax.set_xticks(places, ticks, rotation=30 if len("".join(ticks)) > 45 else 0)
        ax.set_xlim(-0.6, len(places) - 0.4)
    finish(ax, f"Along {title}, other inputs as in a typical row", title, name)
    _headroom(ax, 0.12)
    legend(ax, loc="upper left", ncols=5, columnspacing=1.1, handlelength=1.3, handletextpad=0.5)
    return ax


def _headroom(ax: Axes, share: float) -> None:
    """Room for a legend above the curves."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + share * (top - bottom))


def typical_row(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The row of X nearest to the medians of all columns, in units of their spread: so a real one."""
    spread = X.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    distance = np.abs((X - np.median(X, axis=0)) / scale).sum(axis=1)
    return np.asarray(X[int(np.argmin(distance))], dtype=np.float64)


# ---- where draws_along gets its rows ---------------------------------------------------------------


@dataclass(frozen=True)
class Along:
    """Rows that differ in one input only: where they stand on the axis, names of these places where the input has
    levels, the encoded rows, the input's values in the data, and its name."""

    places: NDArray
    ticks: list[str] | None
    rows: Float[np.ndarray, "k d"]
    seen: NDArray
    name: str


def places_along(model: Any, X: Any, column: int | str, points: int) -> Along:
    """Places along one input, the others as in the most typical row of X."""
    encoded, columns, labels, name = _source(model, X, column)
    values = encoded[:, columns]
    if labels or len(np.unique(values)) <= 2:
        levels, counts = np.unique(values, axis=0, return_counts=True)
        levels = levels[np.sort(np.argsort(-counts, kind="stable")[:MOST_LEVELS])]
        levels = levels[::-1] if len(columns) > 1 else levels  # one-hot rows sort backwards
        places = np.arange(len(levels), dtype=np.float64)
        ticks = _level_labels(levels, labels)
    else:
        low, high = np.quantile(values[:, 0], [0.005, 0.995])
        if not high > low:
            low, high = values.min(), values.max()
        places = np.linspace(low, high, points)
        levels, ticks = places[:, None], None
    rows = np.repeat(typical_row(encoded)[None, :], len(places), axis=0)
    rows[:, columns] = levels
    return Along(places, ticks, np.ascontiguousarray(rows, dtype=np.float64), values[:, 0], name)


def _source(model: Any, X: Any, column: int | str) -> tuple[NDArray, list[int], list[str], str]:
    """Encoded X, the encoded columns of one input, names of their levels, name of the input."""
    if hasattr(model, "posterior_"):
        encoder = model.encoder_
        encoded, names = np.asarray(encoder.transform(X), dtype=np.float64), encoder.feature_names
        sources = list(encoder.source_columns)
    else:
        encoded = array(X).astype(np.float64)
        names = [f"x{i}" for i in range(encoded.shape[-1])]
        sources = list(range(encoded.shape[-1]))
        encoder = None
    if encoded.ndim != 2:
        raise OptionError("draws_along needs a table: images and sequences have no single inputs to follow.")
    if isinstance(column, str):
        if column not in names:
            raise DataError(f"There is no input {column!r}.{suggest(column, names)}")
        column = names.index(column)
    if not 0 <= column < len(names):
        raise DataError(f"There is no input {column}; the inputs are numbered 0 to {len(names) - 1}.")
    columns = [k for k, source in enumerate(sources) if source == column]
    known = encoder.levels[column] if encoder is not None else None
    return encoded, columns, [str(level) for level in known or []], names[column]


def _level_labels(levels: NDArray, labels: list[str]) -> list[str]:
    if levels.shape[1] > 1:
        return [labels[int(np.argmax(level))] for level in levels]
    if len(labels) == 2:  # two levels make one column, the second's
        return [labels[int(level[0] > 0.5)] for level in levels]
    if labels:
        return labels
    return [f"{level[0]:g}" for level in levels]
