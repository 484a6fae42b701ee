"""The posterior over functions that a basis and its site define, in the units of the data."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.gaussians import Coregionalised
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import fit_site
from fspace.inference.numerics import cholesky, full_precision, solve_lower
from fspace.inference.paths import prior_path
from fspace.kernels.deep import embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive import Gaussian, as_tensor, check_count, generator_for

CHUNK = 4096  # rows predicted at once


@dataclass(frozen=True)
class Scaling:
    """From the units of the data to those of the model: Yeo-Johnson with one lambda a column (1: none), then affine.

    Shapes: unit, power, shift, scale [d] ([c, 1, 1] for images); y_shift, y_scale [t]. mixing [t, t]: standardised y
    is mixing times what is modelled, whose outputs are independent (None: the identity).
    Source: Yeo and Johnson (2000), eq. 2.1.
    """

    unit: Float[Tensor, "*row"]
    power: Float[Tensor, "*row"]
    shift: Float[Tensor, "*row"]
    scale: Float[Tensor, "*row"]
    y_shift: Float[Tensor, " t"]
    y_scale: Float[Tensor, " t"]
    mixing: Float[Tensor, "t t"] | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Scaled inputs, same shape."""
        x = x / self.unit
        if bool((self.power != 1).any()):
            x = yeo_johnson(x, self.power)
        return (x - self.shift) / self.scale

    def modelled(self, y: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        """Observations as the model has them."""
        y = (y - self.y_shift) / self.y_scale
        return y if self.mixing is None else torch.linalg.solve(self.mixing, y.mT).mT

    def with_jacobian(self, site: Site) -> Site:
        """A site of what is modelled as one of standardised y: its log_scale gains log |d modelled / dy| a row."""
        if self.mixing is None:
            return site
        volume = torch.linalg.slogdet(self.mixing)[1]
        return replace(site, log_scale=site.log_scale - site.count * volume / len(self.mixing))

    @property
    def units(self) -> Float[Tensor, "t t"]:
        """The matrix that takes what is modelled to y, in the units of the data."""
        return torch.diag(self.y_scale) if self.mixing is None else self.y_scale[:, None] * self.mixing


def yeo_johnson(x: Float[Tensor, "*b"], power: Float[Tensor, "*row"]) -> Float[Tensor, "*b"]:
    """Yeo-Johnson transform, differentiable in x, column by column. Source: Yeo and Johnson (2000), eq. 2.1."""
    up, down = torch.log1p(x.clamp(min=0.0)), torch.log1p((-x).clamp(min=0.0))
    other = 2.0 - power
    safe_power = torch.where(power.abs() < 1e-8, torch.ones_like(power), power)
    safe_other = torch.where(other.abs() < 1e-8, torch.ones_like(other), other)
    positive = torch.where(power.abs() < 1e-8, up, torch.expm1(safe_power * up) / safe_power)
    negative = torch.where(other.abs() < 1e-8, -down, -torch.expm1(safe_other * down) / safe_other)
    return torch.where(x >= 0, positive, negative)


class GPPosterior(FunctionPosterior):
    """Gaussian process posterior from a basis, a site (or several, by name) and the scaling of inputs and outputs."""

    def __init__(self, basis: Basis, site: Site | Mapping[str, Site], scaling: Scaling, vector: bool = True):
        self.sites = {site.site_id: site} if isinstance(site, Site) else dict(site)
        site = reduce(operator.add, self.sites.values())
        self.basis, self.site, self.scaling = basis, site, scaling
        self.num_outputs = site.shift.shape[0]
        self.num_inputs = scaling.shift.shape[0]
        self.vector = vector and self.num_outputs == 1  # y is [n], not [n, 1]
        eye = torch.eye(site.shift.shape[-1], dtype=site.shift.dtype, device=site.shift.device)
        self._inner, _ = cholesky(eye + site.precision, "I + site precision")
        self._mean_weights = solve_lower(self._inner, site.shift[..., None])

    @property
    def noise_variance(self) -> Float[Tensor, " t"]:
        """Noise variance of every output, in squared units of y (where it varies: at a noise ratio of one)."""
        if self.scaling.mixing is None:
            return self.basis.noise * self.scaling.y_scale.square()
        return self.noise_covariance.diagonal()

    @property
    def noise_covariance(self) -> Float[Tensor, "t t"]:
        """Covariance of the outputs' noise, in squared units of y (where it varies: at a noise ratio of one)."""
        return (self.scaling.units * self.basis.noise) @ self.scaling.units.mT

    @property
    def coregionalisation(self) -> Float[Tensor, "t t"]:
        """Prior covariance of the outputs' functions at one input, in squared units of y: B where the covariance of
        f_s(x) and f_t(x') is B_st k(x, x') / k(x, x). Where k(x, x) varies, of its mean over the inducing inputs."""
        prior = self.basis.prior_variance(self.basis.inducing_inputs).mean()
        return prior * self.scaling.units @ self.scaling.units.mT

    def with_sites(self, basis: Basis, sites: Mapping[str, Site]) -> GPPosterior:
        """The same posterior of other sites."""
        return type(self)(basis, sites, self.scaling, self.vector)

    def _inputs(self, x: Any) -> Tensor:
        return self.embedded(self.numbers(x, "x"))

    def numbers(self, values: Any, name: str) -> Tensor:
        """Values in float64. Raises DataError for what is no number: one NaN would spoil all that is said with it."""
        values = as_tensor(values, self.site.shift.device, name).to(torch.float64)
        ends = (
            values.ndim == 3 and self.scaling.shift.ndim == 1
        )  # of sequences, which an extractor looks after
        if not bool(values.isfinite().all()) and not ends:
            raise DataError(f"{name} holds NaN or infinite values; remove such rows.")
        return values

    def embedded(self, x: Tensor) -> Tensor:
        """Rows as the kernel sees them. Raises DataError for another shape."""
        row = self.scaling.shift.shape  # [d], or [c, 1, 1] for images
        fits = x.ndim > len(row) and all(a in (1, b) for a, b in zip(row, x.shape[-len(row) :]))
        if not fits:
            raise DataError(f"x must have shape [n, {self.num_inputs}]; it has {tuple(x.shape)}.")
        if x.ndim > len(row) + 1:  # batch dimensions, or sequences
            return self.basis.embed(self.scaling.inputs(x))
        # part by part: a network's hidden layers for all rows at once would be larger than x many times over
        parts = [self.basis.embed(self.scaling.inputs(part)) for part in x.split(CHUNK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _project(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v [..., m, n], w [..., t, m, n] and the mean [..., t, n] at embedded inputs."""
        v = self.basis.whiten(z)
        w = solve_lower(self._inner, v[..., None, :, :])
        return v, w, (w.mT @ self._mean_weights)[..., 0]

    def _moments(self, x: Any, noise: bool) -> Gaussian:
        with full_precision():
            z = self._inputs(x)
            means, variances, ratios = [], [], []
            for part in z.split(CHUNK, dim=-2):
                v, w, mean = self._project(part)
                prior = self.basis.prior_variance(part)[..., None, :]
                means.append(mean)
                ratios.append(self.basis.log_noise_ratio(part)[..., None, :].exp())
                variances.append(
                    (prior - v.square().sum(-2)[..., None, :] + w.square().sum(-2)).clamp(min=0.0)
                )
            mean, variance = torch.cat(means, dim=-1), torch.cat(variances, dim=-1)
        mixing, y_shift, y_scale = self.scaling.mixing, self.scaling.y_shift, self.scaling.y_scale
        if mixing is not None:  # at first in the units of what is modelled
            y_shift, y_scale = torch.zeros_like(y_shift), torch.ones_like(y_scale)
        aleatoric = (
            (self.basis.noise * y_scale.square())[:, None] * torch.cat(ratios, dim=-1)
            if noise
            else torch.zeros_like(mean)
        ).expand_as(mean)
        mean = mean * y_scale[:, None] + y_shift[:, None]
        variance = variance * y_scale.square()[:, None] + aleatoric

        def joint() -> Tensor:
            with full_precision():
                v, w, _ = self._project(z)
                k = covariance(embedded_kernel(self.basis.kernel), z)
                total = (k - v.mT @ v)[..., None, :, :] + w.mT @ w
                total = total * y_scale.square()[:, None, None]
                total = 0.5 * (total + total.mT) + torch.diag_embed(aleatoric)
                return total[..., 0, :, :] if self.vector else total

        if self.vector:
            return Gaussian(mean[..., 0, :], variance[..., 0, :], joint, aleatoric[..., 0, :], outputs=0)
        gaussian = Gaussian(mean.mT, variance.mT, joint, aleatoric.mT, outputs=self.num_outputs)
        if mixing is None:
            return gaussian
        return Coregionalised(gaussian, self.scaling.units, self.scaling.y_shift)

    def latent(self, x: Any) -> Gaussian:
        """Predictive of f at x [..., n, d]; mean and variance in chunks, covariance only when asked for."""
        return self._moments(x, noise=False)

    def observed(self, x: Any) -> Gaussian:
        """Predictive of y at x [..., n, d]: f plus noise."""
        return self._moments(x, noise=True)

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions by pathwise conditioning. Source: Wilson et al. (2020), eq. 9."""
        generator = generator_for(seed, self.site.shift.device)
        return FunctionDraws([self._path(generator) for _ in range(check_count(n, 1))])

    def _path(self, generator: torch.Generator):  # type: ignore[no-untyped-def]
        inducing, factor = self.basis.inducing_inputs, self.basis.factor
        prior = prior_path(
            embedded_kernel(self.basis.kernel), inducing.shape[-1], self.num_outputs, generator
        )
        white = torch.randn(
            self.site.shift.shape, generator=generator, dtype=factor.dtype, device=factor.device
        )
        # a draw of the whitened inducing values: B^-1 b plus noise of covariance B^-1, B = inner inner'
        v = torch.linalg.solve_triangular(self._inner.mT, self._mean_weights + white[..., None], upper=True)[
            ..., 0
        ]
        with torch.no_grad():
            correction = v - solve_lower(factor, prior(inducing).T).T

        def function(x: Any) -> Tensor:
            z = self._inputs(x)
            values = prior(z) + correction @ self.basis.whiten(z)
            if self.scaling.mixing is not None:
                values = self.scaling.mixing @ values
            values = values * self.scaling.y_scale[:, None] + self.scaling.y_shift[:, None]
            return values[..., 0, :] if self.vector else values.mT

        return function

    def condition(self, x: Any, y: Any) -> GPPosterior:
        """Also seeing y [n] or [n, t] at x [n, d]: the new rows become inducing inputs and one more site.

        Raises DataError for other shapes, NaN and infinity.
        """
        x, y = self.numbers(x, "x"), self.numbers(y, "y")
        with torch.no_grad():
            z = self.embedded(x)
        if len(x) == 0:
            return self
        basis = self.basis.grown(z)
        sites = {name: site.padded(basis) for name, site in self.sites.items()}
        name = f"condition {len(sites)}"
        before = self.with_sites(basis, sites)
        return self.with_sites(basis, {**sites, name: before.site_of(x, y, name)})

    def site_of(self, x: Tensor, y: Any, site_id: str) -> Site:
        """What y [n] or [n, t] at x [n, d] says, beside what the sites here say. Raises DataError for other shapes."""
        y = self._observations(x, y, self.num_outputs)
        with torch.no_grad():
            modelled = self.scaling.modelled(y)
            site = fit_site(self.basis, self.scaling.inputs(x), modelled, site_id=site_id)
            return self.scaling.with_jacobian(site)

    def _observations(self, x: Tensor, y: Any, outputs: int) -> Float[Tensor, "n t"]:
        y = self.numbers(y, "y")
        if y.shape != (len(x), outputs) and not (outputs == 1 and y.shape == (len(x),)):
            raise DataError(
                f"y must have shape [{len(x)}, {outputs}] for x {tuple(x.shape)}; it has {tuple(y.shape)}."
            )
        return y.reshape(len(x), -1)
