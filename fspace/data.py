"""Tables in, float64 arrays out: encoding columns, checking targets (files and data sets: datasets.py).

Input is checked here, once, at the edge; every refusal names the row and the column and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from .columns import (
    column_to_float,
    is_category,
    is_text,
    learn_category,
    level_names,
    median_fill,
    one_hot,
    refuse_text,
    require_finite,
    require_finite_rows,
    suggest,
)
from .datasets import load_diabetes_table, load_flights, load_uci, read_table, write_table
from .errors import DataError, NotFittedError, OptionError
from .tables import as_table, column_names, from_polars, from_tensor, name_mismatch, refuse_dates, unmasked
from .torch_data import DatasetRows

__all__ = [
    "TableEncoder",
    "check_target",
    "load_diabetes_table",
    "load_flights",
    "load_uci",
    "read_table",
    "split_target",
    "write_table",
]


class TableEncoder:
    """Turns a table into a float64 array `[n, d]` in original units; refuses tables that do not match.

    Numeric and boolean columns pass through. Columns with a category type (pandas `category`, polars
    `Categorical` or `Enum`) and those named in `categories` become one-hot columns (one where there are two
    levels). Arrays of three or more dimensions (images `[n, c, h, w]`, sequences `[n, t, d]`) are checked and
    passed on, in float32 if they came so.

    categories: names (or positions) of further columns to read as categories.
    missing: "error", or "impute": medians for numbers, the most frequent level for categories.
    owner: the class named in messages.
    """

    n_features_in_: int
    _tensor_shape: tuple[int, ...] | None
    _columns: list[dict[str, Any]]
    feature_names_in_: NDArray[np.object_]  # only where the table had names, as in scikit-learn

    def __init__(
        self,
        categories: Any = None,  # checked in fit
        missing: str = "error",
        owner: str = "TableEncoder",
    ):
        self.categories = categories
        self.missing = missing
        self.owner = owner

    def fit(self, X: Any) -> TableEncoder:
        """Learn names, kinds, levels and fill-in values from X `[n, columns]`. Raises DataError."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Any) -> Any:
        """`fit` and `transform` in one pass over X: float64 [n, d]; images and sequences as they came."""
        if self.missing not in ("error", "impute"):
            raise OptionError(f"missing={self.missing!r} does not exist; choose 'error' or 'impute'.")
        self._forget()
        if isinstance(X, DatasetRows):
            require_finite_rows(X)
            self._learn_shape(X)
            return X
        table = as_table(X)
        if isinstance(table, np.ndarray) and table.ndim > 2:
            if table.size == 0:
                raise DataError(f"X has shape {list(table.shape)}: there is nothing in it.")
            require_finite_rows(table)
            self._learn_shape(table)
            return table
        names = column_names(table)
        self._tensor_shape, self.n_features_in_ = None, table.shape[1]
        if names is not None:
            self.feature_names_in_ = names
        try:
            opted_in = self._positions([] if self.categories is None else self.categories)
            if isinstance(table, np.ndarray) and opted_in:
                table = pd.DataFrame(table)
            self._learn_columns(table, opted_in)
            return self._encode(table)
        except DataError:
            self._forget()  # a refused table leaves no half-fitted encoder behind
            raise

    def transform(self, X: Any, first_row: int = 0) -> Float[np.ndarray, "n *d"]:
        """Encode X as learnt. Raises DataError for other columns, unseen levels, NaN and infinity.

        first_row: the row of a longer table at which X begins, for the messages.
        """
        if not hasattr(self, "n_features_in_"):
            raise NotFittedError(f"This {self.owner} instance is not fitted yet. Call 'fit' first.")
        table = as_table(X)
        if isinstance(table, np.ndarray) and (table.ndim > 2 or self._tensor_shape is not None):
            self._check_tensor(table)
            require_finite_rows(table, first_row)
            return table
        if isinstance(table, np.ndarray) and not hasattr(self, "feature_names_in_") and any(self.levels):
            table = pd.DataFrame(table)  # as fit does with categories by position
        self._check_columns(table, warned=first_row > 0)
        return self._encode(table, first_row)

    def batches(self, X: Any, values: int) -> Iterator[Float[np.ndarray, "n *d"]]:
        """`transform` in parts of about so many encoded values, so that a long table is never held twice."""
        if isinstance(X, list | tuple):
            X = as_table(X)  # whole: what a column of a list holds is told by all its rows
        if not hasattr(self, "n_features_in_"):
            yield self.transform(X)
            return
        shape: tuple[int, ...] = tuple(getattr(X, "shape", ()))
        width = len(self.feature_names_out) if self._tensor_shape is None else int(np.prod(shape[1:]))
        rows = max(1, values // max(1, width))
        if len(shape) < 2 or shape[0] <= rows:
            yield self.transform(X[:] if isinstance(X, DatasetRows) else X)
            return
        for start in range(0, shape[0], rows):
            stop = start + rows
            yield self.transform(X.iloc[start:stop] if hasattr(X, "iloc") else X[start:stop], start)

    @property
    def feature_names(self) -> list[str]:
        """Names of the input columns (`x0`, `x1`, ... where the table had none)."""
        if hasattr(self, "feature_names_in_"):
            return [str(name) for name in self.feature_names_in_]
        return [f"x{i}" for i in range(self.n_features_in_)]

    @property
    def feature_names_out(self) -> list[str]:
        """Names of the encoded columns: the column's own, or `column_level` for one-hot columns."""
        return [name for names in self._names_out() for name in names]

    @property
    def source_columns(self) -> list[int]:
        """For each encoded column, the position of the input column it came from."""
        return [i for i, names in enumerate(self._names_out()) for _ in names]

    @property
    def levels(self) -> list[list[Any] | None]:
        """For each input column its categories, or None for numbers."""
        return [list(column["levels"]) if "levels" in column else None for column in self._columns]

    def state(self) -> dict[str, Any]:
        """All that was learnt, ready for JSON."""
        return {
            "missing": self.missing,
            "owner": self.owner,
            "n_features": self.n_features_in_,
            "names": self.feature_names if hasattr(self, "feature_names_in_") else None,
            "tensor_shape": None if self._tensor_shape is None else list(self._tensor_shape),
            "columns": [dict(column) for column in self._columns],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TableEncoder:
        """The encoder that gave this `state()`. Raises DataError if it is not one."""
        try:
            encoder = cls(missing=state["missing"], owner=state["owner"])
            encoder.n_features_in_ = int(state["n_features"])
            encoder._columns = [
                {"kind": column["kind"]} | {key: column[key] for key in ("levels", "fill") if key in column}
                for column in state["columns"]
            ]
            encoder._tensor_shape = None if state["tensor_shape"] is None else tuple(state["tensor_shape"])
            if state["names"] is not None:
                encoder.feature_names_in_ = np.array(state["names"], dtype=object)
            if encoder._tensor_shape is None and len(encoder._columns) != encoder.n_features_in_:
                raise ValueError("columns and n_features disagree")
            if state["names"] is not None and len(state["names"]) != encoder.n_features_in_:
                raise ValueError("names and n_features disagree")
            encoder.categories = [
                i for i, column in enumerate(encoder._columns) if "levels" in column
            ] or None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"This is not the state of a TableEncoder ({error!r}).") from error
        return encoder

    # ---- fitting ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        for name in ("feature_names_in_", "n_features_in_", "_columns", "_tensor_shape"):
            if hasattr(self, name):
                delattr(self, name)

    def _positions(self, columns: Any) -> set[int]:
        """Positions of columns given by name or by number."""
        names, found = self.feature_names, set()
        if not isinstance(columns, str | Sequence | np.ndarray | pd.Index):
            raise OptionError(f"categories={columns!r} must be a list of column names or positions.")
        for column in [columns] if isinstance(columns, str) else columns:
            if isinstance(column, str) and column in names:
                found.add(names.index(column))
            elif isinstance(column, int | np.integer) and 0 <= column < self.n_features_in_:
                found.add(int(column))
            else:
                raise DataError(
                    f"categories names the column {column!r}, which is not in the table."
                    f"{suggest(str(column), names)}"
                )
        return found

    def _learn_shape(self, table: NDArray | DatasetRows) -> None:
        self._tensor_shape = tuple(table.shape[1:])
        self.n_features_in_ = int(table.shape[1])
        self._columns = []

    def _learn_columns(self, table: pd.DataFrame | NDArray, opted_in: set[int]) -> None:
        impute = self.missing == "impute"
        if isinstance(table, pd.DataFrame):
            others = [i for i in range(table.shape[1]) if i not in opted_in]
            refuse_text([self.feature_names[i] for i in others if is_text(table.iloc[:, i])])
        self._columns = []
        for i, name in enumerate(self.feature_names):
            if isinstance(table, pd.DataFrame) and (i in opted_in or is_category(table.iloc[:, i])):
                self._columns.append(learn_category(table.iloc[:, i], name, impute))
            else:
                self._columns.append({"kind": "number", "fill": None})
        if impute:
            numbers = self._numeric()
            fills = median_fill(self._numbers(table, numbers), [self.feature_names[i] for i in numbers])
            for i, fill in zip(numbers, fills, strict=True):
                self._columns[i]["fill"] = fill

    # ---- encoding --------------------------------------------------------------------------------

    def _encode(self, table: pd.DataFrame | NDArray, first_row: int = 0) -> Float[np.ndarray, "n d"]:
        numbers = self._numeric()
        values = self._numbers(table, numbers, first_row)
        if self.missing == "impute" and numbers:
            values = np.where(np.isnan(values), [self._columns[i]["fill"] for i in numbers], values)
        require_finite(values, [self.feature_names[i] for i in numbers], first_row=first_row)
        if isinstance(table, np.ndarray) or len(numbers) == self.n_features_in_:
            return values
        at = {i: k for k, i in enumerate(numbers)}
        blocks = [
            values[:, [at[i]]]
            if i in at
            else one_hot(table.iloc[:, i], self.feature_names[i], column, first_row)
            for i, column in enumerate(self._columns)
        ]
        return np.concatenate(blocks, axis=1)

    def _numeric(self) -> list[int]:
        return [i for i, column in enumerate(self._columns) if column["kind"] == "number"]

    def _numbers(
        self, table: pd.DataFrame | NDArray, positions: list[int], first_row: int = 0
    ) -> Float[np.ndarray, "n k"]:
        """The numeric columns as float64, NaN where a value is missing."""
        if isinstance(table, np.ndarray):
            return table
        values = np.empty((len(table), len(positions)))
        for k, i in enumerate(positions):
            values[:, k] = column_to_float(table.iloc[:, i], self.feature_names[i], first_row)
        return values

    def _names_out(self) -> list[list[str]]:
        return [
            level_names(name, column) if "levels" in column else [name]
            for name, column in zip(self.feature_names, self._columns, strict=False)
        ]

    # ---- matching the table that was fitted ------------------------------------------------------

    def _check_columns(self, table: pd.DataFrame | NDArray, warned: bool = False) -> None:
        """Same columns in the same order: scikit-learn's wording, then what to do about it."""
        names = column_names(table)
        fitted = self.feature_names if hasattr(self, "feature_names_in_") else None
        if names is not None and fitted is not None and list(names) != fitted:
            raise DataError(name_mismatch(list(names), fitted))
        if table.shape[1] != self.n_features_in_:
            raise DataError(
                f"X has {table.shape[1]} features, but {self.owner} is expecting "
                f"{self.n_features_in_} features as input."
            )
        if isinstance(table, np.ndarray) and len(self._numeric()) < self.n_features_in_:
            raise DataError(
                f"{self.owner} was fitted on a table with category columns, but X is an array of "
                "numbers. Pass a frame with the same columns."
            )
        if names is not None and fitted is None and not warned:
            warn(f"X has feature names, but {self.owner} was fitted without feature names", stacklevel=3)
        if names is None and fitted is not None and not warned:
            warn(
                f"X does not have valid feature names, but {self.owner} was fitted with feature names",
                stacklevel=3,
            )

    def _check_tensor(self, table: NDArray) -> None:
        """Same number of dimensions, and of channels (images) or of features per step (sequences)."""
        shape, seen = table.shape[1:], self._tensor_shape
        if seen is None:
            raise DataError(
                f"X has shape {list(table.shape)}, but {self.owner} was fitted on a table "
                f"[n, {self.n_features_in_}]."
            )
        channel = -1 if len(seen) == 2 else 0
        if len(shape) != len(seen) or shape[channel] != seen[channel]:
            raise DataError(
                f"X has shape {list(table.shape)}, but {self.owner} was fitted on arrays of shape "
                f"[n, {', '.join(map(str, seen))}]."
            )


# ---- targets -------------------------------------------------------------------------------------


def check_target(y: Any, n: int | None = None) -> Float[np.ndarray, "n *t"]:
    """The target as float64, `[n]` or `[n, t]` as given.

    Raises DataError for text, NaN or infinity (row named), other shapes, or another number of rows than n.
    """
    if y is None:
        raise DataError("This model requires y to be passed, but the target y is None.")
    if type(y).__module__.split(".")[0] == "polars":
        y = from_polars(y) if hasattr(y, "get_columns") else from_polars(y.to_frame()).iloc[:, 0]
    if hasattr(y, "detach"):
        y = from_tensor(y, "y")
    y = unmasked(y)
    if not isinstance(y, pd.DataFrame | pd.Series):
        try:
            y = np.asarray(y)
        except ValueError as error:
            raise DataError(f"y is not a target: its rows differ in length ({error}).") from error
        if y.dtype.kind == "c":
            raise DataError("Complex data not supported in y.")
        refuse_dates(y, "y")
        if y.dtype.kind in "OUS" and y.ndim in (1, 2):
            y = pd.DataFrame(y.astype(object)) if y.ndim == 2 else pd.Series(y.astype(object))
    names: list[str] | None = None
    if isinstance(y, pd.DataFrame | pd.Series):
        frame = y.to_frame() if isinstance(y, pd.Series) else y
        names = target_names(y, y)
        values = np.empty(frame.shape)
        for k, name in enumerate(names):
            values[:, k] = _target_column(frame.iloc[:, k], name)
        values = values[:, 0] if y.ndim == 1 else values
    else:
        try:
            values = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"y is not numeric: {error}.") from error
    if values.ndim not in (1, 2) or 0 in values.shape:
        raise DataError(
            f"y should be a 1d array [n], or [n, outputs]; got an array of shape "
            f"{list(values.shape)} instead."
        )
    if n is not None and len(values) != n:
        raise DataError(
            f"Found input variables with inconsistent numbers of samples: X has {n} rows, y has "
            f"{len(values)}."
        )
    require_finite(values, names, x="y")
    return values


def target_names(y: Any, values: NDArray | pd.DataFrame | pd.Series) -> list[str]:
    """The names of the targets: those of a frame or series y, else y (for values `[n]`), or y0, y1, ... (`[n, t]`)."""
    if values.ndim == 1:
        name = getattr(y, "name", None)
        return [name if isinstance(name, str) and name else "y"]
    names = list(getattr(y, "columns", range(values.shape[1])))
    return [name if isinstance(name, str) else f"y{k}" for k, name in enumerate(names)]


CLASSES = " If its values are classes: GPClassifier, in the terminal --task classification."


def _target_column(column: pd.Series, name: str) -> Float[np.ndarray, " n"]:
    if is_category(column):
        raise DataError(
            f"The target {name!r} is a category (Unknown label type for regression); a regressor "
            f"needs numbers.{CLASSES}"
        )
    for row, value in enumerate(column if column.dtype.kind not in "fiubmMc" else ()):
        if isinstance(value, str | bytes):
            raise DataError(
                f"The target {name!r} holds text (row {row}: {value!r}; Unknown label type for "
                f"regression); a regressor needs numbers.{CLASSES}"
            )
    return column_to_float(column, name)


def split_target(table: pd.DataFrame, targets: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The inputs and the target columns. Raises DataError, with near names, where a target is missing."""
    names = [str(name) for name in table.columns]
    for target in targets:
        if target not in names:
            raise DataError(f"The target {target!r} is not a column of the table.{suggest(target, names)}")
    inputs = table[[name for name in names if name not in targets]]
    if inputs.shape[1] == 0:
        raise DataError("Nothing is left to predict from: every column is a target or dropped.")
    return inputs, table[list(targets)]
