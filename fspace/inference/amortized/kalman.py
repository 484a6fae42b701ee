"""One step of a Kalman filter, for any leading dimensions: of particles, series and systems side by side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.numerics import cholesky_unseen, solve_lower


class Updated(NamedTuple):
    """log p(y | past) (nats), and the moments of z given y too."""

    log_density: Float[Tensor, "*b"]
    mean: Float[Tensor, "*b l"]
    covariance: Float[Tensor, "*b l l"]


def predicted(mean: Tensor, covariance: Tensor, a: Tensor, b: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a z + b + N(0, diag(q)) where z has these. Shapes: mean, b, q [..., l]; covariance, a [..., l, l]."""
    return (a @ mean[..., None])[..., 0] + b, a @ covariance @ a.mT + torch.diag_embed(q)


def updated(mean: Tensor, covariance: Tensor, error: Tensor, c: Tensor, r: Tensor) -> Updated:
    """z ~ N(mean, covariance) after y = c z + N(0, diag(r)) was seen, error = y - c mean.

    Shapes: error, r [..., p]; c [..., p, l]. Backwards in time, y is the next z and c what moves it."""
    root, _ = cholesky_unseen(c @ covariance @ c.mT + torch.diag_embed(r), "covariance of what is predicted")
    white = solve_lower(root, error[..., None])
    gain = solve_lower(root, c @ covariance)
    logs = -0.5 * white.square().sum((-2, -1)) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    logs = logs - 0.5 * error.shape[-1] * math.log(2 * math.pi)
    return Updated(logs, mean + (gain.mT @ white)[..., 0], covariance - gain.mT @ gain)


def drawn(
    mean: Float[Tensor, "*b l"], covariance: Float[Tensor, "*b l l"], generator: torch.Generator
) -> Tensor:
    """A draw of N(mean, covariance)."""
    root, _ = cholesky_unseen(covariance, "covariance of z")
    white = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (root @ white[..., None])[..., 0]
