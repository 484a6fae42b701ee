"""Sites of any likelihood by natural gradients: over all rows for a fixed basis, or over minibatches along with kernel
parameters.

Every row says beta_i and s_i about its own function value, and with a_i = L^-1 k_u(x_i) a batch of B of N rows moves
the running site t(v) = exp(b'v - v' Lambda v / 2) by
    Lambda <- (1 - r) Lambda + r N/B sum beta_i a_i a_i',    b <- (1 - r) b + r N/B sum s_i a_i,
    beta_i = -2 g2_i,    s_i = g1_i + beta_i m_i,
with g1, g2 the derivatives of E_q log p(y_i | f_i) in the marginal mean m_i and variance of f_i (likelihoods.py). Only
non-negative multiples of a a' are ever added, so Lambda is positive semi-definite. For Gaussian noise beta = 1 / s2
and s = y / s2 whatever q is: all rows at rate 1 give the collapsed site in one step. For other likelihoods a step that
lowers the bound is taken back and tried at half the rate, so it cannot diverge.
Sources: Khan and Lin (2017), conjugate-computation variational inference; Adam, Chang, Khan and Solin (2021), dual
parameterization of sparse variational Gaussian processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import CHUNK
from fspace.inference.likelihoods import AnyLikelihood, expected_log_density, functions, local_terms
from fspace.inference.numerics import cholesky, cholesky_unseen, solve_lower
from fspace.inference.source import Inputs

PASSES = 40  # over all rows, at most
SLOWEST = 1e-3  # the smallest rate that is tried before a site counts as found


@dataclass(frozen=True)
class Rows:
    """Rows as a basis sees them. Shapes: v [m, n] whitened, prior [n] their variances, y [n, t], and weight [n], how
    often each row counts (None: once)."""

    v: Float[Tensor, "m n"]
    prior: Float[Tensor, " n"]
    y: Float[Tensor, "n t"]
    weight: Float[Tensor, " n"] | None = None

    def weighed(self, terms: Float[Tensor, "t n"]) -> Float[Tensor, "t n"]:
        """Terms of the rows, as often as they count."""
        return terms if self.weight is None else terms * self.weight

    @staticmethod
    def of(basis: Basis, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Rows:
        """Rows x [n, d] (or images, sequences)."""
        z = basis.embed(x)
        return Rows(basis.whiten(z), basis.prior_variance(z), y, weight)


class Marginals(NamedTuple):
    """Mean and variance of f at some rows, and the part a'Sa of the variance that inducing values account for."""

    mean: Float[Tensor, "t n"]
    variance: Float[Tensor, "t n"]
    known: Float[Tensor, "t n"]


def empty_site(basis: Basis, functions: int, site_id: str = "data") -> Site:
    """The site that says nothing, for natural steps to start from."""
    m = basis.inducing_inputs.shape[0]
    zeros = basis.factor.new_zeros(functions, m, m)
    return Site(basis.id, zeros, zeros[..., 0], zeros[:, 0, 0], 0, site_id)


def natural_step(
    site: Site, basis: Basis, x: Tensor, y: Float[Tensor, "n t"], total: int, rate: float
) -> Site:
    """The running site after one natural-gradient step on a batch x [n, d], y [n, t] of `total` rows.

    For Gaussian noise all rows and rate 1 make `collapsed.fit_site`. Raises OptionError for a site of another basis.
    Source: Adam et al. (2021).
    """
    _require_basis(site, basis)
    with torch.no_grad():
        return blend(site, batch_site(site, basis.likelihood, Rows.of(basis, x, y), total), rate)


def _require_basis(site: Site, basis: Basis) -> None:
    if site.basis_id != basis.id:
        raise OptionError(
            f"Site {site.site_id!r} belongs to basis {site.basis_id[:8]}, not {basis.id[:8]}; "
            "start from `empty_site` of this basis."
        )


def blend(site: Site, batch: Site, rate: float) -> Site:
    """(1 - rate) site + rate batch."""
    return replace(
        batch,
        precision=(1.0 - rate) * site.precision + rate * batch.precision,
        shift=(1.0 - rate) * site.shift + rate * batch.shift,
        log_scale=(1.0 - rate) * site.log_scale + rate * batch.log_scale,
    )


def batch_site(site: Site, likelihood: AnyLikelihood, rows: Rows, total: int) -> Site:
    """What `total` rows like these n would say, where the running `site` gives the posterior.

    log_scale is chosen so that the log evidence of the result is the evidence lower bound wherever this is a fixed
    point.
    """
    return _said(site, likelihood, rows, total, _marginals(site, rows, _inner(site)))[0]


def _said(
    site: Site, likelihood: AnyLikelihood, rows: Rows, total: int, at: Marginals
) -> tuple[Site, Float[Tensor, " t"]]:
    """The site of `batch_site`, and the expected log densities of the rows [t], summed; without a graph."""
    mean, variance, known = (part.detach() for part in at)
    value, slope, beta = (rows.weighed(part) for part in local_terms(likelihood, rows.y, mean, variance))
    target = slope + beta * mean
    scale = total / rows.y.shape[0]
    v = rows.v.detach()
    root = v * beta.sqrt()[:, None, :]
    rest = value - target * mean + 0.5 * beta * (mean.square() + known)
    said = replace(
        site,
        precision=scale * root @ root.mT,
        shift=scale * target @ v.mT,
        log_scale=scale * rest.sum(-1),
        count=total,
    )
    return said, value.sum(-1)


def bound_and_site(
    site: Site, likelihood: AnyLikelihood, rows: Rows, total: int
) -> tuple[Float[Tensor, ""], Site]:
    """`elbo`, differentiable, and `batch_site`, which is not, from one look at the rows."""
    inner = _inner(site, cholesky_unseen)
    at = _marginals(site, rows, inner)
    value = rows.weighed(expected_log_density(likelihood, rows.y, at.mean, at.variance))
    bound = total / rows.y.shape[0] * value.sum() - _divergence(site, inner).sum()
    return bound, _said(site, likelihood, rows, total, at)[0]


def elbo(site: Site, likelihood: AnyLikelihood, rows: Rows, total: int) -> Float[Tensor, ""]:
    """Evidence lower bound (nats, all outputs) of q(v) prop. to N(v; 0, I) t(v), the n rows standing for `total`.

    Differentiable; on a GPU NaN where a factorisation fails. Unbiased over random batches, and at the collapsed site
    the collapsed bound. Source: Hensman et al. (2013).
    """
    inner = _inner(site, cholesky_unseen)
    at = _marginals(site, rows, inner)
    value = rows.weighed(expected_log_density(likelihood, rows.y, at.mean, at.variance))
    return total / rows.y.shape[0] * value.sum() - _divergence(site, inner).sum()


def converge(
    basis: Basis,
    x: Inputs,
    y: Float[Tensor, "n t"],
    weight: Float[Tensor, " n"] | None = None,
    start: Site | None = None,
    cavity: Site | None = None,
    tolerance: float = 1e-5,
) -> tuple[Site, float]:
    """The site that all rows make together on a fixed basis, and the evidence lower bound (nats) it reaches.

    Passes over all rows in chunks, each a natural-gradient step; the bound never falls: a step that lowers it is taken
    back and tried at half the rate. It ends where a pass gains less than `tolerance` nats a row. start: where the
    passes begin; cavity: what other sites say, which stays as it is.
    Shapes: x [n, d] (or images, sequences), y [n, t], weight [n]. Raises NumericalError where the bound is not finite
    at the start, and where no step from an empty site raises it: the prior would pass for a posterior.
    """
    site = start if start is not None else empty_site(basis, functions(basis.likelihood))
    _require_basis(site, basis)
    best, best_value, best_said, rate = site, -math.inf, site, 1.0
    first = site
    with torch.no_grad():
        for _ in range(PASSES):
            said, value = _whole(basis, site, cavity, x, y, weight)
            if math.isfinite(value) and value >= best_value - 1e-10 * abs(best_value):
                gain = value - best_value
                best, best_value, best_said = site, value, said
                if gain < tolerance * len(y):
                    break
                rate = min(1.0, 2.0 * rate) if gain < math.inf else rate
            elif best_value == -math.inf:
                raise NumericalError(
                    f"The bound of {len(y)} rows is {value} where the site starts: the likelihood is not finite at "
                    "y. Check the units of y, or use another likelihood."
                )
            else:
                rate *= 0.5
                if rate < SLOWEST:
                    if start is None and best is first:
                        raise NumericalError(
                            f"No step from the prior raises the bound of {len(y)} rows ({best_value:.4g} nats): "
                            "nothing can be learned with this kernel as it is. Its variance is far too large, or the "
                            "inputs are not scaled; start it with a smaller variance, or take kernel='matern'."
                        )
                    break
            site = blend(best, best_said, rate)
    return best, best_value


@torch.no_grad()
def said_by_rows(
    basis: Basis,
    site: Site,
    cavity: Site,
    x: Inputs,
    y: Float[Tensor, "n t"],
    weight: Float[Tensor, " n"] | None = None,
) -> Site:
    """What all rows say where their `site` and the `cavity` of others give the posterior: where it is `site` itself,
    that is found."""
    return _whole(basis, site, cavity, x, y, weight)[0]


def _whole(
    basis: Basis, site: Site, cavity: Site | None, x: Inputs, y: Tensor, weight: Tensor | None
) -> tuple[Site, float]:
    """What all rows say where site and cavity give the posterior, and the bound of that posterior."""
    posterior = site if cavity is None else site + cavity
    inner = _inner(posterior)
    total: Site | None = None
    sums = []  # asked of the device once, at the end
    for rows in _parts(basis, x, y, weight):
        at = _marginals(posterior, rows, inner)
        part, expected = _said(posterior, basis.likelihood, rows, len(rows.y), at)
        sums.append(expected.sum())
        total = part if total is None else total + part
    assert total is not None
    if cavity is not None:  # relative to what the others say, not to the prior
        sums.append(_expected_log_site(cavity, posterior, inner))
    value = torch.stack(sums).sum() - _divergence(posterior, inner).sum()
    return replace(total, site_id=site.site_id), value.item()


def _parts(basis: Basis, x: Inputs, y: Tensor, weight: Tensor | None) -> Iterator[Rows]:
    for start in range(0, len(y), CHUNK):
        part = slice(start, start + CHUNK)
        yield Rows.of(basis, x[part], y[part], None if weight is None else weight[part])


def _expected_log_site(cavity: Site, posterior: Site, inner: Float[Tensor, "t m m"]) -> Float[Tensor, ""]:
    """E log t(v) of the cavity's factor under the posterior, without its constant."""
    mean = torch.cholesky_solve(posterior.shift[..., None], inner)
    spread = solve_lower(inner, cavity.precision)
    trace = solve_lower(inner, spread.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    quadratic = (mean.mT @ cavity.precision @ mean)[:, 0, 0]
    linear = (cavity.shift[:, None] @ mean)[:, 0, 0]
    return (linear - 0.5 * (quadratic + trace)).sum()


def marginals(site: Site, rows: Rows) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """Mean and variance of f at the rows where `site` gives the posterior."""
    at = _marginals(site, rows, _inner(site))
    return at.mean, at.variance


def _divergence(site: Site, inner: Float[Tensor, "t m m"]) -> Float[Tensor, " t"]:
    """KL divergence (nats) of q(v) from the prior."""
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    centre = torch.cholesky_solve(site.shift[..., None], inner)
    return (
        0.5 * (solve_lower(inner, eye).square().sum((-2, -1)) + centre.square().sum((-2, -1)))
        - 0.5 * inner.shape[-1]
        + inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    )


def _inner(site: Site, factorise: Callable[..., tuple[Tensor, Any]] = cholesky) -> Float[Tensor, "t m m"]:
    eye = torch.eye(site.shift.shape[-1], dtype=site.shift.dtype, device=site.shift.device)
    return factorise(eye + site.precision, "I + site precision")[0]


def _marginals(site: Site, rows: Rows, inner: Float[Tensor, "t m m"]) -> Marginals:
    w = solve_lower(inner, rows.v.expand(len(inner), *rows.v.shape))
    mean = (w.mT @ solve_lower(inner, site.shift[..., None]))[..., 0]
    known = w.square().sum(-2)
    return Marginals(mean, (rows.prior - rows.v.square().sum(0)).clamp(min=0.0) + known, known)


def moved(site: Site, across: Float[Tensor, "m k"]) -> Site:
    """The same factor of u in other whitened coordinates, v = across v'. Shapes: across [m, k] -> site of size k.

    With across = L_old^-1 L_new it stays put as a function of u while the kernel moves under it; with
    L_old^-1 K_old,new L_new^-T it is read off other inducing values.
    """
    return replace(
        site,
        precision=across.mT @ site.precision @ across,
        shift=(across.mT @ site.shift[..., None])[..., 0],
    )
