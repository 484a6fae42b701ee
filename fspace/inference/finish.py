"""From trained parameters to the posterior of all rows: noise that is right, constant or varying, and the sites."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import (
    Statistics,
    bound_from,
    fit_site,
    gather_whitened,
    log_evidence,
    site_from,
)
from fspace.inference.exact import leave_one_out
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import OffsetLikelihood, predictive_log_density
from fspace.inference.noise import fit_noise_function
from fspace.inference.optimise import MIN_NOISE, lbfgs
from fspace.inference.sites import Rows, converge, marginals
from fspace.inference.source import Inputs
from fspace.kernels.deep import SplitKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance


@dataclass(frozen=True)
class Finished:
    """A posterior in standardised units, its log evidence, and the log density of rows it was not told of [k]
    (all rows, each left out, for the exact posterior; the held-out rows, before they were added, for a sparse one)."""

    basis: Basis
    site: Site
    log_evidence: float
    densities: Float[Tensor, " k"]


def log_density(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Gaussian log density, elementwise."""
    return -0.5 * (2.0 * math.pi * variance).log() - 0.5 * (y - mean).square() / variance


def finish_exact(
    kernel: Kernel,
    likelihood: GaussianLikelihood,
    x: Tensor,
    y: Float[Tensor, "n t"],
) -> Finished:
    """Every row an inducing input; densities by closed-form leave-one-out."""
    _freeze(kernel, likelihood)
    basis = Basis(kernel, embed(kernel, x), likelihood)
    site = fit_site(basis, x, y)
    k = covariance(embedded_kernel(kernel), basis.inducing_inputs)
    mean, variance = leave_one_out(k, y, basis.noise)
    return Finished(basis, site, log_evidence([site]), log_density(y, mean, variance).sum(-1))


def vary_exact(fit: Finished, x: Inputs, y: Float[Tensor, "n t"], seed: int) -> Finished:
    """The exact posterior with noise that varies: its function from leave-one-out residuals, signal and level anew."""
    basis = replace(
        fit.basis, kernel=copy.deepcopy(fit.basis.kernel), likelihood=copy.deepcopy(fit.basis.likelihood)
    )
    z = basis.inducing_inputs
    mean, variance = leave_one_out(covariance(embedded_kernel(basis.kernel), z), y, basis.noise)
    function, left_out = fit_noise_function(z, (y - mean).square() / variance, seed)
    basis = replace(basis, noise_function=function)
    whitened = refit_noise(basis, gather_whitened(basis, x, y))
    basis = replace(basis)  # a new one: the parameters have moved
    site = site_from(basis, whitened)
    ratio = function(z)
    weight = torch.exp(-0.5 * ratio)
    k = covariance(embedded_kernel(basis.kernel), z) * weight[:, None] * weight
    mean, variance = leave_one_out(k, y * weight[:, None], basis.noise)
    mean, variance = mean / weight[:, None], variance / weight[:, None].square()
    # a row's own noise must not come from a function that has seen the row
    variance = variance + (left_out.exp() - ratio.exp())[:, None] * basis.noise
    floor = basis.noise * left_out.exp()[:, None]
    return Finished(
        basis, site, log_evidence([site]), log_density(y, mean, torch.maximum(variance, floor)).sum(-1)
    )


def finish_sparse(
    kernel: Kernel,
    likelihood: GaussianLikelihood,
    x: Inputs,
    y: Float[Tensor, "n t"],
    held_out: Int[Tensor, " h"],
    most: int,
    tolerance: float,
    vary: bool | None,
    seed: int,
) -> Finished:
    """Collapsed posterior on greedy inducing inputs; noise set by the held-out rows, which then become a second site.

    vary: whether the noise varies over the inputs; None lets the held-out rows decide (by more than a standard
    error). The noise of a network's training rows is too small, hence the held-out ones.
    """
    _freeze(kernel, likelihood)
    rest = torch.ones(len(y), dtype=torch.bool, device=y.device)
    rest[held_out] = False
    x_rest, y_rest, x_held, y_held = x[rest], y[rest], x[held_out], y[held_out]
    basis = Basis(kernel, inducing_inputs(kernel, x, most, tolerance), likelihood)
    whitened = refit_noise(basis, gather_whitened(basis, x_rest, y_rest))
    basis = replace(basis)  # a new one: the parameters have moved
    z = basis.embed(x_held)
    zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    mean, variance, densities = _set_noise(basis, whitened, z, y_held, zero)
    if vary is not False:
        level = likelihood.noise.detach().clone()
        function, left_out = fit_noise_function(z, (y_held - mean).square() / variance, seed)
        other = replace(basis, noise_function=function)
        other_whitened = gather_whitened(other, x_rest, y_rest)
        other_densities = _set_noise(other, other_whitened, z, y_held, left_out)[2]
        gain = other_densities - densities
        if vary or gain.mean() > gain.std() / math.sqrt(len(gain)):
            basis, whitened, densities = other, other_whitened, other_densities
        else:
            likelihood.noise = level
    basis = replace(basis)
    sites = [site_from(basis, whitened), fit_site(basis, x_held, y_held, site_id="held out")]
    whole = replace(sites[0] + sites[1], site_id=sites[0].site_id)  # to whoever fits them they are one
    return Finished(basis, whole, log_evidence(sites), densities)


def finish_sites(
    kernel: Kernel,
    likelihood: OffsetLikelihood,
    x: Inputs,
    y: Float[Tensor, "n t"],
    weight: Float[Tensor, " n"] | None,
    held_out: Int[Tensor, " h"],
    most: int,
    tolerance: float,
) -> Finished:
    """The posterior by natural-gradient sites on greedy inducing inputs: without the held-out rows to score it on
    them, if there are any, then of all rows."""
    _freeze(kernel, likelihood)
    basis = Basis(kernel, inducing_inputs(kernel, x, most, tolerance), likelihood)
    site, densities = None, y.new_zeros(0)
    if len(held_out):
        rest = torch.ones(len(y), dtype=torch.bool, device=y.device)
        rest[held_out] = False
        site, _ = converge(basis, x[rest], y[rest], None if weight is None else weight[rest])
        with torch.no_grad():
            held = Rows.of(basis, x[held_out], y[held_out])
            densities = predictive_log_density(likelihood, held.y, *marginals(site, held))
    site, evidence = converge(basis, x, y, weight, start=site)
    return Finished(basis, site, evidence, densities)


def _freeze(*modules: torch.nn.Module) -> None:
    for module in modules:
        module.eval()
        module.requires_grad_(False)
        for p in module.parameters():
            p.grad = None


@torch.no_grad()
def inducing_inputs(kernel: Kernel, x: Inputs, most: int, tolerance: float) -> Float[Tensor, "m p"]:
    """The greedily chosen rows, embedded: at most so many, and no more than leave `tolerance` of the prior variance."""
    stride = max(1, len(x) // (10 * most))  # greedy choice is O(n m^2): a stride of rows is as good a pool
    candidates = embed(kernel, x[::stride])
    return candidates[greedy_variance(embedded_kernel(kernel), candidates, most, tolerance)]


@torch.no_grad()
def _set_noise(
    basis: Basis, whitened: Statistics, z: Tensor, y: Float[Tensor, "h t"], log_ratio: Float[Tensor, " h"]
) -> tuple[Float[Tensor, "h t"], Float[Tensor, "h t"], Float[Tensor, " h"]]:
    """Noise variances that predict rows z, y best, set in place; mean, variance and log density of these rows.

    One eigendecomposition of the statistics serves every noise variance that is tried.
    """
    values, vectors = torch.linalg.eigh(whitened.outer)
    values = values.clamp(min=0.0)
    v = basis.whiten(z)
    rotated, cross = vectors.mT @ v, vectors.mT @ whitened.cross
    prior = (basis.prior_variance(z) - v.square().sum(0)).clamp(min=0.0)
    ratio = log_ratio.exp()

    def moments(t: int, noise: float) -> tuple[Tensor, Tensor]:
        shrink = 1.0 / (1.0 + values / noise)
        mean = rotated.mT @ (shrink * cross[:, t] / noise)
        return mean, prior + rotated.square().mT @ shrink + noise * ratio

    best, start = [], basis.noise.tolist()
    for t in range(y.shape[1]):
        found = minimize_scalar(
            lambda u, t=t: -log_density(y[:, t], *moments(t, math.exp(u))).mean().item(),
            # rotated outputs may be nearly all noise
            bounds=(math.log(MIN_NOISE), math.log(4.0 * max(1.0, start[t]))),
            method="bounded",
            options={"xatol": 0.02},
        )
        best.append(max(math.exp(found.x), 1.001 * MIN_NOISE))
    noise = torch.tensor(best, dtype=torch.float64, device=y.device)
    basis.likelihood.noise = noise[:, None]
    pairs = [moments(t, n) for t, n in enumerate(best)]
    mean, variance = (torch.stack([pair[i] for pair in pairs], dim=1) for i in (0, 1))
    return mean, variance, log_density(y, mean, variance).sum(-1)


def refit_noise(basis: Basis, whitened: Statistics) -> Statistics:
    """Noise and signal variance by the bound of all rows, set in place; the statistics of the basis as it is then.

    Whitened statistics scale with the signal, so no further pass over the rows is needed.
    """
    variances = _outputscales(embedded_kernel(basis.kernel))
    identity = torch.eye(len(whitened.outer), dtype=torch.float64, device=whitened.outer.device)
    log_scale = torch.zeros(1, dtype=torch.float64, device=identity.device, requires_grad=True)
    likelihood = basis.likelihood
    assert isinstance(likelihood, GaussianLikelihood)
    noise = list(likelihood.parameters())
    for p in noise:
        p.requires_grad_(True)

    def scaled() -> Statistics:
        s = log_scale.exp()
        cross = s.sqrt() * whitened.cross
        return replace(whitened, outer=s * whitened.outer, cross=cross, trace=(s * whitened.trace)[0])

    def loss() -> Tensor:
        bound = bound_from(scaled(), identity, likelihood.noise[..., 0])
        value = -bound / (whitened.count * whitened.squares.numel())
        value.backward()
        return value.detach()

    lbfgs(loss, [*noise, *([log_scale] if variances else [])], 25, lambda value: None)
    for p in noise:
        p.requires_grad_(False)
        p.grad = None
    with torch.no_grad():
        for scale in variances:
            scale.outputscale = scale.outputscale * log_scale.exp()[0].to(scale.outputscale.dtype)
        return scaled()


def _outputscales(kernel: Kernel) -> list[Any]:
    """The Scale kernels that together multiply the whole kernel; none if a part has no variance of its own."""
    if isinstance(kernel, ScaleKernel):
        return [kernel]
    parts = (
        list(kernel.kernels)
        if isinstance(kernel, AdditiveKernel)
        else [kernel.base, kernel.plain]
        if isinstance(kernel, SplitKernel)
        else []
    )
    found = [_outputscales(part) for part in parts]
    return [s for part in found for s in part] if found and all(found) else []
