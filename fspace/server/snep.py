"""Stochastic natural-gradient expectation propagation: sites over weights from samples of tilted distributions.

A worker's tilted distribution is what it believes when its site is replaced by its rows,

    log tilted(v) = log damper(v) + (log p(rows | v) - log t(v)) / beta,

and its site t is right when the tilted distribution and the posterior have the same moments. The damper is the
posterior of some steps ago; the site moves in the mean parameter gamma of its own Gaussian.
Source: Hasenclever et al. (2017), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import Site
from fspace.server.weight_gaussians import Limits, Mean, Natural
from fspace.server.weight_workers import WeightWorker

MEMORY = 0.999  # of the average of squared gradients, as Adam's
FAR = 1e6  # of the prior's standard deviations: no posterior is there


@dataclass(frozen=True)
class Snep:
    """How a worker moves its site in a round.

    steps: of the mean parameter, each by `rate` / (1 + `decay` * steps before) times the difference of moments, from
    `samples` steps of Langevin dynamics of size `step_size` on mini-batches of `batch` rows. beta: the power, 1 for
    expectation propagation. damper_every: steps after which the damper is the posterior again. temperature: of the
    Langevin noise (1: samples of the tilted distribution; below it is a cold one). mean_limit, variance_limits: where
    the site's own Gaussian is kept, in coordinates in which the prior is N(0, I).

    Networks: beta of 1 over the number of workers, a cold chain (1e-3) and steps * rate of about 1 were what learned on
    benchmarks/snep.py; with beta 1 the other workers' sites hold each worker back.
    """

    steps: int = 10
    samples: int = 1
    rate: float = 0.02
    decay: float = 0.0
    step_size: float = 1e-3
    batch: int = 100
    beta: float = 1.0
    damper_every: int = 10
    temperature: float = 1.0
    mean_limit: float = 10.0
    variance_limits: tuple[float, float] = (1e-2, 1e2)

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "batch", "damper_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)!r} must be at least 1.")
        for name in ("step_size", "beta", "mean_limit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name}={getattr(self, name)!r} must be a positive number.")
        for name in ("decay", "temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise OptionError(f"{name}={getattr(self, name)!r} must be a number from 0.")
        low, high = self.variance_limits
        if not 0 < self.rate <= 1 or not 0 < low < high < float("inf"):
            raise OptionError(
                f"rate={self.rate!r} must be above 0, at most 1, and variance_limits={self.variance_limits!r} two "
                "positive numbers, the smaller first."
            )

    @property
    def limits(self) -> Limits:
        """Of the site's own Gaussian."""
        return Limits(self.mean_limit, self.variance_limits)


class Langevin:
    """Preconditioned stochastic-gradient Langevin dynamics, with Adam's scale for every coordinate.

    Each step's noise is the mean of two draws, the later one used again in the next step (Leimkuhler and Matthews
    2013): of a Gaussian target the variance is then right at any stable step size, where plain Langevin steps inflate
    it. Sources: Li et al. (2016), preconditioned SGLD; Hasenclever et al. (2017), section 5.
    """

    def __init__(self, v: Float[Tensor, " p"], how: Snep, generator: torch.Generator):
        self.v, self.how, self.generator = v, how, generator
        self.square, self.steps = torch.zeros_like(v), 0
        self.noise = self._draw()

    def _draw(self) -> Float[Tensor, " p"]:
        return torch.randn(
            self.v.shape, generator=self.generator, dtype=self.v.dtype, device=self.generator.device
        )

    def step(self, gradient: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """One step along the gradient of the log density; where it led."""
        self.steps += 1
        self.square.mul_(MEMORY).addcmul_(gradient, gradient, value=1.0 - MEMORY)
        root = (self.square / (1.0 - MEMORY**self.steps)).sqrt_()
        # the prior alone has gradients of this size: a coordinate that shows less has only not shown them yet
        scale = self.how.step_size / root.add_(max(self.how.temperature**0.5, 1e-8))
        noise = self._draw()
        shake = (0.5 * self.how.temperature * scale).sqrt_().mul_(self.noise.add_(noise))
        self.v, self.noise = torch.addcmul(self.v, scale, gradient).add_(shake), noise
        return self.v


class SnepWorker(WeightWorker):
    """A worker that samples. Its chain and its damper are lost when it dies; a new one starts at the posterior."""

    how: Snep
    _chain: Langevin | None = None
    _batches: Iterator[tuple[Tensor, Tensor, float]] | None = None
    _damper: Natural | None = None
    _taken = 0  # steps since the damper was the posterior

    def step(self, own: Site, cavity: Site) -> Site:
        """The site after `steps` steps against the cavity; its log_scale makes the evidence of all sites an estimate of
        the evidence lower bound. Raises NumericalError for a chain that has left for infinity."""
        how, diagonal = self.how, self.basis.diagonal
        rest = Natural.of(cavity, self.device).with_prior()
        gamma, site = Natural.of(own, self.device).within(how.limits).projected(how.limits)
        posterior = rest.times(site)
        if self._chain is None or self._batches is None:
            generator = self.generator(own)
            self._chain = Langevin(posterior.mean_parameter().first.to(self.dtype), how, generator)
            self._batches = self.batches(how.batch, generator)
        before, log_scale = (own.version + 1) * how.steps, 0.0
        for step in range(how.steps):
            if self._damper is None or self._taken >= how.damper_every:
                self._damper, self._taken = posterior, 0
            self._taken += 1
            around = self._damper.times(site, -1.0 / how.beta).to(self.dtype)
            exponent = site.to(self.dtype)
            found = Mean.of(torch.zeros_like(rest.shift), diagonal)
            for _ in range(how.samples):
                beyond, v = self._sample(self._chain, self._batches, around, exponent)
                found = found.plus(Mean.of(v.double(), diagonal), 1.0 / how.samples)
                log_scale += beyond / (how.steps * how.samples)
            rate = how.rate / (1.0 + how.decay * (before + step))
            gamma = gamma.plus(found, rate).plus(posterior.mean_parameter(), -rate)
            gamma, site = gamma.projected(how.limits)
            posterior = rest.times(site)
        return replace(
            own,
            precision=site.precision[None].cpu(),
            shift=site.shift[None].cpu(),
            log_scale=torch.full((1,), log_scale, dtype=torch.float64),
            count=len(self.rows[0]),
            version=own.version + 1,
        )

    def _sample(
        self,
        chain: Langevin,
        batches: Iterator[tuple[Tensor, Tensor, float]],
        around: Natural,
        site: Natural,
    ) -> tuple[float, Float[Tensor, " p"]]:
        """One step of the chain: what the log likelihood of all rows, as a batch estimates it, has beyond the site's
        exponent before the step, and where the step led."""
        x, y, times = next(batches)
        v = chain.v.detach().requires_grad_(True)
        value = times * self.log_likelihood(v, x, y)
        (gradient,) = torch.autograd.grad(value, v)
        v = v.detach()
        beyond = value.item() - site.exponent(v)
        moved = chain.step(gradient / self.how.beta + around.gradient(v))
        if not bool((moved.abs() < FAR).all()):
            raise NumericalError(
                f"The Langevin chain of worker {self.name!r} has left for infinity; take a smaller step_size than "
                f"{self.how.step_size:g}, or (where beta={self.how.beta:g} is below 1) a larger beta."
            )
        return beyond, moved
