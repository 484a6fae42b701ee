"""Concrete (Gumbel-softmax) relaxations of discrete latents, kept in log and logit space where nothing underflows.

Both q and p are relaxed and evaluated at the same relaxed sample: only that is a bound (of the relaxed model). The
bound of the discrete model, from the hard values of the same samples, is always given beside it.
Sources: Maddison, Mnih and Teh (2017); Jang, Gu and Poole (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fspace.errors import OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.proposals import Bernoulli, Categorical, gumbel, one_hot, over_latents


@dataclass(frozen=True)
class Concrete:
    """Relaxed one-hot variables; a sample is the logarithm of a point of the simplex.

    Shapes: logits [B, ..., c]; temperature one number; samples [K, B, ..., c] with logsumexp 0 over the last axis.
    The density is of the c - 1 log-ratios y_i - y_c. Raises OptionError for a temperature that is not above 0,
    DataError for logits that are not finite.
    Source: Maddison et al. (2017) (ExpConcrete).
    """

    logits: Float[Tensor, "b ... c"]
    temperature: float | Tensor

    def __post_init__(self) -> None:
        checks.temperature(self.temperature)
        checks.logits(self.logits, self.logits.isfinite(), "the logits of a relaxation are finite")

    def noise(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gumbel noise [samples, B, ..., c]."""
        return gumbel(self.logits, samples, generator)

    def transform(self, noise: Tensor) -> Tensor:
        """log softmax((logits + noise) / temperature)."""
        return ((self.logits + noise) / self.temperature).log_softmax(-1)

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Log-simplex points [samples, B, ..., c], reparameterised; their argmax is an exact draw of the discrete."""
        return self.transform(self.noise(samples, generator))

    def log_prob(self, z: Tensor) -> Float[Tensor, "k b"]:
        """Log density; DataError for what is no logarithm of a point of the simplex."""
        checks.of_shape(z, (*z.shape[:1], *self.logits.shape), "z")
        fine = z.isfinite().all(-1) & (z.detach().logsumexp(-1).abs() < 1e-3)
        checks.support(
            fine, z, "z", "a Concrete sample is the finite log of a point of the simplex, logsumexp 0"
        )
        c = self.logits.shape[-1]
        score = self.logits - self.temperature * z
        scale = math.lgamma(c) + (c - 1) * _log(self.temperature)
        return over_latents(score.sum(-1) - c * score.logsumexp(-1) + scale)

    def stopped(self) -> Concrete:
        """Without gradient to logits and temperature."""
        return Concrete(self.logits.detach(), _held(self.temperature))

    def relaxed(self, z: Tensor) -> Tensor:
        """Samples as points of the simplex."""
        return z.exp()

    def hard(self, z: Tensor) -> Tensor:
        """Samples as one-hot rows."""
        return one_hot(z.detach())

    def discrete(self) -> Categorical:
        """The distribution of `hard`, whatever the temperature."""
        return Categorical(self.logits)


@dataclass(frozen=True)
class BinaryConcrete:
    """Relaxed bits; a sample is a logit. Shapes: logits [B, ...]; temperature one number; samples [K, B, ...].

    Raises OptionError for a temperature that is not above 0, DataError for logits that are not finite.
    Source: Maddison et al. (2017).
    """

    logits: Float[Tensor, "b ..."]
    temperature: float | Tensor

    def __post_init__(self) -> None:
        checks.temperature(self.temperature)
        checks.logits(self.logits, self.logits.isfinite(), "the logits of a relaxation are finite")

    def noise(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard logistic noise [samples, B, ...], the difference of two Gumbels."""
        return gumbel(self.logits, samples, generator) - gumbel(self.logits, samples, generator)

    def transform(self, noise: Tensor) -> Tensor:
        """(logits + noise) / temperature."""
        return (self.logits + noise) / self.temperature

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits of relaxed bits [samples, B, ...], reparameterised; their sign is an exact draw of the bit."""
        return self.transform(self.noise(samples, generator))

    def log_prob(self, z: Tensor) -> Float[Tensor, "k b"]:
        """Log density of the logit; DataError for NaN or infinite values."""
        checks.of_shape(z, (*z.shape[:1], *self.logits.shape), "z")
        checks.support(z.isfinite(), z, "z", "a BinaryConcrete sample is a finite logit")
        gap = self.temperature * z - self.logits
        return over_latents(_log(self.temperature) - gap - 2.0 * F.softplus(-gap))

    def stopped(self) -> BinaryConcrete:
        """Without gradient to logits and temperature."""
        return BinaryConcrete(self.logits.detach(), _held(self.temperature))

    def relaxed(self, z: Tensor) -> Tensor:
        """Samples as numbers between 0 and 1."""
        return z.sigmoid()

    def hard(self, z: Tensor) -> Tensor:
        """Samples as zeros and ones."""
        return (z.detach() > 0).to(z.dtype)

    def discrete(self) -> Bernoulli:
        """The distribution of `hard`, whatever the temperature."""
        return Bernoulli(self.logits)


class RelaxedAndHard(NamedTuple):
    """Log-weights of the relaxed model, to train on, and of the discrete model, to report. Shapes: both [K, B]."""

    relaxed: Float[Tensor, "k b"]
    hard: Float[Tensor, "k b"]


def relaxed_log_weights(
    proposal: Concrete | BinaryConcrete,
    prior: Concrete | BinaryConcrete,
    log_likelihood: Callable[[Tensor], Tensor],
    samples: int,
    generator: torch.Generator | None = None,
) -> RelaxedAndHard:
    """log p(x | s) + log p(s) - log q(s) of relaxed samples s, and the same of their hard values, without gradient.

    log_likelihood(latents [K, B, ...]) -> [K, B] takes points of the simplex (numbers in [0, 1]) and one-hot rows
    (bits) alike. The temperatures of proposal and prior may differ. Any bound of bounds.py takes either tensor; the one
    of `hard` is what the discrete model is worth. Raises OptionError for two kinds of relaxation, or samples < 1;
    DataError for logits of the prior that do not fit, and what log_likelihood refuses.
    """
    if type(proposal) is not type(prior):
        raise OptionError(
            f"proposal is {type(proposal).__name__} and prior {type(prior).__name__}; both densities are of one sample."
        )
    shape = (checks.count(samples, "samples"), proposal.logits.shape[0])
    prior = _as_rows(prior, proposal)
    z = proposal.sample(samples, generator)
    fit = checks.asked("log_likelihood of relaxed latents", log_likelihood, proposal.relaxed(z))
    checks.of_shape(fit, shape, "The value of log_likelihood")
    relaxed = fit + prior.log_prob(z) - proposal.log_prob(z)
    with torch.no_grad():
        b = proposal.hard(z)
        hard = checks.asked("log_likelihood of hard latents", log_likelihood, b)
        return RelaxedAndHard(relaxed, hard + prior.discrete().log_prob(b) - proposal.discrete().log_prob(b))


def straight_through(relaxed: Tensor, hard: Tensor) -> Tensor:
    """The hard value with the relaxed one's gradient: biased. Source: Bengio, Leonard and Courville (2013)."""
    checks.of_shape(hard, tuple(relaxed.shape), "hard")
    return hard.detach() + relaxed - relaxed.detach()


def exponential_temperature(step: int, start: float = 1.0, end: float = 0.5, rate: float = 1e-4) -> float:
    """start exp(-rate step), never below end. Source: Jang et al. (2017). Raises OptionError."""
    _schedule(step, start, end)
    if not rate >= 0:
        raise OptionError(f"rate={rate} must not be negative.")
    return max(end, start * math.exp(-rate * step))


def linear_temperature(step: int, steps: int, start: float = 1.0, end: float = 0.5) -> float:
    """From start to end in equal parts over `steps` steps, then end. Raises OptionError."""
    _schedule(step, start, end)
    if steps < 1:
        raise OptionError(f"steps={steps} must be at least 1.")
    return start + (end - start) * min(step / steps, 1.0)


def _schedule(step: int, start: float, end: float) -> None:
    if step < 0:
        raise OptionError(f"step={step} must not be negative.")
    checks.temperature(end)
    checks.temperature(start)
    if start < end:
        raise OptionError(
            f"The temperature falls from start={start} to end={end}; start must not be the lower."
        )


def _as_rows(
    prior: Concrete | BinaryConcrete, proposal: Concrete | BinaryConcrete
) -> Concrete | BinaryConcrete:
    """The prior, one row of logits for all data where it has one only."""
    if len(prior.logits) != 1:
        checks.of_shape(prior.logits, tuple(proposal.logits.shape), "logits of the prior")
    else:
        checks.of_shape(
            prior.logits[0], tuple(proposal.logits.shape[1:]), "the one row of the prior's logits"
        )
    return type(prior)(prior.logits.expand_as(proposal.logits), prior.temperature)


def _log(temperature: float | Tensor) -> float | Tensor:
    return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)


def _held(temperature: float | Tensor) -> float | Tensor:
    return temperature.detach() if isinstance(temperature, Tensor) else temperature
