"""What the plots share: colours, legends, binning, and reading arrays out of predictives and histories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from .errors import DataError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, PALE, ORANGE, GREY, INK = "#2f6690", "#a9c8de", "#d1622b", "#8a94a0", "#1f2933"
SERIES = (BLUE, ORANGE, "#4f8f5b", "#8659a5", "#b08a1e", "#5b6770")

# With more points than this a bar for each hides the others, and a band of binned intervals is drawn.
MANY = 300


# ---- numbers ---------------------------------------------------------------------------------------


def array(values: Any) -> NDArray:
    """A tensor or array-like as numpy."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def column_of(values: Any, output: int) -> Float[np.ndarray, " n"]:
    """One output of `[n]` or `[n, t]`."""
    whole = array(values).astype(np.float64)
    if whole.ndim == 1:
        return whole
    if not 0 <= output < whole.shape[-1]:
        raise OptionError(f"output={output}: there are {whole.shape[-1]} outputs, numbered from 0.")
    return whole[:, output]


def like(mean: Any, y: Any) -> Any:
    """y as a tensor of the mean's kind."""
    import torch

    return torch.tensor(array(y), dtype=mean.dtype, device=mean.device).reshape(mean.shape)


def same_length(y: NDArray, mean: NDArray) -> None:
    """Raises DataError where y and the predictive are of different points."""
    if len(y) != len(mean):
        raise DataError(f"y has {len(y)} rows, but the predictive {len(mean)}; take both at the same points.")


def binned(
    by: NDArray, values: Sequence[NDArray], reduce: Callable[[NDArray], Any], bins: int = 60
) -> list[NDArray]:
    """Each of `values` reduced over bins of equal count along `by`."""
    parts = np.array_split(np.argsort(by, kind="stable"), min(bins, len(by)))
    return [np.array([reduce(v[part]) for part in parts]) for v in values]


def curves_of(history: Sequence[dict[str, Any]]) -> list[tuple[str, NDArray, NDArray, str, bool]]:
    """(label, steps counted over all stages, finite values, colour, held out?) for each stage."""
    stages: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, entry in enumerate(history):
        stages.setdefault(str(entry.get("stage", "fit")), []).append((place, entry))
    curves = []
    for i, (stage, entries) in enumerate(stages.items()):
        for key, label in (("loss", stage), ("heldout", f"{stage}, held out")):
            pairs = [(place, float(e[key])) for place, e in entries if e.get(key) is not None]
            pairs = [(place, value) for place, value in pairs if np.isfinite(value)]
            if pairs:
                steps, values = (np.array(part) for part in zip(*pairs, strict=True))
                curves.append((label, steps, values, SERIES[i % len(SERIES)], key == "heldout"))
    return curves


def frame_of(values: NDArray) -> tuple[float, float]:
    """Range to show: a few huge first values must not flatten the rest."""
    low, high = float(values.min()), float(values.max())
    usual = float(np.quantile(values, 0.95))
    if high - low > 5 * (usual - low) > 0:
        high = low + 1.3 * (usual - low)
    return low, high if high > low else low + max(1e-12, abs(low) * 1e-3)


def share_an_axis(curves: Sequence[NDArray]) -> bool:
    """Whether curves can be read on one axis: none is flattened by another."""
    frames = [frame_of(values) for values in curves]
    whole = max(high for _, high in frames) - min(low for low, _ in frames)
    return all(high - low > whole / 6 for low, high in frames)


def shortened(label: str, most: int = 28) -> str:
    """A long name without its middle, since names differ at their ends."""
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[-most // 2 :]}"


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# ---- looks -----------------------------------------------------------------------------------------


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.6)) -> Axes:
    """The given Axes, or new ones through pyplot."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def marker(n: int) -> tuple[float, float]:
    """Size and opacity of one of n points."""
    for most, size, opacity in ((MANY, 18.0, 0.85), (2_000, 9.0, 0.5), (20_000, 5.0, 0.25)):
        if n <= most:
            return size, opacity
    return 3.0, 0.1


def rasterise(ax: Axes, n: int) -> None:
    """Many points as one picture: a PDF of 100,000 vector points opens slowly."""
    if n > MANY:
        for points in ax.collections:
            points.set_rasterized(True)


def rug(ax: Axes, values: NDArray) -> None:
    """Where the data lie: short strokes along the lower edge."""
    shown = values if len(values) <= 500 else np.quantile(values, np.linspace(0, 1, 500))
    ax.plot(
        shown,
        np.full(len(shown), 0.012),
        "|",
        color=INK,
        alpha=0.35,
        ms=7,
        mew=0.8,
        transform=ax.get_xaxis_transform(),
        label="data",
    )


def finish(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, labels, and the quiet frame that all plots have."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=9)
    ax.set_xlabel(x, color=INK, fontsize=10)
    ax.set_ylabel(y, color=INK, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#c5ccd3")
    ax.tick_params(colors="#52606d", labelsize=9)
    ax.grid(True, color="#eef1f4", lw=0.8)
    ax.set_axisbelow(True)


def same_exponent(ax: Axes) -> None:
    """One power of ten for both axes, which are in the same unit, where numbers are large enough to need one."""
    largest = max(abs(bound) for bound in (*ax.get_xlim(), *ax.get_ylim()))
    if largest >= 1e6:
        power = 3 * int(np.log10(largest) // 3)
        ax.ticklabel_format(style="sci", scilimits=(power, power))


def legend(ax: Axes, **where: Any) -> None:
    """A legend that is readable also where the points are small and pale."""
    where = {"fontsize": 8.5} | where
    drawn = ax.legend(frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK, **where)
    for handle in drawn.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
            if hasattr(handle, "set_sizes"):
                handle.set_sizes([22.0])
