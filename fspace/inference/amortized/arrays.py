"""What a person hands to a model, as a tensor of numbers; or a refusal that says what it is instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fspace.errors import DataError


def numbers(data: Any, what: str = "The data", dtype: Any = np.float32) -> Tensor:
    """Data as a tensor on the CPU. Raises DataError for text, complex numbers, rows of different lengths, no columns,
    and numbers whose squares overflow; NaN and infinity are for the model to judge."""
    data = data.detach().cpu() if isinstance(data, Tensor) else data
    try:
        given = np.asarray(data)
        if given.dtype.kind in "USc":
            raise DataError(f"{what} must be real numbers; they are of type {given.dtype}.")
        wide = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what} must be numbers, every row as long as the others: {error}.") from error
    if 0 in wide.shape[1:]:
        raise DataError(f"{what} have no columns: their shape is {list(wide.shape)}.")
    largest = float(np.sqrt(np.finfo(dtype).max)) / 10  # whose squares still have a sum
    huge = np.isfinite(wide) & (np.abs(wide) > largest)
    if huge.any():
        raise DataError(
            f"{what} hold {wide[huge][0]:g}, beyond {largest:.0e}: squares overflow. Use another unit."
        )
    return torch.as_tensor(wide.astype(dtype))
