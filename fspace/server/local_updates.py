"""What a worker makes of its rows: its site, given what all the other sites say.

Gaussian observations: the exact site, whatever the others say. Any other likelihood: natural-gradient steps towards
the fixed point where the site of all rows together is the sum of the workers' sites (partitioned variational
inference), or power expectation propagation, row by row.
Sources: Ashman et al. (2022), partitioned variational inference; Khan and Lin (2017); Bui et al. (2017), a unifying
framework for sparse Gaussian process approximation using power expectation propagation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import fit_site
from fspace.inference.likelihoods import OffsetLikelihood, functions
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.sites import blend, said_by_rows
from fspace.inference.source import Inputs
from fspace.server.natural import between


@dataclass(frozen=True)
class Update:
    """How a worker moves its site in a round: `steps` natural-gradient steps, each against the cavity, then `damping`
    of the way there (1: all of it)."""

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise OptionError(
                f"steps={self.steps!r} must be at least 1 and damping={self.damping!r} above 0, at most 1."
            )


def new_site(
    basis: Basis,
    x: Inputs,
    y: Float[Tensor, "n t"],
    own: Site,
    cavity: Site,
    how: Update,
    weight: Float[Tensor, " n"] | None = None,
) -> Site:
    """The worker's next site from its last one and the cavity; its version is one more.

    Shapes: x [n, d] in the units of the basis (or images, sequences), y [n, t], weight [n]. Raises OptionError for
    weights where the noise varies over the inputs.
    """
    if isinstance(basis.likelihood, GaussianLikelihood) and weight is None:
        made = fit_site(basis, x, y, site_id=own.site_id)
    elif isinstance(basis.likelihood, GaussianLikelihood):
        _require_constant_noise(basis, "Weights of rows")
        made = said_by_rows(basis, own, cavity, x, y, weight)
    else:
        made = own
        for _ in range(how.steps):
            made = blend(made, said_by_rows(basis, made, cavity, x, y, weight), 1.0)
        made = between(own, made, how.damping)
    return replace(made, site_id=own.site_id, incarnation=own.incarnation, version=own.version + 1)


def _require_constant_noise(basis: Basis, what: str) -> None:
    if basis.noise_function is not None:
        raise OptionError(f"{what} cannot go with noise that varies over the inputs; use `fit_site`.")


class RowFactors(NamedTuple):
    """The factor of every row about s_i = a_i' v, exp(shift_i s_i - precision_i s_i^2 / 2 + log_scale_i)."""

    precision: Float[Tensor, "t n"]
    shift: Float[Tensor, "t n"]
    log_scale: Float[Tensor, "t n"]

    @staticmethod
    def empty(basis: Basis, rows: int) -> RowFactors:
        """Factors that say nothing."""
        zeros = basis.factor.new_zeros(functions(basis.likelihood), rows)
        return RowFactors(zeros, zeros, zeros)


@torch.no_grad()
def power_ep(
    basis: Basis,
    x: Tensor,
    y: Float[Tensor, "n t"],
    factors: RowFactors,
    cavity: Site,
    power: float = 0.5,
    damping: float = 0.5,
    sweeps: int = 1,
) -> tuple[Site, RowFactors]:
    """A worker's site and the factors of its rows after some parallel sweeps of power expectation propagation.

    cavity: the product of the other workers' sites. power 1 is expectation propagation (for Gaussian noise: FITC),
    towards 0 variational inference (Titsias). Row factors whose cavity is no Gaussian wait for the next sweep.
    Raises OptionError for a softmax over classes, whose tilted moments are not one-dimensional, and for noise that
    varies over the inputs.
    Source: Bui et al. (2017), section 3.
    """
    likelihood = basis.likelihood
    if isinstance(likelihood, OffsetLikelihood) and likelihood.classes:
        raise OptionError(
            "Power expectation propagation takes one function an output; use natural-gradient steps."
        )
    _require_constant_noise(basis, "Power expectation propagation")
    if not 0 < power <= 1 or not 0 < damping <= 1:
        raise OptionError(f"power={power!r} and damping={damping!r} must be above 0 and at most 1.")
    z = basis.embed(x)
    a = basis.whiten(z)
    residual = (basis.prior_variance(z) - a.square().sum(0)).clamp(min=0.0)
    for _ in range(sweeps):
        mean, variance = _row_marginals(a, _site_of(basis, a, factors, cavity.site_id), cavity)
        factors = _sweep(likelihood, y, residual, mean, variance, factors, power, damping)
    # scales belong to the posterior that all factors give
    mean, variance = _row_marginals(a, _site_of(basis, a, factors, cavity.site_id), cavity)
    scaled = _with_scales(likelihood, y, residual, mean, variance, factors, power)
    return _site_of(basis, a, scaled, "data"), scaled


def _site_of(basis: Basis, a: Float[Tensor, "m n"], factors: RowFactors, site_id: str) -> Site:
    precision = (a * factors.precision[:, None, :]) @ a.mT
    return Site(
        basis.id,
        0.5 * (precision + precision.mT),
        factors.shift @ a.mT,
        factors.log_scale.sum(-1),
        a.shape[1],
        site_id,
    )


def _row_marginals(a: Float[Tensor, "m n"], site: Site, cavity: Site) -> tuple[Tensor, Tensor]:
    """Mean and variance of s_i = a_i' v under the posterior of site and cavity, [t, n]."""
    precision = site.precision + cavity.precision
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    inner, _ = cholesky(eye + precision, "I + site precision")
    w = solve_lower(inner, a.expand(len(inner), *a.shape))
    centre = solve_lower(inner, (site.shift + cavity.shift)[..., None])
    return (w.mT @ centre)[..., 0], w.square().sum(-2)


def _row_cavities(
    mean: Tensor, variance: Tensor, factors: RowFactors, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of s without `power` of its own factor, and where these are a Gaussian's."""
    precision = 1.0 / variance - power * factors.precision
    fine = precision > 1e-10
    out = 1.0 / torch.where(fine, precision, torch.ones_like(precision))
    return out * (mean / variance - power * factors.shift), out, fine


def _sweep(
    likelihood: GaussianLikelihood | OffsetLikelihood,
    y: Tensor,
    residual: Tensor,
    mean: Tensor,
    variance: Tensor,
    factors: RowFactors,
    power: float,
    damping: float,
) -> RowFactors:
    out_mean, out_variance, fine = _row_cavities(mean, variance, factors, power)
    _, first, second = _tilted(likelihood, y, out_mean, out_variance + residual, power)
    new_variance = out_variance + out_variance.square() * second
    new_mean = out_mean + out_variance * first
    fine = fine & (new_variance > 0)
    safe = torch.where(fine, new_variance, torch.ones_like(new_variance))
    precision = (1.0 / safe - 1.0 / out_variance) / power
    shift = (new_mean / safe - out_mean / out_variance) / power
    move = lambda new, old: torch.where(fine, old + damping * (new - old), old)  # noqa: E731
    return RowFactors(move(precision, factors.precision), move(shift, factors.shift), factors.log_scale)


def _with_scales(
    likelihood: GaussianLikelihood | OffsetLikelihood,
    y: Tensor,
    residual: Tensor,
    mean: Tensor,
    variance: Tensor,
    factors: RowFactors,
    power: float,
) -> RowFactors:
    """Factors with the scales that make their product's integral the power-EP evidence."""
    out_mean, out_variance, _ = _row_cavities(mean, variance, factors, power)
    value, _, _ = _tilted(likelihood, y, out_mean, out_variance + residual, power)
    volume = lambda m, v: 0.5 * (2.0 * math.pi * v).log() + 0.5 * m.square() / v  # noqa: E731
    scale = (value + volume(out_mean, out_variance) - volume(mean, variance)) / power
    return factors._replace(log_scale=scale)


def _tilted(
    likelihood: GaussianLikelihood | OffsetLikelihood, y: Tensor, mean: Tensor, variance: Tensor, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log of the integral of N(f; mean, variance) p(y | f)^power, and its first two derivatives in the mean."""
    if isinstance(likelihood, GaussianLikelihood):
        noise = likelihood.noise
        spread = variance + noise / power
        error = y.mT - mean
        constant = 0.5 * (1.0 - power) * (2.0 * math.pi * noise).log() - 0.5 * math.log(power)
        value = constant - 0.5 * (2.0 * math.pi * spread).log() - 0.5 * error.square() / spread
        return value, error / spread, (-1.0 / spread).expand_as(mean)
    nodes, weights = _nodes(mean)
    root = variance.sqrt()
    logs = power * likelihood.log_density(y, mean + root * nodes) + weights.log()
    value = torch.logsumexp(logs, dim=0)
    shares = (logs - value).exp()
    e1, e2 = (shares * nodes).sum(0), (shares * nodes.square()).sum(0)
    first = e1 / root
    return value, first, (e2 - 1.0 - e1.square()) / variance


def _nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    shape = (-1,) + (1,) * like.ndim
    return (
        torch.from_numpy(nodes).to(like).reshape(shape),
        torch.from_numpy(weights / weights.sum()).to(like).reshape(shape),
    )
