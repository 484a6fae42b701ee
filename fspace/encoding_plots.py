"""Plots about models with latents; each draws on the Axes given (or new ones) and returns them.

latent_map         what is near what, as the model sees it?
beside             images, and what the latents kept of them
table_beside       rows of a table, and what the latents kept of them
series_beside      a series, and what the latents kept of it
sheet              new images
samples_and_data   do new rows look like the data?
bound_along        did the training settle?
active_units       how many latents are used?
ess_along          how many particles carry the estimate, along time?
bands_along        latent functions along time, and how sure they are
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from .canvas import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    SERIES,
    finish,
    legend,
    marker,
    new_axes,
    rasterise,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 12  # values of a label that get a colour each
MOST_LINES = 4  # columns of a series that are drawn as lines; more make a picture
GAP = np.nan


def principal(values: Float[np.ndarray, "n l"], at: Float[np.ndarray, "m l"]) -> tuple[NDArray, NDArray]:
    """The rows of `at` along the first two principal components of values [m, 2], and the shares of variance [2]; a
    second component that there is not is zero."""
    mean = values.mean(axis=0)
    _, sizes, axes = np.linalg.svd(values - mean, full_matrices=False)
    share = sizes**2 / max(float((sizes**2).sum()), 1e-300)
    width = min(2, len(axes))
    places, shares = np.zeros((len(at), 2)), np.zeros(2)
    places[:, :width], shares[:width] = (at - mean) @ axes[:width].T, share[:width]
    return places, shares


def latent_map(
    means: Float[np.ndarray, "n l"], colour: NDArray, name: str, *, ax: Axes | None = None
) -> Axes:
    """Latent means along their first two principal components, coloured by numbers or by the values of a label [n]."""
    ax = new_axes(ax)
    places, share = principal(means, means)
    size, alpha = marker(len(means))
    numeric = colour.dtype.kind in "fiub"
    kinds = np.unique(colour.astype(str)) if not numeric else np.unique(colour[~_missing(colour)])
    if numeric and bool(_missing(colour).any()):
        these = _missing(colour)
        ax.scatter(places[these, 0], places[these, 1], s=size, color=GREY, alpha=alpha, lw=0, label="none")
    classes = len(kinds) <= MOST_CLASSES and not (numeric and (kinds % 1 != 0).any())  # 0.37 is no class
    if classes:
        shades = _shades(len(kinds))
        for kind, shade in zip(kinds, shades):
            these = (colour if numeric else colour.astype(str)) == kind
            label = shortened(f"{kind:g}" if numeric else str(kind), 16)
            ax.scatter(
                places[these, 0], places[these, 1], s=size, color=shade, alpha=alpha, lw=0, label=label
            )
        legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5), title=name)
    else:
        numbers = colour.astype(float) if numeric else np.unique(colour.astype(str), return_inverse=True)[1]
        low, high = np.nanquantile(numbers, [0.01, 0.99])  # one extreme must not take all colours
        drawn = ax.scatter(
            places[:, 0],
            places[:, 1],
            s=size,
            c=numbers,
            cmap="viridis",
            vmin=low,
            vmax=high,
            alpha=alpha,
            lw=0,
        )
        bar = ax.figure.colorbar(drawn, ax=ax, label=name)
        bar.solids.set(alpha=1)  # type: ignore[union-attr]
        bar.outline.set_visible(False)  # type: ignore[operator]
    rasterise(ax, len(means))
    title = f"{len(means):,} points, of {means.shape[1]} latents"
    finish(
        ax, title, f"first component ({share[0]:.0%} of the variance)", f"second component ({share[1]:.0%})"
    )
    return ax


def _missing(numbers: NDArray) -> NDArray:
    return np.isnan(numbers.astype(float))


def _shades(n: int) -> list[Any]:
    import matplotlib

    if n <= len(SERIES):
        return list(SERIES[:n])
    return [matplotlib.colormaps["tab20"](i / 20 if n > 10 else (2 * i) / 20) for i in range(n)]


def _tiled(images: Float[np.ndarray, "r k c h w"]) -> NDArray:
    """Rows of images as one picture [h, w] or [h, w, 3], with gaps."""
    r, k, c, h, w = images.shape
    whole = np.full((r * (h + 1) - 1, k * (w + 1) - 1, c), GAP)
    for i, j in np.ndindex(r, k):
        whole[i * (h + 1) : i * (h + 1) + h, j * (w + 1) : j * (w + 1) + w] = images[i, j].transpose(1, 2, 0)
    return whole if c == 3 else whole.mean(axis=2)


def _show(ax: Axes, picture: NDArray, low: float, high: float) -> None:
    if picture.ndim == 3:
        scaled = np.clip((picture - low) / max(high - low, 1e-12), 0, 1)
        ax.imshow(np.where(np.isnan(picture), 1.0, scaled), interpolation="nearest")
    else:
        ax.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def _bare(ax: Axes) -> None:
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)


def beside(
    images: Float[np.ndarray, "n c h w"],
    reconstructions: Float[np.ndarray, "n c h w"],
    *,
    columns: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Images in pairs of rows: above the original, below its reconstruction."""
    ax = new_axes(ax)
    n = min(len(images), 3 * columns)
    columns = min(columns, n)
    rows = n // columns
    pairs = [
        part[: rows * columns].reshape(rows, columns, *images.shape[1:]) for part in (images, reconstructions)
    ]
    both = np.stack(pairs, axis=1).reshape(2 * rows, columns, *images.shape[1:])
    low, high = float(np.nanmin(pairs[0])), float(np.nanmax(pairs[0]))
    _show(ax, _tiled(both), low, high)
    height = images.shape[2] + 1
    words = ["original", "reconstructed"] * rows
    ax.set_yticks([height * i + height / 2 - 1 for i in range(2 * rows)], words)
    finish(ax, "Originals, and what the latents kept of them", "", "")
    _bare(ax)
    return ax


def sheet(
    images: Float[np.ndarray, "n c h w"],
    low: float,
    high: float,
    *,
    columns: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """New images in rows; low and high: the values that are black and white."""
    ax = new_axes(ax)
    columns = min(columns, len(images))
    rows = len(images) // columns
    _show(ax, _tiled(images[: rows * columns].reshape(rows, columns, *images.shape[1:])), low, high)
    finish(ax, "New images, from latents drawn from the prior", "", "")
    _bare(ax)
    return ax


def table_beside(
    rows: Float[np.ndarray, "n d"],
    reconstructions: Float[np.ndarray, "n d"],
    names: Sequence[str],
    mean: Float[np.ndarray, " d"],
    std: Float[np.ndarray, " d"],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Rows as colours, in units of each column's spread: left the originals, right their reconstructions."""
    ax = new_axes(ax)
    std = np.where(std > 0, std, 1.0)
    left, right = ((part - mean) / std for part in (rows, reconstructions))
    d = rows.shape[1]
    gap = np.full((len(rows), max(1, d // 12)), GAP)
    drawn = ax.imshow(
        np.concatenate([left, gap, right], axis=1), cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    start = d + gap.shape[1]
    if d <= 14:
        words = [shortened(str(name), 20) for name in names]
        ax.set_xticks([*range(d), *range(start, start + d)], 2 * words, rotation=60, ha="right")
    else:
        ax.set_xticks([d / 2, start + d / 2], ["original columns", "reconstructed"])
    bar = ax.figure.colorbar(drawn, ax=ax, label="standard deviations from the mean")
    bar.outline.set_visible(False)  # type: ignore[operator]
    finish(ax, f"{len(rows)} rows: original on the left, reconstructed on the right", "", "")
    ax.set_yticks([])
    _bare(ax)
    return ax


def samples_and_data(
    rows: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, ax: Axes | None = None
) -> Axes:
    """New rows over those of the data, along the data's first two principal components (columns scaled)."""
    ax = new_axes(ax)
    std = rows.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    for part, colour, label in ((rows, PALE, "data"), (samples, ORANGE, "samples")):
        places, share = principal(rows / std, part / std)
        size, alpha = marker(len(part))
        ax.scatter(places[:, 0], places[:, 1], s=size, color=colour, alpha=alpha, lw=0, label=label)
    rasterise(ax, len(rows))
    finish(
        ax, "New rows, from latents drawn from the prior",
        f"first component of the data ({share[0]:.0%})", f"second component ({share[1]:.0%})",
    )  # fmt: skip
    legend(ax, loc="upper right")
    return ax


def series_beside(
    times: Float[np.ndarray, " t"],
    series: Float[np.ndarray, "t p"],
    other: Float[np.ndarray, "t p"] | None,
    names: Sequence[str],
    title: str,
    *,
    ax: Axes | None = None,
) -> Axes:
    """A series along time, and its reconstruction: lines of a few columns, a picture above another of many."""
    ax = new_axes(ax)
    if series.shape[1] <= MOST_LINES:
        for k, colour in zip(range(series.shape[1]), SERIES):
            name = shortened(str(names[k])) if len(names) else f"column {k}"
            plain = other is None
            ax.plot(
                times,
                series[:, k],
                "-" if plain else ".",
                ms=4,
                lw=1.4,
                color=colour,
                alpha=1.0 if plain else 0.5,
            )
            ax.plot([], [], color=colour, label=name)
            if other is not None:
                ax.plot(times, other[:, k], color=colour, lw=1.6)
        finish(ax, title, "time", "dots: seen, lines: reconstructed" if other is not None else "")
        legend(ax, loc="best")
        return ax
    parts = (
        [series.T]
        if other is None
        else [series.T, np.full((max(1, series.shape[1] // 20), len(times)), GAP), other.T]
    )
    picture = np.concatenate(parts)
    extent = (float(times[0]), float(times[-1]), float(len(picture)), 0.0)
    ax.imshow(picture, cmap="Blues", aspect="auto", interpolation="nearest", extent=extent)
    p = series.shape[1]
    words = ["sampled"] if other is None else ["original", "reconstructed"]
    ax.set_yticks([p / 2, len(picture) - p / 2][: len(words)], words, rotation=90, va="center")
    finish(ax, title, "time", "columns")
    _bare(ax)
    return ax


def bound_along(
    train: Sequence[float], held_out: Sequence[float], best: int, unit: str, *, ax: Axes | None = None
) -> Axes:
    """The bound on held-out data after every pass, the best marked; dashed, that of the training (empty: not drawn)."""
    ax = new_axes(ax)
    if not len(held_out):
        ax.text(
            0.5,
            0.5,
            "interrupted before the first pass was over",
            transform=ax.transAxes,
            ha="center",
            color=GREY,
        )
        ax.set(xticks=[], yticks=[])
        finish(ax, "Training", "", "")
        return ax
    passes = np.arange(1, len(held_out) + 1)
    if len(train):
        ax.plot(passes, train, color=PALE, lw=1.6, ls=(0, (4, 2)), label="training")
    ax.plot(passes, held_out, color=BLUE, lw=2, label="held out", marker="o" if len(passes) == 1 else None)
    ax.scatter(
        passes[best], held_out[best], s=40, color=BLUE, zorder=5, label=f"best: {held_out[best]:.4g}, kept"
    )
    values = np.concatenate([held_out, train])
    low, high = float(np.quantile(values, 0.05)), float(values.max())  # the first passes are far below
    if high > low and values.min() < low - 2 * (high - low):
        ax.set_ylim(low - 0.6 * (high - low), high + 0.1 * (high - low))
    finish(ax, "Training", "pass over the data", unit)
    legend(ax, loc="lower right")
    return ax


def active_units(variances: Float[np.ndarray, " l"], threshold: float, *, ax: Axes | None = None) -> Axes:
    """Variance of every latent's mean over the data, largest first; below the threshold it carries nothing."""
    ax = new_axes(ax)
    order = np.argsort(-variances, kind="stable")
    sizes = np.maximum(variances[order], 1e-6)
    active = sizes > threshold
    ax.bar(np.arange(len(sizes)), sizes, color=[BLUE if on else PALE for on in active], width=0.8)
    ax.axhline(threshold, color=INK, lw=1, ls=(0, (4, 3)), label=f"active above {threshold:g}")
    ax.set_yscale("log")
    ax.set_ylim(min(float(sizes.min()), threshold) / 2, 3 * max(float(sizes.max()), threshold))
    if len(sizes) <= 20:
        ax.set_xticks(range(len(sizes)), [f"z{i}" for i in order])
    finish(ax, f"{int(active.sum())} of {len(sizes)} latents are active", "latent", "variance of its mean")
    legend(ax, loc="upper right")
    return ax


def ess_along(ess: Sequence[NDArray], particles: int, *, ax: Axes | None = None) -> Axes:
    """Effective number of particles at every step, mean over the series and the middle 80% of these."""
    ax = new_axes(ax)
    whole = np.full((len(ess), max(len(e) for e in ess)), np.nan)
    for row, values in zip(whole, ess):
        row[: len(values)] = values
    steps = np.arange(1, whole.shape[1] + 1)
    low, high = np.nanquantile(whole, [0.1, 0.9], axis=0)
    ax.fill_between(steps, low, high, color=PALE, alpha=0.6, lw=0, label="80% of the series")
    ax.plot(steps, np.nanmean(whole, axis=0), color=BLUE, lw=2, label="mean")
    ax.axhline(particles, color=GREY, lw=1, ls=(0, (4, 3)), label=f"all {particles} particles")
    ax.axhline(particles / 2, color=ORANGE, lw=1, ls=(0, (1, 2)), label="resampled below")
    ax.set_ylim(0, 1.25 * particles)
    finish(
        ax,
        f"{np.nanmean(whole) / particles:.0%} of the particles count, on average",
        "step",
        "effective sample size",
    )
    legend(ax, loc="upper right", ncols=2)
    return ax


def bands_along(
    times: Float[np.ndarray, " t"],
    mean: Float[np.ndarray, "t l"],
    lower: Float[np.ndarray, "t l"],
    upper: Float[np.ndarray, "t l"],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Latent functions of one series along time, with bands of 90%; the first few of them."""
    ax = new_axes(ax)
    for k, colour in zip(range(mean.shape[1]), SERIES):
        ax.fill_between(times, lower[:, k], upper[:, k], color=colour, alpha=0.18, lw=0)
        ax.plot(times, mean[:, k], color=colour, lw=1.8, label=f"z{k}")
    finish(ax, "Latent functions of the first series, with 90% bands", "time", "latent")
    legend(ax, loc="best", ncols=3)
    return ax
