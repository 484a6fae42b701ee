"""Arrays that are not what they seem: masked, of dates, sparse, without values."""

import numpy as np
import pytest
import torch

from fspace.data import TableEncoder, check_target
from fspace.errors import DataError


def masked(dtype=np.float64):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    values[1, 1] = 99  # what stands under a mask is not a value
    return np.ma.masked_array(values, mask=[[0, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, object])
def test_masked_values_are_missing(dtype):
    with pytest.raises(DataError, match="Row 1, column 'x1'.*has no value"):
        TableEncoder().fit(masked(dtype))
    filled = TableEncoder(missing="impute").fit_transform(masked(dtype))
    np.testing.assert_array_equal(filled, [[0, 1], [2, 3], [4, 5]])  # 3 is the median of 1 and 5
    with pytest.raises(DataError, match="Row 1 .*has no value"):
        check_target(masked(dtype)[:, 1])


def test_an_array_that_masks_nothing_is_an_array():
    plain = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(TableEncoder().fit_transform(plain), plain.data)
    np.testing.assert_array_equal(check_target(plain[:, 0]), [1.0, 3.0])


@pytest.mark.parametrize("dtype", ["datetime64[ns]", "timedelta64[D]"])
def test_dates_in_arrays_are_refused_as_they_are_in_frames(dtype):
    dates = np.arange(6).reshape(3, 2).astype(dtype)
    with pytest.raises(DataError, match="X holds dates or times"):
        TableEncoder().fit(dates)
    with pytest.raises(DataError, match="y holds dates or times"):
        check_target(dates[:, 0])


@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, 3, device="meta")])
def test_tensors_without_dense_values(make):
    with pytest.raises(DataError, match="X is not a dense tensor"):
        TableEncoder().fit(make())
    with pytest.raises(DataError, match="y is not a dense tensor"):
        check_target(make())
