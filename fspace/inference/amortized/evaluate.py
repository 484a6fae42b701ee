"""Log-likelihood of data by importance sampling, streamed, with the diagnostics that say whether to believe it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.latent import LatentModel, Proposal, weights_of
from fspace.inference.amortized.pareto import pareto_k, tail_length


class LogLikelihood(NamedTuple):
    """What importance sampling says of each datum. Shapes: all [B], float64.

    log_likelihood   nats; its mean is a lower bound of log p(x) (IWAE with that many samples).
    standard_error   of log_likelihood, by the delta method; too small where pareto_k is high; NaN of one sample.
    ess              effective sample size, (sum w)^2 / sum w^2.
    pareto_k         shape of the tail of the weights: above 0.7 do not trust the estimate; NaN below 21 samples.
    """

    log_likelihood: Float[Tensor, " b"]
    standard_error: Float[Tensor, " b"]
    ess: Float[Tensor, " b"]
    pareto_k: Float[Tensor, " b"]


@torch.no_grad()
def log_likelihood(
    model: LatentModel,
    x: Tensor,
    samples: int = 5000,
    chunk: int = 10_000,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """log p(x) of each row of x from `samples` latents of its own, at most `chunk` pairs of datum and latent at once.

    Weights are summed in float64 and never all held. The same generator and chunk give the same numbers.
    Raises OptionError for samples or chunk < 1; NumericalError for a datum with NaN weights or none above zero;
    DataError for what the model refuses.
    Source: Burda, Grosse and Salakhutdinov (2016).
    """
    checks.count(samples, "samples")
    checks.count(chunk, "chunk")
    rows = min(len(x), math.isqrt(chunk))
    found = []
    for start in range(0, len(x), rows or 1):
        part = x[start : start + rows]
        found.append(_one(model, part, start, samples, chunk // len(part), generator))
    if not found:
        raise OptionError("x has no rows.")
    return LogLikelihood(*(torch.cat(column) for column in zip(*found)))


def _one(
    model: LatentModel, x: Tensor, start: int, samples: int, at_once: int, generator: torch.Generator | None
) -> LogLikelihood:
    """All samples for a few rows, the encoder asked once."""
    q: Proposal = checks.asked("model.encode", model.encode, x, data=x)
    total = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    squares, top = total.clone(), total[None, :].clone()[:0]
    keep = min(samples, tail_length(samples) + 1)
    for done in range(0, samples, at_once):
        weights = weights_of(model, x, q, min(at_once, samples - done), generator).double()
        checks.known(weights, start, done)
        total = torch.logaddexp(total, weights.logsumexp(0))
        squares = torch.logaddexp(squares, (2 * weights).logsumexp(0))
        top = torch.cat([top, weights])
        top = top.topk(min(keep, len(top)), dim=0).values
    checks.some(total, start, samples)
    ess = (2 * total - squares).exp()
    error = (1 / ess - 1 / samples).clamp_min(0.0).sqrt()  # 1/ess: mean of w^2 over squared mean of w, over S
    unknown = torch.full_like(total, torch.nan)  # one sample says nothing of how far another would be
    if samples == 1:
        return LogLikelihood(total, unknown, ess, unknown)
    return LogLikelihood(total - math.log(samples), error, ess, pareto_k(top, samples))
