"""Algebra of natural parameters relative to the prior N(0, I): full Gaussians and diagonal ones.

A site has precision [t, m, m] (full) or [t, m] (diagonal) and shift [t, m]; with the prior it gives the posterior of
covariance (I + precision)^-1 and mean (I + precision)^-1 shift, for each of t functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.basis import Site
from fspace.inference.numerics import solve_lower


@dataclass(frozen=True)
class Form:
    """What natural parameters of a basis look like: t functions of m coordinates each, full or diagonal."""

    functions: int
    size: int
    diagonal: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a site."""
        shift = (self.functions, self.size)
        precision = shift if self.diagonal else (*shift, self.size)
        return {"precision": precision, "shift": shift, "log_scale": (self.functions,)}

    def empty(self, basis_id: str, site_id: str) -> Site:
        """The site that says nothing."""
        precision, shift, log_scale = (torch.zeros(s, dtype=torch.float64) for s in self.shapes.values())
        return Site(basis_id, precision, shift, log_scale, 0, site_id)


def is_diagonal(site: Site) -> bool:
    """Whether the precision holds variances alone."""
    return site.precision.ndim == site.shift.ndim


def proper_factor(precision: Tensor, diagonal: bool) -> Tensor | None:
    """Cholesky factor of I + precision (its root where diagonal), or None where that is not positive definite."""
    if diagonal:
        total = 1.0 + precision
        return total.sqrt() if bool((total > 0).all()) else None
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    factor, info = torch.linalg.cholesky_ex(eye + precision)
    return factor if not bool(info.any()) and bool(factor.isfinite().all()) else None


def nonnegative(precision: Tensor, diagonal: bool) -> bool:
    """Whether the precision is positive semi-definite up to 1e-6 of the prior's precision."""
    if diagonal:
        return bool((precision >= 0).all())
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return not bool(torch.linalg.cholesky_ex(precision + 1e-6 * eye).info.any())


def factor_of(site: Site) -> Tensor:
    """`proper_factor` of a site. Raises NumericalError where there is no posterior."""
    factor = proper_factor(site.precision, is_diagonal(site))
    if factor is None:
        raise NumericalError(
            f"The product of prior and site {site.site_id!r} is no Gaussian: I + precision is not positive definite. "
            "Take away the site that was put last, or put it again with a smaller step."
        )
    return factor


def moments(site: Site) -> tuple[Float[Tensor, "t m"], Tensor]:
    """Mean [t, m] and covariance [t, m, m] (variances [t, m] where diagonal) of the posterior."""
    factor = factor_of(site)
    if is_diagonal(site):
        return _mean(site, factor), factor.square().reciprocal()
    return _mean(site, factor), torch.cholesky_inverse(factor)


def _mean(site: Site, factor: Tensor) -> Float[Tensor, "t m"]:
    if is_diagonal(site):
        return site.shift / factor.square()
    return torch.cholesky_solve(site.shift[..., None], factor)[..., 0]


def log_normaliser(site: Site) -> float:
    """Log evidence (nats) of the product of the prior and the site: log of the integral of N(v; 0, I) t(v)."""
    factor = factor_of(site)
    if is_diagonal(site):
        centre, log_root = site.shift / factor, factor.log().sum(-1)
    else:
        centre = solve_lower(factor, site.shift[..., None])[..., 0]
        log_root = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (site.log_scale + 0.5 * centre.square().sum(-1) - log_root).sum().item()


def divergence(one: Site, other: Site) -> float:
    """KL divergence (nats) of the posterior that `one` gives from the posterior that `other` gives."""
    first, second = factor_of(one), factor_of(other)
    mean = _mean(one, first) - _mean(other, second)
    if is_diagonal(one):
        ratio = (second / first).square()
        quadratic = (second * mean).square().sum()
        return 0.5 * (ratio.sum() - ratio.numel() - ratio.log().sum() + quadratic).item()
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    spread = second.mT @ solve_lower(first, eye).mT  # its squares sum to tr(other^-1 covariance of one)
    logs = (first.diagonal(dim1=-2, dim2=-1).log() - second.diagonal(dim1=-2, dim2=-1).log()).sum()
    quadratic = (second.mT @ mean[..., None]).square().sum()
    return (0.5 * (spread.square().sum() - mean.numel() + quadratic) + logs).item()


def contribution(total: Site, site: Site) -> float:
    """How many of the posterior's t m degrees of freedom the site determines: tr((I + total)^-1 site).

    The contributions of all sites and of the prior, tr((I + total)^-1), sum to t m.
    """
    factor = factor_of(total)
    if is_diagonal(site):
        return (site.precision / factor.square()).sum().item()
    return torch.cholesky_solve(site.precision, factor).diagonal(dim1=-2, dim2=-1).sum().item()


def scaled(site: Site, by: float) -> Site:
    """t(v)^by."""
    return replace(site, precision=by * site.precision, shift=by * site.shift, log_scale=by * site.log_scale)


def between(old: Site, new: Site, step: float) -> Site:
    """The site `step` of the way from `old` to `new`, with the names and the count of `new`."""
    return replace(
        new,
        precision=old.precision + step * (new.precision - old.precision),
        shift=old.shift + step * (new.shift - old.shift),
        log_scale=old.log_scale + step * (new.log_scale - old.log_scale),
    )


def without(total: Site, site: Site, site_id: str) -> Site:
    """total / site: what is left of a product when one factor is taken out."""
    return replace(
        total,
        precision=total.precision - site.precision,
        shift=total.shift - site.shift,
        log_scale=total.log_scale - site.log_scale,
        count=total.count - site.count,
        site_id=site_id,
    )


class Total:
    """The product of many sites, kept as a sum and the rounding errors of that sum (Neumaier 1974).

    Adding sites and taking them away in any order leaves what a fresh sum of the rest gives, to the last places:
    a plain running sum would keep the rounding of a large site that has gone.
    """

    def __init__(self, form: Form, basis_id: str):
        self._empty = form.empty(basis_id, "total")
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in form.shapes.items()}
        self._errors = {name: torch.zeros_like(value) for name, value in self._sums.items()}
        self.count = 0

    def add(self, site: Site, sign: int = 1) -> None:
        """Put a factor in (sign 1), or take it out again (-1)."""
        for name in self._sums:
            value, before = sign * getattr(site, name), self._sums[name]
            after = before + value
            moved = after - before
            self._errors[name] = self._errors[name] + (before - (after - moved)) + (value - moved)
            self._sums[name] = after
        self.count += sign * site.count

    def site(self) -> Site:
        """The product as one site."""
        precision, shift, log_scale = (self._sums[name] + self._errors[name] for name in self._sums)
        return Site(self._empty.basis_id, precision, shift, log_scale, self.count, self._empty.site_id)

    def changed(self, old: Site | None, new: Site | None) -> Total:
        """A copy with `new` in place of `old`."""
        copy = object.__new__(Total)
        copy._empty, copy.count = self._empty, self.count
        copy._sums, copy._errors = dict(self._sums), dict(self._errors)
        if old is not None:
            copy.add(old, -1)
        if new is not None:
            copy.add(new)
        return copy
