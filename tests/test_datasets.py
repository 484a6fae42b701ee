"""Files that are whole, files that are not, and the data sets."""

import os

import numpy as np
import pandas as pd
import pytest

from fspace.data import load_diabetes_table, load_flights, load_uci, read_table, write_table
from fspace.errors import DataError, OptionError

TABLE = pd.DataFrame({"a": [1, 2, 3], "b": [0.1, 1 / 3, 1e-12], "c": ["x", "y, z", None]})


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet", "T.CSV", "deep/er/t.csv"])
def test_what_is_written_is_read(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    write_table(TABLE, tmp_path / name)
    table = read_table(tmp_path / name)
    pd.testing.assert_frame_equal(table.astype({"c": object}), TABLE.astype({"c": object}), check_exact=True)


def refused(path, *words):
    with pytest.raises(DataError) as caught:
        read_table(path)
    for word in (*words, path.name):
        assert word in str(caught.value)


def test_missing_empty_and_foreign_files(tmp_path):
    TABLE.to_csv(tmp_path / "houses.csv", index=False)
    refused(tmp_path / "house.csv", "no file", "Did you mean 'houses.csv'")
    refused(tmp_path / "nowhere" / "house.csv", "no file")
    refused(tmp_path, "folder")
    for name, content, words in [
        ("empty.csv", b"", ["is empty"]),
        ("empty.parquet", b"", ["is empty"]),
        ("blank.csv", b"\n\n", ["no table"]),
        ("header.csv", b"a,b\n", ["no rows"]),
        ("binary.csv", bytes(range(128, 256)), ["not a whole CSV"]),
        ("ragged.csv", b"a,b\n1,2\n3,4,5\n", ["not a whole CSV", "line 3"]),
        ("quote.csv", b'a,b\n1,"2\n3,4\n', ["not a whole CSV"]),
        ("other.parquet", b"a,b\n1,2\n", ["not a whole Parquet"]),
        ("packed.csv.gz", b"not gzip", ["not a whole CSV"]),
        ("table.xlsx", b"PK", ["neither CSV nor Parquet"]),
    ]:
        (tmp_path / name).write_bytes(content)
        if name.endswith("parquet") and content:
            pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        refused(tmp_path / name, *words)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".parquet"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, ending):
    """Cut within the last row (not its last field), or in the second half of a packed file."""
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 4)), columns=list("abcd"))
    write_table(table, tmp_path / f"whole{ending}")
    content = (tmp_path / f"whole{ending}").read_bytes()
    text = ending in (".csv", ".tsv")
    if text:
        separator = b"\t" if ending == ".tsv" else b","
        start, end = content[:-1].rindex(b"\n") + 2, content.rindex(separator)
    else:
        start, end = len(content) // 2, len(content) - 1
    cut = tmp_path / f"cut{ending}"
    for length in range(start, end, max(1, (end - start) // 30)):
        cut.write_bytes(content[:length])
        refused(cut, "cut off")
    if text:  # the twin: a whole table whose last cell is empty is none of this
        cut.write_bytes(content[: content.rindex(separator) + 1])
        assert np.isnan(read_table(cut).iloc[-1, -1])


def test_an_unknown_ending_is_not_written(tmp_path):
    with pytest.raises(OptionError, match="ends in .csv or .parquet"):
        write_table(TABLE, tmp_path / "t.xlsx")


def test_diabetes():
    table = load_diabetes_table()
    assert table.shape == (442, 11) and "progression" in table
    assert 19 <= table["age"].min() and table["age"].max() <= 79  # years, not scaled


def test_uci_says_where_the_data_is_to_be_had(tmp_path, monkeypatch):
    monkeypatch.delenv("FSPACE_DATA", raising=False)
    with pytest.raises(DataError, match="FSPACE_DATA is not set.*github.com"):
        load_uci("yacht")
    with pytest.raises(DataError, match="is not there.*github.com"):
        load_uci("yacht", root=tmp_path)
    with pytest.raises(OptionError, match="Did you mean 'yacht'"):
        load_uci("yach")


@pytest.mark.skipif("FSPACE_DATA" not in os.environ, reason="FSPACE_DATA names no folder of data")
@pytest.mark.parametrize(
    ("name", "rows", "columns", "splits"),
    [("boston", 506, 13, 20), ("yacht", 308, 6, 20), ("protein", 45730, 9, 5), ("naval", 11934, 16, 20)],
)
def test_uci_splits(name, rows, columns, splits):
    x_train, y_train, x_test, y_test = load_uci(name, splits - 1)
    assert x_train.shape[1] == columns and len(x_train) + len(x_test) == rows
    assert len(y_train) == len(x_train) and len(y_test) == len(x_test)
    assert abs(len(x_test) / rows - 0.1) < 0.01
    with pytest.raises(OptionError, match=f"splits 0 to {splits - 1}"):
        load_uci(name, splits)


def test_flights():
    pytest.importorskip("pandas")
    try:
        x, y = load_flights(500, seed=1)
    except DataError as error:
        pytest.skip(str(error))
    assert x.shape == (500, 8) and len(y) == 500
    assert np.isfinite(x.to_numpy()).all() and np.isfinite(y).all()
    assert x["departure"].between(0, 24 * 60).all() and (x["plane_age"] >= 0).all()
    again, _ = load_flights(500, seed=1)
    pd.testing.assert_frame_equal(x, again)
    other, _ = load_flights(500, seed=2)
    assert not x.equals(other)
