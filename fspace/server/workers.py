"""What a worker holds, its shard of the rows, and what it answers to the messages of an engine.

A worker keeps no state that counts: its site is at the server, and a step is a function of that site and the cavity.
So a worker that dies and starts again goes on where its site is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import CHUNK, Statistics, chunks, gather, statistics
from fspace.inference.gp import Scaling
from fspace.inference.likelihoods import OffsetLikelihood
from fspace.server.local_updates import Update, new_site

Rows: TypeAlias = tuple[
    Any, Any
]  # x [n, d] (or images, sequences) and y [n] or [n, t], in the units of the data


@dataclass(frozen=True)
class TableShard:
    """A CSV or Parquet file of numbers: the columns named as targets are y, all others x, in the file's order."""

    path: str | Path
    targets: tuple[str, ...]

    def __call__(self) -> Rows:
        """Read the file. Raises DataError for a file or a column that cannot be used."""
        from fspace.datasets import read_table

        table = read_table(self.path)
        missing = [name for name in self.targets if name not in table.columns]
        if missing:
            raise DataError(
                f"{str(self.path)!r} has no column {missing[0]!r}; it has {', '.join(table.columns)}."
            )
        words = [name for name in table.columns if table[name].dtype.kind not in "iufb"]
        if words:
            raise DataError(
                f"Column {words[0]!r} of {str(self.path)!r} holds no numbers; encode it first, or pass a function that "
                "returns the encoded rows as shard."
            )
        y = table[list(self.targets)].to_numpy(np.float64)
        return table.drop(columns=list(self.targets)).to_numpy(np.float64), y


Shard: TypeAlias = Rows | TableShard | Callable[[], Rows]


class Worker:
    """One contributor: reads its shard where it runs, and makes its site."""

    def __init__(self, name: str, shard: Shard, basis: Basis, scaling: Scaling, how: Update):
        self.name, self.shard, self.how = name, shard, how
        self.basis, self.scaling = basis, scaling
        self._rows: tuple[Tensor, Tensor] | None = None
        self._learner: Basis | None = None

    @property
    def rows(self) -> tuple[Tensor, Float[Tensor, "n t"]]:
        """The shard in the units of the basis, read once. Raises DataError for rows that do not fit."""
        if self._rows is None:
            x, y = self.shard() if callable(self.shard) else self.shard
            self._rows = in_units_of_basis(self.basis, self.scaling, x, y, self.name)
        return self._rows

    def step(self, own: Site, cavity: Site) -> Site:
        """The next site from the last one and what all others say."""
        x, y = self.rows
        return new_site(self.basis, x, y, own, cavity, self.how)

    def learn_from(self, parameters: list[Tensor]) -> None:
        """Move the worker's own copy of the basis to new parameters of kernel and inducing inputs."""
        if self._learner is None:
            kernel = copy.deepcopy(self.basis.kernel)
            self._learner = Basis(kernel, self.basis.inducing_inputs.clone(), self.basis.likelihood)
        inputs, *rest = parameters
        self._learner.inducing_inputs.data = inputs.clone()
        with torch.no_grad():
            for own, new in zip(self._learner.kernel.parameters(), rest, strict=True):
                own.copy_(new)

    def statistics(self, parameters: list[Tensor]) -> Statistics:
        """The additive statistics of the shard at these parameters: O(m^2) numbers, whatever the rows."""
        self.learn_from(parameters)
        assert self._learner is not None
        return gather(self._learner.kernel, self._learner.inducing_inputs, *self.rows, CHUNK)

    def gradient(self, parameters: list[Tensor], outer: Tensor, cross: Tensor, trace: Tensor) -> list[Tensor]:
        """The shard's part of the bound's gradient in inducing inputs and kernel parameters, from the gradient in the
        statistics."""
        self.learn_from(parameters)
        assert self._learner is not None
        kernel, inducing = self._learner.kernel, self._learner.inducing_inputs.requires_grad_(True)
        leaves = [inducing, *kernel.parameters()]
        for leaf in leaves:
            leaf.requires_grad_(True)
            leaf.grad = None
        for x, y in chunks(*self.rows, CHUNK):
            block = statistics(kernel, inducing, x, y)
            ((outer * block.outer).sum() + (cross * block.cross).sum() + trace * block.trace).backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
        inducing.requires_grad_(False)
        return found


def in_units_of_basis(
    basis: Basis, scaling: Scaling, x: Any, y: Any, name: str
) -> tuple[Tensor, Float[Tensor, "n t"]]:
    """Rows in the units of the data as a basis models them. Raises DataError, naming the shard, for what cannot be."""
    x, y = (
        v.to(torch.float64) if isinstance(v, Tensor) else torch.tensor(np.array(v, np.float64))
        for v in (x, y)
    )
    likelihood = basis.likelihood
    classes = isinstance(likelihood, OffsetLikelihood) and likelihood.classes
    outputs = 1 if classes else scaling.y_shift.shape[0]
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim < 2 or len(x) != len(y) or y.ndim != 2 or y.shape[1] != outputs:
        raise DataError(
            f"Shard {name!r}: x {list(x.shape)} and y {list(y.shape)} must be n rows each, with {outputs} outputs."
        )
    row = scaling.shift.shape
    if x.ndim <= len(row) or any(a not in (1, b) for a, b in zip(row, x.shape[-len(row) :])):
        raise DataError(f"Shard {name!r}: x has shape {list(x.shape)}; rows of this basis are {list(row)}.")
    for what, values in (("x", x), ("y", y)):
        bad = ~values.reshape(len(values), -1).isfinite().all(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise DataError(
                f"Shard {name!r}: row {first} of {what} holds NaN or infinite values; leave such rows out."
            )
    x = scaling.inputs(x)
    if classes:
        labels = set(range(likelihood.classes))
        if not set(y.unique().tolist()) <= labels:
            raise DataError(f"Shard {name!r}: y must hold classes 0 to {likelihood.classes - 1}.")
        return x, y
    y = (y - scaling.y_shift) / scaling.y_scale
    if isinstance(likelihood, OffsetLikelihood):
        y = y + likelihood.offset.detach()
    return x, y
