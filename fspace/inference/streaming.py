"""A posterior that goes on learning: sites come, go and fade, on inducing inputs that grow and are pruned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import solve_lower
from fspace.inference.sites import moved
from fspace.kernels.deep import embedded_kernel
from fspace.kernels.evaluate import covariance

UNEXPLAINED = 0.01  # share of a row's prior variance that inducing inputs may leave open before it joins them


def take_in(
    posterior: GPPosterior, x: Any, y: Any, site_id: Any, budget: int, discount: Any = 1.0
) -> GPPosterior:
    """The posterior after also seeing y at x [n, d] as a site of its own; time and memory are those of the batch.

    Rows that the inducing inputs explain badly join them; beyond `budget` the inducing inputs that the others explain
    best are dropped, and every site is read off the rest. discount multiplies what older sites say: below 1, old data
    fade. Raises OptionError for a site_id that is taken, a discount outside (0, 1], DataError for x or y that do not
    fit.
    """
    if not isinstance(site_id, str):
        raise OptionError(f"site={site_id!r} must be a name, text.")
    if site_id in posterior.sites:
        raise OptionError(f"There is a site {site_id!r} already; forget it first, or give another name.")
    if not isinstance(discount, int | float | np.number) or not 0 < discount <= 1:
        raise OptionError(f"discount={discount!r} must be a number above 0 and at most 1.")
    x = posterior.numbers(x, "x")
    z = posterior.embedded(x)
    basis, sites = posterior.basis, posterior.sites
    new = unexplained(basis, z, budget)
    if len(new):
        basis = basis.grown(new)
        sites = {name: site.padded(basis) for name, site in sites.items()}
    if len(basis.inducing_inputs) > budget:
        basis, sites = pruned(basis, sites, budget)
    if discount < 1:
        sites = {name: faded(site, float(discount)) for name, site in sites.items()}
    kept = posterior.with_sites(basis, sites)
    return kept.with_sites(basis, {**sites, site_id: kept.site_of(x, y, site_id)})


def forget(posterior: GPPosterior, site_id: Any) -> GPPosterior:
    """The posterior as if the rows of one site had never come. Raises OptionError for a site that is not there, and
    for the last one."""
    if not isinstance(site_id, str) or site_id not in posterior.sites:
        known = ", ".join(repr(name) for name in list(posterior.sites)[:10])
        raise OptionError(f"There is no site {site_id!r}; there are {known}.")
    if len(posterior.sites) == 1:
        raise OptionError(
            f"{site_id!r} is the only site: without it there is nothing but the prior. Fit anew."
        )
    rest = {name: site for name, site in posterior.sites.items() if name != site_id}
    return posterior.with_sites(posterior.basis, rest)


def faded(site: Site, discount: float) -> Site:
    """A site that says so much less: t(u)^discount."""
    return replace(
        site,
        precision=discount * site.precision,
        shift=discount * site.shift,
        log_scale=discount * site.log_scale,
        version=site.version + 1,
    )


@torch.no_grad()
def pruned(basis: Basis, sites: dict[str, Site], most: int) -> tuple[Basis, dict[str, Site]]:
    """The basis on at most so many of its inducing inputs, the greedily chosen ones, and the sites read off these by
    the conditional prior mean."""
    chosen = greedy_variance(embedded_kernel(basis.kernel), basis.inducing_inputs, most)
    smaller = replace(basis, inducing_inputs=basis.inducing_inputs[chosen])
    across = read_off(basis, smaller)
    return smaller, {name: replace(moved(site, across), basis_id=smaller.id) for name, site in sites.items()}


@torch.no_grad()
def read_off(basis: Basis, other: Basis) -> Float[Tensor, "m k"]:
    """What `moved` takes to read a site off the inducing values of another basis of the same kernel, by the conditional
    prior mean: exact where all inducing inputs are among the other's."""
    cross = covariance(embedded_kernel(basis.kernel), other.inducing_inputs, basis.inducing_inputs)
    return solve_lower(basis.factor, solve_lower(other.factor, cross).mT)


@torch.no_grad()
def unexplained(basis: Basis, z: Float[Tensor, "n p"], budget: int) -> Float[Tensor, "k p"]:
    """Rows to add to the inducing inputs, the greedily chosen ones of those that are badly explained."""
    prior = basis.prior_variance(z)
    left = prior - basis.whiten(z).square().sum(0)
    open_rows = z[left > UNEXPLAINED * prior]
    if len(open_rows) == 0:
        return open_rows
    return open_rows[greedy_variance(embedded_kernel(basis.kernel), open_rows, budget)]
