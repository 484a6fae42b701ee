"""Rows that are read when they are asked for, so that they need not fit memory: arrays on disk, torch data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 8192  # rows that may be in memory together


class RowSource:
    """Rows [n, *row] behind a reader; indexing gives a float64 tensor of few rows, or a source of many.

    read: from row numbers, in the order wanted, to an array or tensor of these rows. change: what is done to rows that
    were read (scaling). It can be sliced, indexed by row numbers and by a mask, and split, as a tensor can.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Any],
        index: np.ndarray,
        row: tuple[int, ...],
        device: torch.device,
        change: Callable[[Tensor], Tensor] | None = None,
    ):
        self._read, self._index, self._row, self._change = read, index, row, change
        self.device = device

    @staticmethod
    def of(values: Any, device: torch.device) -> RowSource:
        """Rows of an array, which may be memory-mapped, or of what is read as one."""
        return RowSource(lambda rows: values[rows], np.arange(len(values)), tuple(values.shape[1:]), device)

    def changed(self, change: Callable[[Tensor], Tensor]) -> RowSource:
        """The same rows after `change`, in place of what was done to them before."""
        return RowSource(self._read, self._index, self._row, self.device, change)

    @property
    def shape(self) -> torch.Size:
        """Rows, then the shape of one."""
        return torch.Size((len(self._index), *self._row))

    @property
    def ndim(self) -> int:
        """Dimensions, that of the rows included."""
        return 1 + len(self._row)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: Any) -> Any:
        picked = self._index[key.cpu().numpy() if isinstance(key, Tensor) else key]
        if len(picked) > AT_ONCE:
            return RowSource(self._read, picked, self._row, self.device, self._change)
        return self._rows(picked)

    def split(self, size: int) -> Iterator[Tensor]:
        """Tensors of at most `size` rows, in order."""
        for start in range(0, len(self), min(size, AT_ONCE)):
            yield self[start : start + min(size, AT_ONCE)]

    def _rows(self, index: np.ndarray) -> Tensor:
        order = np.argsort(index, kind="stable")  # a file is read forwards
        values = torch.as_tensor(self._read(index[order]))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.from_numpy(order)] = torch.arange(len(order))
        rows = values[back].to(self.device, torch.float64)
        return rows if self._change is None else self._change(rows)


Inputs: TypeAlias = Tensor | RowSource  # rows [n, *row], in memory or not


def placed(x: Inputs, index: Tensor) -> Tensor:
    """Row numbers where x[index] takes them as they are: on the device of a tensor, on the host for rows to be read."""
    return index.cpu() if isinstance(x, RowSource) else index.to(x.device)
