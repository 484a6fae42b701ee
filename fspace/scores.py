"""Scores of a regression's predictions on held-out points, in the target's own units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .canvas import column_of, like, same_length

# In the order of tables: key, what a reader calls it, whether more is better (None: should equal the level).
SCORES: tuple[tuple[str, str, bool | None], ...] = (
    ("rmse", "RMSE", False),
    ("mae", "MAE", False),
    ("r2", "R²", True),
    ("log_likelihood", "log-likelihood per point", True),
    ("coverage_90", "90% interval coverage", None),
    ("width_90", "90% interval width", False),
)


def regression_scores(y: Any, predictive: Any, *, output: int = 0) -> dict[str, float]:
    """RMSE, MAE, R2, mean log density, coverage and mean width of the 90% interval of one output.

    y `[n]` or `[n, t]` and an observed Predictive at the same points. R2 is NaN where y is constant.
    """
    observed, mean = column_of(y, output), column_of(predictive.mean, output)
    same_length(observed, mean)
    lower, upper = (column_of(bound, output) for bound in predictive.interval(0.9))
    density = column_of(predictive.log_prob(like(predictive.mean, y)), output)
    return _scores(observed, mean, lower, upper, float(density.mean()))


def baseline_scores(y: Any, y_train: Any, *, output: int = 0) -> dict[str, float]:
    """The same of one Gaussian, with the training targets' mean and spread, at every point."""
    observed, seen = column_of(y, output), column_of(y_train, output)
    mean, std = float(seen.mean()), max(float(seen.std()), 1e-12 * abs(float(seen.mean())), 1e-300)
    density = -0.5 * ((observed - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    half = 1.6448536269514722 * std
    constant = np.full(len(observed), mean)
    return _scores(observed, constant, constant - half, constant + half, float(density.mean()))


def _scores(
    y: np.ndarray, mean: np.ndarray, lower: np.ndarray, upper: np.ndarray, density: float
) -> dict[str, float]:
    error = y - mean
    spread = float(np.sum((y - y.mean()) ** 2))
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "r2": 1.0 - float(np.sum(error**2)) / spread if spread > 0 else math.nan,
        "log_likelihood": density,
        "coverage_90": float(np.mean((y >= lower) & (y <= upper))),
        "width_90": float(np.mean(upper - lower)),
    }


def shown(key: str, value: float) -> str:
    """A score as a table shows it."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.1%}" if key == "coverage_90" else f"{value:.4g}"
