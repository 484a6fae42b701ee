"""Predictives that are known from samples: function values, or class probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.gaussians import Gaussian, Mixture
from fspace.predictive_base import (
    Continuous,
    Predictive,
    as_tensor,
    check_count,
    generator_for,
    normalised_weights,
)


class Samples(Continuous):
    """Equally likely function values, as from an ensemble of networks, with or without Gaussian noise around them.

    Shapes: values [s, *y shape], noise_variance y-shaped or [s, *y shape]. Without noise there is no density:
    log_prob raises OptionError, cdf is the sample's and quantile its inverse (a value of the sample).
    """

    def __init__(self, values: Tensor, noise_variance: Tensor | float | None = None):
        if values.ndim < 2 or len(values) == 0 or not values.is_floating_point():
            raise DataError(
                f"Samples must be floating-point values [s, n] or [s, n, t], at least one; got {values.dtype} "
                f"{tuple(values.shape)}."
            )
        self.values = values
        self.noise = None
        if noise_variance is not None:
            self.noise = torch.as_tensor(noise_variance, dtype=values.dtype, device=values.device).expand_as(
                values
            )
        self.mean = values.mean(0)
        self.outputs = values.shape[-1] if values.ndim == 3 else None

    def _mixture(self) -> Mixture:
        assert self.noise is not None
        return Mixture([Gaussian(v, s) for v, s in zip(self.values, self.noise)])

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        return self.values.var(0, correction=0)

    @property
    def aleatoric(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.noise is None else self.noise.mean(0)

    @property
    def covariance(self) -> Tensor:
        """Joint covariance over the points, noise included: [n, n], or [t, n, n], that of each of several outputs."""
        centred = (self.values - self.mean).movedim(1, -1)  # [s, (t,) n]
        spread = torch.einsum("s...n,s...m->...nm", centred, centred) / len(centred)
        return spread + torch.diag_embed(self.aleatoric.movedim(0, -1))

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        generator = generator_for(seed, self.values.device)
        count = (check_count(n),)
        picks = torch.randint(len(self.values), count, generator=generator, device=self.values.device)
        chosen = self.values[picks]
        if self.noise is None:
            return chosen
        white = torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype, device=chosen.device)
        return chosen + self.noise[picks].sqrt() * white

    def log_prob(self, y: Any) -> Tensor:
        if self.noise is None:
            raise OptionError(
                "A finite sample without noise has no density; give noise_variance, or use observed()."
            )
        return self._mixture().log_prob(y)

    def cdf(self, y: Any) -> Tensor:
        if self.noise is not None:
            return self._mixture().cdf(y)
        y = self._check(y)
        return (self.values <= y).to(self.values).mean(0).masked_fill(y.isnan(), math.nan)

    def _quantile(self, p: float) -> Tensor:
        if self.noise is not None:
            return self._mixture()._quantile(p)
        # the smallest value with cdf >= p; a little less than p * s, so that rounding does not skip one
        rank = math.ceil(p * len(self.values) * (1 - 1e-12))
        return self.values.kthvalue(rank, dim=0).values

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Samples:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        square = torch.as_tensor(scale, dtype=self.values.dtype, device=self.values.device).square()
        return Samples(self.values * scale + loc, None if self.noise is None else self.noise * square)


class Categorical(Predictive):
    """Class probabilities [n, c], or samples of them [s, n, c] whose spread is what is not known.

    Entropies are in nats. joint(n, seed) gives probabilities [n, points, c] that are joint over the points, where the
    samples hold for each point alone; weights [s] are for samples that are not equally likely.
    Source: Houlsby et al. (2011), eq. 1 (mutual information).
    """

    def __init__(
        self,
        probs: Any,
        weights: Any = None,
        joint: Callable[[int, int | None], Tensor] | None = None,
    ):
        probs = as_tensor(probs, None, "probs")
        probs = probs if probs.is_floating_point() else probs.double()
        if probs.ndim not in (2, 3) or (probs.ndim == 3 and len(probs) == 0) or probs.shape[-1] == 0:
            raise DataError(f"Class probabilities must be [n, c] or [s, n, c], not {tuple(probs.shape)}.")
        if bool((probs < 0).any()) or not torch.allclose(
            probs.sum(-1), torch.ones_like(probs[..., 0]), atol=1e-5
        ):
            raise DataError(
                "Class probabilities must be non-negative and sum to one over the last dimension."
            )
        self.samples = probs if probs.ndim == 3 else probs[None]
        self.weights = normalised_weights(weights, len(self.samples)).to(self.samples)
        self.joint = joint
        self.probs: Float[Tensor, "n c"] = torch.tensordot(self.weights, self.samples, dims=1)
        self.mean = self.probs
        self.variance = self.probs * (1 - self.probs)

    @classmethod
    def mixed(cls, parts: Sequence[Categorical], weights: Float[Tensor, " k"]) -> Categorical:
        """The mixture of which one part is right; weights [k]."""
        weights = weights.to(parts[0].weights)

        def joint(n: int, seed: int | None) -> Tensor:
            generator = generator_for(seed, torch.device("cpu"))
            picks = torch.multinomial(weights.cpu(), n, replacement=True, generator=generator)
            inner = int(torch.randint(2**31, (1,), generator=generator))
            drawn = parts[0].probs.new_empty(n, *parts[0].probs.shape)
            for k, part in enumerate(parts):
                mine = (picks == k).nonzero()[:, 0].to(drawn.device)
                if len(mine):
                    drawn[mine] = part._draw(len(mine), inner + k)
            return drawn

        samples = torch.cat([part.samples for part in parts])
        return cls(samples, torch.cat([w * part.weights for w, part in zip(weights, parts)]), joint)

    @property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of the averaged probabilities."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def mutual_information(self) -> Float[Tensor, " n"]:
        """Entropy minus expected entropy: what knowing the function would tell about the class."""
        return (self.entropy - self.aleatoric).clamp(min=0.0)

    @property
    def epistemic(self) -> Float[Tensor, " n"]:
        return self.mutual_information

    @property
    def aleatoric(self) -> Float[Tensor, " n"]:
        return self.weights @ torch.special.entr(self.samples).sum(-1)

    @property
    def mode(self) -> Int[Tensor, " n"]:
        """The most probable class."""
        return self.probs.argmax(-1)

    def log_prob(self, y: Any) -> Float[Tensor, " n"]:
        """Log probability of integer labels [n]. Raises DataError for labels that are no class."""
        try:
            y = as_tensor(y, self.probs.device)
        except DataError as error:
            raise DataError(
                "Labels must be positions in the model's classes_, not the classes themselves: "
                "numpy.searchsorted(model.classes_, y)."
            ) from error
        labels = y.long()
        known = (labels == y) & (labels >= 0) & (labels < self.probs.shape[1])
        if labels.shape != self.probs.shape[:1] or not bool(known.all()):
            raise DataError(
                f"Labels must be {self.probs.shape[0]} integers from 0 to {self.probs.shape[1] - 1}."
            )
        return self.probs.gather(-1, labels[:, None])[:, 0].log()

    def rsample(self, n: int = 1, seed: int | None = None) -> Int[Tensor, "k n"]:
        """n draws of labels; one function sample for each, so joint over the points (not differentiable)."""
        generator = generator_for(seed, self.probs.device)
        if check_count(n) == 0:
            return torch.empty((0, len(self.probs)), dtype=torch.long, device=self.probs.device)
        return torch.stack([torch.multinomial(p, 1, generator=generator)[:, 0] for p in self._draw(n, seed)])

    def _draw(self, n: int, seed: int | None) -> Float[Tensor, "k n c"]:
        """Class probabilities of n functions."""
        if self.joint is not None:
            return self.joint(n, seed)
        generator = generator_for(seed, self.probs.device)
        return self.samples[torch.multinomial(self.weights, n, replacement=True, generator=generator)]
