"""The models a regression may choose from, how each is fitted, and how the data decide between them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from sklearn.preprocessing import PowerTransformer, StandardScaler
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.train import Record, finish, fit_exact, fit_network, gaussian_likelihood, loo_scores
from fspace.kernels.deep import DeepKernel, embed
from fspace.kernels.extractors import ResidualMLP
from fspace.kernels.neural import NeuralKernel

EXACT_ROWS = 2000  # up to here the exact posterior, above it the collapsed one ("auto")
SUBSET = 1200  # rows on which kernel parameters are learned when there are more
FEATURES = 8


@dataclass(frozen=True)
class Plan:
    """What every candidate needs to know. y is standardised [n, t]; x is encoded, in the units of the data [n, d]."""

    x: Tensor
    y: Float[Tensor, "n t"]
    y_shift: Tensor
    y_scale: Tensor
    vector: bool
    exact: bool
    inducing: int
    dtype: torch.dtype
    seed: int
    steps: int
    record: Record


@dataclass(frozen=True)
class Fitted:
    """A candidate after fitting: its posterior, its score on rows it did not see (nats a row), its log evidence."""

    posterior: GPPosterior
    score: float
    log_evidence: float


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
        from fspace.inference.gp import yeo_johnson

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


def deep_kernel(d: int, dtype: torch.dtype) -> DeepKernel:
    """Residual spectral-normalised network into a Matern-5/2 kernel, plus a plain ARD Matern-5/2 kernel."""
    extractor = ResidualMLP(d, width=64, depth=2, out_features=FEATURES).to(dtype)
    base, plain = named_kernel("matern", FEATURES), named_kernel("matern", d)
    base.outputscale = 0.5
    plain.outputscale = 0.5
    return DeepKernel(extractor, base, plain)


def _held_out(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator)[: max(1, round(fraction * n))]


def _scaled(plan: Plan, scaling: dict[str, np.ndarray]) -> tuple[Tensor, Scaling]:
    parts = {k: torch.as_tensor(v, dtype=torch.float64, device=plan.x.device) for k, v in scaling.items()}
    full = Scaling(**parts, y_shift=plan.y_shift, y_scale=plan.y_scale)
    return full.inputs(plan.x), full


def _finish(
    plan: Plan, kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, scaling: Scaling, score: float
) -> Fitted:
    basis, site, evidence = finish(kernel, likelihood, x, plan.y, plan.inducing, plan.exact)
    return Fitted(GPPosterior(basis, site, scaling, plan.vector), score, evidence)


def fit_plain(plan: Plan, kernel: Kernel, scaling: dict[str, np.ndarray], stage: str) -> Fitted:
    """A kernel on the inputs themselves: exact evidence on all rows, or on a subset of them when there are many.

    Scored by closed-form leave-one-out on the rows the parameters were learned from.
    """
    x, full = _scaled(plan, scaling)
    rows = torch.arange(len(x))
    if len(x) > max(SUBSET, EXACT_ROWS if plan.exact else SUBSET) and not (
        plan.exact and x.device.type == "cuda"
    ):
        generator = torch.Generator().manual_seed(plan.seed)
        rows = torch.randperm(len(x), generator=generator)[:SUBSET]
    rows = rows.to(x.device)
    likelihood = gaussian_likelihood(plan.y.shape[1], 0.1, x.device)
    kernel = kernel.to(x.device)
    fit_exact(kernel, likelihood, embed(kernel, x[rows]), plan.y[rows], plan.steps, plan.record, stage)
    score = loo_scores(kernel, likelihood, x[rows], plan.y[rows]).mean().item()
    return _finish(plan, kernel, likelihood, x, full, score)


def fit_deep(
    plan: Plan, kernel: DeepKernel | None, scaling: dict[str, np.ndarray], member: int, stage: str
) -> Fitted:
    """One deep kernel: trained with a tenth of the rows held out, then the site on all rows.

    Scored on the held-out part, which also said when to stop.
    """
    x, full = _scaled(plan, scaling)
    generator = torch.Generator().manual_seed(plan.seed + 7919 * member)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed + 7919 * member)
        kernel = deep_kernel(x.shape[1], plan.dtype) if kernel is None else copy.deepcopy(kernel)
    kernel = kernel.to(x.device)
    likelihood = gaussian_likelihood(plan.y.shape[1], 0.1, x.device)
    held_out = _held_out(len(x), 0.1 if len(x) > 400 else 0.2, generator).to(x.device)
    steps = 800 if len(x) <= 4096 else 1500
    score = fit_network(kernel, likelihood, x, plan.y, held_out, steps, plan.record, stage, generator)
    kernel.fix_statistics(x)
    return _finish(plan, kernel, likelihood, x, full, score * plan.y.shape[1])


def choose(plan: Plan, members: int) -> tuple[list[Fitted], dict[str, Any]]:
    """Fit plain kernels on standardised and on warped inputs and deep kernels on the better of the two; keep what
    predicts unseen rows best. A deep kernel must beat the plain one by more than noise on the same held-out rows."""
    x = plan.x.cpu().numpy()
    scalings = {"matern": input_scaling(x, warp=False), "matern-warped": input_scaling(x, warp=True)}
    fits: dict[str, Fitted] = {}
    for name, scaling in scalings.items():
        if name == "matern-warped" and np.all(scaling["power"] == 1.0):
            continue
        fits[name] = fit_plain(plan, named_kernel("matern", x.shape[1]), scaling, name)
    best = max(fits, key=lambda name: fits[name].score)
    scores = {name: fit.score for name, fit in fits.items()}
    chosen = [fits[best]]
    picked = best
    if len(x) >= 60:
        try:
            margin, deep = _against_plain(plan, scalings[best], members)
            scores["deep"] = scores[best] + margin[0]
            if margin[0] > margin[1]:
                chosen, picked = deep, "deep"
        except NumericalError as error:
            scores["deep"] = -math.inf
            plan.record(stage="deep", failed=str(error))
    return chosen, {"scores": scores, "chosen": picked, "unit": "log density a row, standardised y"}


def _against_plain(
    plan: Plan, scaling: dict[str, np.ndarray], members: int
) -> tuple[tuple[float, float], list[Fitted]]:
    """Gain of deep over plain on rows neither was fitted on (mean and standard error), and the deep members.

    The plain kernel is refitted without those rows so that the two are compared on equal terms.
    """
    n = len(plan.x)
    generator = torch.Generator().manual_seed(plan.seed + 1)
    test = _held_out(n, 0.2 if n < 5000 else 0.1, generator)
    rest = torch.ones(n, dtype=torch.bool)
    rest[test] = False
    device = plan.x.device
    part = Plan(
        **{
            **plan.__dict__,
            "x": plan.x[rest.to(device)],
            "y": plan.y[rest.to(device)],
            "record": lambda **kw: plan.record(**{**kw, "stage": f"compare {kw['stage']}"}),
        }
    )
    x, y = plan.x[test.to(device)], plan.y[test.to(device)]

    def score(fit: Fitted) -> Tensor:
        predicted = fit.posterior.observed(x)
        y_units = y * plan.y_scale + plan.y_shift
        return predicted.log_prob(y_units[:, 0] if plan.vector else y_units).reshape(len(x), -1).sum(-1)

    plain = score(fit_plain(part, named_kernel("matern", x.shape[1]), scaling, "plain"))
    trial = score(fit_deep(part, None, scaling, 0, "deep"))
    gain = (trial - plain).cpu()
    error = gain.std().item() / math.sqrt(len(gain))
    if gain.mean().item() <= error:
        return (gain.mean().item(), error), []
    fits = [fit_deep(plan, None, scaling, k, f"deep {k + 1}") for k in range(members)]
    return (gain.mean().item(), error), fits
