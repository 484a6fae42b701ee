"""Scores of predictions on held-out points: of numbers in the target's own units, and of classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .canvas import array, column_of, like, same_length
from .compare import metrics

# In the order of tables: key, what a reader calls it, whether more is better (None: should equal the level).
SCORES: tuple[tuple[str, str, bool | None], ...] = (
    ("rmse", "RMSE", False),
    ("mae", "MAE", False),
    ("r2", "R²", True),
    ("log_likelihood", "log-likelihood per point", True),
    ("coverage_90", "90% interval coverage", None),
    ("width_90", "90% interval width", False),
)

CLASS_SCORES: tuple[tuple[str, str, bool | None], ...] = (
    ("accuracy", "accuracy", True),
    ("log_likelihood", "log-likelihood per point", True),
    ("brier", "Brier score", False),
    ("ece", "calibration error", False),
)


def class_scores(labels: Any, predictive: Any) -> dict[str, float]:
    """Accuracy, mean log probability, Brier score (summed over classes) and expected calibration error of the predicted
    class (15 bins of equal count). labels: positions of classes [n]; predictive: a Categorical at the same points."""
    labels, probs = array(labels).astype(int), array(predictive.probs)
    same_length(labels, probs)
    return _class_scores(labels, probs)


def class_baseline_scores(labels: Any, labels_train: Any, classes: int) -> dict[str, float]:
    """The same of the training part's class frequencies (each counted once more), at every point."""
    labels = array(labels).astype(int)
    counts = np.bincount(array(labels_train).astype(int), minlength=classes) + 1.0
    return _class_scores(labels, np.tile(counts / counts.sum(), (len(labels), 1)))


def _class_scores(labels: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    with np.errstate(divide="ignore"):  # a probability of 0 for what happened is infinitely bad
        logs = np.log(probs[np.arange(len(labels)), labels])
    return {
        "accuracy": metrics.accuracy(labels, probs),
        "log_likelihood": float(logs.mean()),
        "brier": metrics.brier(labels, probs),
        "ece": metrics.class_calibration_error(labels, probs),
    }


def regression_scores(y: Any, predictive: Any, *, output: int = 0) -> dict[str, float]:
    """RMSE, MAE, R2, mean log density, coverage and mean width of the 90% interval of one output.

    y `[n]` or `[n, t]` and an observed Predictive at the same points. R2 is NaN where y is constant.
    """
    observed, mean = column_of(y, output), column_of(predictive.mean, output)
    same_length(observed, mean)
    lower, upper = (column_of(bound, output) for bound in predictive.interval(0.9))
    density = column_of(predictive.log_prob(like(predictive.mean, y)), output)
    return _scores(observed, mean, lower, upper, float(density.mean()))


def baseline_scores(y: Any, y_train: Any, *, output: int = 0, counts: bool = False) -> dict[str, float]:
    """The same of one Gaussian, with the training targets' mean and spread, at every point; of counts, whose models
    give probabilities and not densities, of their shares in training (one that was not seen there counts as once)."""
    observed, seen = column_of(y, output), column_of(y_train, output)
    if counts:
        return _frequency_scores(observed, seen)
    mean, std = float(seen.mean()), max(float(seen.std()), 1e-12 * abs(float(seen.mean())), 1e-300)
    density = -0.5 * ((observed - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    half = 1.6448536269514722 * std
    constant = np.full(len(observed), mean)
    return _scores(observed, constant, constant - half, constant + half, float(density.mean()))


def _frequency_scores(observed: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Scores of the shares of the values seen; a value that was not seen has the share of one row."""
    values, times = np.unique(seen, return_counts=True)
    share = np.array([times[values == value].sum() or 1 for value in observed]) / (len(seen) + 1)
    lower, upper = np.quantile(seen, [0.05, 0.95], method="inverted_cdf")
    constant = np.full(len(observed), float(seen.mean()))
    return _scores(
        observed, constant, constant * 0 + lower, constant * 0 + upper, float(np.log(share).mean())
    )


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
    """A score as a table shows it, with four digits that count: 552,300 rather than 5.523e+05."""
    if not math.isfinite(value):
        return "n/a"
    if key in ("coverage_90", "accuracy"):
        return f"{value:.1%}"
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if 1e3 <= abs(rounded) < 1e12 else f"{value:.4g}"
