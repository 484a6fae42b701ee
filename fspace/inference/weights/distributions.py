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
