"""Lower bounds of log p(x) from log-weights: pure functions of log w = log p(x, z_k) - log q(z_k | x), [K, B] to [B].

K samples lead, B data come last; where there are M independent repeats, [M, K, B]. Every bound is of one datum, so that
the mean over the batch is the caller's. All raise DataError for other axes, and NumericalError that names datum and
sample for NaN, +inf, or weights that are all zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks


def elbo(log_weights: Tensor) -> Float[Tensor, " b"]:
    """Evidence lower bound, the mean log-weight. Source: Kingma and Welling (2014)."""
    checks.log_weights(log_weights)
    return log_weights.mean(0)


def elbo_with_kl(log_likelihood: Tensor, kl: Tensor, beta: float = 1.0) -> Float[Tensor, " b"]:
    """mean log p(x | z_k) - beta KL. log_likelihood [K, B]; kl [B] in closed form. A bound for beta >= 1, in nats.

    kl may also be [K, B], log q(z_k | x) - log p(z_k): the same by Monte Carlo. Raises OptionError for beta < 0.
    Source: Kingma and Welling (2014); Higgins et al. (2017), eq. 4.
    """
    checks.log_weights(log_likelihood)
    if not 0 <= beta < math.inf:
        raise OptionError(f"beta={beta} must be a finite number, at least 0.")
    samples, data = log_likelihood.shape
    if kl.ndim == 2:
        checks.of_shape(kl, (samples, data), "kl")
        kl = kl.mean(0)
    checks.of_shape(kl, (data,), "kl")
    checks.finite(kl, "kl")
    return log_likelihood.mean(0) - beta * kl


def iwae(log_weights: Tensor) -> Float[Tensor, " b"]:
    """Importance-weighted bound, log mean_k w_k; grows with K to log p(x). Source: Burda et al. (2016)."""
    checks.log_weights(log_weights)
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


def miwae(log_weights: Tensor) -> Float[Tensor, " b"]:
    """Mean over M repeats of the bound of K samples; log_weights [M, K, B]. Source: Rainforth et al. (2018)."""
    checks.log_weights(log_weights, dims=3)
    return (log_weights.logsumexp(1) - math.log(log_weights.shape[1])).mean(0)


class Piwae(NamedTuple):
    """A bound for each group of parameters. Shapes: decoder, encoder [B]."""

    decoder: Float[Tensor, " b"]
    encoder: Float[Tensor, " b"]


def piwae(log_weights: Tensor) -> Piwae:
    """All M K samples in one bound for the decoder, M of K for the encoder, whose gradient would drown otherwise.

    log_weights [M, K, B]. Source: Rainforth et al. (2018).
    """
    encoder = miwae(log_weights)
    return Piwae(iwae(log_weights.flatten(0, 1)), encoder)


def ciwae(log_weights: Tensor, beta: float) -> Float[Tensor, " b"]:
    """beta ELBO + (1 - beta) IWAE, beta in [0, 1]. Source: Rainforth et al. (2018). Raises OptionError."""
    if not 0 <= beta <= 1:
        raise OptionError(f"beta={beta} must lie in [0, 1]: 0 is IWAE, 1 the ELBO.")
    if beta == 0:  # 0 * -inf where a sample has weight zero
        return iwae(log_weights)
    return beta * elbo(log_weights) + (1 - beta) * iwae(log_weights)


def renyi(log_weights: Tensor, alpha: float) -> Float[Tensor, " b"]:
    """log(mean_k w_k^(1 - alpha)) / (1 - alpha): 0 is IWAE, 1 the ELBO, inf the least and -inf the greatest log-weight.

    For alpha < 0 it is no lower bound. Raises OptionError for NaN. Source: Li and Turner (2016).
    """
    if math.isnan(alpha):
        raise OptionError("alpha must be a number, not NaN.")
    checks.log_weights(log_weights)
    if alpha == 1:
        return log_weights.mean(0)
    if math.isinf(alpha):
        return log_weights.amin(0) if alpha > 0 else log_weights.amax(0)
    rest = 1 - alpha
    return ((rest * log_weights).logsumexp(0) - math.log(log_weights.shape[0])) / rest


def tvo(log_weights: Tensor, partition: Sequence[float]) -> Float[Tensor, " b"]:
    """Thermodynamic bound: the left Riemann sum over inverse temperatures of E[log w], each by self-normalised weights.

    partition grows from 0 to 1; (0, 1) is the ELBO. With few samples the self-normalised means are biased.
    Raises OptionError for another partition. Source: Masrani, Le and Wood (2019).
    """
    steps = [float(beta) for beta in partition]
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != 1 or any(not a < b for a, b in pairwise(steps)):
        raise OptionError(f"partition must grow from 0 to 1; it is {steps}.")
    bound = elbo(log_weights) * steps[1]
    for beta, following in pairwise(steps[1:]):
        share = (beta * log_weights).softmax(0)
        bound = bound + (following - beta) * (share * torch.where(share > 0, log_weights, 0.0)).sum(0)
    return bound


def as_repeats(log_weights: Tensor, repeats: int) -> Float[Tensor, "m k b"]:
    """[M K, B] to [M, K, B], for miwae and piwae. Raises DataError where M does not divide the samples."""
    checks.shaped(log_weights)
    if repeats < 1 or log_weights.shape[0] % repeats:
        raise DataError(
            f"{log_weights.shape[0]} samples cannot be parted into {repeats} repeats of equal size."
        )
    return log_weights.unflatten(0, (repeats, -1))
