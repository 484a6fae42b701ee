"""Targets that are not plain numbers: labels, their weights, and numbers of a restricted kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from gpytorch.likelihoods import Likelihood
from jaxtyping import Float, Int
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import distributions

from fspace.errors import DataError, OptionError
from fspace.inference.likelihoods import NAMED
from fspace.tables import unmasked

KINDS = {  # what a distribution asks of y
    distributions.constraints.nonnegative_integer: "whole numbers of at least 0",
    distributions.constraints.positive: "positive numbers",
    distributions.constraints.unit_interval: "numbers strictly between 0 and 1",
}


def check_likelihood(likelihood: Likelihood, y: Float[np.ndarray, "n t"]) -> None:
    """Raises OptionError for a gpytorch likelihood that is not of one function, the same for every output."""
    some = torch.from_numpy(y[:1]).expand(y.shape[1] + 1, -1)  # not as many rows as outputs
    try:
        with torch.no_grad():
            shapes = [
                likelihood(torch.zeros_like(part)).log_prob(part).shape
                for part in (some, some.mT.contiguous())
            ]
    except Exception as error:  # whatever a foreign likelihood raises
        raise OptionError(
            f"likelihood={type(likelihood).__name__} cannot be used on y with {y.shape[1]} output(s): {error}. Pass "
            "one of one function, without batch_shape or tasks, whose y is numbers; all outputs share it."
        ) from error
    if shapes != [some.shape, some.mT.shape]:
        raise OptionError(
            f"likelihood={type(likelihood).__name__} gives densities of shape {list(shapes[1])} for "
            f"{list(some.mT.shape)} function values. Pass one without batch_shape or tasks; all outputs share it."
        )


def check_support(y: Float[np.ndarray, "n t"], likelihood: Likelihood, vector: bool) -> None:
    """Raises DataError, with the row, for a y that the likelihood cannot have made."""
    with torch.no_grad():
        support: Any = likelihood(torch.zeros(1, 1, dtype=torch.float64)).support
    fine = support.check(torch.from_numpy(y)).numpy()
    if support is distributions.constraints.unit_interval:  # at its ends, and at 0, densities may be infinite
        fine = (y > 0) & (y < 1)
    elif support in (distributions.constraints.nonnegative, distributions.constraints.positive):
        support, fine = distributions.constraints.positive, y > 0
    if not fine.all():
        row, column = (int(i) for i in np.argwhere(~fine)[0])
        where = f"row {row}" if vector else f"row {row}, column {column}"
        raise DataError(
            f"y holds {y[row, column]:g} ({where}), but {_named(likelihood)} is of {KINDS.get(support, str(support))}; "
            f"{(~fine).sum()} value(s) are not. Choose another likelihood, such as {_fitting(y)}, or mend y."
        )


def _named(likelihood: Likelihood) -> str:
    """A likelihood by the name that an estimator knows it by, if it has one."""
    known = [f"likelihood={name!r}" for name, kind in NAMED.items() if kind is type(likelihood)]
    return known[0] if known else type(likelihood).__name__


def _fitting(y: Float[np.ndarray, "n t"]) -> str:
    """The option for numbers such as these."""
    whole = (y >= 0).all() and (y == np.floor(y)).all()
    shares = (y > 0).all() and (y < 1).all()
    name = "poisson" if whole else "beta" if shares else "gamma" if (y > 0).all() else "auto"
    return f"likelihood={name!r}"


def check_positions(y: Float[np.ndarray, "n 1"], classes: int) -> None:
    """Raises DataError, with the row, for a y that is no position among so many classes."""
    bad = (y != np.floor(y)) | (y < 0) | (y >= classes)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"y holds {y[row, 0]:g} (row {row}); classes are whole numbers from 0 to {classes - 1} here."
        )


def label_values(y: Any, n: int) -> np.ndarray:
    """The labels of n rows as an array [n] of one kind. Raises DataError for labels that cannot be used."""
    if y is None:
        raise DataError("This model requires y to be passed, but the target y is None.")
    if isinstance(y, list) and any(isinstance(label, str) for label in y):
        y = np.array(y, dtype=object)  # numpy would make text of numbers that stand beside text
    try:
        y = unmasked(y)
        values = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    except ValueError as error:
        raise DataError(
            f"y holds no labels, one for each row: its rows differ in length ({error})."
        ) from error
    if values.ndim == 0 or values.size == 0:
        raise DataError(f"y should be a 1d array of labels; got shape {values.shape} instead.")
    missing = np.asarray(pd.isna(values)).reshape(len(values), -1).any(axis=1)
    if missing.any():
        rows = np.flatnonzero(missing)
        raise DataError(f"y is NaN or missing in row {rows[0]} ({len(rows)} in all); remove such rows.")
    if values.dtype == object and values.ndim == 1:  # whole numbers and booleans as such
        values = pd.Series(values).infer_objects().to_numpy()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"y is infinite in row {int(np.flatnonzero(~np.isfinite(values))[0])}.")
    if values.dtype == object:
        kinds = {type(value) for value in values.reshape(-1)}
        if kinds & {str, np.str_} and kinds - {str, np.str_}:
            raise DataError(
                f"y mixes labels of different kinds ({', '.join(sorted(k.__name__ for k in kinds))}); make them alike."
            )
    try:
        values = column_or_1d(values, warn=True)
        check_classification_targets(values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{error} Labels are text, whole numbers, booleans or dates, all of one kind."
        ) from error
    if len(values) != n:
        raise DataError(f"X has {n} rows, but y has {len(values)}.")
    return values


def check_labels(y: Any, n: int, known: Any = None) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
    """The classes, sorted, and the position of every row's. known: all classes there are (None: those in y).

    Raises DataError for labels that cannot be used.
    """
    values = label_values(y, n)
    classes, labels = np.unique(values, return_inverse=True)
    if known is not None:
        known = known_classes(known)
        strange = [label for label in classes.tolist() if label not in known.tolist()]
        if strange:
            row = values.tolist().index(strange[0])
            raise DataError(
                f"y holds the class {strange[0]!r} (row {row}), which is not among the classes {known.tolist()[:20]}. "
                "Fit anew with it, or name all classes in the first call."
            )
        at = {label: k for k, label in enumerate(known.tolist())}
        classes, labels = known, np.array([at[label] for label in values.tolist()])
    if len(classes) < 2:
        raise DataError(
            f"y holds one class only ({classes.tolist()[0]!r}); a classifier needs at least 2 classes to tell apart."
        )
    return classes, labels.reshape(-1)


def known_classes(classes: Any) -> np.ndarray:
    """All classes there are, sorted. Raises OptionError for what is no list of labels."""
    try:
        known = np.unique(np.asarray(classes))
    except (TypeError, ValueError) as error:
        raise OptionError(f"classes={classes!r} must be labels of one kind ({error}).") from error
    if np.ndim(classes) != 1 or pd.isna(known).any():
        raise OptionError(f"classes={classes!r} must be a list of labels, none of them missing.")
    return known


def check_weights(sample_weight: Any, n: int) -> Float[np.ndarray, " n"] | None:
    """How often each row counts; None where all count once. Raises DataError for what cannot be weights."""
    if sample_weight is None:
        return None
    try:
        weight = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample_weight holds no numbers ({error}).") from error
    if weight.shape not in ((n,), ()):
        raise DataError(
            f"sample_weight has shape {list(weight.shape)}; give one number for each of the {n} rows of X. "
            "Sample weights must be 1D array or scalar."
        )
    weight = np.broadcast_to(weight, (n,))
    bad = ~np.isfinite(weight) | (weight < 0)
    if bad.any() or weight.sum() <= 0:
        row = int(np.flatnonzero(bad)[0]) if bad.any() else 0
        raise DataError(
            f"sample_weight must be finite and at least 0, and not zero everywhere; row {row} has {weight[row]:g}."
        )
    return np.ones(n) * weight


def balanced(
    weight: Float[np.ndarray, " n"] | None,
    class_weight: Any,
    classes: np.ndarray,
    labels: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"] | None:
    """The weights times those of the classes. Raises OptionError for a class_weight that is none."""
    if class_weight is None:
        return weight
    named = isinstance(class_weight, str) and class_weight == "balanced"
    if not named and not isinstance(class_weight, dict):
        raise OptionError(
            f"class_weight={class_weight!r} must be None, 'balanced', or a dict from class to weight."
        )
    rare = [label for k, label in enumerate(classes.tolist()) if not (labels == k).any()]
    if named and rare:
        raise OptionError(
            f"class_weight='balanced' weighs a class by how rare it is, but of the classes {rare[:10]} there is no row "
            "(with a weight above 0) in this first call. Give it rows of every class, or weights of your own: "
            "class_weight={class: weight, ...}."
        )
    try:
        of_class = compute_class_weight(class_weight, classes=classes, y=classes[labels])
    except (TypeError, ValueError) as error:
        raise OptionError(f"class_weight={class_weight!r}: {error}") from error
    if not (np.isfinite(of_class) & (of_class > 0)).all():
        raise OptionError(f"class_weight={class_weight!r}: every class needs a positive, finite weight.")
    return of_class[labels] if weight is None else weight * of_class[labels]
