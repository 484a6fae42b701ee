"""The loop of active learning: fit, choose rows to label, label them, fit again; and what each label bought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fspace.decisions.active import CRITERIA, select
from fspace.decisions.sources import check_callable
from fspace.errors import DataError, OptionError
from fspace.predictive_base import check_seed, check_whole

BASELINES = ("random", "margin")


def learning_curve(
    fit: Callable[[Any, Any], Any],
    X: Any,
    y: Any,
    score: Callable[[Any], float],
    criterion: Any = "variance",
    start: int = 10,
    batch: int = 10,
    labels: int = 100,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score of the model over the number of labels: [{"labels", "score", "chosen"}], one entry a fit.

    fit(X, y) gives a fitted estimator of the rows labelled so far; score(estimator) a number, higher is better. X, y:
    the pool and the labels an oracle would give, [n, d] and [n]. The first `start` labels are random (of classes, as
    many more as it takes to see two). criterion: one of `select`, or "random", or "margin" (classes: the smallest gap
    between the two likeliest). Raises OptionError, DataError.
    """
    if not isinstance(criterion, str) or criterion not in (*CRITERIA, *BASELINES):
        raise OptionError(
            f"criterion={criterion!r} does not exist; choose one of {', '.join((*CRITERIA, *BASELINES))}."
        )
    check_callable(fit, "fit")
    check_callable(score, "score")
    check_whole("start", start, 2), check_whole("batch", batch), check_whole("labels", labels, 2)
    check_seed(seed)
    X, y = np.asarray(X), np.asarray(y)
    if X.ndim < 2 or y.ndim < 1 or len(X) != len(y):
        raise DataError(
            f"X has shape {X.shape} and y {y.shape}; they must be a table of rows and a label for each."
        )
    if not 2 <= start <= labels <= len(y) or batch < 1:
        raise OptionError(
            f"start={start}, labels={labels}, batch={batch}: there must be 2 <= start <= labels <= {len(y)} rows and a "
            "batch of at least 1."
        )
    if len(np.unique(y)) < 2:
        raise DataError("All labels of the pool are the same; there is nothing to learn.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    while len(np.unique(y[order[:start]])) < 2:
        start += 1
    known, history = list(order[:start]), []
    chosen = list(known)
    while True:
        model = fit(X[known], y[known])
        history.append(
            {"labels": len(known), "score": float(score(model)), "chosen": [int(i) for i in chosen]}
        )
        count = min(batch, labels - len(known))
        if count <= 0:
            return history
        left = np.setdiff1d(np.arange(len(y)), known)
        if criterion == "random":
            chosen = list(rng.choice(left, count, replace=False))
        elif criterion == "margin":
            if not hasattr(model, "predict_proba"):
                raise OptionError(
                    "criterion='margin' is the gap between two classes, but the model has none."
                )
            top = np.sort(model.predict_proba(X[left]), axis=1)
            chosen = list(left[np.argsort(top[:, -1] - top[:, -2], kind="stable")[:count]])
        else:  # pools have equal rows; of these one is as good as another
            distinct = left[np.sort(np.unique(X[left], axis=0, return_index=True)[1])]
            picked = select(model, X[distinct], min(count, len(distinct)), criterion, seed=seed)
            chosen = list(distinct[picked.index.numpy()])
        known = known + chosen
