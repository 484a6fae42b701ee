"""What workers over the weights of a module have in common: their rows, the likelihood, mini-batches, seeds."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fspace.errors import DataError, OptionError
from fspace.inference.basis import Site
from fspace.predictive import generator_for
from fspace.server.weights import WeightBasis
from fspace.server.workers import Shard, require_finite


@dataclass(frozen=True)
class Softmax:
    """Class labels 0, 1, ...: the module's outputs [n, classes] are log probabilities up to a constant."""

    classes: int

    def __post_init__(self) -> None:
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise OptionError(f"classes={self.classes!r} must be a whole number of at least 2.")

    def log_prob(self, outputs: Float[Tensor, "n c"], y: Tensor) -> Float[Tensor, " n"]:
        """log p(y_i | outputs_i), in nats."""
        return -nn.functional.cross_entropy(outputs, y, reduction="none")

    def targets(self, y: Tensor, name: str) -> Tensor:
        """y [n] as class numbers. Raises DataError, with the row, for what is no class."""
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1:
            raise DataError(f"Shard {name!r}: y {list(y.shape)} must be one class number a row.")
        wrong = (y != y.round()) | (y < 0) | (y >= self.classes)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"Shard {name!r}: row {row} of y is {y[row].item():g}; classes are 0 to {self.classes - 1}."
            )
        return y.long()

    def width(self, y: Tensor) -> int:
        """How many outputs the module must have."""
        return self.classes


@dataclass(frozen=True)
class GaussianNoise:
    """Numbers: the module's outputs [n, t] plus independent Gaussian noise of this variance."""

    variance: float

    def __post_init__(self) -> None:
        if not 0 < self.variance < float("inf"):
            raise OptionError(f"variance={self.variance!r} of the noise must be a positive number.")

    def log_prob(self, outputs: Float[Tensor, "n t"], y: Float[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """log p(y_i | outputs_i), in nats."""
        return torch.distributions.Normal(outputs, self.variance**0.5).log_prob(y).sum(-1)

    def targets(self, y: Tensor, name: str) -> Tensor:
        """y as [n, t]. Raises DataError."""
        y = y[:, None] if y.ndim == 1 else y
        if y.ndim != 2:
            raise DataError(f"Shard {name!r}: y {list(y.shape)} must be [n] or [n, t].")
        return y

    def width(self, y: Tensor) -> int:
        """How many outputs the module must have."""
        return y.shape[1]


WeightLikelihood: TypeAlias = Softmax | GaussianNoise


class WeightWorker(ABC):
    """One contributor: reads its shard where it runs, and makes its site over the weights as `how` says.

    The module is a copy of its own, in eval mode: a posterior over weights leaves no work for dropout, and statistics
    of a batch are no function of weights.
    """

    def __init__(
        self,
        name: str,
        shard: Shard,
        basis: WeightBasis,
        module: nn.Module,
        likelihood: WeightLikelihood,
        seed: int,
        how: Any,
    ):
        self.name, self.shard, self.basis, self.likelihood = name, shard, basis, likelihood
        self.seed, self.how = seed, how
        self.module = copy.deepcopy(module).eval()
        parameter = next(p for p in self.module.parameters() if p.requires_grad)
        self.dtype, self.device = parameter.dtype, parameter.device
        self._rows: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def step(self, own: Site, cavity: Site) -> Site:
        """The next site from the last one and what all others say."""

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The shard as the module and the likelihood take it, read once. Raises DataError for rows that do not fit."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows

    def _read(self) -> tuple[Tensor, Tensor]:
        x, y = (_tensor(v) for v in (self.shard() if callable(self.shard) else self.shard))
        if x.ndim < 2 or y.ndim < 1 or len(x) != len(y) or len(x) == 0:
            raise DataError(
                f"Shard {self.name!r}: x {list(x.shape)} and y {list(y.shape)} must be n rows each, at least one."
            )
        require_finite(self.name, x, y)
        y = self.likelihood.targets(y, self.name)
        x = x.to(self.device, self.dtype)
        require_finite(self.name, x, y)  # a number may be beyond float32
        y = y.to(self.device, self.dtype) if y.is_floating_point() else y.to(self.device)
        try:
            with torch.no_grad():
                outputs = self.module(x[:1])
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"Shard {self.name!r}: the module does not take x {list(x.shape)}: {error}"
            ) from error
        if tuple(outputs.shape) != (1, self.likelihood.width(y)):
            raise DataError(
                f"Shard {self.name!r}: the module's outputs are {list(outputs.shape[1:])} a row; {self.likelihood!r} "
                f"asks [{self.likelihood.width(y)}]."
            )
        return x, y

    def log_likelihood(self, v: Float[Tensor, " p"], x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x, v) of some rows, summed (nats)."""
        outputs = functional_call(self.module, self.basis.weights(v.to(self.dtype)), (x,))
        return self.likelihood.log_prob(outputs, y).sum()

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Mini-batches for ever, and what their sums are to be multiplied by to stand for all rows.

        Every pass is in a new order; rows beyond a whole number of batches wait for another pass.
        """
        x, y = self.rows
        n = len(x)
        while True:
            if size >= n:
                yield x, y, 1.0
                continue
            order = torch.randperm(n, generator=generator, device=generator.device).to(x.device)
            for part in order[: n - n % size].split(size):
                yield x[part], y[part], n / size

    def generator(self, own: Site) -> torch.Generator:
        """Random numbers that depend on the seed, the worker's name and the version of its site alone: the same on
        every engine. (A worker that starts again draws them anew; give `fit_weights` another seed for others.)"""
        digest = hashlib.sha256(f"{self.seed} {self.name} {own.version}".encode()).digest()
        return generator_for(int.from_bytes(digest[:4], "big"), self.device)


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(np.array(values, np.float64))
