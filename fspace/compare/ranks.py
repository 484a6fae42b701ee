"""Who is better, and is it more than chance? Ranks over data sets, paired tests, and standard errors over splits.

Values are [blocks, methods]: a block is a data set (or a split of one), on which every method has one score. A method
without a score on a block (it failed or diverged) counts as the worst of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from fspace.compare.metrics import floats
from fspace.errors import DataError, OptionError

LOWER_IS_BETTER = (
    "rmse", "crps", "calibration_error", "calibration_error_width", "width_90", "sharpness", "brier", "aurc", "augrc",
    "fit_seconds", "cpu_seconds", "predict_seconds",
)  # fmt: skip


def higher_is_better(metric: str) -> bool:
    """Which way a score of a study is better. Raises OptionError for coverage, which should equal its level."""
    if metric.startswith("coverage"):
        raise OptionError(
            f"{metric} is best at its level, neither high nor low; rank calibration_error instead."
        )
    return metric not in LOWER_IS_BETTER and not metric.startswith("fpr95")


@dataclass(frozen=True)
class Ranking:
    """Mean ranks (1 is best) over so many blocks; the p-value of Friedman's test that all methods are alike; the
    critical difference of mean ranks (Nemenyi, 5%); p-values of pairs (Wilcoxon, Holm) [k, k]."""

    methods: list[str]
    ranks: Float[np.ndarray, " k"]
    blocks: int
    p_value: float
    critical_difference: float
    pairs: Float[np.ndarray, "k k"]


def rank(values: Any, methods: list[str], higher: bool) -> Ranking:
    """Rank methods by values [blocks, methods]. Raises DataError where there are not two of each.

    Sources: Demsar (2006): Friedman's statistic in Iman and Davenport's form (eq. 3.2), Nemenyi's critical difference
    (section 3.2.2); Wilcoxon's signed ranks with Holm's correction.
    """
    table = floats(values, "values")
    if table.ndim != 2 or table.shape[1] != len(methods) or len(methods) < 2 or len(table) < 2:
        raise DataError(
            f"Ranks need at least two methods on at least two blocks; there are values {list(table.shape)} for "
            f"{len(methods)} methods."
        )
    scores = comparable(table if higher else -table)
    ranks = np.stack([stats.rankdata(-row) for row in scores])
    blocks, k = ranks.shape
    return Ranking(
        list(methods),
        ranks.mean(axis=0),
        blocks,
        _friedman(ranks),
        critical_difference(k, blocks),
        _pairs(scores),
    )


def comparable(scores: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b k"]:
    """Scores, higher better, with a number for what is NaN or minus infinity: below all others of the block, by as much
    as these spread."""
    finite = np.isfinite(scores)
    filled = scores.copy()
    for row, known in zip(filled, finite):
        low, high = (row[known].min(), row[known].max()) if known.any() else (0.0, 0.0)
        row[~known & ~(row == math.inf)] = low - max(high - low, 1.0)
        row[row == math.inf] = high + max(high - low, 1.0)
    return filled


def _friedman(ranks: Float[np.ndarray, "b k"]) -> float:
    """P-value of Iman and Davenport's F statistic, with the correction for ties; never below 1 / k!^(blocks - 1), the
    probability by chance alone of one order on all blocks, which no result can be less probable than."""
    blocks, k = ranks.shape
    between = blocks * ((ranks.mean(0) - (k + 1) / 2) ** 2).sum()
    within = ((ranks - (k + 1) / 2) ** 2).sum() / (blocks * (k - 1))
    if within == 0:  # all tied everywhere
        return 1.0
    square = between / within
    rest = blocks * (k - 1) - square
    least = float(math.factorial(k)) ** (1 - blocks) if k < 100 else 0.0
    if rest <= 1e-12 * square:  # the same order on every block
        return least
    return max(least, float(stats.f.sf((blocks - 1) * square / rest, k - 1, (k - 1) * (blocks - 1))))


def critical_difference(methods: int, blocks: int, level: float = 0.05) -> float:
    """Nemenyi's: mean ranks that differ by less cannot be told apart. Source: Demsar (2006), section 3.2.2."""
    quantile = stats.studentized_range.ppf(1 - level, methods, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * blocks)))


def _pairs(scores: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "k k"]:
    """Wilcoxon's p-value of every pair, with Holm's correction over all pairs."""
    k = scores.shape[1]
    places = [(i, j) for i in range(k) for j in range(i)]
    raw = []
    for i, j in places:
        difference = scores[:, i] - scores[:, j]
        raw.append(1.0 if (difference == 0).all() else float(stats.wilcoxon(difference).pvalue))
    table = np.ones((k, k))
    for (i, j), p in zip(places, holm(raw)):
        table[i, j] = table[j, i] = p
    return table


def holm(p_values: list[float]) -> list[float]:
    """P-values corrected for their number, step by step. Source: Holm (1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def standard_error(values: Any, test_share: float) -> float:
    """Standard error of a mean over splits (or of paired differences); NaN of fewer than two and of infinite ones.

    test_share: test rows for each training row. The training parts of random splits overlap, so that scores of splits
    are less different than those of new data: the variance is multiplied by 1/J + test_share rather than 1/J, which
    is a rule of thumb, and 0 gives the plain standard error. Source: Nadeau and Bengio (2003), eq. 13.
    """
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2 or not np.isfinite(found).all():
        return math.nan
    return float(np.std(found, ddof=1) * math.sqrt(1 / len(found) + test_share))
