"""What `fspace encode` is given, as rows, images or series of numbers; and what is wrong with it, by its row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from fspace.columns import column_to_float, require_finite, suggest
from fspace.datasets import load_digits_images, read_table
from fspace.errors import DataError


@dataclass
class Material:
    """Numbers to encode: kind "rows" (values [n, d]), "images" ([n, c, h, w]) or "series" (steps [n, p], or frames).

    names: of the columns of a table; parts: for series the rows of each, in the order of time; times, series [n];
    label [n]: colours the latent map and is not encoded.
    """

    kind: str
    values: Float[np.ndarray, "n *row"]
    source: str
    names: list[str] = field(default_factory=list)
    parts: list[NDArray[np.intp]] = field(default_factory=list)
    times: Float[np.ndarray, " n"] | None = None
    series: Shaped[np.ndarray, " n"] | None = None
    label: Shaped[np.ndarray, " n"] | None = None
    label_name: str = "label"
    ending: str = "csv"  # of tables that are written
    note: str = ""

    @property
    def units(self) -> int:
        """How many things have a log-likelihood of their own: rows, images, or whole series."""
        return len(self.parts) if self.kind == "series" else len(self.values)

    @property
    def flat(self) -> Float[np.ndarray, "n d"]:
        """Rows, images or steps, each as one row of numbers."""
        return self.values.reshape(len(self.values), -1)

    def as_frames(self) -> Material:
        """Images as the frames of one series, at times 0, 1, 2, ..."""
        n = len(self.values)
        return Material(
            "series", self.values, self.source, [], [np.arange(n)], np.arange(n, dtype=np.float64), None,
            self.label, self.label_name, self.ending, self.note,
        )  # fmt: skip


def read_material(
    data: str | None,
    series: str | None = None,
    time: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    gaps: bool = False,
    scaled: bool = True,
) -> Material:
    """A table, an array of images, or without a path scikit-learn's digits. gaps: NaN may stay in series;
    scaled: arrays of numbers of 8 bits are brought to 0..1.

    Raises DataError for files that are not there, damaged, or hold text, NaN or infinity, naming the row.
    """
    asked = [("--series", series), ("--time", time), ("--label", label), *(("--drop", name) for name in drop)]
    if data is None or Path(data).suffix.lower() == ".npy":
        for option, name in asked:
            if name is not None:
                raise DataError(f"{option} {name}: images have no columns; that is for tables.")
        return _digits() if data is None else _array(Path(data), scaled)
    table = read_table(data)
    names = list(table.columns)
    for option, column in asked:
        if column is not None and column not in names:
            raise DataError(f"{option} {column}: the table has no such column.{suggest(column, names)}")
    kept = [name for name in names if name not in {series, time, label, *drop}]
    if not kept:
        raise DataError("No column is left to encode.")
    values = np.stack([_numbers(table[name], name) for name in kept], axis=1)
    in_series = series is not None or time is not None
    if gaps and in_series and bool(np.isnan(values).all(axis=0).any()):
        empty = kept[int(np.isnan(values).all(axis=0).argmax())]
        raise DataError(f"Column {empty!r} has no value in any row. Leave it out: --drop {empty}.")
    require_finite(np.nan_to_num(values, nan=0.0) if gaps and in_series else values, kept, "DATA")
    material = Material("series" if in_series else "rows", values, str(data), kept)
    material.ending = "parquet" if data.lower().endswith((".parquet", ".pq")) else "csv"
    if label is not None:
        material.label, material.label_name = table[label].to_numpy(), label
    if in_series:
        _into_series(material, table, series, time)
    return material


def _digits() -> Material:
    images, labels = load_digits_images()
    return Material("images", images, "scikit-learn's digits", label=labels, label_name="digit")


def _array(file: Path, scaled: bool) -> Material:
    """Images [n, c, h, w] or [n, h, w], or rows [n, d], from a .npy file; nothing in it is ever unpickled.
    scaled: numbers of 8 bits are brought to 0..1."""
    if not file.is_file():
        raise DataError(f"There is no file {str(file)!r}.")
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{str(file)!r} is no whole .npy array of numbers (arrays of Python objects are not read): {error}"
        ) from error
    if values.dtype.kind not in "fiub":
        raise DataError(f"{str(file)!r} holds {values.dtype}, not numbers.")
    if values.ndim not in (2, 3, 4) or 0 in values.shape:
        raise DataError(
            f"{str(file)!r} has the shape {list(values.shape)}; images are [n, h, w] or [n, c, h, w], rows [n, d]."
        )
    note, top = "", int(values.max()) if values.dtype == np.uint8 else 1
    if scaled and top > 1:  # by 255, images of a smaller range would all be black
        values, note = values / top, f"Whole numbers of 8 bits were divided by their largest, {top}."
    values = values.astype(np.float64)
    require_finite(values, [f"x{i}" for i in range(values.shape[1])] if values.ndim == 2 else None, "DATA")
    if values.ndim == 2:
        return Material("rows", values, str(file), [f"x{i}" for i in range(values.shape[1])], note=note)
    return Material("images", values[:, None] if values.ndim == 3 else values, str(file), note=note)


def _numbers(column: pd.Series, name: str) -> Float[np.ndarray, " n"]:
    cells = column.to_numpy(dtype=object)
    text = [row for row, cell in enumerate(cells) if isinstance(cell, str | bytes)]
    if text:
        raise DataError(
            f"Column {name!r} holds text (row {text[0]}: {cells[text[0]]!r}); only numbers are encoded. Leave it out: "
            f"--drop {name}; or colour the latent map by it: --label {name}."
        )
    return column_to_float(column, name)


def _into_series(material: Material, table: pd.DataFrame, series: str | None, time: str | None) -> None:
    n = len(table)
    which: Any = np.zeros(n, dtype=np.int64)
    if series is not None:
        if bool(table[series].isna().any()):
            row = int(np.flatnonzero(table[series].isna())[0])
            raise DataError(f"Row {row} has nothing in the column {series!r}: which series is it of?")
        material.series = table[series].to_numpy()
        which, _ = pd.factorize(table[series])
    when = np.arange(n, dtype=np.float64)
    if time is not None:
        if any(isinstance(cell, str | bytes) for cell in table[time].to_numpy(dtype=object)):
            raise DataError(
                f"--time {time}: the column holds text (row 0: {table[time].iloc[0]!r}), and times are numbers, "
                "such as days since the first; for dates (pandas.to_datetime(x) - start) / pandas.Timedelta(days=1)."
            )
        when = _numbers(table[time], time)
        require_finite(when[:, None], [time], "DATA")
    for k in range(int(which.max()) + 1):
        rows = np.flatnonzero(which == k)
        rows = rows[np.argsort(when[rows], kind="stable")]
        twice = np.flatnonzero(np.diff(when[rows]) == 0)
        if len(twice):
            a, b = rows[twice[0]], rows[twice[0] + 1]
            cure = "" if series is not None else " Is there a column that tells series apart (--series)?"
            raise DataError(f"Rows {a} and {b} are of one series and have the same time {when[a]:g}.{cure}")
        if time is None:
            when[rows] = np.arange(len(rows))
        material.parts.append(rows)
    material.times = when


def same_file(path: str | None, folder: Path, names: Sequence[str]) -> bool:
    """Whether a file of the results would replace the data."""
    if path is None:
        return False
    return os.path.realpath(path) in {os.path.realpath(folder / name) for name in names}
