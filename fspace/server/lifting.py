"""A site moved to another basis, what it says there, and how much of it is lost on the way.

A site is a statement t(a) about the values a that the function takes at its own inducing inputs Z_a. On a basis with
inducing values u it becomes exp E[log t(a) | u], in two steps. First the kernel: t(a) stays put as a function of a
while the prior under it becomes the target's. Then the inducing inputs: a = A u + error with A = K_au K_uu^-1, so that
    Lambda' = A' T A,    log_scale' = log_scale - 1/2 tr T (K_aa - A K_ua),
with T the precision of the site in a. Where the target's inducing inputs hold all of Z_a, nothing is lost.
Source: Bui, Nguyen and Turner (2017), streaming sparse Gaussian process approximations, section 3 (their bound with the
old posterior over the old prior as the site).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError, ServerError, SiteRefused
from fspace.inference.basis import Basis, Site
from fspace.inference.likelihoods import OffsetLikelihood, functions
from fspace.inference.numerics import solve_lower
from fspace.inference.sites import moved
from fspace.kernels.deep import DeepKernel, SplitKernel, embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.server.core import Receipt, form_of
from fspace.server.natural import divergence, factor_of
from fspace.server.wire import check_site

# nats an observation, where f stays open by twice the noise; benchmarks/experts.py shows both sides of it
THRESHOLD = 1.0


@dataclass(frozen=True, eq=False)
class Lift:
    """A lifted site and what the way cost, in nats, outputs summed.

    information: 1/2 log|I + Lambda| of the site at its own inducing inputs, under the target's kernel. lost: how much
    of it the lifted site has no more. trace: what the target's inducing inputs leave open of what the site says; the
    log evidence falls by it, and it is at least `lost`. unexplained: what the site's own inducing inputs had left open
    of its rows, 1/2 sum of (k_ii - q_ii) / noise; None where the site does not tell, and too much where its
    rows have faded. kernel_gap: KL divergence of the
    site's posterior at its own inducing inputs under the target's kernel from that under its own; 0 for one kernel.
    """

    site: Site
    information: float
    lost: float
    trace: float
    unexplained: float | None
    kernel_gap: float

    @property
    def shortfall(self) -> float:
        """unexplained + trace for one observation (one output of one row): half the variance of f that stays open once
        inducing values are known, first the site's own, then the target's, over the noise.

        For Gaussian noise and one kernel, on average over y, the log evidence of the lifted site falls short of that of
        its rows by between once and twice this an observation. Source: Burt, Rasmussen and van der Wilk (2019), for
        one step.
        """
        observations = max(self.site.count, 1) * len(self.site.log_scale)
        return (self.trace + (self.unexplained or 0.0)) / observations


@torch.no_grad()
def lift(site: Site, own: Basis, target: Basis) -> Lift:
    """A site of basis `own` as a site of basis `target`, and what is lost.

    One lifted site and the prior give a lower bound of the evidence of its rows wherever the kernel is the same; of
    several, as of any streaming bound, the sum is an approximation. Another kernel in the target: taken is that the
    rows reached the function through a alone, so what the old kernel assumed between the inducing inputs stays in the
    site; `kernel_gap` measures how much the change of kernel moves the site's own posterior.
    Raises OptionError for a site of another basis, likelihoods of another kind, and inducing inputs in another
    embedding; SiteRefused for values that are no site.
    """
    if site.basis_id != own.id:
        raise OptionError(
            f"Site {site.site_id!r} belongs to basis {site.basis_id[:8]}, not {own.id[:8]}; give the basis that it was "
            "made on."
        )
    check_site(site, form_of(own))
    require_alike(own, target, f"Site {site.site_id!r}")
    _require_one_embedding(own, target, site.site_id)
    unexplained = _unexplained(site, own)
    information = _information(site)
    if own.id == target.id:
        return Lift(site, information, 0.0, 0.0, unexplained, 0.0)
    here = replace(target, inducing_inputs=own.inducing_inputs)
    gap = 0.0
    if not torch.equal(here.factor, own.factor):
        across = solve_lower(own.factor, here.factor)
        changed = moved(site, across)
        eye = torch.eye(len(across), dtype=across.dtype, device=across.device)
        # the posterior under its own prior, N(0, I) in the old coordinates, as a site in the new ones
        before = replace(changed, precision=changed.precision + across.mT @ across - eye)
        site, gap, information = changed, divergence(changed, before), _information(changed)
    across = solve_lower(here.factor, solve_lower(target.factor, _shared(here, target).mT).mT)
    open_part = torch.eye(len(across), dtype=across.dtype, device=across.device) - across @ across.mT
    trace = 0.5 * (site.precision * open_part).sum((-2, -1))
    there = replace(moved(site, across), basis_id=target.id, log_scale=site.log_scale - trace)
    lost = information - _information(there)
    return Lift(there, information, lost, trace.sum().item(), unexplained, gap)


def put_lifted(server: Any, site: Site, own: Basis, threshold: float = THRESHOLD) -> tuple[Receipt, Lift]:
    """Put a worker's site, made on a basis of its own, on the server's (the open epoch's if there is one).

    server: a `PosteriorServer` or `RemoteServer`. own: a basis in the units of the server's. Raises SiteRefused,
    reason `lossy`, where `Lift.shortfall` is above `threshold` nats; else as `lift` and the server's `put`.
    """
    check_threshold(threshold)
    basis, _ = server.basis()
    if not isinstance(basis, Basis):
        raise ServerError(
            "The server holds a posterior over weights; only sites over inducing values can be lifted."
        )
    lifted = lift(site, own, basis)
    if lifted.shortfall > threshold:
        raise SiteRefused(
            "lossy",
            f"Site {site.site_id!r} falls {lifted.shortfall:.3g} nats an observation short on basis {basis.id[:8]} "
            f"({figures(lifted)}), above threshold={threshold:g}; make it on inducing inputs nearer the basis', or on "
            "the basis itself.",
        )
    return server.put(lifted.site), lifted


def figures(lifted: Lift) -> str:
    """What a lift cost, in words."""
    own = "not known" if lifted.unexplained is None else f"{lifted.unexplained:.3g}"
    return (
        f"{lifted.site.count} rows; nats left open by its own inducing inputs: {own}, by the target's: "
        f"{lifted.trace:.3g}; information lost: {lifted.lost:.3g} of {lifted.information:.3g}"
    )


def check_threshold(threshold: float) -> None:
    """Raises OptionError unless threshold is above 0 (infinite: none)."""
    if not threshold > 0:
        raise OptionError(f"threshold={threshold!r} must be a number of nats above 0 (math.inf: none).")


def require_alike(one: Basis, other: Basis, whose: str) -> None:
    """Raises OptionError unless both bases are of the same kind of observations of equally many functions."""
    kinds = [_kind(basis) for basis in (one, other)]
    if kinds[0] != kinds[1]:
        raise OptionError(
            f"{whose} has {kinds[0]}, the other basis {kinds[1]}; the likelihood must be of one kind."
        )
    counts = [functions(basis.likelihood) for basis in (one, other)]
    if counts[0] != counts[1]:
        raise OptionError(f"{whose} is about {counts[0]} functions, the other basis about {counts[1]}.")
    a, b = one.likelihood, other.likelihood
    if isinstance(a, OffsetLikelihood) and isinstance(b, OffsetLikelihood):
        if not torch.equal(a.offset, b.offset):
            raise OptionError(
                f"{whose} is about functions around {a.offset.tolist()}, the other basis around {b.offset.tolist()}; "
                "make both with one offset."
            )


def _kind(basis: Basis) -> str:
    inner = basis.likelihood.inner if isinstance(basis.likelihood, OffsetLikelihood) else basis.likelihood
    return type(inner).__name__


def _require_one_embedding(own: Basis, target: Basis, site_id: str) -> None:
    a, b = own.kernel, target.kernel
    same = own.inducing_inputs.shape[1] == target.inducing_inputs.shape[1]
    if isinstance(a, DeepKernel) or isinstance(b, DeepKernel):
        same = same and isinstance(a, DeepKernel) and isinstance(b, DeepKernel) and _same_network(a, b)
    if not same:
        raise OptionError(
            f"Site {site_id!r} has its inducing inputs in another embedding than the target; only the kernel on the "
            "embedding may differ, not the network before it."
        )


def _same_network(a: DeepKernel, b: DeepKernel) -> bool:
    for one, other in ((a.extractor, b.extractor), (a.norm, b.norm)):
        first, second = one.state_dict(), other.state_dict()
        if type(one) is not type(other) or first.keys() != second.keys():
            return False
        if any(not torch.equal(first[name], second[name]) for name in first):
            return False
    return (a.plain is None) == (b.plain is None)


def _information(site: Site) -> float:
    return factor_of(site).diagonal(dim1=-2, dim2=-1).log().sum().item()


def _shared(here: Basis, target: Basis) -> Float[Tensor, "k m"]:
    """Covariance of the inducing values of two bases of one kernel. The jitter is part of a value, and an input that
    both have is one value: else a target that holds all of another's inputs would not hold all that it says."""
    cross = covariance(embedded_kernel(target.kernel), here.inducing_inputs, target.inducing_inputs)
    equal = (here.inducing_inputs[:, None] == target.inducing_inputs).all(-1)
    jitter = min(
        basis.jitter * basis.prior_variance(basis.inducing_inputs).mean().item() for basis in (here, target)
    )
    return cross + jitter * equal


def _unexplained(site: Site, own: Basis) -> float | None:
    """1/2 sum of (k_ii - q_ii) / noise over the rows behind a site, from its trace and the number of its rows: needs
    constant Gaussian noise, a constant prior variance, and rows that count once and in full (a faded site has fewer
    than its count says, and so more here than is true)."""
    if not isinstance(own.likelihood, GaussianLikelihood) or own.noise_function is not None:
        return None
    prior = own.prior_variance(own.inducing_inputs)
    constant = bool((prior - prior[0]).abs().max() <= 1e-12 * prior[0])
    if not constant or not _has_constant_variance(embedded_kernel(own.kernel)):
        return None
    all_of_it = 0.5 * site.count * (prior[0] / own.noise).sum().item()
    value = all_of_it - 0.5 * site.precision.diagonal(dim1=-2, dim2=-1).sum().item()
    rounding = 1e-9 * all_of_it
    return None if value < -rounding or not math.isfinite(value) else max(value, 0.0)


def _has_constant_variance(kernel: Kernel) -> bool:
    if isinstance(kernel, SplitKernel):
        return all(_has_constant_variance(part) for part in (kernel.base, kernel.plain))
    if isinstance(kernel, ScaleKernel):
        return _has_constant_variance(kernel.base_kernel)
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        return all(_has_constant_variance(part) for part in kernel.kernels)
    return bool(kernel.is_stationary)
