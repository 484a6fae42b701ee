"""What a worker holds, its shard of the rows, and what it answers to the messages of an engine.

A worker keeps no state that counts: its site is at the server, and a step is a function of that site and the cavity.
So a worker that dies and starts again goes on where its site is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import CHUNK, Statistics, chunks
from fspace.inference.gp import Scaling
from fspace.inference.likelihoods import OffsetLikelihood
from fspace.inference.numerics import solve_lower
from fspace.kernels.deep import embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal
from fspace.server.local_updates import Update, new_site

Rows: TypeAlias = tuple[
    Any, Any
]  # x [n, d] (or images, sequences) and y [n] or [n, t], in the units of the data


@dataclass(frozen=True)
class TableShard:
    """A CSV or Parquet file of numbers: the columns named as targets are y, all others x, in file order."""

    path: str | Path
    targets: str | tuple[str, ...]

    def __call__(self) -> Rows:
        """Read the file. Raises DataError for a file or a column that cannot be used."""
        from fspace.datasets import read_table

        table = read_table(self.path)
        targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        missing = [name for name in targets if name not in table.columns]
        if not targets:
            raise DataError(f"targets is empty; name the columns of {str(self.path)!r} that are y.")
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
        y = table[targets].to_numpy(np.float64)
        return table.drop(columns=targets).to_numpy(np.float64), y


Shard: TypeAlias = Rows | TableShard | Callable[[], Rows]


class Worker:
    """One contributor: reads its shard where it runs, and makes its site."""

    def __init__(self, name: str, shard: Shard, basis: Basis, scaling: Scaling, how: Update):
        self.name, self.shard, self.how = name, shard, how
        self.basis, self.scaling = basis, scaling
        self._rows: tuple[Tensor, Tensor] | None = None
        self._learner: Kernel | None = None

    @property
    def rows(self) -> tuple[Tensor, Float[Tensor, "n t"]]:
        """The shard in the units of the basis, read once. Raises DataError for rows that do not fit."""
        if self._rows is None:
            x, y = self.shard() if callable(self.shard) else self.shard
            self._rows = in_units_of_basis(self.basis, self.scaling, x, y, self.name)
        return self._rows

    def step(self, own: Site, cavity: Site, basis: Basis | None = None) -> Site:
        """The next site from the last one and what all others say; on another basis than the worker's if one is given
        (of the same units)."""
        x, y = self.rows
        basis = self.basis if basis is None else basis
        return self.scaling.with_jacobian(new_site(basis, x, y, own, cavity, self.how))

    @torch.no_grad()
    def statistics(
        self, factor: Float[Tensor, "m m"], inducing: Float[Tensor, "m p"], *state: Tensor
    ) -> Statistics:
        """The additive statistics of the shard, whitened by the factor of K_uu, at these inducing inputs and this state
        of the kernel (`state_of`): O(m^2) numbers, whatever the rows."""
        blocks = self._blocks(factor, inducing, self._kernel_at(state))
        total = next(blocks)
        for block in blocks:
            total = total + block
        return total

    def gradient(
        self,
        outer: Float[Tensor, "m m"],
        cross: Float[Tensor, "m t"],
        trace: Float[Tensor, ""],
        factor: Float[Tensor, "m m"],
        inducing: Float[Tensor, "m p"],
        *state: Tensor,
    ) -> list[Tensor]:
        """The shard's part of the bound's gradient in inducing inputs and parameters of the kernel at a fixed factor of
        K_uu, from the gradient in the statistics."""
        kernel, inducing = self._kernel_at(state), inducing.clone().requires_grad_()
        leaves = [inducing, *kernel.parameters()]
        for leaf in leaves:
            leaf.grad = None
        for block in self._blocks(factor, inducing, kernel):
            ((outer * block.outer).sum() + (cross * block.cross).sum() + trace * block.trace).backward()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    def _blocks(self, factor: Tensor, inducing: Tensor, kernel: Kernel) -> Iterator[Statistics]:
        inner = embedded_kernel(kernel)
        for x, y in chunks(*self.rows, CHUNK):
            z = embed(kernel, x)
            v = solve_lower(factor, covariance(inner, inducing, z))
            yield Statistics(v @ v.mT, v @ y, y.square().sum(0), diagonal(inner, z).sum(), len(y))

    def _kernel_at(self, state: Sequence[Tensor]) -> Kernel:
        """The worker's own copy of the kernel, which learns, in this state."""
        if self._learner is None:
            self._learner = copy.deepcopy(self.basis.kernel).eval().requires_grad_(True)
        with torch.no_grad():
            for own, new in zip(state_of(self._learner), state, strict=True):
                own.copy_(new)
        return self._learner


def state_of(kernel: Kernel) -> list[Tensor]:
    """Parameters of a kernel, then what else a network keeps (estimates of spectral norms, statistics)."""
    return [*kernel.parameters(), *kernel.buffers()]


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
    if not len(x):
        raise DataError(f"Shard {name!r} has no rows; leave it out.")
    row = scaling.shift.shape
    if x.ndim <= len(row) or any(a not in (1, b) for a, b in zip(row, x.shape[-len(row) :])):
        raise DataError(f"Shard {name!r}: x has shape {list(x.shape)}; rows of this basis are {list(row)}.")
    require_finite(name, x, y)
    x = scaling.inputs(x)
    if classes:
        labels = set(range(likelihood.classes))
        if not set(y.unique().tolist()) <= labels:
            raise DataError(f"Shard {name!r}: y must hold classes 0 to {likelihood.classes - 1}.")
        return x, y
    y = scaling.modelled(y)
    if isinstance(likelihood, OffsetLikelihood):
        y = y + likelihood.offset.detach()
    return x, y


def require_finite(name: str, x: Tensor, y: Tensor) -> None:
    """Raises DataError, naming the shard and the row, for NaN and infinite values."""
    for what, values in (("x", x), ("y", y)):
        bad = ~values.reshape(len(values), -1).isfinite().all(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise DataError(
                f"Shard {name!r}: row {first} of {what} holds NaN or infinite values; leave such rows out."
            )
