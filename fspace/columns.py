"""One column at a time: from what a table holds to float64, and the words of each refusal."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder

from .errors import DataError

# The square of anything larger overflows float64, so no variance of it exists.
ROWS_AT_ONCE = 8192  # of images and sequences, which may be on disk, that are looked at together
LARGEST_VALUE = 1e150


class WrongKindError(DataError, TypeError):
    """The object is of a kind that cannot become a table of numbers (sparse, dict cells, ...)."""


def is_category(column: pd.Series) -> bool:
    """Whether the column has a category type."""
    return isinstance(column.dtype, pd.CategoricalDtype)


# ---- numbers -------------------------------------------------------------------------------------


def column_to_float(column: pd.Series, name: str, first_row: int = 0) -> Float[np.ndarray, " n"]:
    """One column as float64, NaN where a value is missing. Raises DataError for text, dates, categories."""
    dtype: Any = column.dtype
    if is_category(column):
        raise DataError(f"Column {name!r} is a category, but it held numbers in fit.")
    if dtype.kind in "mM":
        raise DataError(
            f"Column {name!r} holds dates or times ({dtype}). Turn it into numbers that mean "
            "something here, such as days since a start, the month, or the hour."
        )
    if dtype.kind == "c":
        raise DataError(f"Complex data not supported (column {name!r}).")
    if isinstance(dtype, np.dtype) and dtype.kind in "fiub":
        return np.asarray(column.to_numpy(), dtype=np.float64)
    values = column.to_numpy(dtype=object)
    for row, value in enumerate(values):
        if isinstance(value, str | bytes):
            raise DataError(_text_message(name, values, row, first_row))
    try:
        return np.asarray(np.where(pd.isna(values), np.nan, values), dtype=np.float64)
    except TypeError as error:
        raise WrongKindError(f"Column {name!r} is not numeric: {error}.") from error
    except (ValueError, OverflowError) as error:  # a whole number may be larger than any float
        raise DataError(f"Column {name!r} is not numeric: {error}.") from error


def is_text(column: pd.Series) -> bool:
    """Whether most cells hold text that is no number, and the column has no category type."""
    dtype: Any = column.dtype
    if is_category(column) or (isinstance(dtype, np.dtype) and dtype.kind != "O"):
        return False
    values = column.to_numpy(dtype=object)
    text = any(isinstance(value, str | bytes) for value in values)
    return text and bool(2 * _numbers_in(values).sum() < len(values))


def refuse_text(names: Sequence[str]) -> None:
    """Raises DataError that tells of all text columns at once, so that nobody meets them one by one."""
    if len(names) > 1:
        options = " ".join(f"--categorical {name}" for name in names)
        raise DataError(
            f"Columns {', '.join(map(repr, names))} hold text and have no category type. If they are categories, say "
            f"so: categories={list(names)!r}, or in the terminal {options}. Otherwise remove them (in the terminal "
            "--drop, once for each)."
        )


def _numbers_in(values: NDArray) -> NDArray[np.bool_]:
    """Which cells are numbers, maybe written as text."""
    return pd.to_numeric(pd.Series(values).map(str), errors="coerce").notna().to_numpy()


def _text_message(name: str, values: NDArray, first: int, first_row: int) -> str:
    """Three cases: a few bad cells among numbers, numbers written as text, and real text."""
    parsed = _numbers_in(values)
    bad = np.flatnonzero(~parsed & ~np.asarray(pd.isna(values), dtype=bool))
    if not len(bad):
        return (
            f"Column {name!r} holds numbers written as text (row {first_row + first}: {values[first]!r}). "
            f"Convert it: X[{name!r}] = pandas.to_numeric(X[{name!r}])."
        )
    if 2 * parsed.sum() >= len(values):
        others = f" ({len(bad)} such cells in all)" if len(bad) > 1 else ""
        return (
            f"Column {name!r} holds text in row {first_row + bad[0]} ({values[bad[0]]!r}){others}, though most of its "
            "values are numbers. Correct the value, or leave the cell empty to have it read as missing."
        )
    holds = f"Column {name!r} holds text (row {first_row + first}: {values[first]!r})"
    drop = f"remove the column (in the terminal --drop {name})"
    if len(values) > 5 and len({str(value) for value in values}) == len(values):
        return f"{holds}, another one in every row, as an identifier has: {drop}."
    return (
        f"{holds} and has no category type. If it is a category, say so: X[{name!r}].astype('category'), or "
        f"categories=[{name!r}], or in the terminal --categorical {name}. Otherwise {drop}."
    )


def median_fill(values: Float[np.ndarray, "n k"], names: Sequence[str]) -> list[float]:
    """The median of each column's values. Raises DataError for a column without any."""
    for name, column in zip(names, values.T, strict=True):
        if np.isnan(column).all():
            raise DataError(
                f"Input X contains NaN.\nColumn {name!r} has no value at all, so there is nothing to "
                "impute from; remove the column."
            )
    require_finite(np.where(np.isnan(values), 0.0, values), names)
    return [float(fill) for fill in SimpleImputer(strategy="median").fit(values).statistics_] if names else []


# ---- categories ----------------------------------------------------------------------------------


def learn_category(column: pd.Series, name: str, impute: bool) -> dict[str, Any]:
    """{"kind", "levels", "fill"}: the levels that the column's type declares, else those seen, sorted."""
    values = column.to_numpy(dtype=object)
    gone = np.asarray(pd.isna(values), dtype=bool)
    if gone.all():
        raise DataError(f"Column {name!r} is a category column without a single value; remove it.")
    levels = column.cat.categories.tolist() if is_category(column) else list(pd.unique(values[~gone]))
    levels = [level.item() if isinstance(level, np.generic) else level for level in levels]
    for level in levels:
        if not isinstance(level, str | int | float | bool):
            raise DataError(
                f"Column {name!r} has the category {level!r}; a category may be text, a number or a "
                "boolean. Convert the column to text."
            )
    if not is_category(column):
        levels = (
            sorted(levels)
            if len({isinstance(level, str) for level in levels}) == 1
            else sorted(levels, key=str)
        )
    fill = None
    if impute:  # ties go to the first level, whatever the order of the rows
        counts = [int(np.sum(values[~gone] == level)) for level in levels]
        fill = levels[int(np.argmax(counts))]
    return {"kind": "category", "levels": levels, "fill": fill}


def one_hot(
    column: pd.Series, name: str, learnt: dict[str, Any], first_row: int = 0
) -> Float[np.ndarray, "n k"]:
    """Levels as 0/1 columns (one where there are two levels). A level not seen in fit is refused."""
    values = column.to_numpy(dtype=object)
    gone = np.asarray(pd.isna(values), dtype=bool)
    if gone.any():
        if learnt["fill"] is None:
            row = first_row + int(np.flatnonzero(gone)[0])
            raise DataError(missing_message("NaN", row, name, int(gone.sum())))
        values = np.where(gone, learnt["fill"], values)
    levels = np.empty(len(learnt["levels"]), dtype=object)
    levels[:] = learnt["levels"]
    codes = pd.Index(levels).get_indexer(pd.Index(values, dtype=object))
    unseen = np.flatnonzero(codes < 0)
    if len(unseen):
        value = values[unseen[0]]
        raise DataError(
            f"Column {name!r}, row {first_row + unseen[0]}: the category {value!r} was not there in fit."
            f"{suggest(str(value), [str(level) for level in levels])} Correct it, drop such rows, or "
            "fit again on data that has it."
        )
    encoder = OneHotEncoder(categories=[np.arange(len(levels))], drop="if_binary", sparse_output=False)
    return cast(NDArray, encoder.fit(np.arange(len(levels))[:, None]).transform(codes[:, None]))


def level_names(name: str, learnt: dict[str, Any]) -> list[str]:
    """The names of what `one_hot` makes."""
    levels = learnt["levels"][1:] if len(learnt["levels"]) == 2 else learnt["levels"]
    return [f"{name}_{level}" for level in levels]


# ---- finite values -------------------------------------------------------------------------------


def require_finite(
    values: NDArray, names: Sequence[str] | None = None, x: str = "X", first_row: int = 0
) -> None:
    """Refuses NaN, infinity and values whose square overflows, naming the first row and column.

    first_row: the row of a longer table at which these values begin.
    """
    if values.size == 0:
        return
    with np.errstate(invalid="ignore"):
        high, low = float(np.max(values)), float(np.min(values))  # NaN if any is
        if high <= LARGEST_VALUE and low >= -LARGEST_VALUE:
            return
        kinds = {
            "NaN": np.isnan(values),
            "infinity": np.isinf(values),
            "large": np.abs(np.asarray(values, dtype=np.float64)) > LARGEST_VALUE,
        }
    for what, bad in kinds.items():
        if bad.any():
            where = [int(i) for i in np.argwhere(bad)[0]]
            column = None
            if values.ndim == 2:
                column = names[where[1]] if names is not None else f"{x.lower()}{where[1]}"
            elif values.ndim > 2:
                column = f"position {tuple(where[1:])}"
            raise DataError(missing_message(what, first_row + where[0], column, int(bad.sum()), x))


def require_finite_rows(values: Any, first_row: int = 0) -> None:
    """`require_finite` of images and sequences, some rows at a time; steps at the end of a sequence [n, t, d] that are
    NaN throughout are no values, but its being shorter than others."""
    for start in range(0, len(values), ROWS_AT_ONCE):
        part = np.asarray(values[start : start + ROWS_AT_ONCE])
        if part.ndim == 3 and part.dtype.kind == "f" and np.isnan(part[:, -1:]).any():
            empty = np.isnan(part).all(axis=2)
            tail = np.flip(np.logical_and.accumulate(np.flip(empty, axis=1), axis=1), axis=1)
            if tail.all(axis=1).any():
                row = first_row + start + int(np.flatnonzero(tail.all(axis=1))[0])
                raise DataError(f"X: the sequence in row {row} has no step that is not NaN; leave it out.")
            part = np.where(tail[:, :, None], 0.0, part)
        require_finite(part, first_row=first_row + start)


def missing_message(what: str, row: int, column: str | None, count: int, x: str = "X") -> str:
    """What is wrong ("NaN", "infinity", "large"), in scikit-learn's words; where; and the cure."""
    where = f"Row {row}" + (f", column {column!r}" if column is not None else "") + " (rows count from 0)"
    more = f" ({count} such values in all)" if count > 1 else ""
    if what == "NaN":
        cure = (
            " or fill the gaps: missing='impute' in the fit (terminal: fspace fit --missing impute)"
            if x == "X"
            else ""
        )
        return f"Input {x} contains NaN.\n{where} has no value{more}. Remove such rows{cure}."
    if what == "infinity":
        return (
            f"Input {x} contains infinity.\n{where} is infinite{more}. Correct the value or remove the row."
        )
    return (
        f"Input {x} contains a value too large for float64 arithmetic.\n{where} is beyond "
        f"{LARGEST_VALUE:g}{more}; its square overflows. Measure it in another unit."
    )


def suggest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' with the nearest of the known names, or what there is."""
    lower = {other.lower(): other for other in known}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.6)]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, list(known)[:12]))
    return f" There is: {shown}{', ...' if len(known) > 12 else ''}."
