"""The shape of the tail of importance weights, which says whether their mean can be trusted."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError


def tail_length(samples: int) -> int:
    """Weights that count as the tail of S: min(S / 5, 3 sqrt(S)). Source: Vehtari et al. (2024)"""
    return math.ceil(min(samples / 5, 3 * math.sqrt(samples)))


def pareto_k(log_weights: Float[Tensor, "k b"], samples: int) -> Float[Tensor, " b"]:
    """Shape of a generalised Pareto fit to the tail. Above 0.7 the mean of the weights is not to be trusted.

    log_weights: at least the tail_length(samples) + 1 greatest of `samples`. NaN where the tail is shorter than five:
    it cannot be said; -inf where it has no spread.
    Sources: Zhang and Stephens (2009); Vehtari, Simpson, Gelman, Yao and Gabry (2024).
    """
    tail = tail_length(samples)
    if len(log_weights) < tail + 1:
        raise OptionError(
            f"The tail of {samples} weights needs the {tail + 1} greatest; there are {len(log_weights)}."
        )
    if tail < 5:
        return torch.full_like(log_weights[0], torch.nan)
    top = log_weights.topk(tail + 1, dim=0).values.double()
    ratio = (top - top[0]).exp()  # of the greatest weight
    excess = (ratio[:-1] - ratio[-1]).flip(0)  # above the threshold, ascending
    flat = excess[-1] < 1e-10
    k = _fit(
        torch.where(
            flat, torch.linspace(0.1, 1, tail, dtype=excess.dtype, device=excess.device)[:, None], excess
        )
    )
    k = (tail * k + 5.0) / (tail + 10.0)  # a weak prior at one half, worth ten observations
    return torch.where(flat, -torch.inf, k).to(log_weights.dtype)


def _fit(x: Float[Tensor, "n b"]) -> Float[Tensor, " b"]:
    """Posterior mean of the shape under Zhang and Stephens's prior on theta = -k / sigma; x ascending along axis 0."""
    n = x.shape[0]
    grid = 30 + math.isqrt(n)
    j = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device)[:, None]
    quartile = x[int(n / 4 + 0.5) - 1].clamp_min(torch.finfo(x.dtype).tiny)
    theta = 1 / x[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta[:, None] * x).mean(1)
    profile = n * ((-theta / shape).log() - shape - 1)
    theta = (profile.softmax(0) * theta).sum(0)
    return torch.log1p(-theta * x).mean(0)
