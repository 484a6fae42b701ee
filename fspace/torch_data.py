"""torch data sets as rows that are read when they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError


class DatasetRows:
    """The inputs of a map-style torch data set of pairs (x, y), or of x alone, as an array that is read row by row.

    Only what an array [n, *row] needs here: shape, ndim, dtype, len, and indexing by a slice or by row numbers.
    """

    def __init__(self, dataset: Any):
        if len(dataset) == 0:
            raise DataError("The data set is empty.")
        self.dataset = dataset
        first = self._row(0)
        self.dtype = first.dtype
        self.shape = (len(dataset), *first.shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray:
        rows = range(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key).tolist()
        found = [self._row(int(i)) for i in rows]
        if not found:
            return np.empty((0, *self.shape[1:]), dtype=self.dtype)
        strange = next((i for i, row in zip(rows, found) if row.shape != self.shape[1:]), None)
        if strange is not None:
            raise DataError(
                f"The data set's row {strange} has another shape than row 0, which has {list(self.shape[1:])}."
            )
        return np.stack(found)

    def targets(self) -> NDArray:
        """y of every row, in one pass. Raises DataError for a data set of x alone."""
        found = []
        for i in range(len(self)):
            pair = self.dataset[i]
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(f"The data set's row {i} is no pair (x, y); give y beside it.")
            y = pair[1]
            found.append(y.detach().cpu().numpy() if hasattr(y, "detach") else y)
        return np.asarray(found)

    def _row(self, i: int) -> NDArray:
        item = self.dataset[i]
        x = item[0] if isinstance(item, tuple | list) else item
        row = x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)
        return row if row.dtype in (np.float32, np.float64) else row.astype(np.float64)


def is_dataset(X: Any) -> bool:
    """Whether X is a map-style torch data set; torch is not imported to find out."""
    return any(
        kind.__module__ == "torch.utils.data.dataset" and kind.__name__ == "Dataset"
        for kind in type(X).__mro__
    )


def unpacked(X: Any, y: Any) -> tuple[Any, Any]:
    """Inputs and targets of a data set where X is one; else X and y as they are."""
    if not is_dataset(X):
        return X, y
    rows = DatasetRows(X)
    return (rows if rows.ndim > 2 else rows[:]), (rows.targets() if y is None else y)
