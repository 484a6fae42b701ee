"""Tables read and written in parts, so that memory does not grow with the file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .datasets import (
    CSV_ENDINGS,
    PARQUET_ENDINGS,
    _require_whole_last_row,
    csv_separator,
    pyarrow,
    read_table,
)
from .errors import DataError


def read_parts(path: str | os.PathLike[str], rows: int, text: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """The frames of at most so many rows that make up a CSV or Parquet file. Raises DataError as `read_table` does.

    text: columns whose cells are read as they are written, so that the category "1" is not the number 1.
    """
    file = Path(path)
    name = file.name.lower()
    if not file.is_file() or file.stat().st_size == 0 or not name.endswith(CSV_ENDINGS + PARQUET_ENDINGS):
        read_table(file)  # says what is wrong
    parts = _parquet(file, rows) if name.endswith(PARQUET_ENDINGS) else _csv(file, rows, text)
    first_row = 0
    for part in parts:
        if len(part) == 0:
            continue
        part.columns = part.columns.map(str)
        for column in text:
            if column in part.columns:
                part[column] = part[column].map(str, na_action="ignore")
        first_row += len(part)
        yield part
    if first_row == 0:
        read_table(file)


def _parquet(file: Path, rows: int) -> Iterator[pd.DataFrame]:
    arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(rows):
                yield arrow.Table.from_batches([batch]).to_pandas()
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise DataError(f"{str(file)!r} is not a whole Parquet file (cut off or damaged): {error}") from error


def _csv(file: Path, rows: int, text: Sequence[str]) -> Iterator[pd.DataFrame]:
    separator: Any = csv_separator(file)
    engine: Any = "python" if separator is None else "c"
    part, rows_read = None, 0
    try:
        with pd.read_csv(
            file, sep=separator, engine=engine, chunksize=rows, dtype=dict.fromkeys(text, str)
        ) as source:
            for part in source:
                rows_read += len(part)
                yield part
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{str(file)!r} holds no table.") from error
    except (pd.errors.ParserError, UnicodeDecodeError, csv.Error, OSError, EOFError) as error:
        raise DataError(
            f"{str(file)!r} is not a whole CSV table (cut off, damaged or of another kind): {str(error).strip()}"
        ) from error
    if separator is not None and not file.name.endswith(".gz") and part is not None:
        try:
            _require_whole_last_row(file, part, separator)
        except DataError as error:  # which counts rows from the part's beginning
            message = str(error).replace(f"(row {len(part) - 1})", f"(row {rows_read - 1})")
            raise DataError(message) from error


class PartWriter:
    """Writes frames one after another into one CSV or Parquet file; to be used in a `with` block."""

    def __init__(self, path: str | os.PathLike[str]):
        self.file = Path(path)
        self._parquet: Any = None
        self._begun = False

    def __enter__(self) -> PartWriter:
        return self

    def write(self, part: pd.DataFrame) -> None:
        """Append rows; all parts have the columns of the first."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.name.lower().endswith(PARQUET_ENDINGS):
            separator = "\t" if ".tsv" in self.file.name else ","
            mode: Any = "a" if self._begun else "w"
            part.to_csv(self.file, index=False, sep=separator, mode=mode, header=not self._begun)
        else:
            arrow = pyarrow()
            table = arrow.Table.from_pandas(part, preserve_index=False)
            if self._parquet is None:
                self._parquet = arrow.parquet.ParquetWriter(self.file, table.schema)
            self._parquet.write_table(table)
        self._begun = True

    def __exit__(self, *_: Any) -> None:
        if self._parquet is not None:
            self._parquet.close()
