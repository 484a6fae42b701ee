"""Plots about predicted classes; each draws on the Axes given (or new ones) and returns them.

reliability         are the stated probabilities right?
confusion           which classes are taken for which?
accuracy_rejection  are the rows it is unsure of those it gets wrong?
probability_along   how do the probabilities change along one input, and how sure is the model of them?

labels are positions of classes [n], predictive a `Categorical` at the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .canvas import (
    BLUE,
    GREY,
    INK,
    PALE,
    SERIES,
    array,
    binned,
    finish,
    legend,
    new_axes,
    same_length,
    shortened,
)
from .plots import _headroom, places_along

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 4  # whose probabilities are followed along an input
MOST_NUMBERS = 12  # classes whose confusion is also written in figures


def _checked(labels: Any, predictive: Any) -> tuple[NDArray, NDArray]:
    labels, probs = array(labels).astype(int), array(predictive.probs)
    same_length(labels, probs)
    return labels, probs


def reliability(labels: Any, predictive: Any, *, ax: Axes | None = None) -> Axes:
    """Share of hits over the probability stated for the predicted class, in bins of equal count, with 95% bars."""
    ax = new_axes(ax)
    labels, probs = _checked(labels, predictive)
    stated, hit = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    bins = int(np.clip(len(hit) // 20, 1, 15))
    said, share = binned(stated, [stated, hit], np.mean, bins)
    count = len(hit) / len(said)
    ends = _wilson(share, count)
    low = min(0.5, float(said.min()) - 0.03)
    ax.plot([low, 1], [low, 1], color=INK, lw=1, ls=(0, (4, 3)), label="perfect")
    ax.errorbar(
        said,
        share,
        np.abs(ends - share),
        color=BLUE,
        lw=1.6,
        marker="o",
        ms=5,
        label=f"this model, {len(hit):,} rows (95%)",
    )
    ax.text(
        0.03, 0.80, "too cautious", transform=ax.transAxes, color=GREY, fontsize=9, style="italic", va="top"
    )
    ax.text(
        0.97, 0.05, "too sure", transform=ax.transAxes, color=GREY, fontsize=9, style="italic", ha="right"
    )
    ax.set(xlim=(low, 1.01), ylim=(min(low, float(ends[0].min())), 1.04))
    title = f"Stated {stated.mean():.1%} on average; {hit.mean():.1%} are right"
    finish(ax, title, "stated probability of the predicted class", "share that is right")
    legend(ax, loc="upper left")
    return ax


def _wilson(share: NDArray, count: float) -> NDArray:
    """Ends [2, k] of the 95% interval of the probability behind a share of `count` rows; also where all or none are
    right. Source: Wilson (1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.stack([middle - half, middle + half])


def confusion(labels: Any, predictive: Any, names: Sequence[Any], *, ax: Axes | None = None) -> Axes:
    """How often each class (rows) is predicted to be each (columns), as a share of the class."""
    ax = new_axes(ax)
    labels, probs = _checked(labels, predictive)
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, probs.argmax(axis=1)), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="equal")
    if len(names) <= MOST_NUMBERS:
        for i, j in np.ndindex(counts.shape):
            if counts[i, j]:
                colour = "white" if share[i, j] > 0.6 else INK
                ax.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=9, color=colour)
    words = [shortened(str(name), 14) for name in names]
    if len(names) <= 30:
        ax.set_xticks(range(len(names)), words, rotation=40 if max(map(len, words)) > 4 else 0)
        ax.set_yticks(range(len(names)), words)
    finish(ax, f"{counts.trace():,} of {counts.sum():,} rows are right", "predicted", "observed")
    ax.grid(False)
    return ax


def accuracy_rejection(labels: Any, predictive: Any, *, ax: Axes | None = None) -> Axes:
    """Accuracy of the rows that are kept when the least certain are handed to a person, over their share."""
    ax = new_axes(ax)
    labels, probs = _checked(labels, predictive)
    hit = (probs.argmax(axis=1) == labels).astype(float)
    order = np.argsort(array(predictive.entropy), kind="stable")
    kept = np.cumsum(hit[order]) / np.arange(1, len(hit) + 1)
    best = np.cumsum(np.sort(hit)[::-1]) / np.arange(1, len(hit) + 1)
    share = 1 - np.arange(1, len(hit) + 1) / len(hit)
    first = max(1, len(hit) // 50) - 1  # the accuracy of a handful of rows says nothing
    ax.plot(
        share[first:], best[first:], color=GREY, lw=1, ls=(0, (4, 3)), label="errors first: the best possible"
    )
    ax.axhline(hit.mean(), color=PALE, lw=1.4, label="at random")
    ax.plot(share[first:], kept[first:], color=BLUE, lw=2.2, label="least certain first")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    ax.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    ax.set_xlim(0, 1)
    finish(
        ax, "Accuracy when unsure rows are handed to a person", "share handed over", "accuracy of the rest"
    )
    ax.set(yticks=[tick for tick in ax.get_yticks() if tick <= 1 + 1e-9], ylim=ax.get_ylim())
    legend(ax, loc="center right")  # between the curve, which rises, and the line, which does not
    return ax


def probability_along(
    model: Any, X: Any, column: int | str, *, level: float = 0.9, points: int = 120, ax: Axes | None = None
) -> Axes:
    """Class probabilities along one input, the others as in the most typical row of X; bands hold `level` of what
    the probability may be, the function not being known. The most variable classes are drawn."""
    import torch

    along = places_along(model, X, column, points)
    x = torch.from_numpy(along.rows)
    with torch.no_grad():
        predictive = model.posterior_.observed(x)
    probs, samples = array(predictive.probs), array(predictive.samples)
    weights = array(predictive.weights)
    shown = np.argsort(-np.ptp(probs, axis=0), kind="stable")[:MOST_CLASSES]
    if len(model.classes_) == 2:
        shown = np.array([1])
    ax = new_axes(ax)
    for k, colour in zip(np.sort(shown), SERIES, strict=False):
        low, high = (
            _weighted_quantile(samples[:, :, k], weights, p) for p in (0.5 - level / 2, 0.5 + level / 2)
        )
        name = shortened(str(model.classes_[k]), 16)
        if along.ticks is None:
            ax.fill_between(along.places, low, high, color=colour, alpha=0.18, lw=0)
            ax.plot(along.places, probs[:, k], color=colour, lw=2, label=name)
        else:
            ax.errorbar(
                along.places, probs[:, k], [probs[:, k] - low, high - probs[:, k]],
                color=colour, fmt="o", capsize=3, label=name,
            )  # fmt: skip
    if along.ticks is not None:
        ax.set_xticks(along.places, along.ticks, rotation=30 if len("".join(along.ticks)) > 45 else 0)
    ax.set_ylim(-0.02, 1.02)
    finish(ax, f"Along {along.name}, other inputs as in a typical row", along.name, "probability")
    _headroom(ax, 0.12)
    legend(ax, loc="upper left", ncols=MOST_CLASSES)
    return ax


def _weighted_quantile(values: NDArray, weights: NDArray, p: float) -> NDArray:
    """The p-quantile over the first axis of values [s, n], of which row s has weights[s]."""
    order = np.argsort(values, axis=0)
    total = np.cumsum(weights[order], axis=0)
    at = (total >= p * total[-1]).argmax(axis=0)
    return np.take_along_axis(values, np.take_along_axis(order, at[None], axis=0), axis=0)[0]
