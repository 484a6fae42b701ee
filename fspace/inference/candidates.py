"""The models a regression may choose from, how each is fitted, and how the data decide between them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float, Int
from sklearn.preprocessing import PowerTransformer, StandardScaler
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.exact import leave_one_out
from fspace.inference.finish import (
    Finished,
    finish_exact,
    finish_sparse,
    log_density,
    vary_exact,
)
from fspace.inference.gp import GPPosterior, Scaling, yeo_johnson
from fspace.inference.network import INDUCING, fit_network
from fspace.inference.numerics import seeded
from fspace.inference.optimise import Record, fit_exact, gaussian_likelihood
from fspace.inference.sites import fit_sites
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.kernels.extractors import MLP
from fspace.kernels.neural import NeuralKernel

EXACT_ROWS = 2000  # up to here the exact posterior, above it the collapsed one ("auto")
SUBSET = 1000  # rows on which a plain kernel's parameters are learned at first
STEPS, REFINEMENTS = 60, 15  # of L-BFGS, on these and then on all
FEATURES = 8
FEWEST_FOR_DEEP = 300  # below it too few rows are held out to see a network fail on one row in fifty
FEWEST_FOR_VARYING = 50
SITE_STEPS = 1500  # about as many minibatches as train the kernel by sites
NEGLIGIBLE = 0.02  # a smaller weight in the mixture is not worth its predictions


@dataclass(frozen=True)
class Plan:
    """What every candidate needs to know. y is standardised [n, t]; x is encoded, in the units of the data [n, d].

    tolerance: inducing inputs stop where they leave this share of the prior variance unexplained. vary: whether the
    noise varies over the inputs (None: the data decide). likelihood: where the noise starts and how it is
    constrained, for each output; None for a default.
    """

    x: Tensor
    y: Float[Tensor, "n t"]
    y_shift: Tensor
    y_scale: Tensor
    vector: bool
    exact: bool
    sites: bool
    inducing: int
    tolerance: float
    vary: bool | None
    likelihood: GaussianLikelihood | None
    dtype: torch.dtype
    seed: int
    record: Record

    @property
    def held_out(self) -> Int[Tensor, " h"]:
        """Rows that no kernel parameter is learned from: a fifth of small tables, a tenth of large ones."""
        n = len(self.y)
        generator = torch.Generator().manual_seed(self.seed)
        count = max(1, min(5000, n // 5 if n <= EXACT_ROWS else n // 10))
        return torch.randperm(n, generator=generator)[:count].to(self.y.device)

    def start_likelihood(self) -> GaussianLikelihood:
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
        """Mean log density of unseen rows."""
        return self.densities.mean().item()


@dataclass(frozen=True)
class Choice:
    """What to predict with: candidates, their weights, and how it came to that (for `choice_`)."""

    fits: list[Fitted]
    weights: Float[Tensor, " k"]
    report: dict[str, Any]


def input_scaling(x: Float[np.ndarray, "n d"], warp: bool) -> dict[str, np.ndarray]:
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
    scaler = StandardScaler().fit(x)
    return {"unit": unit, "power": power, "shift": scaler.mean_, "scale": scaler.scale_}


def named_kernel(name: str, d: int) -> Kernel:
    """An ARD kernel with variance by name: "matern" (5/2), "rbf", or "neural" (infinitely wide ReLU network)."""
    if name == "neural":
        return NeuralKernel(depth=2, ard_num_dims=d).double()
    base = RBFKernel(ard_num_dims=d) if name == "rbf" else MaternKernel(nu=2.5, ard_num_dims=d)
    kernel = ScaleKernel(base).double()
    base.lengthscale = math.sqrt(d)
    return kernel


def deep_kernel(d: int, activation: str, dtype: torch.dtype) -> DeepKernel:
    """A network of three layers of 128 into eight features, under an ARD Matern-5/2 kernel."""
    extractor = MLP(d, hidden=(128, 128, 128), out_features=FEATURES, activation=activation).to(dtype)
    return DeepKernel(extractor, named_kernel("matern", FEATURES))


def _scaled(plan: Plan, scaling: dict[str, np.ndarray]) -> tuple[Tensor, Scaling]:
    parts = {k: torch.as_tensor(v, dtype=torch.float64, device=plan.x.device) for k, v in scaling.items()}
    full = Scaling(**parts, y_shift=plan.y_shift, y_scale=plan.y_scale)
    return full.inputs(plan.x), full


def fit_plain(plan: Plan, kernel: Kernel, scaling: dict[str, np.ndarray], name: str) -> list[Fitted]:
    """A kernel on the inputs themselves: parameters by the exact evidence of all rows, or of some where there are many.

    Returns the exact posterior with constant noise, and the one with varying noise, as `plan.vary` asks; or the
    collapsed posterior, whose noise the held-out rows decide on.
    """
    x, full = _scaled(plan, scaling)
    kernel, likelihood = kernel.to(x.device), plan.start_likelihood()
    uninterrupted = True
    if plan.sites:
        _learn_by_sites(plan, kernel, likelihood, x, plan.seed)
    else:
        uninterrupted = _learn_plain(plan, kernel, likelihood, x, name)

    def fitted(done: Finished, name: str) -> Fitted:
        posterior = GPPosterior(done.basis, done.site, full, plan.vector)
        return Fitted(name, posterior, done.densities, done.log_evidence)

    if not plan.exact:
        return [fitted(_sparse(plan, kernel, likelihood, x, plan.inducing), name)]
    constant = finish_exact(kernel, likelihood, x, plan.y)
    may_vary = plan.vary is not False and len(x) >= FEWEST_FOR_VARYING
    if not (may_vary and uninterrupted):
        return [fitted(constant, name)]
    varying = fitted(vary_exact(constant, x, plan.y, plan.seed), f"{name}, varying noise")
    return [varying] if plan.vary else [fitted(constant, name), varying]


def _learn_plain(plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, name: str) -> bool:
    """Parameters by the exact evidence: of a few rows first, which is quick, then from there of all where the posterior
    is exact. A sparse one is served better by the few: the collapsed bound of all rows, with as many inducing inputs
    as it has time for, ends in longer lengthscales and more noise. Returns False after Ctrl-C."""
    rest = _shuffled(plan, torch.arange(len(x), device=x.device) if plan.exact else _rest(plan))
    rows = rest[:SUBSET]
    done = fit_exact(kernel, likelihood, embed(kernel, x[rows]), plan.y[rows], STEPS, plan.record, name)
    if not (done and plan.exact) or len(rest) <= SUBSET:
        return done
    return fit_exact(kernel, likelihood, embed(kernel, x), plan.y, REFINEMENTS, plan.record, name)


def _learn_by_sites(plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, seed: int) -> None:
    """Parameters from minibatches of all rows that are not held out, by natural-gradient sites."""
    rest = _rest(plan)
    batch = min(1024, len(rest))
    epochs = max(3, min(200, SITE_STEPS * batch // len(rest)))
    generator = torch.Generator().manual_seed(seed)
    most = min(plan.inducing, INDUCING)
    fit_sites(kernel, likelihood, x[rest], plan.y[rest], most, epochs, batch, generator, plan.record)


def _shuffled(plan: Plan, rows: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(plan.seed)).to(rows.device)]


def _rest(plan: Plan) -> Int[Tensor, " r"]:
    """Rows that are not held out."""
    rest = torch.ones(len(plan.y), dtype=torch.bool, device=plan.y.device)
    rest[plan.held_out] = False
    return rest.nonzero()[:, 0]


def _sparse(plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, inducing: int) -> Finished:
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
    x, full = _scaled(plan, scaling)
    seed = plan.seed + 7919 * member
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        activation = "silu" if member % 2 == 0 else "relu"
        kernel = deep_kernel(x.shape[1], activation, plan.dtype) if kernel is None else copy.deepcopy(kernel)
    kernel, likelihood = kernel.to(x.device), plan.start_likelihood()
    if plan.sites:
        _learn_by_sites(plan, kernel, likelihood, x, seed)
    else:
        fit_network(kernel, likelihood, x, plan.y, plan.held_out, plan.record, name, generator)
    kernel.fix_statistics(x)
    done = _sparse(plan, kernel, likelihood, x, len(x) if plan.exact else plan.inducing)
    posterior = GPPosterior(done.basis, done.site, full, plan.vector)
    return Fitted(name, posterior, done.densities, done.log_evidence)


def stacking_weights(densities: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
    """Weights of a mixture of predictions that maximise the log density of n unseen rows.

    The problem is concave; expectation maximisation climbs it. Source: Yao, Vehtari, Simpson and Gelman (2018), eq. 4.
    """
    weights = torch.full(
        (len(densities),), 1.0 / len(densities), dtype=torch.float64, device=densities.device
    )
    for _ in range(300):
        weights = torch.softmax(densities + weights.log()[:, None], dim=0).mean(dim=1)
    weights = torch.where(weights < NEGLIGIBLE, torch.zeros_like(weights), weights)
    return weights / weights.sum()


def _mix(densities: Float[Tensor, "k n"], weights: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
    return torch.logsumexp(densities + weights.log()[:, None], dim=0)


def _stack(densities: Float[Tensor, "k n"], what: list[Fitted]) -> tuple[list[Fitted], Tensor, Tensor]:
    """Those with weight, their weights, and the log densities of their mixture."""
    weights = stacking_weights(densities)
    return [fit for fit, w in zip(what, weights) if w > 0], weights[weights > 0], _mix(densities, weights)


def choose(plan: Plan, members: int) -> Choice:
    """Fit plain kernels on standardised and on warped inputs and deep kernels on the better of the two, and stack them
    by how they predict rows they have not seen. Deep kernels come in where they predict held-out rows better than
    the plain ones by more than a standard error."""
    x = plan.x.cpu().numpy()
    scalings = {"matern": input_scaling(x, warp=False), "matern, warped inputs": input_scaling(x, warp=True)}
    if np.all(scalings["matern, warped inputs"]["power"] == 1.0):
        del scalings["matern, warped inputs"]
    stopped, told = False, plan.record

    def record(**entry: Any) -> None:
        nonlocal stopped
        stopped = stopped or bool(entry.get("interrupted"))
        told(**entry)

    plan = replace(plan, record=record)
    plain: list[Fitted] = []
    if plan.exact:
        for name, scaling in scalings.items():
            if not (stopped and plain):
                plain += fit_plain(plan, named_kernel("matern", x.shape[1]), scaling, name)
        best = max(plain, key=lambda fit: fit.score).name.removesuffix(", varying noise")
    else:
        best = _better_scaling(plan, scalings)
        plain = fit_plain(plan, named_kernel("matern", x.shape[1]), scalings[best], best)
    scores = {fit.name: fit.score for fit in plain}
    kept, weights, density = _stack(torch.stack([fit.densities for fit in plain]), plain)
    on_held_out = density[plan.held_out] if plan.exact else density
    deep: list[Fitted] = []
    gain, error = 0.0, 0.0
    for k in range(members if len(x) >= FEWEST_FOR_DEEP else 0):
        if stopped:
            break
        try:
            deep.append(fit_deep(replace(plan, exact=False), None, scalings[best], k, f"deep {k + 1}"))
        except NumericalError as failure:
            plan.record(stage=f"deep {k + 1}", failed=str(failure))
            break
        densities = torch.stack([on_held_out, *(fit.densities for fit in deep)])
        together = stacking_weights(densities)
        difference = _mix(densities, together) - on_held_out
        gain, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
        scores[deep[-1].name] = deep[-1].score
        if gain <= error:
            break
    if deep and gain > error:
        used = [fit for fit, w in zip(deep, together[1:]) if w > 0]
        weights = torch.cat([together[0] * weights, together[1:][together[1:] > 0]])
        kept = [fit for fit, w in zip([*kept, *used], weights) if w > 0]
        weights = weights[weights > 0]
    heaviest = kept[int(weights.argmax())].name
    report = {
        "scores": scores,
        "chosen": heaviest,
        "weights": {fit.name: w for fit, w in zip(kept, weights.tolist())},
        "gain_of_deep": {"mean": gain, "standard_error": error},
        "unit": "log density a row, standardised y",
    }
    return Choice(kept, weights, report)


def _better_scaling(plan: Plan, scalings: dict[str, dict[str, np.ndarray]]) -> str:
    """The scaling of the inputs under which a plain kernel predicts left-out rows better, from a part of the rows."""
    scores = {}
    rows = _shuffled(plan, _rest(plan))[: SUBSET // 2]
    for name, scaling in scalings.items():
        x, _ = _scaled(plan, scaling)
        kernel, likelihood = named_kernel("matern", x.shape[1]).to(x.device), plan.start_likelihood()
        z, y = x[rows], plan.y[rows]
        fit_exact(kernel, likelihood, z, y, STEPS // 2, plan.record, name)
        with torch.no_grad():
            k = covariance(embedded_kernel(kernel), z)
            moments = leave_one_out(k, y, likelihood.noise[..., 0])
        scores[name] = log_density(y, *moments).mean().item()
    return max(scores, key=lambda name: scores[name])
