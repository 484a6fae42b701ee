"""Does a model know where it is wrong, and where it has seen nothing alike?

Selective prediction: rows are answered from the surest on, and what is asked is the loss of those answered. Detection:
rows of another kind ("outside") should be less sure than rows of the kind that was fitted ("inside").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from fspace.canvas import array
from fspace.compare.metrics import class_arrays, floats, numbers
from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical

MEASURES = ("largest probability", "entropy", "mutual information", "variance", "epistemic variance")


def auroc(inside: Any, outside: Any) -> float:
    """Probability that a row from outside is less sure than one from inside, ties counted half.

    inside [n], outside [m]: any measure of doubt, larger where less sure. Raises DataError for NaN and for no rows.
    """
    inside, outside = _doubts(inside, "inside"), _doubts(outside, "outside")
    ranks = rankdata(np.concatenate([outside, inside]))
    m, n = len(outside), len(inside)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def fpr95(inside: Any, outside: Any) -> float:
    """Share of outside rows that are let through by the threshold that lets 95% of the inside rows through."""
    inside, outside = _doubts(inside, "inside"), _doubts(outside, "outside")
    return float((outside <= np.quantile(inside, 0.95, method="inverted_cdf")).mean())


def risk_coverage(loss: Any, doubt: Any) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Share of rows answered, the surest first, and the mean loss of these. loss, doubt [n]; rows of equal doubt count
    in every order, on average. Raises DataError for NaN and for other lengths."""
    loss, doubt = _doubts(loss, "loss"), _doubts(doubt, "doubt")
    if len(loss) != len(doubt):
        raise DataError(f"There are {len(loss)} losses for {len(doubt)} measures of doubt.")
    _, group = np.unique(doubt, return_inverse=True)
    expected = (np.bincount(group, loss) / np.bincount(group))[group]
    answered = np.arange(1, len(loss) + 1)
    return answered / len(loss), np.cumsum(expected[np.argsort(doubt, kind="stable")]) / answered


def aurc(loss: Any, doubt: Any) -> float:
    """Area under the risk-coverage curve: the loss of those answered, averaged over how many are.

    loss [n]: 0 or 1 of classes, squared or absolute errors of numbers (then in their units). It weighs the few surest
    rows most. Source: Geifman, Uziel and El-Yaniv (2019).
    """
    return float(risk_coverage(loss, doubt)[1].mean())


def augrc(loss: Any, doubt: Any) -> float:
    """Area under the generalised risk-coverage curve: the loss of those answered as a share of all rows, averaged; the
    risk of a silent error. Of many rows of classes at most 0.5. Source: Traub et al. (2024), eq. 6."""
    coverage, risk = risk_coverage(loss, doubt)
    return float((coverage * risk).mean())


def losses(y: Any, predictive: Any) -> Float[np.ndarray, " n"]:
    """What selective prediction counts: 0 or 1 for each label, the squared error of each number."""
    if isinstance(predictive, Categorical):
        labels, probs = class_arrays(y, predictive)
        return (probs.argmax(axis=1) != labels).astype(np.float64)
    return (numbers(y, predictive) - array(predictive.mean)) ** 2


def doubt(predictive: Any, measure: str | None = None) -> Float[np.ndarray, " n"]:
    """How unsure the model is of each row, larger where less sure.

    measure: of classes "largest probability" (one minus it, the default), "entropy" or "mutual information"; of
    numbers "variance" (default) or "epistemic variance". Raises OptionError for one that the predictive has not.
    """
    classes = isinstance(predictive, Categorical)
    measure = measure or ("largest probability" if classes else "variance")
    if measure not in MEASURES or classes == ("variance" in measure):
        raise OptionError(
            f"measure={measure!r} is not one of {'classes' if classes else 'numbers'}; choose one of "
            f"{', '.join(MEASURES[:3] if classes else MEASURES[3:])}."
        )
    if measure == "largest probability":
        return 1.0 - array(predictive.probs).max(axis=1).astype(np.float64)
    of = {"entropy": "entropy", "mutual information": "mutual_information", "variance": "variance"}
    return array(getattr(predictive, of.get(measure, "epistemic"))).astype(np.float64)


def _doubts(values: Any, name: str) -> Float[np.ndarray, " n"]:
    found = floats(values, name)
    if found.ndim != 1 or len(found) == 0:
        raise DataError(f"{name} must be numbers [n], at least one; got shape {list(found.shape)}.")
    if np.isnan(found).any():
        raise DataError(f"{name} is NaN in row {int(np.flatnonzero(np.isnan(found))[0])}.")
    return found
