"""Proposals q(z | x) that encoders return: diagonal Gaussians, hard discrete variables, and chains of several layers.

The rows of a parameter are the data, [B, ...]; all that follows is latent, and log_prob sums over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fspace.errors import DataError
from fspace.inference.amortized import checks
from fspace.inference.amortized.latent import Proposal


def gumbel(like: Tensor, samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "k *b"]:
    """Standard Gumbel noise [samples, *like.shape] of like's type, on its device; never infinite."""
    drawn = torch.empty((samples, *like.shape), dtype=like.dtype, device=like.device)
    return -drawn.exponential_(generator=generator).clamp_min(torch.finfo(like.dtype).tiny).log()


def gumbel_max(
    logits: Float[Tensor, "*b c"], samples: int, generator: torch.Generator | None = None
) -> Float[Tensor, "k *b c"]:
    """One-hot draws with probabilities softmax(logits): the argmax of logits + Gumbel noise.

    Source: Maddison, Tarlow and Minka (2014).
    """
    return one_hot(logits.detach() + gumbel(logits, samples, generator))


def one_hot(z: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """One where z is greatest along the last axis, the first of several."""
    return torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)


def over_latents(terms: Float[Tensor, "k b ..."]) -> Float[Tensor, "k b"]:
    """Sum over every axis but samples and data."""
    return terms.flatten(2).sum(-1) if terms.ndim > 2 else terms


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent Gaussians. Shapes: mean, std [B, ...]; z [K, B, ...]. Raises DataError for std not positive."""

    mean: Float[Tensor, "b ..."]
    std: Float[Tensor, "b ..."]

    def __post_init__(self) -> None:
        checks.of_shape(self.std, tuple(self.mean.shape), "std")
        checks.support(self.std > 0, self.std, "std", "a standard deviation is above 0")

    def noise(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise [samples, B, ...]."""
        shape = (samples, *self.mean.shape)
        return torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)

    def transform(self, noise: Tensor) -> Tensor:
        """z = mean + std noise."""
        return self.mean + self.std * noise

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """z [samples, B, ...], reparameterised."""
        return self.transform(self.noise(samples, generator))

    def log_prob(self, z: Tensor) -> Float[Tensor, "k b"]:
        """Log density in nats."""
        checks.of_shape(z, (*z.shape[:1], *self.mean.shape), "z")
        scaled = (z - self.mean) / self.std
        return over_latents(-0.5 * (scaled.square() + math.log(2 * math.pi)) - self.std.log())

    def stopped(self) -> DiagonalGaussian:
        """Without gradient to mean and std."""
        return DiagonalGaussian(self.mean.detach(), self.std.detach())


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits. Shapes: logits [B, ...]; z [K, B, ...], zeros and ones without gradient.

    Raises DataError for NaN.
    """

    logits: Float[Tensor, "b ..."]

    def __post_init__(self) -> None:
        checks.logits(self.logits, ~self.logits.isnan(), "the logit of a bit is a number, or infinite")

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Bits [samples, B, ...]."""
        chances = self.logits.detach().sigmoid().expand(samples, *self.logits.shape)
        return torch.bernoulli(chances, generator=generator)

    def log_prob(self, z: Tensor) -> Float[Tensor, "k b"]:
        """Log mass; DataError for what is neither 0 nor 1."""
        checks.of_shape(z, (*z.shape[:1], *self.logits.shape), "z")
        checks.support((z == 0) | (z == 1), z, "z", "a bit is 0 or 1")
        return over_latents(F.logsigmoid(torch.where(z == 1, self.logits, -self.logits)))

    def stopped(self) -> Bernoulli:
        """Without gradient to the logits."""
        return Bernoulli(self.logits.detach())


@dataclass(frozen=True)
class Categorical:
    """Independent categories. Shapes: logits [B, ..., c]; z [K, B, ..., c] one-hot, without gradient.

    A logit of -inf is a category that never comes. Raises DataError for NaN, +inf, and a row that is -inf throughout.
    """

    logits: Float[Tensor, "b ... c"]

    def __post_init__(self) -> None:
        fine = self.logits.amax(-1).isfinite()  # NaN and +inf win
        checks.logits(self.logits, fine, "a row needs a finite logit, and none that is NaN or +inf")

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """One-hot draws [samples, B, ..., c]."""
        return gumbel_max(self.logits, samples, generator)

    def log_prob(self, z: Tensor) -> Float[Tensor, "k b"]:
        """Log mass; DataError for what is not one-hot."""
        checks.of_shape(z, (*z.shape[:1], *self.logits.shape), "z")
        hot = ((z == 0) | (z == 1)).all(-1) & (z.sum(-1) == 1)
        checks.support(hot, z, "z", "a category is a one-hot row")
        log_p = self.logits.log_softmax(-1)
        return over_latents(torch.where(z == 1, log_p, 0.0).sum(-1))

    def stopped(self) -> Categorical:
        """Without gradient to the logits."""
        return Categorical(self.logits.detach())


@dataclass(frozen=True)
class Chain:
    """Several stochastic layers, q(z_1 | x) q(z_2 | z_1, x) ...; z is the tuple of them, first drawn first.

    first    q(z_1 | x), a Proposal of B rows.
    layers   modules: layer(rows of z_{l-1}) is the Proposal of z_l for these rows; layer(rows, context rows) where a
             context [B, ...] is given, such as features of x.

    `stopped` holds the parameters of every layer constant but lets the gradient through z_{l-1} into the density of
    z_l: the indirect score that the doubly reparameterised gradient needs. Source: Bauer and Mnih (2021).
    """

    first: Proposal
    layers: Sequence[nn.Module | Callable[..., Proposal]]
    context: Tensor | None = None

    def _conditional(self, layer: Callable[..., Proposal], z: Tensor) -> Proposal:
        rows = z.flatten(0, 1)
        if self.context is None:
            return layer(rows)
        return layer(rows, self.context.expand(*z.shape[:1], *self.context.shape).flatten(0, 1))

    def sample(self, samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """One tensor [samples, B, ...] a layer."""
        z = [self.first.sample(samples, generator)]
        for layer in self.layers:
            drawn = self._conditional(layer, z[-1]).sample(1, generator)
            z.append(drawn[0].unflatten(0, z[-1].shape[:2]))
        return tuple(z)

    def log_prob(self, z: tuple[Tensor, ...]) -> Float[Tensor, "k b"]:
        """Log density of all layers together."""
        if len(z) != len(self.layers) + 1:
            raise DataError(f"z has {len(z)} parts; the chain has {len(self.layers) + 1} stochastic layers.")
        total = self.first.log_prob(z[0])
        for layer, below, here in zip(self.layers, z, z[1:]):
            density = self._conditional(layer, below).log_prob(here.flatten(0, 1)[None])
            total = total + density.reshape(total.shape)
        return total

    def stopped(self) -> Chain:
        """All parameters held constant, z live. Raises DataError for a layer that is no module."""
        context = None if self.context is None else self.context.detach()
        return Chain(self.first.stopped(), [_held(layer) for layer in self.layers], context)


def _held(layer: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
    """The module with its parameters as constants."""
    if not isinstance(layer, nn.Module):
        raise DataError(
            f"A layer of a Chain must be a torch module, not {type(layer).__name__}: its parameters must be found."
        )
    constants = {name: value.detach() for name, value in layer.named_parameters()}

    def held(*rows: Tensor) -> Any:
        return functional_call(layer, constants, rows)

    return held
