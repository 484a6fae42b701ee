"""Models of series with a latent at every step: what data they take, and what an emission says about a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.training import Rows
from fspace.kernels.extractors import MLP

LIKELIHOODS = ("bernoulli", "gaussian")
SMALLEST = 1e-4  # variance of a latent, relative to the prior's at the start


class SeriesModel(AmortizedModel):
    """A model of series [T, p], or a list of them of any lengths. A subclass makes `emission`, the network that ends in
    what a step is like: logits [p], or means and log variances [2 p] in units of the columns' spread."""

    likelihood: str
    emission: MLP
    x_shift: Tensor
    x_scale: Tensor

    def prepare(self, data: Any) -> Rows:
        """Series padded to one length: x [s, T, p] and lengths [s]."""
        series = [_series(x, k) for k, x in enumerate(data if isinstance(data, list) else [data])]
        if not series:
            raise DataError("There is no series.")
        widths = {x.shape[1] for x in series}
        if len(widths) > 1:
            raise DataError(f"Series differ in the columns of a step: {sorted(widths)}.")
        if self.likelihood == "bernoulli":
            for k, x in enumerate(series):
                if not bool(((x == 0) | (x == 1)).all()):
                    raise DataError(f"Series {k} holds values other than 0 and 1; use likelihood='gaussian'.")
        longest = max(len(x) for x in series)
        x = torch.stack([nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x in series])
        return x, torch.tensor([len(x) for x in series])

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"columns": rows[0].shape[-1]}

    def remember(self, columns: int) -> None:
        """Room for mean and scale of the columns."""
        self.register_buffer("x_shift", torch.zeros(columns))
        self.register_buffer("x_scale", torch.ones(columns))

    def begin(self, rows: Rows) -> None:
        """Mean and scale of x; the emission starts at the mean."""
        x, lengths = rows
        values = x[torch.arange(x.shape[1], device=x.device) < lengths[:, None]]
        self.x_shift = values.mean(0)
        bias: Tensor = self.emission.layers[-1].bias  # type: ignore[assignment]
        with torch.no_grad():
            if self.likelihood == "bernoulli":
                bias.copy_(torch.logit(self.x_shift.clamp(1e-3, 1 - 1e-3)))
            else:
                spread = values.std(0, correction=0)
                self.x_scale = torch.where(spread > 0, spread, torch.ones_like(spread))

    def density(self, x: Float[Tensor, "*b p"], out: Float[Tensor, "n *b q"]) -> Float[Tensor, "n *b"]:
        """log p(x) of what the emission says."""
        if self.likelihood == "bernoulli":
            x = x.expand_as(out)
            return -nn.functional.binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)
        mean, log_variance = out.chunk(2, dim=-1)
        error = (x - self.x_shift) / self.x_scale - mean
        each = -0.5 * (error.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
        return (each - self.x_scale.log()).sum(-1)

    def mean_of(self, out: Tensor) -> Tensor:
        """Mean of x of what the emission says."""
        if self.likelihood == "bernoulli":
            return out.sigmoid()
        return out.chunk(2, dim=-1)[0] * self.x_scale + self.x_shift


def moments(out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from a network's output; variance 1 where it says 0."""
    mean, raw = out.chunk(2, dim=-1)
    return mean, nn.functional.softplus(raw + math.log(math.e - 1)).square() + SMALLEST


def log_gaussian(error: Tensor, variance: Tensor) -> Tensor:
    """Log density of independent Gaussians at so far from their means, over the last dimension."""
    return -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)


def parts_of(values: Float[Tensor, "T b *k"], lengths: Tensor, data: Any) -> Any:
    """One tensor a series, without what stands behind its end."""
    parts = [values[:length, k] for k, length in enumerate(lengths.tolist())]
    return parts if isinstance(data, list) else parts[0]


def _series(x: Any, k: int) -> Float[Tensor, "T p"]:
    x = numbers(x, f"The steps of series {k}")
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or len(x) == 0:
        raise DataError(f"Series {k} must be [T] or [T, p] with at least one step; it is {list(x.shape)}.")
    bad = ~x.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(f"Series {k}: step {int(bad.nonzero()[0])} holds NaN or infinite values.")
    return x
