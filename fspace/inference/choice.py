"""How the data decide between candidates: they are stacked by how they predict rows they have not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.candidates import (
    STEPS,
    SUBSET,
    Fitted,
    Plan,
    fit_deep,
    fit_plain,
    input_scaling,
    named_kernel,
    scaled,
)
from fspace.inference.exact import leave_one_out
from fspace.inference.finish import log_density
from fspace.inference.optimise import fit_exact
from fspace.kernels.deep import embedded_kernel
from fspace.kernels.evaluate import covariance

FEWEST_FOR_DEEP = 300  # below it too few rows are held out to see a network fail on a few rows
NEGLIGIBLE = 0.02  # a smaller weight in the mixture is not worth its predictions


@dataclass(frozen=True)
class Choice:
    """What to predict with: candidates, their weights, and how it came to that (for `choice_`)."""

    fits: list[Fitted]
    weights: Float[Tensor, " k"]
    report: dict[str, Any]


def stacking_weights(densities: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
    """Weights of a mixture of predictions that maximise the log density of n unseen rows.

    The problem is concave; expectation maximisation climbs it. Source: Yao, Vehtari, Simpson and Gelman (2018), eq. 4.
    """
    weights = torch.full(
        (len(densities),), 1.0 / len(densities), dtype=torch.float64, device=densities.device
    )
    if densities.shape[1] == 0:
        return weights
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
    assert isinstance(plan.x, Tensor)  # images and sequences need a kernel that the user names
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
                plain += fit_plain(plan, named_kernel("matern", x.shape[1], not plan.gaussian), scaling, name)
        best = max(plain, key=lambda fit: fit.score).name.removesuffix(", varying noise")
    else:
        best = _better_scaling(plan, scalings) if plan.gaussian else "matern"
        plain = fit_plain(plan, named_kernel("matern", x.shape[1], not plan.gaussian), scalings[best], best)
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
        "unit": "log density a row, standardised y" if plan.gaussian else "log density a row",
    }
    return Choice(kept, weights, report)


def _better_scaling(plan: Plan, scalings: dict[str, dict[str, np.ndarray]]) -> str:
    """The scaling of the inputs under which a plain kernel predicts left-out rows better, from a part of the rows."""
    scores = {}
    rows = plan.shuffled(plan.rest)[: SUBSET // 2]
    for name, scaling in scalings.items():
        x, _ = scaled(plan, scaling)
        kernel, likelihood = (
            named_kernel("matern", x.shape[1], not plan.gaussian).to(x.device),
            plan.start_likelihood(),
        )
        z, y = x[rows], plan.y[rows]
        fit_exact(kernel, likelihood, z, y, STEPS // 2, plan.record, name)
        with torch.no_grad():
            k = covariance(embedded_kernel(kernel), z)
            moments = leave_one_out(k, y, likelihood.noise[..., 0])
        scores[name] = log_density(y, *moments).mean().item()
    return max(scores, key=lambda name: scores[name])
