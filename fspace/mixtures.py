"""Mixtures of Gaussians and finite samples as predictives: the forms that ensembles and weight posteriors end in.

Marginals are computed on stacks `[*y shape, k]` (components last), so that y, weights and probabilities broadcast by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.normal import normal_cdf, normal_log_prob, normal_quantile
from fspace.predictive import Gaussian, Outputs, Predictive, affine_terms, check_outputs, points_last


class Mixture(Predictive):
    """Weighted mixture of Gaussians over the same points; each component is a joint distribution of its own.

    components: Gaussians of one shape (mixtures among them are flattened); weights: `[k]`, non-negative, sum 1; None: equal.
    Components of weight zero are dropped. Raises DataError for weights or shapes that do not fit.
    """

    def __init__(self, components: Sequence[Gaussian | Mixture], weights: Any = None) -> None:
        if len(components) == 0:
            raise DataError("Mixture: no components given; give at least one Gaussian.")
        like = components[0].mean
        weights = check_weights(weights, len(components), like.dtype, like.device)
        flat: list[Gaussian] = []
        flat_weights: list[Tensor] = []
        for component, weight in zip(components, weights, strict=True):
            parts = component.components if isinstance(component, Mixture) else [component]
            shares = component.weights * weight if isinstance(component, Mixture) else [weight]
            for part, share in zip(parts, shares, strict=True):
                if not isinstance(part, Gaussian):
                    raise OptionError(f"Mixture: component is a {type(part).__name__}; only Gaussians and mixtures of them mix.")
                if part.shape != like.shape or part.outputs != components[0].outputs:
                    raise DataError(
                        f"Mixture: component {len(flat)} has shape {tuple(part.shape)} (outputs={part.outputs}), the first has "
                        f"{tuple(like.shape)} (outputs={components[0].outputs}); all must describe the same points."
                    )
                if share > 0:
                    flat.append(part)
                    flat_weights.append(share)
        self.outputs = components[0].outputs
        self.components = flat
        self.weights = torch.stack(flat_weights)
        self._means = torch.stack([c.mean for c in flat], -1)
        self._variances = torch.stack([c.variance for c in flat], -1)
        self._mean = (self._means * self.weights).sum(-1)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return (self._variances * self.weights).sum(-1) + self._between

    @property
    def _between(self) -> Tensor:
        """Variance of the components' means: what the components disagree about."""
        return ((self._means - self._mean[..., None]).square() * self.weights).sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        return (torch.stack([c.aleatoric for c in self.components], -1) * self.weights).sum(-1)

    @property
    def epistemic(self) -> Tensor:
        within = (torch.stack([c.epistemic for c in self.components], -1) * self.weights).sum(-1)
        return within + self._between

    @property
    def covariance(self) -> Tensor:
        total = torch.zeros((), dtype=self._mean.dtype, device=self.device)
        for component, weight in zip(self.components, self.weights, strict=True):
            off = points_last(component.mean - self._mean, self.outputs)
            total = total + weight * (component.covariance + off[..., :, None] * off[..., None, :])
        return total

    def _rsample(self, n: int, generator: torch.Generator) -> Tensor:
        # One component per joint sample, the same for all its points and outputs: mixing point by point would lose the joint.
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        counts = torch.bincount(chosen, minlength=len(self.components)).tolist()
        drawn = [c._rsample(count, generator) for c, count in zip(self.components, counts, strict=True) if count]
        order = torch.argsort(chosen, stable=True)
        return torch.cat(drawn)[torch.argsort(order)]

    def log_prob(self, y: Any) -> Tensor:
        values = self._values(y, "log_prob")[..., None]
        return _log_mix(normal_log_prob(values, self._means, self._variances), self.weights)

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of y over all points together: a scalar, or `[t]`, one per output.

        Outputs share the component, so the `[t]` values are each output's own and their sum is not the density of all outputs.
        """
        return _log_mix(torch.stack([c.joint_log_prob(y) for c in self.components], -1), self.weights)

    def cdf(self, y: Any) -> Tensor:
        values = self._values(y, "cdf", scalar=True)[..., None]
        return (normal_cdf(values, self._means, self._variances.sqrt()) * self.weights).sum(-1)

    def _quantile(self, levels: Tensor) -> Tensor:
        return mixture_quantile(levels, self._means, self._variances.sqrt(), self.weights)

    def affine(self, loc: Any, scale: Any) -> Mixture:
        return Mixture([c.affine(loc, scale) for c in self.components], self.weights)


class Samples(Predictive):
    """Values of s sampled functions at the points, with or without Gaussian noise around each.

    values: `[s, n]` or `[s, n, t]`; noise_variance: anything that broadcasts to values (`[n]`, `[n, t]`, `[s, n]`, a number), or None.
    With noise this is the equal-weight mixture of the s Gaussians; without, the empirical distribution of the s values: it has
    quantiles (smallest value whose cdf reaches p) but no density, so log_prob raises OptionError.
    Variances divide by s, as the mixture's do. Raises DataError for shapes that do not fit or negative noise.
    """

    def __init__(self, values: Float[Tensor, "s ..."], noise_variance: Any = None, outputs: Outputs = "infer") -> None:
        if values.ndim < 2 or values.shape[0] == 0:
            raise DataError(f"Samples: values have shape {tuple(values.shape)}; give [s, n] or [s, n, t] with s >= 1.")
        self.outputs = check_outputs(values[0], outputs, "Samples")
        self.values = values
        self.noise_variance: Tensor | None = None
        if noise_variance is not None:
            noise = torch.as_tensor(noise_variance, dtype=values.dtype, device=values.device)
            try:
                self.noise_variance = noise.expand(values.shape)
            except RuntimeError as error:
                raise DataError(
                    f"Samples: noise_variance has shape {tuple(noise.shape)}, which does not fit values {tuple(values.shape)}."
                ) from error
            if not bool((noise >= 0).all()):
                raise DataError("Samples: noise_variance holds negative or NaN entries; variances are at least zero.")
        self._mean = values.mean(0)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        return (self.values - self._mean).square().mean(0)

    @property
    def aleatoric(self) -> Tensor:
        return torch.zeros_like(self._mean) if self.noise_variance is None else self.noise_variance.mean(0)

    @property
    def covariance(self) -> Tensor:
        off = points_last(self.values - self._mean, self.outputs).movedim(0, -1)
        return off @ off.transpose(-1, -2) / len(self.values) + torch.diag_embed(points_last(self.aleatoric, self.outputs))

    def _rsample(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.values), (n,), generator=generator, device=self.device)
        drawn = self.values[chosen]
        if self.noise_variance is None:
            return drawn
        noise = torch.randn(drawn.shape, generator=generator, dtype=drawn.dtype, device=self.device)
        return drawn + self.noise_variance[chosen].sqrt() * noise

    def log_prob(self, y: Any) -> Tensor:
        values = self._values(y, "log_prob")[..., None]
        return _log_mix(normal_log_prob(values, self._stack(self.values), self._stack(self._noise("log_prob"))), self._equal())

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of y over all points together: a scalar, or `[t]`, one per output (see `Mixture.joint_log_prob`)."""
        values = self._values(y, "joint_log_prob")
        noise = self._noise("joint_log_prob")
        each = [
            points_last(normal_log_prob(values, m, v), self.outputs).sum(-1) for m, v in zip(self.values, noise, strict=True)
        ]
        return _log_mix(torch.stack(each, -1), self._equal())

    def cdf(self, y: Any) -> Tensor:
        values = self._values(y, "cdf", scalar=True)[..., None]
        noise = torch.zeros_like(self.values) if self.noise_variance is None else self.noise_variance
        return normal_cdf(values, self._stack(self.values), self._stack(noise).sqrt()).mean(-1)

    def _quantile(self, levels: Tensor) -> Tensor:
        if self.noise_variance is None:
            s = len(self.values)
            # 1e-9 takes back the rounding of p * s: 0.7 * 10 is 7.000000000000001 and must pick the 7th value.
            rank = (levels * s - 1e-9).ceil().long().clamp(1, s) - 1
            return self.values.sort(0).values[rank]
        return mixture_quantile(levels, self._stack(self.values), self._stack(self.noise_variance).sqrt(), self._equal())

    def affine(self, loc: Any, scale: Any) -> Samples:
        loc, scale = affine_terms(self, loc, scale)
        noise = None if self.noise_variance is None else self.noise_variance * scale.square()
        return Samples(self.values * scale + loc, noise, self.outputs)

    def _noise(self, name: str) -> Tensor:
        if self.noise_variance is None:
            raise OptionError(
                f"{name}: {len(self.values)} sampled values have no density. Ask observed(x), which adds the noise, "
                "or use cdf, quantile or the moments."
            )
        return self.noise_variance

    def _equal(self) -> Tensor:
        s = len(self.values)
        return torch.full((s,), 1 / s, dtype=self.values.dtype, device=self.device)

    @staticmethod
    def _stack(values: Tensor) -> Tensor:
        return values.movedim(0, -1)


def check_weights(weights: Any, k: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Float[Tensor, " k"]:
    """Mixture weights as a tensor that sums to one; DataError when they are not k non-negative numbers of sum 1."""
    if weights is None:
        return torch.full((k,), 1 / k, dtype=dtype, device=device)
    values = torch.as_tensor(weights, dtype=dtype, device=device)
    if values.shape != (k,):
        raise DataError(f"weights have shape {tuple(values.shape)}; {k} components need one weight each.")
    total = float(values.sum())
    if not bool((values >= 0).all()) or not math.isclose(total, 1, abs_tol=1e-5):
        raise DataError(f"weights {values.tolist()} must be non-negative and sum to 1 (they sum to {total:.6g}).")
    return values / values.sum()


def mixture_quantile(
    levels: Float[Tensor, " p"], means: Float[Tensor, "... k"], stddevs: Float[Tensor, "... k"], weights: Float[Tensor, " k"]
) -> Float[Tensor, "p ..."]:
    """Solve sum_k w_k Phi((q - m_k)/s_k) = p for q, elementwise; differentiable in the parameters.

    Newton's method kept inside the bracket [min, max] of the components' own quantiles, with a bisection whenever it is slow.
    At a jump of the cdf (zero stddev) the result is the smallest value whose cdf reaches p.
    """
    p = levels.to(torch.float64).view(-1, *[1] * (means.ndim - 1))
    inner = torch.where((p > 0) & (p < 1), p, torch.full_like(p, 0.5))
    # float64 inside, whatever the model's dtype: a float32 cdf cannot resolve p to better than 1e-7.
    m, s, w = means.to(torch.float64), stddevs.to(torch.float64), weights.to(torch.float64)
    with torch.no_grad():
        root = _solve(inner, m, s, w)
    if torch.is_grad_enabled() and (m.requires_grad or s.requires_grad or w.requires_grad):
        # One Newton step of zero length carries the implicit derivative dq = -dF(q) / f(q).
        density = _density(root, m, s, w).detach()
        slack = (normal_cdf(root[..., None], m, s) * w).sum(-1)
        root = torch.where(density > 0, root - (slack - slack.detach()) / density.clamp_min(1e-300), root)
    ends = normal_quantile(p[..., None], m, s)
    result = torch.where(p <= 0, ends.amin(-1), torch.where(p >= 1, ends.amax(-1), root))
    return result.to(means.dtype)


def _solve(p: Tensor, means: Tensor, stddevs: Tensor, weights: Tensor) -> Tensor:
    own = normal_quantile(p[..., None], means, stddevs)
    low, high = own.amin(-1), own.amax(-1)
    x = (own * weights).sum(-1)
    root, done = high.clone(), low == high
    last_step = high - low
    # Relative in both tails, down to what a float64 cdf can resolve.
    tolerance = 1e-10 * torch.minimum(p, 1 - p) + 1e-15 * p
    for _ in range(200):
        excess = (normal_cdf(x[..., None], means, stddevs) * weights).sum(-1) - p
        hit = (excess.abs() <= tolerance) & ~done
        low, high = torch.where(excess < 0, x, low), torch.where(excess < 0, high, x)
        # A closed bracket ends at its upper edge: there the cdf has reached p.
        closed = (high - low <= 4e-16 * torch.maximum(low.abs(), high.abs())) & ~done & ~hit
        root = torch.where(hit, x, torch.where(closed, high, root))
        done = done | hit | closed
        if bool(done.all()):
            break
        step = -excess / _density(x, means, stddevs, weights)
        newton = x + step
        good = (newton > low) & (newton < high) & (step.abs() <= 0.5 * last_step.abs())
        following = torch.where(good, newton, low + 0.5 * (high - low))
        last_step, x = following - x, following
    return torch.where(done, root, high)


def _density(x: Tensor, means: Tensor, stddevs: Tensor, weights: Tensor) -> Tensor:
    safe = torch.where(stddevs > 0, stddevs, torch.ones_like(stddevs))
    z = (x[..., None] - means) / safe
    density = torch.exp(-0.5 * z.square()) / (safe * math.sqrt(2 * math.pi))
    return (torch.where(stddevs > 0, density, torch.zeros_like(density)) * weights).sum(-1)


def _log_mix(log_densities: Float[Tensor, "... k"], weights: Float[Tensor, " k"]) -> Tensor:
    return torch.logsumexp(log_densities + weights.log(), -1)
