"""Tables: what goes through unchanged, what is encoded, and how each bad table is refused."""

import json
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from fspace.data import TableEncoder, check_target, split_target
from fspace.errors import DataError, FspaceError, NotFittedError, OptionError

FRAME = pd.DataFrame(
    {
        "age": [31.0, 45.5, 28.25, 60.0],
        "smoker": [True, False, False, True],
        "city": pd.Categorical(["Oxford", "Paris", "Oxford", "Rome"]),
        "side": pd.Categorical(["left", "right", "left", "left"]),
    }
)
BY_HAND = np.array(
    [
        [31.0, 1, 1, 0, 0, 0],
        [45.5, 0, 0, 1, 0, 1],
        [28.25, 0, 1, 0, 0, 0],
        [60.0, 1, 0, 0, 1, 0],
    ]
)


def encode(X, **options):
    return TableEncoder(**options).fit_transform(X)


# ---- what goes in, what comes out ----------------------------------------------------------------


def test_a_frame_is_encoded_as_by_hand():
    encoder = TableEncoder()
    np.testing.assert_array_equal(encoder.fit_transform(FRAME), BY_HAND)
    assert encoder.feature_names_out == [
        "age",
        "smoker",
        "city_Oxford",
        "city_Paris",
        "city_Rome",
        "side_right",
    ]
    assert encoder.source_columns == [0, 1, 2, 2, 2, 3]
    assert encoder.n_features_in_ == 4
    assert list(encoder.feature_names_in_) == list(FRAME.columns)


@pytest.mark.parametrize("kind", ["Categorical", "Enum"])
def test_polars_gives_what_pandas_gives(kind):
    city = pl.Categorical() if kind == "Categorical" else pl.Enum(["Oxford", "Paris", "Rome"])
    frame = pl.DataFrame(
        {name: FRAME[name].to_list() for name in FRAME},
        schema={"age": pl.Float64, "smoker": pl.Boolean, "city": city, "side": pl.Categorical()},
    )
    encoder = TableEncoder().fit(FRAME)
    np.testing.assert_array_equal(encode(frame), BY_HAND)
    np.testing.assert_array_equal(encoder.transform(frame), BY_HAND)  # fitted on pandas, asked with polars


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.astype(np.float16),
        lambda x: x.astype(np.float32),
        lambda x: x.astype(np.int8),
        lambda x: x.astype(object),
        lambda x: x.tolist(),
        lambda x: torch.tensor(x),
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: pd.DataFrame(x),
        lambda x: pd.DataFrame(x, columns=["a", "b", "c"]).convert_dtypes(),
        lambda x: pl.DataFrame(x, schema=["a", "b", "c"]),
        lambda x: np.asfortranarray(x)[:, :],
    ],
)
def test_every_container_gives_the_same_float64(convert):
    values = np.array([[1.0, 2.0, -3.0], [4.0, 0.0, 6.0]])
    out = encode(convert(values))
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, values)


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
        elements=st.floats(-1e150, 1e150, allow_nan=False),
    )
)
def test_numbers_pass_through_exactly_at_any_scale(values):
    encoder = TableEncoder()
    np.testing.assert_array_equal(encoder.fit_transform(values), values)
    named = pd.DataFrame(values, columns=[f"c{i}" for i in range(values.shape[1])])
    np.testing.assert_array_equal(encode(named), values)


@st.composite
def mixed_tables(draw):
    """A frame of numbers and categories of 1 to 8 rows, in drawn order of columns."""
    rows = draw(st.integers(1, 8))
    columns = {}
    for i in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            columns[f"c{i}"] = draw(st.lists(st.floats(-1e9, 1e9), min_size=rows, max_size=rows))
        else:
            text = draw(st.booleans())
            values = st.text(max_size=4) if text else st.integers(-3, 3)
            columns[f"c{i}"] = pd.Categorical(draw(st.lists(values, min_size=rows, max_size=rows)))
    return pd.DataFrame(columns)


@settings(deadline=None)
@given(mixed_tables())
def test_the_encoding_is_one_to_one_and_survives_json(frame):
    encoder = TableEncoder()
    out = encoder.fit_transform(frame)
    assert (
        out.shape == (len(frame), len(encoder.feature_names_out)) == (len(frame), len(encoder.source_columns))
    )
    again = TableEncoder.from_state(json.loads(json.dumps(encoder.state())))
    np.testing.assert_array_equal(again.transform(frame), out)
    assert again.feature_names_out == encoder.feature_names_out
    assert again.state() == encoder.state()
    # two rows are encoded alike exactly if they are alike
    for i in range(len(frame)):
        for j in range(i):
            alike = all(frame.iloc[i, k] == frame.iloc[j, k] for k in range(frame.shape[1]))
            assert alike == bool((out[i] == out[j]).all())


@settings(deadline=None)
@given(mixed_tables(), st.randoms(use_true_random=False))
def test_rows_are_encoded_each_for_itself(frame, random):
    encoder = TableEncoder().fit(frame)
    order = list(range(len(frame)))
    random.shuffle(order)
    np.testing.assert_array_equal(encoder.transform(frame.iloc[order]), encoder.transform(frame)[order])
    np.testing.assert_array_equal(encoder.transform(frame.iloc[[0]]), encoder.transform(frame)[[0]])


def test_the_input_is_left_as_it_was():
    frame = FRAME.copy(deep=True)
    encode(frame, missing="impute")
    pd.testing.assert_frame_equal(frame, FRAME)
    values = np.ones((3, 2))
    values[0, 0] = np.nan
    encode(values, missing="impute")
    assert np.isnan(values[0, 0])


def test_images_and_sequences_are_checked_and_passed_on():
    images = np.zeros((5, 3, 8, 8), dtype=np.float32)
    encoder = TableEncoder()
    assert encoder.fit_transform(images).dtype == np.float32
    assert encoder.transform(np.zeros((2, 3, 9, 9))).shape == (2, 3, 9, 9)
    with pytest.raises(DataError, match=r"\[2, 1, 8, 8\].*\[n, 3, 8, 8\]"):
        encoder.transform(np.zeros((2, 1, 8, 8)))
    with pytest.raises(DataError, match="fitted on arrays"):
        encoder.transform(np.zeros((2, 3)))
    images[4, 2, 1, 0] = np.nan
    with pytest.raises(DataError, match=r"Row 4, column 'position \(2, 1, 0\)'"):
        encoder.transform(images)
    sequences = TableEncoder().fit(torch.zeros(4, 10, 2))
    assert sequences.transform(torch.zeros(4, 7, 2)).shape == (4, 7, 2)
    with pytest.raises(DataError):
        sequences.transform(torch.zeros(4, 10, 3))
    with pytest.raises(DataError, match="fitted on a table"):
        TableEncoder().fit(np.zeros((3, 2))).transform(np.zeros((3, 2, 2)))
    again = TableEncoder.from_state(json.loads(json.dumps(encoder.state())))
    assert again.transform(np.zeros((1, 3, 4, 4))).shape == (1, 3, 4, 4)


# ---- categories ----------------------------------------------------------------------------------


def test_a_text_column_must_be_called_a_category():
    frame = pd.DataFrame({"x": [1.0, 2.0], "city": ["Oxford", "Paris"]})
    with pytest.raises(DataError, match=r"'city' holds text \(row 0: 'Oxford'\).*categories=\['city'\]"):
        encode(frame)
    with pytest.raises(DataError, match="'city' holds text"):
        encode(pl.DataFrame({"x": [1.0, 2.0], "city": ["Oxford", "Paris"]}))
    np.testing.assert_array_equal(encode(frame, categories=["city"]), [[1, 0], [2, 1]])
    np.testing.assert_array_equal(encode(frame, categories="city"), [[1, 0], [2, 1]])
    np.testing.assert_array_equal(encode(frame, categories=[1]), [[1, 0], [2, 1]])
    with pytest.raises(DataError, match="'town'.*There is: 'x', 'city'"):
        encode(frame, categories=["town"])
    with pytest.raises(DataError, match="Did you mean 'city'"):
        encode(frame, categories=["City"])


def test_text_among_numbers_is_named_by_row():
    frame = pd.DataFrame({"x": ["1.5", "2", "?", "4"]})
    with pytest.raises(DataError, match=r"'x' holds text in row 2 \('\?'\)"):
        encode(frame)
    with pytest.raises(DataError, match="numbers written as text"):
        encode(pd.DataFrame({"x": ["1.5", "2"]}))
    with pytest.raises(DataError, match=r"'x1' holds text \(row 0: 'a'\)"):
        encode([[1, "a"], [2, "b"]])


def test_numbers_can_be_categories():
    x = np.array([[1.0, 7], [2.0, 9], [3.0, 7], [4.0, 8]])
    np.testing.assert_array_equal(
        encode(x, categories=[1]), [[1, 1, 0, 0], [2, 0, 0, 1], [3, 1, 0, 0], [4, 0, 1, 0]]
    )
    encoder = TableEncoder(categories=[1]).fit(x)
    with pytest.raises(DataError, match="array of numbers|was not there"):
        encoder.transform(np.array([[1.0, 5.0]]))


def test_an_unseen_category_is_named():
    encoder = TableEncoder().fit(FRAME)
    other = FRAME.iloc[:2].assign(city=["Oxford", "Roma"])
    with pytest.raises(DataError, match=r"'city', row 1: the category 'Roma'.*Did you mean 'Rome'"):
        encoder.transform(other)


def test_declared_levels_are_known_even_if_not_seen():
    column = pd.Categorical(["a", "b", "a"], categories=["a", "b", "c"])
    encoder = TableEncoder().fit(pd.DataFrame({"k": column}))
    np.testing.assert_array_equal(encoder.transform(pd.DataFrame({"k": ["c"]})), [[0, 0, 1]])


def test_one_category_is_a_constant_column():
    np.testing.assert_array_equal(encode(pd.DataFrame({"k": pd.Categorical(["a", "a"])})), [[1], [1]])


# ---- missing and infinite values ---------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 3), st.sampled_from([np.nan, np.inf, -np.inf, 1e200]), st.booleans())
def test_each_bad_cell_is_named_by_row_and_column(row, column, value, named):
    values = np.arange(40.0).reshape(10, 4)
    fine = values.copy()
    values[row, column] = value
    X = pd.DataFrame(values, columns=list("abcd")) if named else values
    name = "abcd"[column] if named else f"x{column}"
    word = "NaN" if np.isnan(value) else "infinity" if np.isinf(value) else "too large"
    with pytest.raises(DataError, match=f"(?s)Input X contains.*{word}.*Row {row}, column '{name}'"):
        encode(X)
    encoder = TableEncoder().fit(pd.DataFrame(fine, columns=list("abcd")) if named else fine)
    with pytest.raises(DataError, match=f"Row {row}, column '{name}'"):
        encoder.transform(X)


def test_the_number_of_bad_cells_is_said():
    with pytest.raises(DataError, match="3 such values in all"):
        encode([[1, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize("gap", [None, np.nan, pd.NA])
def test_impute_fills_with_medians_and_most_frequent(gap):
    frame = pd.DataFrame({"x": [1.0, gap, 10.0, 2.0], "k": pd.Categorical(["a", "b", None, "b"])}).astype(
        {"x": object}
    )
    with pytest.raises(DataError, match="Row 1, column 'x'.*missing='impute'"):
        encode(frame)
    encoder = TableEncoder(missing="impute")
    np.testing.assert_array_equal(encoder.fit_transform(frame), [[1, 0], [2, 1], [10, 1], [2, 1]])
    # at predict: the training part's fill-ins, also in a column that had no gap in training
    again = TableEncoder.from_state(json.loads(json.dumps(encoder.state())))
    np.testing.assert_array_equal(again.transform(pd.DataFrame({"x": [gap], "k": [None]})), [[2, 1]])


def test_impute_does_not_hide_infinity_or_an_empty_column():
    with pytest.raises(DataError, match="infinity"):
        encode([[1.0, np.inf], [np.nan, 1.0]], missing="impute")
    with pytest.raises(DataError, match="'x1' has no value at all"):
        encode([[1.0, np.nan], [2.0, np.nan]], missing="impute")
    with pytest.raises(OptionError, match="'error' or 'impute'"):
        encode([[1.0]], missing="drop")


def test_missing_category_without_impute():
    with pytest.raises(DataError, match="Row 1, column 'k'"):
        encode(pd.DataFrame({"k": pd.Categorical(["a", None])}))


# ---- tables that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("X", "message", "kind"),
    [
        (np.zeros((0, 3)), r"0 sample\(s\)", ValueError),
        (
            np.zeros((12, 0)),
            r"0 feature\(s\) \(shape=\(12, 0\)\) while a minimum of 1 is required",
            ValueError,
        ),
        (np.zeros(4), "Reshape your data", ValueError),
        (pd.Series([1.0, 2.0]), "Reshape your data", ValueError),
        (np.array([[1j]]), "Complex data not supported", ValueError),
        (pd.DataFrame({"z": [1j]}), "Complex data not supported", ValueError),
        ([[1, 2], [3]], "differ in length", ValueError),
        (sparse.csr_array(np.eye(3)), "[Ss]parse", TypeError),
        (np.array([[{"a": 1}, 2]], dtype=object), "argument must be .* string.* number", TypeError),
        (pd.DataFrame({"d": pd.date_range("2020", periods=2)}), "'d' holds dates", ValueError),
        (pl.DataFrame({"d": pd.date_range("2020", periods=2)}), "'d' holds dates", ValueError),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "'a' stands 2 times", ValueError),
        (pd.DataFrame([[1, 2]], columns=["a", 3]), "Some column names are text", TypeError),
        (pd.DataFrame(), "0 sample", ValueError),
        (None, "Expected 2D array", ValueError),
        ("text", "text", ValueError),
    ],
)
def test_what_is_no_table_is_refused(X, message, kind):
    with pytest.raises(DataError, match=message) as caught:
        encode(X)
    assert isinstance(caught.value, kind)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.lists(
            st.lists(st.one_of(st.none(), st.floats(), st.text(max_size=3), st.integers()), max_size=3),
            max_size=4,
        ),
        hnp.arrays(
            st.sampled_from(
                [np.float16, np.float32, np.float64, np.int64, np.complex64, np.dtype("U3"), bool]
            ),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
        ),
    ),
    st.sampled_from(["error", "impute"]),
)
def test_anything_is_either_encoded_finite_or_refused_by_name(X, missing):
    try:
        out = encode(X, missing=missing)
    except FspaceError:
        return
    assert np.isfinite(out).all() and out.size and out.dtype in (np.float32, np.float64)


# ---- the same columns at predict -------------------------------------------------------------------


def test_other_columns_are_named():
    encoder = TableEncoder(owner="GPRegressor").fit(FRAME)
    start = "The feature names should match those that were passed during fit.\n"
    with pytest.raises(
        DataError, match="same order as they were in fit.\nColumn 0 is 'smoker' but was 'age'"
    ) as e:
        encoder.transform(FRAME[["smoker", "age", "city", "side"]])
    assert str(e.value).startswith(start)
    with pytest.raises(DataError, match=f"{start}Feature names seen at fit time, yet now missing:\n- city\n"):
        encoder.transform(FRAME.drop(columns="city"))
    with pytest.raises(
        DataError, match=f"{start}Feature names unseen at fit time:\n- town\nFeature names seen .*\n- city"
    ):
        encoder.transform(FRAME.rename(columns={"city": "town"}))
    with pytest.raises(DataError, match="X has 1 features, but GPRegressor is expecting 2 features as input"):
        TableEncoder(owner="GPRegressor").fit(np.zeros((3, 2))).transform(np.zeros((3, 1)))
    with pytest.raises(DataError, match="category columns, but X is an array"):
        encoder.transform(np.zeros((2, 4)))


def test_names_on_one_side_only_warn_as_in_sklearn():
    named = pd.DataFrame({"a": [1.0], "b": [2.0]})
    with pytest.warns(UserWarning, match="X does not have valid feature names, but TableEncoder"):
        TableEncoder().fit(named).transform(named.to_numpy())
    with pytest.warns(UserWarning, match="X has feature names, but TableEncoder"):
        TableEncoder().fit(named.to_numpy()).transform(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TableEncoder().fit(named).transform(named)


def test_a_refused_fit_leaves_the_encoder_unfitted():
    encoder = TableEncoder().fit(FRAME)
    with pytest.raises(DataError):
        encoder.fit(pd.DataFrame({"x": [np.nan]}))
    with pytest.raises(NotFittedError):
        encoder.transform(FRAME)


def test_a_second_fit_forgets_the_first():
    encoder = TableEncoder().fit(FRAME)
    encoder.fit(np.zeros((2, 3)))
    assert encoder.n_features_in_ == 3 and not hasattr(encoder, "feature_names_in_")
    assert encoder.feature_names_out == ["x0", "x1", "x2"]


@pytest.mark.parametrize(
    "change", [{"columns": []}, {"names": ["a"]}, {"n_features": "many"}, {"columns": [{}]}]
)
def test_a_damaged_state_is_refused(change):
    state = TableEncoder().fit(FRAME).state()
    with pytest.raises(DataError, match="not the state of a TableEncoder"):
        TableEncoder.from_state(state | change)
    del state["columns"]
    with pytest.raises(DataError):
        TableEncoder.from_state(state)


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        list,
        lambda y: np.asarray(y, dtype=np.float16),
        lambda y: np.asarray(y, dtype=object),
        lambda y: torch.tensor(y),
        lambda y: pd.Series(y, name="t"),
        lambda y: pd.Series(y).convert_dtypes(),
        lambda y: pl.Series("t", y),
    ],
)
def test_targets_of_every_kind(convert):
    y = check_target(convert([1.0, 2.0, 4.0]), 3)
    assert y.dtype == np.float64 and y.shape == (3,)
    np.testing.assert_array_equal(y, [1, 2, 4])


def test_two_outputs_and_columns_keep_their_shape():
    frame = pd.DataFrame({"a": [1, 2], "b": [3.0, 4.0]})
    for y in (
        frame,
        pl.DataFrame({"a": [1, 2], "b": [3.0, 4.0]}),
        frame.to_numpy(),
        torch.tensor(frame.to_numpy()),
    ):
        np.testing.assert_array_equal(check_target(y, 2), [[1, 3], [2, 4]])
    assert check_target(np.ones((3, 1))).shape == (3, 1)
    assert check_target([True, False]).tolist() == [1, 0]
    assert check_target(np.full(3, 5)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed, but the target y is None"),
        (["a", "b"], "'y' holds text .row 0: 'a'"),
        (pd.Series([1, "b"], name="price"), "'price' holds text .row 1: 'b'"),
        (pd.Series(pd.Categorical(["a", "b"]), name="k"), "'k' is a category"),
        ([1.0, np.nan], "(?s)Input y contains NaN.*Row 1"),
        (pd.DataFrame({"a": [1, 2], "b": [1, np.inf]}), "(?s)infinity.*Row 1, column 'b'"),
        (np.array([[1, 2], [np.nan, 1]]), "Row 1, column 'y0'"),
        ([1.0, 2.0, 3.0], "X has 2 rows, y has 3"),
        (np.zeros((2, 2, 2)), "1d array"),
        (5.0, "1d array"),
        ([], "1d array"),
        ([[1], [2, 3]], "differ in length"),
        ([1j, 2], "Complex"),
        ([{}, 1], "not numeric"),
    ],
)
def test_bad_targets_are_refused(y, message):
    with pytest.raises(DataError, match=message):
        check_target(y, 2)


def test_split_target_names_the_nearest():
    inputs, target = split_target(FRAME, ["age"])
    assert list(inputs) == ["smoker", "city", "side"] and list(target) == ["age"]
    with pytest.raises(DataError, match="'smokr' is not a column.*Did you mean 'smoker'"):
        split_target(FRAME, ["smokr"])
    with pytest.raises(DataError, match="There is: 'age'"):
        split_target(FRAME, ["zzz"])
    with pytest.raises(DataError, match="Nothing is left"):
        split_target(FRAME[["age"]], ["age"])


def test_all_text_columns_are_named_at_once():
    """Not one after the other; columns with numbers in them are another matter, and told of on their own."""
    frame = pd.DataFrame({"a": ["x", "y"], "n": [1.0, 2.0], "b": ["u", None], "c": ["1", "2"]})
    with pytest.raises(DataError, match=r"Columns 'a', 'b' hold text.*--categorical a --categorical b\."):
        TableEncoder().fit(frame)
    with pytest.raises(DataError, match="'c' holds numbers written as text"):
        TableEncoder(categories=["a"], missing="impute").fit(frame.drop(columns="b"))
    TableEncoder(categories=["a", "b"], missing="impute").fit(frame.drop(columns="c"))
