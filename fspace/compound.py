"""Predictives of observations that are not Gaussian given the function: counts, heavy tails, positive numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor, distributions

from fspace.errors import OptionError
from fspace.gaussians import Gaussian
from fspace.predictive_base import Continuous, check_count, generator_for

NODES = 32  # of the quadrature over the function's value
FAR = 1e-30  # levels below which scipy's quantiles of shares are wrong or NaN, and Student's plus infinity
LEAST = 5e-324  # the smallest positive number


class Compound(Continuous):
    """y = shift + scale * w, where w given the function's value f has a known distribution and f is Gaussian.

    Marginals are integrals over f by Gauss-Hermite quadrature; one joint sample draws f at all points together.
    conditional(f) is a torch distribution of the shape of f. Shapes: latent y-shaped; shift and scale scalars or [t].
    """

    def __init__(
        self,
        latent: Gaussian,
        conditional: Callable[[Tensor], distributions.Distribution],
        shift: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ):
        self.latent, self.conditional, self.shift, self.scale = latent, conditional, shift, scale
        self.outputs = latent.outputs
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        some: dict[str, Any] = {"dtype": latent.mean.dtype, "device": latent.mean.device}
        places = torch.as_tensor(nodes, **some).reshape(-1, *[1] * latent.mean.ndim)
        self._weights = torch.as_tensor(weights / weights.sum(), **some)
        self._given = conditional(latent.mean + latent.stddev * places)
        self.counts = self._given.support is distributions.constraints.nonnegative_integer

    def _average(self, values: Tensor) -> Tensor:
        return torch.tensordot(self._weights, values, dims=1)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.shift + self.scale * self._average(self._given.mean)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        """Variance of E[y | f] over f."""
        means = self._given.mean
        return self._average((means - self._average(means)).square()) * self.scale**2

    @property
    def aleatoric(self) -> Tensor:
        """Mean of Var[y | f] over f."""
        return self._average(self._given.variance.expand_as(self._given.mean)) * self.scale**2

    @property
    def covariance(self) -> Tensor:
        """Not known in closed form. Raises OptionError."""
        raise OptionError(
            "Observations that are not Gaussian have no joint covariance in closed form; draw samples (rsample, "
            "sample_y), or take that of the function: posterior_.latent(x).covariance."
        )

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n samples, joint over the points: one draw of f at all of them, then y given f (not differentiable)."""
        generator = generator_for(seed, torch.device("cpu"))
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        values = self.latent.rsample(check_count(n), seeds[0])
        if values.numel() == 0:
            return values
        uniform = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        drawn = scipy_form(self.conditional(values)).ppf(uniform.clamp(1e-12, 1.0 - 1e-12).numpy())
        return self.shift + self.scale * torch.from_numpy(np.asarray(drawn)).to(values)

    def log_prob(self, y: Any) -> Tensor:
        w = ((self._check(y) - self.shift) / self.scale).expand_as(self.latent.mean)
        support = getattr(self._given, "support", None)
        inside = torch.ones_like(w, dtype=torch.bool) if support is None else support.check(w)
        safe = torch.where(inside, w, self._given.mean[0].round().clamp(min=0.5))
        density = torch.logsumexp(
            self._given.log_prob(safe) + self._weights.log().reshape(-1, *[1] * w.ndim), dim=0
        )
        scale = torch.as_tensor(self.scale, dtype=w.dtype, device=w.device).log()
        return torch.where(inside, density - scale, torch.where(w.isnan(), math.nan, -math.inf))

    def cdf(self, y: Any) -> Tensor:
        w = (self._check(y) - self.shift) / self.scale
        values = scipy_form(self._given).cdf(w.detach().cpu().numpy())
        return self._average(torch.from_numpy(np.asarray(values)).to(self._weights))

    @torch.no_grad()
    def _quantile(self, p: float) -> Tensor:
        """Solved from the cdf; the quantile lies between those at the function's values."""
        form, weights = scipy_form(self._given), self._weights.cpu().numpy()
        ends = form.ppf(p)
        low, high = ends.min(axis=0), ends.max(axis=0)
        whole = isinstance(form, Counts)
        low = low - 1.0 if whole else low
        found = bisected(lambda w: np.tensordot(weights, form.cdf(w), axes=1), p, low, high, whole)
        return self.shift + self.scale * torch.from_numpy(found).to(self._weights)

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Compound:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        return Compound(self.latent, self.conditional, loc + scale * self.shift, scale * self.scale)


def bisected(
    cdf: Callable[[np.ndarray], np.ndarray], p: Any, low: np.ndarray, high: np.ndarray, whole: bool
) -> np.ndarray:
    """Where cdf, below p at `low`, first is at least p, at most at `high`; whole: among whole numbers.

    Halves the logarithm where the ends are positive and of different size: they may lie 300 decades apart.
    """
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    near_zero = np.where(low < 0, 1e-17 * (high - low), 0.0)
    while True:
        apart = (low > 0) & (high > 4.0 * low)
        middle = np.where(apart, np.sqrt(np.abs(low)) * np.sqrt(np.abs(high)), low + 0.5 * (high - low))
        if whole:
            middle = np.floor(middle)
        going = (low < middle) & (middle < high)
        if not whole:
            going &= high - low > np.maximum(1e-14 * np.abs(high), near_zero)
        if not going.any():
            return high
        below = cdf(middle) < p
        low, high = np.where(going & below, middle, low), np.where(going & ~below, middle, high)


class Counts:
    """A distribution of counts by its function: scipy's quantiles of large ones are NaN (Poisson), or take for ever
    (negative binomial)."""

    def __init__(self, cdf: Callable[[np.ndarray], np.ndarray], mean: np.ndarray, deviation: np.ndarray):
        self._cdf, self.mean, self.deviation = cdf, mean, deviation

    def cdf(self, w: Any) -> np.ndarray:
        """P(count <= w)."""
        k = np.floor(np.asarray(w, dtype=np.float64))
        return np.where(k < 0, np.where(np.isnan(k), k, 0.0), self._cdf(np.maximum(k, 0.0)))

    def ppf(self, p: Any) -> np.ndarray:
        """The smallest count whose cdf is at least p; the bracket grows from the mean."""
        width = self.deviation + 1.0
        low, high = np.floor(self.mean - width), np.ceil(self.mean + width)
        while (wrong := (low >= 0) & (self.cdf(low) >= p)).any():
            width = 2.0 * width
            low = np.where(wrong, np.floor(self.mean - width), low)
        while (wrong := self.cdf(high) < p).any():
            width = 2.0 * width
            high = np.where(wrong, np.ceil(self.mean + width), high)
        return bisected(self.cdf, p, np.maximum(low, -1.0), high, True)


class LowerTail:
    """A scipy distribution whose quantiles at levels under FAR are solved from its cdf, from `high` down to `low`, or
    further where it has no end."""

    def __init__(self, known: Any, low: Any, high: Any, ends: bool):
        self.known, self.low, self.high, self.ends = known, low, high, ends
        self.cdf = known.cdf

    def ppf(self, p: Any) -> np.ndarray:
        """Where the cdf is p."""
        if (np.asarray(p) >= FAR).all():
            return self.known.ppf(p)
        shape = np.broadcast(self.known.cdf(self.low), p).shape
        low, high = (np.broadcast_to(end, shape).astype(np.float64) for end in (self.low, self.high))
        while not self.ends and (short := self.cdf(low) > p).any():
            low = np.where(short, high - 1e3 * (high - low), low)
        return bisected(self.cdf, p, low, high, False)


def scipy_form(given: distributions.Distribution) -> Any:
    """A torch distribution with cdf and ppf, as scipy has it. Raises OptionError for a kind not known here."""

    def numpy(value: Tensor) -> np.ndarray:
        return value.detach().cpu().numpy()

    if isinstance(given, distributions.Poisson):
        rate = numpy(given.rate)
        return Counts(lambda k: special.gammaincc(k + 1.0, rate), rate, np.sqrt(rate))
    if isinstance(given, distributions.NegativeBinomial):  # torch's probs is that of one more count
        total, rest = numpy(given.total_count), numpy(torch.sigmoid(-given.logits))
        moments = numpy(given.mean), numpy(given.variance.sqrt())
        return Counts(lambda k: special.betainc(total, k + 1.0, rest), *moments)
    if isinstance(given, distributions.StudentT):
        loc, width = numpy(given.loc), numpy(given.scale)
        return LowerTail(stats.t(numpy(given.df), loc, width), loc - width, loc, ends=False)
    if isinstance(given, distributions.Laplace):
        return stats.laplace(numpy(given.loc), numpy(given.scale))
    if isinstance(given, distributions.Gamma):
        return stats.gamma(numpy(given.concentration), scale=1.0 / numpy(given.rate))
    if isinstance(given, distributions.Beta):
        known = stats.beta(numpy(given.concentration1), numpy(given.concentration0))
        return LowerTail(known, LEAST, 1.0, ends=True)
    if isinstance(given, distributions.Normal):
        return stats.norm(numpy(given.loc), numpy(given.scale))
    raise OptionError(
        f"A likelihood that gives {type(given).__name__} has no quantiles here; use log_prob, mean and variance."
    )
