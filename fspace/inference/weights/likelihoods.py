"""What a network's outputs say about y: Gaussian noise, constant or varying, and classes.

Each likelihood has `tail` numbers of its own that are learned beside the weights (log noise variances). Shapes:
outputs f [..., n, o], tail [..., r], densities [..., n].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from fspace.inference.optimise import MIN_NOISE
from fspace.predictive import Categorical, Predictive, Samples

LOG_NOISE = (
    math.log(0.1),
    2.0,
)  # prior mean and deviation of a log noise variance, in units of standardised y


@runtime_checkable
class NetworkLikelihood(Protocol):
    """What inference over weights asks of a likelihood."""

    @property
    def outputs(self) -> int:
        """Outputs of the network."""

    @property
    def tail(self) -> int:
        """Numbers that are learned beside the weights."""

    def functions(self, f: Tensor) -> Tensor:
        """The part of the outputs that is the function of the contract."""

    def log_prob(self, f: Tensor, tail: Tensor, y: Tensor) -> Tensor:
        """Log density of every row."""

    def noise(self, f: Tensor, tail: Tensor) -> Tensor | None:
        """Variance of y given f, [..., t] or [..., n, t]; None for classes."""

    def curvature(self, f: Tensor, tail: Tensor) -> Tensor | None:
        """Minus the second derivative of log_prob in f, [n, o, o]; None where it is not of generalised
        Gauss-Newton form."""

    def observed(self, f: Tensor, tail: Tensor, y_scale: Tensor, y_shift: Tensor) -> Predictive:
        """Predictive of y from outputs f [s, n, o] of s draws."""

    def response(self, f: Tensor) -> Tensor:
        """E[y | f]."""


def _gaussian(residual: Tensor, log_variance: Tensor) -> Tensor:
    density = -0.5 * (math.log(2 * math.pi) + log_variance + residual.square() * (-log_variance).exp())
    return density.sum(-1)


@dataclass(frozen=True, eq=False)
class GaussianNoise:
    """Constant noise for t outputs. log_variance [t] is of noise that is known; None: it is learned, with the log of
    each variance (in units of standardised y) from N(log 0.1, 2^2)."""

    targets: int
    log_variance: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Outputs of the network."""
        return self.targets

    @property
    def tail(self) -> int:
        """Numbers that are learned beside the weights."""
        return self.targets if self.log_variance is None else 0

    def log_noise(self, tail: Tensor) -> Tensor:
        """Log variances [..., t]; learned ones never below log MIN_NOISE."""
        if self.log_variance is not None:
            return self.log_variance.to(tail)
        return torch.logaddexp(tail, tail.new_tensor(math.log(MIN_NOISE)))

    def functions(self, f: Tensor) -> Tensor:
        return f

    def log_prob(self, f: Tensor, tail: Tensor, y: Tensor) -> Tensor:
        return _gaussian(y - f, self.log_noise(tail)[..., None, :])

    def noise(self, f: Tensor, tail: Tensor) -> Tensor | None:
        return self.log_noise(tail).exp()

    def curvature(self, f: Tensor, tail: Tensor) -> Tensor | None:
        return torch.diag_embed(torch.exp(-self.log_noise(tail)).expand_as(f))

    def observed(self, f: Tensor, tail: Tensor, y_scale: Tensor, y_shift: Tensor) -> Predictive:
        noise = self.log_noise(tail).exp() * y_scale.square()
        if tail.ndim == 2 and len(tail) != len(f):
            noise = noise.expand(len(f), -1)
        noise = noise[..., None, :].expand(f.shape) if noise.ndim == 2 else noise.expand(f.shape)
        return Samples(f * y_scale + y_shift, noise)

    def response(self, f: Tensor) -> Tensor:
        return f


@dataclass(frozen=True, eq=False)
class VaryingNoise:
    """Noise that varies over the inputs: the network has t outputs for the mean and t for the log variance.

    Source: Nix and Weigend (1994)."""

    targets: int
    tail: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of the network."""
        return 2 * self.targets

    def log_noise(self, f: Tensor) -> Tensor:
        """Log variances [..., n, t], never below log MIN_NOISE."""
        raw = f[..., self.targets :]
        return torch.logaddexp(raw, raw.new_tensor(math.log(MIN_NOISE)))

    def functions(self, f: Tensor) -> Tensor:
        return f[..., : self.targets]

    def log_prob(self, f: Tensor, tail: Tensor, y: Tensor) -> Tensor:
        return _gaussian(y - self.functions(f), self.log_noise(f))

    def noise(self, f: Tensor, tail: Tensor) -> Tensor | None:
        return self.log_noise(f).exp()

    def curvature(self, f: Tensor, tail: Tensor) -> Tensor | None:
        return None

    def observed(self, f: Tensor, tail: Tensor, y_scale: Tensor, y_shift: Tensor) -> Predictive:
        return Samples(self.functions(f) * y_scale + y_shift, self.log_noise(f).exp() * y_scale.square())

    def response(self, f: Tensor) -> Tensor:
        return f


@dataclass(frozen=True, eq=False)
class Classes:
    """Two classes (one output, logistic link) or more (one output a class, softmax). y [n, 1] holds positions."""

    count: int
    tail: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of the network."""
        return 1 if self.count == 2 else self.count

    def functions(self, f: Tensor) -> Tensor:
        return f

    def log_prob(self, f: Tensor, tail: Tensor, y: Tensor) -> Tensor:
        if self.count == 2:
            return F.logsigmoid(torch.where(y > 0.5, f, -f))[..., 0]
        index = y.long().expand(*f.shape[:-1], 1)
        return torch.log_softmax(f, -1).gather(-1, index)[..., 0]

    def noise(self, f: Tensor, tail: Tensor) -> Tensor | None:
        return None

    def curvature(self, f: Tensor, tail: Tensor) -> Tensor | None:
        if self.count == 2:
            p = torch.sigmoid(f)
            return (p * (1 - p))[..., None]
        p = torch.softmax(f, -1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def probabilities(self, f: Tensor) -> Tensor:
        """Probability of every class, [..., n, c]."""
        if self.count == 2:
            p = torch.sigmoid(f)
            return torch.cat([1 - p, p], -1)
        return torch.softmax(f, -1)

    def observed(self, f: Tensor, tail: Tensor, y_scale: Tensor, y_shift: Tensor) -> Predictive:
        return Categorical(self.probabilities(f))

    def response(self, f: Tensor) -> Tensor:
        return torch.sigmoid(f) if self.count == 2 else torch.softmax(f, -1)
