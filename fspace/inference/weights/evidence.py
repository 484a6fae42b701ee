"""Prior precision and noise by the Laplace evidence, from the spectrum of the curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.optimise import lbfgs
from fspace.inference.weights.likelihoods import LOG_NOISE

LOG_PRECISION = 3.0  # prior deviation of the log of a factor on a prior precision


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The curvature of some weights that share a prior precision: its eigenvalues [k] where they are not zero, and
    the sum of the squares of the whitened weights."""

    values: Float[Tensor, " k"]
    square: float


@dataclass(frozen=True)
class Tuned:
    """Factors on the prior precision of each group, the factor on the noise variance, and the log evidence."""

    precision: tuple[float, ...]
    noise: float
    log_evidence: float


def log_evidence(
    groups: list[Spectrum],
    log_precision: Float[Tensor, " g"],
    log_noise: Tensor,
    log_likelihood: float,
    error: float,
    numbers: int,
) -> Tensor:
    """Laplace's log evidence (MacKay 1992, eq. 22) with prior precisions times exp(log_precision) and noise variances
    times exp(log_noise).

    log_likelihood: at the mode, with factors one; error: the sum of squared residuals over their variances in it,
    numbers: how many (both zero where there is no noise).
    """
    value = log_likelihood + 0.5 * error * (1.0 - torch.exp(-log_noise)) - 0.5 * numbers * log_noise
    for group, rho in zip(groups, log_precision):
        # half the log determinants: count * rho of the prior, less that of the posterior, count * rho + log1p(ratio)
        ratio = group.values * torch.exp(-log_noise - rho)
        value = value - 0.5 * torch.exp(rho) * group.square - 0.5 * torch.log1p(ratio).sum()
    return value


def tune(
    groups: list[Spectrum],
    log_likelihood: float,
    error: float,
    log_noises: Float[Tensor, " t"],
    numbers: int,
    noise: bool,
    precision: bool = True,
) -> Tuned:
    """The factors at which the evidence, times weak log-normal priors on each, is greatest (L-BFGS from one).

    log_noises: log noise variances now, whose prior is that of the likelihood.
    """
    rho = torch.zeros(len(groups), dtype=torch.float64, requires_grad=True)
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    free = [p for p, wanted in ((rho, precision), (eta, noise)) if wanted]

    def loss() -> Tensor:
        value = -log_evidence(groups, rho, eta, log_likelihood, error, numbers)
        value = value + 0.5 * (rho / LOG_PRECISION).square().sum()
        if noise:
            value = value + 0.5 * ((log_noises + eta - LOG_NOISE[0]) / LOG_NOISE[1]).square().sum()
        value.backward()
        return value.detach()

    if free:
        lbfgs(loss, free, 200, lambda value: None)
    with torch.no_grad():
        best = log_evidence(groups, rho, eta, log_likelihood, error, numbers).item()
    return Tuned(tuple(rho.exp().tolist()), math.exp(eta.item()), best)
