"""Closed forms over predictives, and what counts of a payoff beside its mean: its variance, its worst cases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.decisions.sources import check_number
from fspace.predictive import Categorical, Gaussian, Mixture, Predictive, Samples
from fspace.predictive_base import Continuous


@runtime_checkable
class Risk(Protocol):
    """What counts of a payoff beside its mean."""

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        """Value [n], and each sample's influence [s, n], whose spread over sqrt(s) is the standard error."""
        ...

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Closed form for the payoff of `Linear`; None where there is none."""
        ...


@dataclass(frozen=True)
class MeanVariance:
    """Mean minus aversion / 2 times variance of the payoff. Source: Markowitz (1952)."""

    aversion: float

    def __post_init__(self) -> None:
        aversion = check_number(self.aversion, "aversion", "be a positive number", 0.0)
        object.__setattr__(self, "aversion", aversion)

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        mean, variance = payoff.mean(0), payoff.var(0)
        influence = (payoff - mean) - 0.5 * self.aversion * ((payoff - mean).square() - variance)
        return mean - 0.5 * self.aversion * variance, influence

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        if isinstance(predictive, Categorical):
            return None
        mean, spread = mean_and_covariance(predictive)
        w = actions.reshape(len(actions), -1)
        variance = torch.einsum("at,nts,as->na", w, spread, w)
        return mean @ w.mT - 0.5 * self.aversion * variance

    def best_linear(self, predictive: Predictive) -> Tensor:
        """The best of all actions for the payoff of `Linear`: covariance^-1 mean / aversion, y-shaped."""
        mean, spread = mean_and_covariance(predictive)
        return (torch.linalg.solve(spread, mean[..., None])[..., 0] / self.aversion).reshape(
            predictive.mean.shape
        )


@dataclass(frozen=True)
class CVaR:
    """Mean payoff in the worst `share` of cases. Source: Rockafellar and Uryasev (2000)."""

    share: float

    def __post_init__(self) -> None:
        share = check_number(self.share, "share", "lie strictly between 0 and 1", 0.0, 1.0)
        object.__setattr__(self, "share", share)

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        # Rockafellar and Uryasev: the maximum over q of q - E(q - payoff)+ / share, at the quantile
        q = payoff.quantile(self.share, dim=0)
        terms = q - (q - payoff).clamp(min=0.0) / self.share
        return terms.mean(0), terms - terms.mean(0)

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        parts = _gaussian_parts(predictive)
        if parts is None or predictive.mean.ndim != 1 or not isinstance(predictive, Continuous):
            return None
        low, high = predictive.quantile(self.share), predictive.quantile(1.0 - self.share)
        worst = _tail_mean(parts, low, below=True) / self.share  # where the action is positive
        best = _tail_mean(parts, high, below=False) / self.share  # a negative one fears large y
        return torch.where(actions >= 0, actions * worst[:, None], actions * best[:, None])


def expected_excess(predictive: Predictive, thresholds: Tensor) -> Float[Tensor, "n a"] | None:
    """E(y - q)+ for every row and threshold q, [a] or [n, a]; None where there is no closed form."""
    if isinstance(predictive, Samples) and predictive.noise is None and predictive.mean.ndim == 1:
        return (predictive.values[..., None].to(torch.float64) - thresholds).clamp(min=0.0).mean(0)
    parts = _gaussian_parts(predictive)
    if parts is None or predictive.mean.ndim != 1:
        return None
    total: Tensor | float = 0.0
    for weight, gaussian in parts:
        gap = gaussian.mean[:, None] - thresholds
        s = gaussian.stddev[:, None].clamp(min=1e-300)
        z = gap / s
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
        total = total + weight * (gap * torch.special.ndtr(z) + s * density)
    assert isinstance(total, Tensor)
    return total


def _gaussian_parts(predictive: Predictive) -> list[tuple[float, Gaussian]] | None:
    """Weights and Gaussians that the marginals are mixtures of; None where they are something else."""
    if isinstance(predictive, Samples) and predictive.noise is not None:
        share = 1.0 / len(predictive.values)
        return [(share, Gaussian(v, s)) for v, s in zip(predictive.values, predictive.noise, strict=True)]
    if isinstance(predictive, Gaussian):
        return [(1.0, predictive)]
    if isinstance(predictive, Mixture) and all(isinstance(c, Gaussian) for c in predictive.components):
        return list(zip(predictive.weights.tolist(), predictive.components, strict=True))
    return None


def _tail_mean(
    parts: list[tuple[float, Gaussian]], q: Float[Tensor, " n"], below: bool
) -> Float[Tensor, " n"]:
    """E[y; y <= q] (or y >= q) of a mixture of Gaussians."""
    sign = 1.0 if below else -1.0
    total = torch.zeros_like(q)
    for weight, gaussian in parts:
        s = gaussian.stddev.clamp(min=1e-300)
        z = sign * (q - gaussian.mean) / s
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
        total = total + weight * (gaussian.mean * torch.special.ndtr(z) - sign * s * density)
    return total


def mean_and_covariance(predictive: Predictive) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t t"]]:
    """Mean and covariance over the outputs at every row."""
    mean = predictive.mean
    if mean.ndim == 1:
        return mean[:, None], predictive.variance[:, None, None]
    n, t = mean.shape
    if isinstance(predictive, Gaussian | Mixture):
        joint = predictive.joint_covariance.reshape(n, t, n, t)
        return mean, joint[torch.arange(n), :, torch.arange(n), :]
    return mean, torch.diag_embed(predictive.variance)
