"""Monte Carlo dropout: inputs of layers are dropped at random in training, and in prediction as well.

It claims no posterior here: its spread is set by the rate, whatever the number of rows.
Source: Gal and Ghahramani (2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.distributions import Dropped
from fspace.inference.weights.ensemble import LEAST_HELD_OUT
from fspace.inference.weights.layer_calls import Call, by_row
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import Loss, held_out_rows, train

RATES = (0.002, 0.005, 0.01, 0.05, 0.1, 0.2)
FEW_ROWS_RATE = 0.05
JUDGED_BY = 32  # draws, in the choice of the rate


@dataclass(frozen=True)
class Dropout:
    """Monte Carlo dropout before every layer (of images: of whole channels).

    rate: None: of 0.002, 0.005, 0.01, 0.05, 0.1 and 0.2 the one whose predictive density of a fifth of the rows is
    greatest, which is then trained on all rows. decay: how often the log prior counts (the masks are what it is
    regularised by). It claims no posterior.
    """

    rate: float | None = None
    decay: float = 0.01
    name: ClassVar[str] = "dropout"

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < 1:
            raise OptionError(f"rate={self.rate!r} must lie strictly between 0 and 1, or be None.")

    def fit(self, problem: Problem) -> tuple[Dropped, NetworkLikelihood]:
        """The state and the rate."""
        problem.require_bayes(self.name)
        rate = self.rate
        if not self.decay >= 0:
            raise OptionError(f"decay={self.decay!r} must be at least 0.")
        known = None
        if rate is None and problem.n >= LEAST_HELD_OUT:
            rate, known = _best_rate(problem, self.decay)
        rate = problem.report.figures["rate"] = FEW_ROWS_RATE if rate is None else rate
        if known is not None and problem.report.interrupted:  # it has learned from most of the rows
            return _dropped(problem, known, rate), problem.likelihood
        rates = torch.tensor([rate], device=problem.x.device)
        found = train(problem, problem.start(1), _dropping(problem, rates, self.decay), "dropout")
        return _dropped(problem, found.theta[0], rate), problem.likelihood


def _best_rate(problem: Problem, decay: float) -> tuple[float, Float[Tensor, " q"]]:
    """The rate under which rows that were not learned from are most probable, and the state learned with it."""
    held_out = held_out_rows(problem, 1, 0.2)
    kept = ~held_out
    rates = torch.tensor(RATES, device=problem.x.device)
    start = problem.start(1).expand(len(RATES), -1).clone()
    found = train(problem, start, _dropping(problem, rates, decay, kept[0]), "dropout: the rate", stream=3)
    rows = held_out[0].nonzero()[:, 0]
    scores = []
    with torch.no_grad():
        for theta, rate in zip(found.theta, RATES):
            states = _dropped(problem, theta, rate).sample(JUDGED_BY, problem.generator_cpu(4))
            density = problem.log_likelihood(states, problem.x[rows], problem.y[rows])
            scores.append(torch.logsumexp(density, 0).mean().item() - math.log(JUDGED_BY))
    problem.report.figures["held_out_scores"] = dict(zip(map(str, RATES), scores))
    best = max(range(len(RATES)), key=lambda k: scores[k])
    return RATES[best], found.theta[best]


def _dropped(problem: Problem, theta: Float[Tensor, " q"], rate: float) -> Dropped:
    return Dropped(theta, rate, tuple((layer.weight[0], layer.shape) for layer in problem.network.layers))


def _dropping(problem: Problem, rates: Float[Tensor, " s"], decay: float, kept: Tensor | None = None) -> Loss:
    """Minus the log joint density a row, each row of each state under masks of its own."""
    generator = problem.generator(5)
    network = problem.network
    widths = [layer.shape[1] for layer in network.layers]

    def pass_(w: Tensor, x: Tensor, masks: list[Tensor]) -> Tensor:
        def drop(k: int, call: Call, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if weight.ndim == 2 and value.ndim > 2:
                raise OptionError(
                    "network: dropout is for linear layers on rows, not on positions of sequences."
                )
            return call(value * by_row(masks[k], value), weight, bias)

        return network.watched(w, x, drop)

    def loss(theta: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        w, tail = problem.split(theta)
        x, y, p = problem.x[rows], problem.y[rows], rates[:, None, None]
        masks = []
        for width in widths:
            shape = (len(theta), len(rows), width)
            uniform = torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
            masks.append((uniform >= p).to(x) / (1.0 - p))
        f = torch.func.vmap(pass_, in_dims=(0, None, 0))(w, x, masks)
        density = problem.likelihood.log_prob(f, tail, y)
        if kept is None:
            return -density.mean(-1) - decay * problem.log_prior(theta) / problem.n
        mine = kept[rows].to(density)
        return (
            -(density * mine).sum(-1) / mine.sum().clamp(min=1.0)
            - decay * problem.log_prior(theta) / kept.sum()
        )

    return loss
