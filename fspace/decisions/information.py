"""What one more observation is worth, in utility, before it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.decisions.risks import Risk
from fspace.decisions.sources import posterior_of, rows_of
from fspace.decisions.utility import best_action
from fspace.predictive import Categorical
from fspace.predictive_base import check_whole


@dataclass(frozen=True)
class InformationValue:
    """Expected gain in utility from one more y at each of k places, summed over the rows decided about, and its
    standard error. Shapes [k]. Compare it with what the observation costs, in the units of the utility."""

    value: Float[Tensor, " k"]
    standard_error: Float[Tensor, " k"]


@torch.no_grad()
def value_of_information(
    model: Any,
    x: Any,
    actions: Any,
    utility: Callable[[Any, Tensor], Tensor],
    at: Any,
    risk: Risk | None = None,
    outcomes: int = 64,
    samples: int = 1024,
    seed: int = 0,
) -> InformationValue:
    """E_y max_a E[u | y at `at`] - max_a E[u] for the decisions at x [n, d]; at [k, d], one observation each.

    Outcomes y are drawn from the predictive (of classes all are enumerated) and the posterior conditioned on each.
    Closed-form utilities have no inner error; for others the same samples are used before and after, and with few of
    them the value is biased upwards. Raises what `best_action` does, and OptionError where the posterior cannot be
    conditioned. Source: Raiffa and Schlaifer (1961), preposterior analysis.
    """
    check_whole("outcomes", outcomes, 2)
    posterior, rows, places = posterior_of(model), rows_of(model, x), rows_of(model, at, "at")

    def best(of: Any) -> Tensor:
        return best_action(of, rows, actions, utility, risk, samples, seed).value.sum()

    before, values, errors = best(posterior), [], []
    for k, place in enumerate(places):
        predictive = posterior.observed(place[None])
        if isinstance(predictive, Categorical):
            weights = predictive.probs[0].to(torch.float64)
            labels = torch.arange(len(weights))
            gains = torch.stack([best(posterior.condition(place[None], y[None])) for y in labels]) - before
            values.append(weights @ gains)
            errors.append(torch.zeros_like(before))
            continue
        drawn = predictive.rsample(outcomes, (seed + k) % 2**32)
        gains = torch.stack([best(posterior.condition(place[None], y)) for y in drawn]) - before
        values.append(gains.mean())
        errors.append(gains.std() / math.sqrt(outcomes))
    return InformationValue(torch.stack(values), torch.stack(errors))
