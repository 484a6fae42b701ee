"""What a decoder's numbers say about data: Gaussian, Bernoulli and categorical likelihoods of rows [..., d]."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, OptionError

LIKELIHOODS = ("gaussian", "bernoulli", "categorical")


class Observations(nn.Module):
    """p(x | decoder's numbers), independent over the d columns of a row.

    gaussian: columns are standardised, with one noise variance for all; bernoulli: values from 0 to 1 (between them, a
    probability to be matched); categorical: whole numbers 0 to c - 1, c numbers of the decoder a column.
    """

    def __init__(self, likelihood: str, columns: int, classes: int = 0):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise OptionError(
                f"likelihood={likelihood!r} does not exist; choose one of {', '.join(LIKELIHOODS)}."
            )
        self.likelihood, self.columns, self.classes = likelihood, columns, classes
        self.register_buffer("shift", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        self.log_noise = nn.Parameter(torch.zeros(()), requires_grad=likelihood == "gaussian")

    @property
    def per_column(self) -> int:
        """Numbers of the decoder for one column."""
        return self.classes if self.likelihood == "categorical" else 1

    def begin(self, x: Float[Tensor, "n d"]) -> None:
        """Shift and scale of the columns of all training rows."""
        if self.likelihood == "categorical":
            return
        self.shift = x.mean(0)
        if self.likelihood == "gaussian":
            spread = x.std(0, correction=0)
            self.scale = torch.where(spread > 0, spread, torch.ones_like(spread))

    def read(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """Rows as an encoder should see them."""
        if self.likelihood == "categorical":
            return nn.functional.one_hot(x.long(), self.classes).flatten(-2).to(x)
        return (x - self.shift) / self.scale

    def log_prob(self, x: Float[Tensor, "b d"], out: Float[Tensor, "*k b e"]) -> Float[Tensor, "*k b"]:
        """log p(x | out), nats, in the units of x."""
        if self.likelihood == "bernoulli":
            each = -nn.functional.binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none")
        elif self.likelihood == "categorical":
            logs = out.unflatten(-1, (self.columns, self.classes)).log_softmax(-1)
            each = logs.gather(-1, x.long().expand(logs.shape[:-1])[..., None])[..., 0]
        else:
            error = (x - self.shift) / self.scale - out
            each = -0.5 * (error.square() * (-self.log_noise).exp() + self.log_noise + math.log(2 * math.pi))
            each = each - self.scale.log()
        return each.sum(-1)

    def mean(self, out: Float[Tensor, "*b e"]) -> Tensor:
        """Mean of x [..., d]; of categories their probabilities [..., d, c]."""
        if self.likelihood == "bernoulli":
            return out.sigmoid()
        if self.likelihood == "categorical":
            return out.unflatten(-1, (self.columns, self.classes)).softmax(-1)
        return out * self.scale + self.shift

    def sample(self, out: Float[Tensor, "*b e"], generator: torch.Generator | None) -> Float[Tensor, "*b d"]:
        """Draws of x."""
        mean = self.mean(out)
        if self.likelihood == "bernoulli":
            return torch.bernoulli(mean, generator=generator)
        if self.likelihood == "categorical":
            flat = torch.multinomial(mean.flatten(0, -2), 1, generator=generator)
            return flat.reshape(mean.shape[:-1]).to(mean)
        white = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + white * (0.5 * self.log_noise).exp() * self.scale


def check_rows(x: Float[Tensor, "n d"], likelihood: str) -> None:
    """Raises DataError for values that the likelihood has no place for."""
    bad = ~x.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(f"Row {int(bad.nonzero()[0])} holds NaN or infinite values; leave such rows out.")
    wrong: Any = None
    if likelihood == "bernoulli":
        wrong, words = (x < 0) | (x > 1), "values from 0 to 1"
    elif likelihood == "categorical":
        wrong, words = (x < 0) | (x != x.round()), "whole numbers from 0 on"
    if wrong is not None and bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        raise DataError(
            f"likelihood={likelihood!r} takes {words}; row {row} holds {x[row][wrong[row]][0].item():g}."
        )
