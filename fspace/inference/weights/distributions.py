"""Distributions over the state of a network (weights and noise), each with what a posterior asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class StateDistribution(Protocol):
    """A distribution over states theta [q]."""

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        """n states."""

    def fixed(self) -> Float[Tensor, "s q"] | None:
        """All states, where there are finitely many, equally probable."""


@dataclass(frozen=True, eq=False)
class Points:
    """Finitely many states [s, q], equally probable: one of MAP, the members of an ensemble, a chain's."""

    states: Float[Tensor, "s q"]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        picks = torch.randint(len(self.states), (n,), generator=generator, device=generator.device)
        return self.states[picks.to(self.states.device)]

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return self.states


def white(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the generator, on the device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Independent Gaussians: mean and scale [q]."""

    mean: Float[Tensor, " q"]
    scale: Float[Tensor, " q"]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        return self.mean + self.scale * white((n, len(self.mean)), self.mean, generator)

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None


@dataclass(frozen=True, eq=False)
class LowRankPaths:
    """Gaussians from paths, equally probable: mean [m, q], variance [m, q] and k deviations [m, k, q], of whose sum
    of squares / (k - 1) and the variance each makes half of the covariance. Source: Maddox et al. (2019), eq. 1."""

    mean: Float[Tensor, "m q"]
    variance: Float[Tensor, "m q"]
    deviations: Float[Tensor, "m k q"]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        m, k, q = self.deviations.shape
        picks = torch.randint(m, (n,), generator=generator, device=generator.device).to(self.mean.device)
        alone = white((n, q), self.mean, generator) * (0.5 * self.variance[picks]).sqrt()
        along = white((n, k), self.mean, generator) / (2.0 * max(k - 1, 1)) ** 0.5
        return self.mean[picks] + alone + torch.einsum("nk,nkq->nq", along, self.deviations[picks])

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None


@dataclass(frozen=True, eq=False)
class Dropped:
    """One state [q] whose layers' inputs are each dropped with probability rate, the others divided by 1 - rate.

    places: (first weight, shape) of every layer; a unit or channel is dropped in all rows and positions at once, so
    that each draw is one function.
    """

    mean: Float[Tensor, " q"]
    rate: float
    places: tuple[tuple[int, tuple[int, ...]], ...]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        states = self.mean.expand(n, -1).clone()
        for first, shape in self.places:
            size = torch.Size(shape).numel()
            uniform = torch.rand(n, shape[1], generator=generator, device=generator.device)
            kept = (uniform >= self.rate).to(self.mean) / (1.0 - self.rate)
            weight = states[:, first : first + size].reshape(n, *shape)
            kept = kept.reshape(n, 1, shape[1], *[1] * (len(shape) - 2))
            states[:, first : first + size] = (weight * kept).flatten(1)
        return states

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None


@dataclass(frozen=True, eq=False)
class LowRankPrecision:
    """A Gaussian over the weights first..., in whitened coordinates: precision factor * I + V diag(values) V'.

    mean [q] in the type of the network; scale [r] takes whitened weights to weights; vectors V [r, k], orthonormal;
    covariances are times `temperature`.
    """

    mean: Float[Tensor, " q"]
    scale: Float[Tensor, " r"]
    vectors: Float[Tensor, "r k"]
    values: Float[Tensor, " k"]
    factor: float
    first: int
    temperature: float

    def _shrunk(self) -> tuple[float, Tensor]:
        """Prior variance, and by how much of it each direction of V is known."""
        return self.temperature / self.factor, self.values / (self.values + self.factor)

    def deviations(self, n: int, generator: torch.Generator) -> Float[Tensor, "n r"]:
        """n draws of weights minus mean, of the weights with a distribution."""
        variance, known = self._shrunk()
        v = white((n, len(self.scale)), self.scale, generator)
        v = v - ((v @ self.vectors) * (1.0 - (1.0 - known).sqrt())) @ self.vectors.mT
        return variance**0.5 * v * self.scale

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        return placed(self.mean, self.deviations(n, generator), self.first)

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None

    def covariance(self, a: Float[Tensor, "*n r"], b: Float[Tensor, "*m r"]) -> Tensor:
        """a C b' for the covariance C of the weights."""
        variance, known = self._shrunk()
        a, b = a * self.scale, b * self.scale
        return variance * (a @ b.mT - (a @ self.vectors * known) @ (b @ self.vectors).mT)

    def variance(self, a: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
        """The diagonal of a C a'."""
        variance, known = self._shrunk()
        a = a * self.scale
        return variance * (a.square().sum(-1) - ((a @ self.vectors).square() * known).sum(-1)).clamp(min=0.0)


@dataclass(frozen=True, eq=False)
class DiagonalPrecision:
    """Independent Gaussians over the weights first...: mean [q] in the type of the network, deviation [r]."""

    mean: Float[Tensor, " q"]
    deviation: Float[Tensor, " r"]
    first: int

    def deviations(self, n: int, generator: torch.Generator) -> Float[Tensor, "n r"]:
        """n draws of weights minus mean."""
        return self.deviation * white((n, len(self.deviation)), self.deviation, generator)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        return placed(self.mean, self.deviations(n, generator), self.first)

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None

    def covariance(self, a: Float[Tensor, "*n r"], b: Float[Tensor, "*m r"]) -> Tensor:
        """a C b' for the covariance C of the weights."""
        return (a * self.deviation) @ (b * self.deviation).mT

    def variance(self, a: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
        """The diagonal of a C a'."""
        return (a * self.deviation).square().sum(-1)


@dataclass(frozen=True, eq=False)
class KroneckerPrecision:
    """Gaussians over the weights of layers, independent between layers: precision of whitened weights
    A ⊗ G + factor * I, by eigenvectors.

    Of layer l: input_vectors[l] [i, i] (the last row is the bias's, where it has one), output_vectors[l] [o, o],
    deviations_[l] [o, i] of the rotated weights, columns[l] [i] the prior scales, places[l] = (first weight, first
    bias or -1), both from `first`.
    """

    mean: Float[Tensor, " q"]
    input_vectors: tuple[Tensor, ...]
    output_vectors: tuple[Tensor, ...]
    rotated: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    first: int
    size: int

    def deviations(self, n: int, generator: torch.Generator) -> Float[Tensor, "n r"]:
        """n draws of weights minus mean."""
        drawn = self.rotated[0].new_zeros(n, self.size)
        for a, g, deviation, column, (weight, bias) in self._layers():
            v = white((n, *deviation.shape), deviation, generator) * deviation
            block = (g @ v @ a.mT) * column
            inputs = block.shape[-1] - (bias >= 0)
            drawn[:, weight : weight + len(g) * inputs] = block[..., :inputs].flatten(1)
            if bias >= 0:
                drawn[:, bias : bias + len(g)] = block[..., -1]
        return drawn

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n q"]:
        return placed(self.mean, self.deviations(n, generator), self.first)

    def fixed(self) -> Float[Tensor, "s q"] | None:
        return None

    def _layers(self):  # type: ignore[no-untyped-def]
        return zip(self.input_vectors, self.output_vectors, self.rotated, self.columns, self.places)

    def _root(self, a: Float[Tensor, "*n r"]) -> Float[Tensor, "*n r"]:
        """a times a square root of the covariance."""
        parts = []
        for inner, outer, deviation, column, (weight, bias) in self._layers():
            inputs = len(column) - (bias >= 0)
            block = a[..., weight : weight + len(outer) * inputs].unflatten(-1, (len(outer), inputs))
            if bias >= 0:
                block = torch.cat([block, a[..., bias : bias + len(outer), None]], dim=-1)
            parts.append((outer.mT @ (block * column) @ inner * deviation).flatten(-2))
        return torch.cat(parts, dim=-1)

    def covariance(self, a: Float[Tensor, "*n r"], b: Float[Tensor, "*m r"]) -> Tensor:
        """a C b' for the covariance C of the weights."""
        return self._root(a) @ self._root(b).mT

    def variance(self, a: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
        """The diagonal of a C a'."""
        return self._root(a).square().sum(-1)


def placed(mean: Float[Tensor, " q"], moves: Float[Tensor, "n r"], first: int) -> Float[Tensor, "n q"]:
    """States at the mean, moved in the weights from `first` on."""
    states = mean.expand(len(moves), -1).clone()
    states[:, first : first + moves.shape[1]] += moves.to(mean)
    return states


LOCAL = (
    LowRankPrecision,
    DiagonalPrecision,
    KroneckerPrecision,
)  # around one state: what can be linearised there
DISTRIBUTIONS = {kind.__name__: kind for kind in (Points, Diagonal, LowRankPaths, Dropped, *LOCAL)}
