"""What counts as a table (frames, arrays, tensors, lists), and whether two have the same columns."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import check_array

from .columns import WrongKindError
from .errors import DataError


def as_table(X: Any) -> pd.DataFrame | NDArray:
    """A pandas frame where kinds of columns matter, else a float array. Refusals are DataErrors."""
    if type(X).__module__.split(".")[0] == "polars" and hasattr(X, "get_columns"):
        X = from_polars(X)
    if isinstance(X, pd.DataFrame):
        if 0 in X.shape:
            _checked(np.empty(X.shape))
        return X
    if isinstance(X, pd.Series):
        X = X.to_numpy()
    if hasattr(X, "detach"):
        X = from_tensor(X, "X")
    X = unmasked(X)
    if isinstance(X, list) and len(X) and all(getattr(row, "ndim", 0) == 2 for row in X):
        X = padded(X)
    if not isinstance(X, np.ndarray) and not hasattr(X, "nnz"):
        try:
            array = np.asarray(X)
        except ValueError as error:
            raise DataError(f"X is not a table: its rows differ in length ({error}).") from error
        # numpy turns [1, "a"] into two strings; as objects each cell stays what it was
        X = np.asarray(X, dtype=object) if array.dtype.kind in "US" else array
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUS" and X.ndim == 2 and 0 not in X.shape:
        return pd.DataFrame(X.astype(object))
    refuse_dates(X, "X")
    return _checked(X)


def _checked(X: Any) -> NDArray:
    keep = getattr(X, "ndim", 2) > 2 and X.dtype in (np.float32, np.float64)
    try:
        return cast(
            NDArray,
            check_array(X, dtype=X.dtype if keep else np.float64, ensure_all_finite=False, allow_nd=True),
        )
    except TypeError as error:
        raise WrongKindError(str(error)) from error
    except ValueError as error:
        raise DataError(str(error)) from error


def padded(sequences: list[Any]) -> NDArray:
    """Sequences [t_i, d] of different lengths as one array [n, t, d], NaN after the end of each.

    Raises DataError for sequences without steps, or of different widths.
    """
    rows = [from_tensor(row, "X") if hasattr(row, "detach") else np.asarray(row) for row in sequences]
    widths = sorted({row.shape[1] for row in rows})
    if len(widths) > 1:
        raise DataError(f"X: sequences must have one width; these have {widths} numbers a step.")
    if min(len(row) for row in rows) == 0:
        empty = next(i for i, row in enumerate(rows) if len(row) == 0)
        raise DataError(f"X: the sequence in row {empty} has no steps; leave it out.")
    kind = np.float32 if all(row.dtype == np.float32 for row in rows) else np.float64
    whole = np.full((len(rows), max(len(row) for row in rows), widths[0]), np.nan, dtype=kind)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
    return whole


def from_tensor(X: Any, name: str) -> NDArray:
    """A tensor as a numpy array on the host. Raises DataError for a sparse one, or one without values."""
    try:
        X = X.detach().cpu()
        if X.is_floating_point() and X.element_size() < 4:  # numpy has no bfloat16
            X = X.float()
        return cast(NDArray, X.numpy())
    except (TypeError, RuntimeError) as error:
        raise WrongKindError(f"{name} is not a dense tensor of numbers: {error}") from error


def unmasked(values: Any) -> Any:
    """A masked array with NaN where values are masked, so that they count as missing; anything else as it is."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    if not np.ma.is_masked(values):
        return values.data
    if values.dtype.kind not in "fiub":
        return np.ma.MaskedArray(values, dtype=object).filled(np.nan)
    return np.where(np.ma.getmaskarray(values), np.nan, values.data)


def refuse_dates(values: Any, name: str) -> None:
    """Raises DataError for an array of dates or times, which would become counts of nanoseconds."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "mM":
        raise DataError(
            f"{name} holds dates or times ({values.dtype}). Turn them into numbers that mean something here, such as "
            "days since a start, the month, or the hour."
        )


def from_polars(frame: Any) -> pd.DataFrame:
    """Column by column, so that pyarrow is not needed."""
    columns: dict[str, Any] = {}
    for series in frame.get_columns():
        kind = str(series.dtype)
        if kind.startswith("Enum"):
            levels = series.dtype.categories.to_list()
            columns[series.name] = pd.Categorical(series.to_list(), categories=levels)
        elif kind.startswith("Categorical"):
            columns[series.name] = pd.Categorical(series.to_list())
        elif kind in ("String", "Null", "Boolean"):
            columns[series.name] = pd.Series(series.to_list(), dtype=object)
        else:
            columns[series.name] = series.to_numpy()  # missing numbers become NaN
    return pd.DataFrame(columns)


def column_names(table: pd.DataFrame | NDArray) -> NDArray[np.object_] | None:
    """The names of a frame; None for arrays and for frames that number their columns."""
    if not isinstance(table, pd.DataFrame):
        return None
    names = list(table.columns)
    text = [isinstance(name, str) for name in names]
    if not any(text):
        return None
    if not all(text):
        # scikit-learn raises a TypeError here, so this one is one as well
        raise WrongKindError(
            f"Some column names are text and some are not ({names[text.index(False)]!r}); "
            "make them all text: X.columns = X.columns.astype(str)."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"The column name {twice[0]!r} stands {names.count(twice[0])} times in the table; rename one."
        )
    return np.array(names, dtype=object)


def name_mismatch(names: list[str], fitted: list[str]) -> str:
    """scikit-learn's message for other column names, then the first difference and the cure."""
    message = "The feature names should match those that were passed during fit.\n"
    extra, gone = sorted(set(names) - set(fitted)), sorted(set(fitted) - set(names))
    for title, listed in (
        ("Feature names unseen at fit time:\n", extra),
        ("Feature names seen at fit time, yet now missing:\n", gone),
    ):
        if listed:
            message += title + "".join(f"- {name}\n" for name in listed[:5])
            message += "- ...\n" if len(listed) > 5 else ""
    if not extra and not gone:
        i = next(i for i, (a, b) in enumerate(zip(names, fitted, strict=True)) if a != b)
        message += (
            "Feature names must be in the same order as they were in fit.\n"
            f"Column {i} is {names[i]!r} but was {fitted[i]!r}.\n"
        )
    if not gone:
        message += "Select the fitted columns: X[list(model.feature_names_in_)].\n"
    return message
