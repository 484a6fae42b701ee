"""Predictives of observations that are not Gaussian given the function: counts, heavy tails, positive numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, distributions

from fspace.errors import OptionError
from fspace.gaussians import Gaussian
from fspace.predictive_base import Continuous, check_count, generator_for

NODES = 32  # of the quadrature over the function's value
HALVINGS = 60  # of the bracket around a quantile


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
        some = {"dtype": latent.mean.dtype, "device": latent.mean.device}
        places = torch.as_tensor(nodes, **some).reshape(-1, *[1] * latent.mean.ndim)
        self._weights = torch.as_tensor(weights / weights.sum(), **some)
        self._given = conditional(latent.mean + latent.stddev * places)

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

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n samples, joint over the points: one draw of f at all of them, then y given f (not differentiable)."""
        generator = generator_for(seed, torch.device("cpu"))
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        values = self.latent.rsample(check_count(n), seeds[0])
        uniform = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        drawn = scipy_form(self.conditional(values)).ppf(uniform.clamp(1e-12, 1.0 - 1e-12).numpy())
        return self.shift + self.scale * torch.from_numpy(np.asarray(drawn)).to(values)

    def log_prob(self, y: Any) -> Tensor:
        w = (self._check(y) - self.shift) / self.scale
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
        counts = bool(getattr(self._given, "support", None) is distributions.constraints.nonnegative_integer)
        if counts:
            low = low - 1.0
        for _ in range(HALVINGS):
            middle = np.floor(0.5 * (low + high)) if counts else 0.5 * (low + high)
            below = np.tensordot(weights, form.cdf(middle), axes=1) < p
            low, high = np.where(below, middle, low), np.where(below, high, middle)
            if np.all(high - low <= (1.0 if counts else 1e-14 * np.abs(high))):
                break
        found = torch.from_numpy(np.asarray(high if counts else 0.5 * (low + high))).to(self._weights)
        return self.shift + self.scale * found

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Compound:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        return Compound(self.latent, self.conditional, loc + scale * self.shift, scale * self.scale)


def scipy_form(given: distributions.Distribution) -> Any:
    """A torch distribution as scipy has it, with cdf and ppf. Raises OptionError for a kind not known here."""

    def numpy(value: Tensor) -> np.ndarray:
        return value.detach().cpu().numpy()

    if isinstance(given, distributions.Poisson):
        return stats.poisson(numpy(given.rate))
    if isinstance(given, distributions.NegativeBinomial):  # torch's probs is that of one more count
        return stats.nbinom(numpy(given.total_count), numpy(torch.sigmoid(-given.logits)))
    if isinstance(given, distributions.StudentT):
        return stats.t(numpy(given.df), numpy(given.loc), numpy(given.scale))
    if isinstance(given, distributions.Laplace):
        return stats.laplace(numpy(given.loc), numpy(given.scale))
    if isinstance(given, distributions.Gamma):
        return stats.gamma(numpy(given.concentration), scale=1.0 / numpy(given.rate))
    if isinstance(given, distributions.Beta):
        return stats.beta(numpy(given.concentration1), numpy(given.concentration0))
    if isinstance(given, distributions.Normal):
        return stats.norm(numpy(given.loc), numpy(given.scale))
    raise OptionError(
        f"A likelihood that gives {type(given).__name__} has no quantiles here; use log_prob, mean and variance."
    )
