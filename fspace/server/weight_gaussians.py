"""Gaussians over weights in natural and in mean parameters, full and diagonal: what a worker's updates are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.basis import Site


class Limits(NamedTuple):
    """Where a site's own Gaussian is kept: its mean within +- `mean`, its variances between two numbers."""

    mean: float
    variance: tuple[float, float]


class Natural(NamedTuple):
    """A Gaussian's natural parameters: exp(shift' v - v' precision v / 2)."""

    precision: Float[Tensor, "p p"] | Float[Tensor, " p"]
    shift: Float[Tensor, " p"]

    @staticmethod
    def of(site: Site, device: torch.device) -> Natural:
        """A site's."""
        return Natural(site.precision[0].to(device), site.shift[0].to(device))

    def to(self, dtype: torch.dtype) -> Natural:
        """The same numbers in another type."""
        return Natural(self.precision.to(dtype), self.shift.to(dtype))

    def times(self, other: Natural, power: float = 1.0) -> Natural:
        """Times a power of another."""
        return Natural(self.precision + power * other.precision, self.shift + power * other.shift)

    def gradient(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Of the log density in v."""
        return self.shift - apply(self.precision, v)

    def with_prior(self) -> Natural:
        """Times the prior N(0, I)."""
        one = torch.ones_like(self.shift)
        return Natural(self.precision + (one if self.precision.ndim == 1 else one.diag()), self.shift)

    def within(self, limits: Limits) -> Mean:
        """The mean parameter; of what says nothing, or is no Gaussian, with the widest variance allowed."""
        low, high = limits.variance
        if self.precision.ndim == 1:
            variance = self.precision.clamp(1.0 / high, 1.0 / low).reciprocal()
            mean = (variance * self.shift).clamp(-limits.mean, limits.mean)
            return Mean(mean, variance + mean.square())
        precisions, axes = torch.linalg.eigh(self.precision)
        variances = precisions.clamp(1.0 / high, 1.0 / low).reciprocal()
        covariance = (axes * variances) @ axes.mT
        mean = (covariance @ self.shift).clamp(-limits.mean, limits.mean)
        return Mean(mean, covariance + mean.outer(mean))

    def exponent(self, v: Float[Tensor, " p"]) -> float:
        """The log of exp(shift' v - v' precision v / 2)."""
        return (self.shift @ v - 0.5 * (v @ apply(self.precision, v))).item()

    def mean_parameter(self) -> Mean:
        """Of the same Gaussian, which must be one."""
        if self.precision.ndim == 1:
            variance = self.precision.reciprocal()
            mean = variance * self.shift
            return Mean(mean, variance + mean.square())
        factor = torch.linalg.cholesky(self.precision)
        mean = torch.cholesky_solve(self.shift[:, None], factor)[:, 0]
        return Mean(mean, torch.cholesky_inverse(factor) + mean.outer(mean))


class Mean(NamedTuple):
    """A Gaussian's mean parameter: the expectations of v and of v v' (of its squares where diagonal)."""

    first: Float[Tensor, " p"]
    second: Float[Tensor, "p p"] | Float[Tensor, " p"]

    @staticmethod
    def of(v: Float[Tensor, " p"], diagonal: bool) -> Mean:
        """Sufficient statistics of one sample."""
        return Mean(v, v.square() if diagonal else v.outer(v))

    def plus(self, other: Mean, times: float = 1.0) -> Mean:
        """A sum."""
        return Mean(self.first + times * other.first, self.second + times * other.second)

    def projected(self, limits: Limits) -> tuple[Mean, Natural]:
        """The Gaussian with mean and variances (along its principal axes) cut off at the limits, both ways."""
        mean = self.first.clamp(-limits.mean, limits.mean)
        if self.second.ndim == 1:
            variance = (self.second - self.first.square()).clamp(*limits.variance)
            return Mean(mean, variance + mean.square()), Natural(1.0 / variance, mean / variance)
        variances, axes = torch.linalg.eigh(self.second - self.first.outer(self.first))
        variances = variances.clamp(*limits.variance)
        covariance, precision = (axes * variances) @ axes.mT, (axes / variances) @ axes.mT
        return Mean(mean, covariance + mean.outer(mean)), Natural(precision, precision @ mean)


def apply(matrix: Float[Tensor, "p p"] | Float[Tensor, " p"], v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """The matrix, or the diagonal one, times v."""
    return matrix * v if matrix.ndim == 1 else matrix @ v
