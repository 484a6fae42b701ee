"""The models that may predict, and how each is fitted (who is chosen: choice.py)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float, Int
from sklearn.preprocessing import PowerTransformer
from torch import Tensor

from fspace.inference.basis import Basis
from fspace.inference.coregion import Rotation, learn_rotation
from fspace.inference.finish import (
    Finished,
    finish_exact,
    finish_sites,
    finish_sparse,
    inducing_inputs,
    vary_exact,
)
from fspace.inference.gp import GPPosterior, Scaling, yeo_johnson
from fspace.inference.likelihoods import AnyLikelihood, OffsetLikelihood, functions
from fspace.inference.network import INDUCING, fit_network, fit_network_sites
from fspace.inference.nongaussian import LikelihoodPosterior
from fspace.inference.numerics import seeded
from fspace.inference.optimise import Record, fit_exact, gaussian_likelihood
from fspace.inference.site_training import fit_sites
from fspace.inference.source import Inputs, RowSource
from fspace.kernels.deep import DeepKernel, embed
from fspace.kernels.extractors import MLP
from fspace.kernels.neural import NeuralKernel

EXACT_ROWS = 2000  # up to here the exact posterior, above it the collapsed one ("auto")
SUBSET = 1000  # rows on which a plain kernel's parameters are learned at first
STEPS, REFINEMENTS = 60, 15  # of L-BFGS, on these and then on all
FEATURES = 8
FEWEST_FOR_VARYING = 50
FEWEST_FOR_HOLDING_OUT = 50
SITE_STEPS = 1500  # about as many minibatches as train the kernel by sites
LINK_STEPS = 400  # where the likelihood is not Gaussian
SIGNAL = 4.0  # variance at first of a function before a link


@dataclass(frozen=True)
class Plan:
    """What every candidate needs to know. y is standardised [n, t]; x is encoded, in the units of the data [n, d].

    tolerance: inducing inputs stop where they leave this share of the prior variance unexplained. vary: whether the
    noise varies over the inputs (None: the data decide). likelihood: where the noise starts, for each output (None
    for a default), or what stands in for Gaussian noise; y is then as that likelihood has it. weight [n]: how often
    each row counts, where the likelihood is not Gaussian. coregionalised: whether the outputs' correlations are
    learned, which turns y.
    """

    x: Inputs
    y: Float[Tensor, "n t"]
    y_shift: Tensor
    y_scale: Tensor
    vector: bool
    exact: bool
    sites: bool
    inducing: int
    tolerance: float
    vary: bool | None
    likelihood: AnyLikelihood | None
    dtype: torch.dtype
    seed: int
    record: Record
    weight: Float[Tensor, " n"] | None = None
    coregionalised: bool = False

    @property
    def held_out(self) -> Int[Tensor, " h"]:
        """Rows that no kernel parameter is learned from: a fifth of small tables, a tenth of large ones; of very small
        ones whose likelihood is not Gaussian, none."""
        n = len(self.y)
        if not self.gaussian and n < FEWEST_FOR_HOLDING_OUT:
            return torch.empty(0, dtype=torch.long, device=self.y.device)
        generator = torch.Generator().manual_seed(self.seed)
        count = max(1, min(5000, n // 5 if n <= EXACT_ROWS else n // 10))
        return torch.randperm(n, generator=generator)[:count].to(self.y.device)

    @property
    def rest(self) -> Int[Tensor, " r"]:
        """Rows that are not held out."""
        rest = torch.ones(len(self.y), dtype=torch.bool, device=self.y.device)
        rest[self.held_out] = False
        return rest.nonzero()[:, 0]

    def shuffled(self, rows: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
        """Rows in a random order that is the same for all candidates."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return rows[order.to(rows.device)]

    @property
    def gaussian(self) -> bool:
        """Whether the noise is Gaussian, so that posteriors are in closed form."""
        return not isinstance(self.likelihood, OffsetLikelihood)

    def start_likelihood(self) -> Any:
        """A new likelihood for a candidate to fit."""
        if self.likelihood is not None:
            return copy.deepcopy(self.likelihood).to(self.y.device)
        return gaussian_likelihood(self.y.shape[1], 0.1, self.y.device)


@dataclass(frozen=True)
class Fitted:
    """A candidate: its posterior, the log densities of rows it had not seen [k] (nats, standardised y), its log
    evidence."""

    name: str
    posterior: GPPosterior
    densities: Float[Tensor, " k"]
    log_evidence: float

    @property
    def score(self) -> float:
        """Mean log density of unseen rows; NaN where there were none."""
        return self.densities.mean().item()


def input_scaling(
    x: Float[np.ndarray, "n d"], warp: bool, weight: Float[np.ndarray, " n"] | None = None
) -> dict[str, np.ndarray]:
    """Standardise columns, after a Yeo-Johnson warp where asked for; constant columns stay at zero.

    The warp is fitted by scikit-learn on columns brought to unit size only where they are far from it, because its
    likelihood overflows there.
    """
    spread = x.std(axis=0)
    unit = np.where((spread > 1e-3) & (spread < 1e6), 1.0, np.maximum(spread, 1e-300))
    unit = np.where(
        spread > 1e-12 * (np.abs(x).max(axis=0) + 1e-300), unit, np.maximum(np.abs(x).max(axis=0), 1.0)
    )
    x, power = x / unit, np.ones(x.shape[1])
    if warp:
        busy = [j for j in range(x.shape[1]) if len(np.unique(x[:, j])) > 2 and abs(x[:, j]).max() < 1e8]
        for j in busy:
            power[j] = PowerTransformer(standardize=False).fit(x[:, [j]]).lambdas_[0]
        power = np.clip(power, -5.0, 5.0)
        x = yeo_johnson(torch.from_numpy(x), torch.from_numpy(power)).numpy()
    shift = np.average(x, axis=0, weights=weight)
    # of the rows around their mean: scikit-learn's weighted variance of a constant column may come out negative
    spread = np.sqrt(np.average(np.square(x - shift), axis=0, weights=weight))
    scale = np.where(spread > len(x) * np.finfo(float).eps * np.abs(shift), spread, 1.0)
    return {"unit": unit, "power": power, "shift": shift, "scale": scale}


def named_kernel(name: str, d: int, link: bool = False) -> Kernel:
    """A kernel by name: with one lengthscale a column and a variance "matern" (5/2), "rbf" or "neural" (infinitely
    wide ReLU network), or "additive", the sum of a Matern-5/2 kernel for every column.

    link: for functions before a link, whose size is not known beforehand as that of standardised y is: the variance
    starts higher, and its logarithm is what is learned.
    """

    def scaled(base: Kernel) -> ScaleKernel:
        if not link:
            return ScaleKernel(base).double()
        logarithm = Positive(transform=torch.exp, inv_transform=torch.log)
        kernel = ScaleKernel(base, outputscale_constraint=logarithm).double()
        kernel.outputscale = SIGNAL
        return kernel

    if name == "neural":
        return NeuralKernel(depth=2, ard_num_dims=d).double()
    if name == "additive":
        return AdditiveKernel(*(scaled(MaternKernel(nu=2.5, active_dims=(i,))) for i in range(d)))
    base = RBFKernel(ard_num_dims=d) if name == "rbf" else MaternKernel(nu=2.5, ard_num_dims=d)
    kernel = scaled(base)
    base.lengthscale = math.sqrt(d)
    return kernel


def deep_kernel(d: int, activation: str, dtype: torch.dtype, link: bool = False) -> DeepKernel:
    """A network of three layers of 128 into eight features, under an ARD Matern-5/2 kernel."""
    extractor = MLP(d, hidden=(128, 128, 128), out_features=FEATURES, activation=activation).to(dtype)
    return DeepKernel(extractor, named_kernel("matern", FEATURES, link))


def scaled(plan: Plan, scaling: dict[str, np.ndarray]) -> tuple[Any, Scaling]:
    """The rows as a kernel sees them, and the scaling that made them so."""
    parts = {k: torch.as_tensor(v, dtype=torch.float64, device=plan.x.device) for k, v in scaling.items()}
    full = Scaling(**parts, y_shift=plan.y_shift, y_scale=plan.y_scale)
    if isinstance(plan.x, RowSource):
        return plan.x.changed(full.inputs), full
    return full.inputs(plan.x), full


def fit_plain(plan: Plan, kernel: Kernel, scaling: dict[str, np.ndarray], name: str) -> list[Fitted]:
    """A kernel on the inputs themselves: parameters by the exact evidence of all rows, or of some where there are many.

    Returns the exact posterior with constant noise, and the one with varying noise, as `plan.vary` asks; or the
    collapsed posterior, whose noise the held-out rows decide on.
    """
    x, full = scaled(plan, scaling)
    kernel, likelihood = kernel.to(x.device), plan.start_likelihood()
    if not plan.gaussian:
        _learn_by_sites(plan, kernel, likelihood, x, plan.seed, name)
        return [_any_likelihood(plan, kernel, likelihood, x, full, name)]
    uninterrupted = True
    if plan.sites:
        _learn_by_sites(plan, kernel, likelihood, x, plan.seed, name)
    else:
        uninterrupted = _learn_plain(plan, kernel, likelihood, x, name)
        if list(likelihood.named_priors()):  # it has done its part
            likelihood = gaussian_likelihood(plan.y.shape[1], likelihood.noise.detach()[:, 0], x.device)

    if plan.coregionalised:
        plan, likelihood, full = _rotated(plan, kernel, likelihood, x, full, plan.inducing)

    def fitted(done: Finished, name: str) -> Fitted:
        return _fitted(plan, done, full, name)

    if not plan.exact:
        return [fitted(_sparse(plan, kernel, likelihood, x, plan.inducing), name)]
    constant = finish_exact(kernel, likelihood, x, plan.y)
    may_vary = plan.vary is not False and len(x) >= FEWEST_FOR_VARYING
    if not (may_vary and uninterrupted):
        return [fitted(constant, name)]
    varying = fitted(vary_exact(constant, x, plan.y, plan.seed), f"{name}, varying noise")
    return [varying] if plan.vary else [fitted(constant, name), varying]


def _fitted(plan: Plan, done: Finished, full: Scaling, name: str) -> Fitted:
    """A candidate with Gaussian noise; densities and evidence are of standardised y, also where the outputs are
    rotated."""
    site = full.with_jacobian(done.site)
    gain = (site.log_scale - done.site.log_scale).sum().item()  # log |det| of the rotation, of all rows
    posterior = GPPosterior(done.basis, site, full, plan.vector)
    return Fitted(name, posterior, done.densities + gain / site.count, done.log_evidence + gain)


def _rotated(
    plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Inputs, full: Scaling, most: int
) -> tuple[Plan, GaussianLikelihood, Scaling]:
    """Plan, noise and scaling of rotated outputs, which are independent of each other where y's are not; as they came
    where the outputs do not go together.

    Learned at the kernel as it is, from the rows of an exact posterior or, of a sparse one, those not held out. (The
    kernel learned anew from the rotated outputs was on no table better by more than chance, and on some worse.)
    """
    kernel.eval()
    if plan.exact:
        assert isinstance(x, Tensor)  # an exact posterior is of rows in memory
        basis, seen, y = Basis(kernel, embed(kernel, x).detach(), likelihood), x, plan.y
    else:
        basis = Basis(kernel, inducing_inputs(kernel, x, most, plan.tolerance), likelihood)
        seen, y = x[plan.rest], plan.y[plan.rest]
    rotation = learn_rotation(basis, seen, y, Rotation.none(likelihood))
    if rotation is None:
        return plan, likelihood, full
    turned = replace(plan, y=rotation.rotated(plan.y))
    return turned, rotation.likelihood(), replace(full, mixing=rotation.mixing)


def _learn_plain(plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Inputs, name: str) -> bool:
    """Parameters by the exact evidence: of a few rows first, which is quick, then from there of all where the posterior
    is exact. A sparse one is served better by the few: the collapsed bound of all rows, with as many inducing inputs
    as it has time for, ends in longer lengthscales and more noise. Returns False after Ctrl-C."""
    rest = plan.shuffled(torch.arange(len(x), device=x.device) if plan.exact else plan.rest)
    rows = rest[:SUBSET]
    done = fit_exact(kernel, likelihood, embed(kernel, x[rows]), plan.y[rows], STEPS, plan.record, name)
    if not (done and plan.exact) or len(rest) <= SUBSET:
        return done
    assert isinstance(x, Tensor)  # an exact posterior is of rows in memory
    return fit_exact(kernel, likelihood, embed(kernel, x), plan.y, REFINEMENTS, plan.record, name)


def _learn_by_sites(
    plan: Plan, kernel: Kernel, likelihood: AnyLikelihood, x: Inputs, seed: int, name: str
) -> None:
    """Parameters from minibatches of all rows that are not held out, by natural-gradient sites."""
    rest = plan.rest
    batch = min(1024 if functions(likelihood) == 1 else 512, len(rest))
    steps = SITE_STEPS if plan.gaussian else LINK_STEPS
    epochs = max(3, min(200, steps * batch // len(rest)))
    generator = torch.Generator().manual_seed(seed)
    most = min(plan.inducing, INDUCING)
    weight = None if plan.weight is None else plan.weight[rest]
    stage = "sites" if plan.gaussian else name
    fit_sites(
        kernel,
        likelihood,
        x[rest],
        plan.y[rest],
        most,
        epochs,
        batch,
        generator,
        plan.record,
        weight,
        stage=stage,
    )


def _any_likelihood(
    plan: Plan, kernel: Kernel, likelihood: OffsetLikelihood, x: Inputs, full: Scaling, name: str
) -> Fitted:
    """The posterior by sites of all rows, under a likelihood that is not Gaussian."""
    done = finish_sites(
        kernel, likelihood, x, plan.y, plan.weight, plan.held_out, plan.inducing, plan.tolerance
    )
    full = replace(full, y_shift=full.y_shift + full.y_scale * likelihood.offset.detach())
    return Fitted(
        name,
        LikelihoodPosterior(done.basis, done.site, full, plan.vector),
        done.densities,
        done.log_evidence,
    )


def _sparse(plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Inputs, inducing: int) -> Finished:
    vary = plan.vary if len(plan.held_out) >= FEWEST_FOR_VARYING else False
    return finish_sparse(
        kernel, likelihood, x, plan.y, plan.held_out, inducing, plan.tolerance, vary, plan.seed
    )


def fit_deep(
    plan: Plan, kernel: DeepKernel | None, scaling: dict[str, np.ndarray], member: int, name: str
) -> Fitted:
    """One deep kernel: trained without the held-out rows, its noise set by them, its posterior of all rows.

    Members differ in their seed and, for the default network, in its activation: smooth (SiLU) first, then ReLU.
    """
    x, full = scaled(plan, scaling)
    seed = plan.seed + 7919 * member
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        activation = "silu" if member % 2 == 0 else "relu"
        kernel = (
            deep_kernel(x.shape[1], activation, plan.dtype, not plan.gaussian)
            if kernel is None
            else copy.deepcopy(kernel)
        )
    kernel, likelihood = kernel.to(x.device), plan.start_likelihood()
    if not plan.gaussian:
        fit_network_sites(
            kernel,
            likelihood,
            x,
            plan.y,
            plan.weight,
            plan.rest,
            plan.held_out,
            plan.record,
            name,
            generator,
        )
        kernel.fix_statistics(x)
        return _any_likelihood(plan, kernel, likelihood, x, full, name)
    if plan.sites:
        _learn_by_sites(plan, kernel, likelihood, x, seed, name)
    else:
        fit_network(kernel, likelihood, x, plan.y, plan.held_out, plan.record, name, generator)
    kernel.fix_statistics(x)
    most = len(x) if plan.exact else plan.inducing
    if plan.coregionalised:
        # not by all rows, as where the posterior is exact: the network has learned from these
        plan, likelihood, full = _rotated(replace(plan, exact=False), kernel, likelihood, x, full, most)
    return _fitted(plan, _sparse(plan, kernel, likelihood, x, most), full, name)
