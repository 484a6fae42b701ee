"""Gradient estimators that ask nothing of the latents: they may be discrete. All take LogTerms, as in gradients.py."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.inference.amortized import bounds, checks
from fspace.inference.amortized.gradients import Estimate, weighted
from fspace.inference.amortized.latent import LogTerms


def reinforce(terms: LogTerms, baseline: Tensor | None = None) -> Estimate:
    """Score-function gradient of the IWAE bound (one sample: of the ELBO); unbiased, with high variance.

    baseline [B]: any estimate of the bound made without these samples. Source: Mnih and Rezende (2016).
    """
    value = bounds.iwae(terms.weights)
    signal = value.detach()
    if baseline is not None:
        checks.of_shape(baseline, tuple(value.shape), "baseline")
        checks.finite(baseline, "baseline")
        signal = signal - baseline.detach()
    share = terms.weights.detach().softmax(0)
    return Estimate(value.detach(), value, ((signal - share) * terms.score).sum(0))


def reinforce_loo(terms: LogTerms) -> Estimate:
    """Score-function gradient of the ELBO, the mean log-weight of the other samples as each one's baseline; unbiased.

    Raises OptionError for one sample, NumericalError for a weight of zero.
    Source: Kool, van Hoof and Welling (2019).
    """
    checks.several(terms.joint, "reinforce_loo")
    log_weights = terms.weights
    checks.log_weights(log_weights, positive=True)
    value, signal = log_weights.mean(0), log_weights.detach()
    centred = (signal - signal.mean(0)) / (signal.shape[0] - 1)
    return Estimate(value.detach(), value, (centred * terms.score).sum(0))


def vimco(terms: LogTerms) -> Estimate:
    """Score-function gradient of the IWAE bound, each sample's baseline the bound with its weight replaced by the
    geometric mean of the others; unbiased.

    Raises OptionError for one sample, NumericalError for a weight of zero. Source: Mnih and Rezende (2016).
    """
    checks.several(terms.joint, "vimco")
    log_weights = terms.weights
    checks.log_weights(log_weights, positive=True)
    value, fixed = bounds.iwae(log_weights), log_weights.detach()
    signal = value.detach() - leave_one_out(fixed) - fixed.softmax(0)
    return Estimate(value.detach(), value, (signal * terms.score).sum(0))


def leave_one_out(log_weights: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
    """The IWAE bound with log-weight k replaced by the mean of the others, for each k."""
    k = log_weights.shape[0]
    none = torch.full_like(log_weights[:1], -torch.inf)
    before = torch.cat(
        [none, log_weights[:-1].logcumsumexp(0)]
    )  # memory linear in k, and no difference of sums
    after = torch.cat([none, log_weights[1:].flip(0).logcumsumexp(0)]).flip(0)
    mean = (log_weights.sum(0) - log_weights) / (k - 1)
    return torch.logaddexp(torch.logaddexp(before, after), mean) - math.log(k)


def wake_wake(terms: LogTerms) -> Estimate:
    """Reweighted wake-sleep: the decoder climbs IWAE, the encoder descends KL(p(z | x) || q), both by the weights.

    The encoder's gradient is that of no bound; its bias vanishes as K grows. Source: Bornschein and Bengio (2015),
    the wake phase of q.
    """
    value = bounds.iwae(terms.weights)
    return Estimate(value.detach(), value, weighted(terms.weights.detach().softmax(0), terms.score))


def wake_sleep(terms: LogTerms, dreams: Tensor) -> Estimate:
    """As wake_wake, but the encoder learns from dreams: log q(z' | x') [S] of pairs drawn from the decoder's own joint.

    (z', x') must be held constant. Raises DataError for dreams of another shape, NumericalError for one that is not
    finite. Source: Hinton et al. (1995); Bornschein and Bengio (2015).
    """
    value = bounds.iwae(terms.weights)
    if dreams.ndim != 1 or not len(dreams):
        raise DataError(
            f"dreams must be log q of one pair or more, [S]; they have shape {tuple(dreams.shape)}."
        )
    checks.finite(dreams, "dreams")
    return Estimate(value.detach(), value, dreams.mean().expand_as(value))
