"""One posterior from several contributors' posteriors: the product of their sites, or a product of experts.

Sites of one basis multiply, which is the pooled posterior. Sites of other bases are lifted (lifting.py). Products of
experts combine, at every input by itself, the predictives of f: with means m_k, variances s_k, prior variances p_k,
    precision = sum w_k / s_k  (+ prior),    mean = sum w_k m_k / s_k / precision,
    poe    w_k = 1                                                                     Hinton (2002)
    gpoe   w_k = h_k / sum h_j, h_k = 1/2 log(p_k / s_k), the fall of entropy          Cao and Fleet (2014)
    bcm    w_k = 1, and the prior is taken out of every expert and put in once         Tresp (2000)
    rbcm   w_k = h_k, and likewise                                                     Deisenroth and Ng (2015)
At the level of f, not of y: with the noise in every s_k, all of these count it K times.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.gaussians import Gaussian
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.nongaussian import LikelihoodPosterior, posterior_of
from fspace.inference.sites import empty_site
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive_base import Predictive
from fspace.server.core import form_of, unit_scaling
from fspace.server.lifting import THRESHOLD, Lift, check_threshold, figures, lift, require_alike
from fspace.server.wire import check_site

POINTWISE = ("poe", "gpoe", "bcm", "rbcm")
METHODS = ("sites", "lifted", *POINTWISE)
LEAST = 1e-12  # of a variance relative to the prior's: what lies below is rounding


class PointwisePosterior(FunctionPosterior):
    """Experts whose predictives of f are combined at every input by itself; there is no joint posterior behind them.

    latent and observed give means and variances. Raises OptionError for draws, joint samples and covariances: a rule
    for single inputs says nothing about how two go together.
    experts: posteriors in the units of one scaling. prior: that of the combination, and its noise. lifts: where
    experts stand in for sites that could not be lifted, what the lift of every site would have cost.
    """

    def __init__(
        self, experts: Sequence[GPPosterior], method: str, prior: GPPosterior, lifts: Sequence[Lift] = ()
    ):
        self.experts, self.method, self.prior, self.lifts = list(experts), method, prior, list(lifts)
        self.num_outputs, self.num_inputs = prior.num_outputs, prior.num_inputs

    def latent(self, x: Any) -> Gaussian:
        """Predictive of f at x [..., n, d], without a covariance. Raises NumericalError where it is no Gaussian."""
        level = self.prior.scaling.y_shift  # of no data, where all means are measured from
        level = level[0] if self.prior.vector else level
        at = [expert.latent(x) for expert in self.experts]
        means = torch.stack([each.mean for each in at]) - level
        priors = torch.stack([_prior_variance(expert, x) for expert in self.experts])
        variances = torch.maximum(torch.stack([each.variance for each in at]), LEAST * priors)
        mean, variance = combined(means, variances, priors, _prior_variance(self.prior, x), self.method)
        return Gaussian(level + mean, variance, outputs=at[0].outputs or 0)

    def observed(self, x: Any) -> Predictive:
        """Predictive of y at x [..., n, d]: f and the noise of the combination's basis; marginals alone."""
        latent = self.latent(x)
        if isinstance(self.prior, LikelihoodPosterior):
            return self.prior.given(latent)
        noise = self.prior.observed(x).aleatoric
        return Gaussian(latent.mean, latent.variance + noise, None, noise, latent.outputs or 0)

    def response(self, f: Tensor) -> Tensor:
        return self.prior.response(f)

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """There are no draws. Raises OptionError."""
        raise OptionError(
            f"A product of experts ({self.method}) knows every input by itself, so it has no functions to draw; use "
            "latent(x).mean and .variance, or combine the sites (method='sites' or 'lifted')."
        )


def _prior_variance(posterior: GPPosterior, x: Any) -> Tensor:
    """Of f before any data, y-shaped, in squared units of y."""
    variance = posterior.basis.prior_variance(posterior.embedded(posterior.numbers(x, "x")))
    scale = posterior.scaling.units.square().sum(-1)
    return variance * scale[0] if posterior.vector else variance[..., None] * scale


def combined(
    means: Float[Tensor, "k *y"],
    variances: Float[Tensor, "k *y"],
    priors: Float[Tensor, "k *y"],
    prior: Float[Tensor, "*y"],
    method: str,
) -> tuple[Float[Tensor, "*y"], Float[Tensor, "*y"]]:
    """Mean and variance of a product of k experts at every entry, for a prior mean of zero.

    Shapes: means, variances and the experts' prior variances [k, ...], the combination's prior variance [...]. Where
    all kernels are one, `bcm` and `rbcm` are the formulas of the papers; else each expert's own prior is taken out.
    gpoe where no expert has learned anything weighs all alike. Raises NumericalError where a precision is not positive.
    """
    fall = 0.5 * (priors.log() - variances.log())  # of entropy, nats
    if method == "gpoe":
        learned = fall.clamp(min=0.0)
        whole = learned.sum(0)
        weights = torch.where(whole > 0, learned / whole.where(whole > 0, 1.0), 1.0 / len(means))
    else:
        weights = fall if method == "rbcm" else torch.ones_like(fall)
    precision = (weights / variances).sum(0)
    if method in ("bcm", "rbcm"):
        precision = precision - (weights / priors).sum(0) + 1.0 / prior
    if not bool((precision > 0).all()):
        raise NumericalError(
            f"The {method} of {len(means)} experts is no Gaussian everywhere: its smallest precision is "
            f"{precision.min().item():.3g}, since an expert is less certain than the prior. Use 'gpoe'."
        )
    return (weights * means / variances).sum(0) / precision, 1.0 / precision


def combine(
    parts: Sequence[Any],
    method: str = "sites",
    target: Basis | None = None,
    threshold: float = THRESHOLD,
) -> FunctionPosterior:
    """One posterior from those of several contributors, who saw different rows of one thing.

    parts: (basis, site), in the units of the basis, or posteriors of one scaling. method: "sites" (one basis: the
    pooled posterior, exactly where noise is Gaussian), "lifted" (any bases: sites are moved to `target`; the ones
    whose `Lift.shortfall` is above `threshold` nats stay experts, combined with the posterior of all others by
    the robust Bayesian committee machine, with a warning that says so), "poe", "gpoe", "bcm", "rbcm" (marginals of f
    alone; see `PointwisePosterior`). target: the basis of the result; None: the first part's, for "lifted" with the
    inducing inputs of all parts. Raises OptionError for parts that do not go together.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r} does not exist; choose one of {', '.join(METHODS)}.")
    check_threshold(threshold)
    experts = [_read(part, k) for k, part in enumerate(parts)]
    if not experts:
        raise OptionError("There is nothing to combine: parts is empty.")
    first = experts[0]
    for k, other in enumerate(experts[1:], start=1):
        require_alike(other.basis, first.basis, f"Part {k}")
        _require_one_scaling(other.scaling, first.scaling, k)
    if target is not None:
        require_alike(target, first.basis, "The target")
    if method == "sites":
        return _pooled(experts, target)
    if method == "lifted":
        return _lifted(experts, _union(experts) if target is None else target, threshold)
    basis = first.basis if target is None else target
    return PointwisePosterior(experts, method, prior_of(basis, first.scaling, first.vector))


def prior_of(basis: Basis, scaling: Scaling, vector: bool = True) -> GPPosterior:
    """The posterior of no data."""
    return posterior_of(basis, empty_site(basis, form_of(basis).functions), scaling, vector)


def _read(part: Any, k: int) -> GPPosterior:
    if isinstance(part, GPPosterior):
        check_site(part.site, form_of(part.basis))
        return part
    pair = isinstance(part, tuple) and len(part) == 2
    if not pair or not isinstance(part[0], Basis) or not isinstance(part[1], Site):
        kind = type(part).__name__
        raise OptionError(f"Part {k} is a {kind}; give a pair (basis, site) or a Gaussian process posterior.")
    basis, site = part
    if site.basis_id != basis.id:
        raise OptionError(
            f"Part {k}: site {site.site_id!r} belongs to basis {site.basis_id[:8]}, not to {basis.id[:8]}."
        )
    check_site(site, form_of(basis))
    return posterior_of(basis, site, unit_scaling(basis))


def _require_one_scaling(one: Scaling, other: Scaling, k: int) -> None:
    for field in fields(Scaling):
        a, b = getattr(one, field.name), getattr(other, field.name)
        same = a is b if a is None or b is None else torch.equal(a, b)
        if not same:
            found = " and ".join("none" if value is None else str(value.tolist()) for value in (a, b))
            raise OptionError(
                f"Part {k} has another scaling than the first ({field.name}: {found}), so their "
                "priors are not of one thing; make all parts with one scaling (as `fspace.server.fit` does)."
            )


def _pooled(experts: Sequence[GPPosterior], target: Basis | None) -> GPPosterior:
    basis = experts[0].basis
    others = {expert.basis.id for expert in experts} | ({target.id} if target is not None else set())
    if others != {basis.id}:
        raise OptionError(
            f"The sites belong to {len(others)} bases, and only those of one can be multiplied; use method='lifted', "
            "or make them anew on one basis."
        )
    return posterior_of(basis, _named([e.site for e in experts]), experts[0].scaling, experts[0].vector)


def _lifted(experts: Sequence[GPPosterior], target: Basis, threshold: float) -> FunctionPosterior:
    scaling, vector = experts[0].scaling, experts[0].vector
    lifts = [lift(expert.site, expert.basis, target) for expert in experts]
    sites = [each.site for each in lifts if each.shortfall <= threshold]
    left = {k: each for k, each in enumerate(lifts) if each.shortfall > threshold}
    pooled = [posterior_of(target, _named(sites), scaling, vector)] if sites else []
    if not left:
        return pooled[0]
    worst = max(left, key=lambda k: left[k].shortfall)
    warnings.warn(
        f"{len(left)} of {len(lifts)} sites fall more than threshold={threshold:g} nats an observation short when "
        "lifted; they stay experts, combined by the robust Bayesian committee machine (marginals alone: no joint "
        f"samples, no draws). The worst: part {worst} ({experts[worst].site.site_id!r}), "
        f"{left[worst].shortfall:.3g} nats ({figures(left[worst])}).",
        stacklevel=3,
    )
    together = [*pooled, *(experts[k] for k in left)]
    if len(together) == 1:  # the committee machine of one expert is not that expert
        return together[0]
    return PointwisePosterior(together, "rbcm", prior_of(target, scaling, vector), lifts)


def _union(experts: Sequence[GPPosterior]) -> Basis:
    """The first part's basis with all parts' inducing inputs, each once."""
    basis = experts[0].basis
    for expert in experts[1:]:
        z, more = basis.inducing_inputs, expert.basis.inducing_inputs
        if z.shape[1] != more.shape[1]:
            raise OptionError(
                f"Inducing inputs have {z.shape[1]} and {more.shape[1]} columns; give a target basis."
            )
        new = ~(more[:, None] == z).all(-1).any(1)
        if bool(new.any()):
            basis = basis.grown(more[new])
    return basis


def _named(sites: Sequence[Site]) -> dict[str, Site]:
    """Sites by name; where a name is not the only one of its kind, with its place."""
    names = [site.site_id for site in sites]
    return {
        name if names.count(name) == 1 else f"{name} {k}": s for k, (name, s) in enumerate(zip(names, sites))
    }
