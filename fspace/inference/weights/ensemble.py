"""One network at the mode of its posterior (MAP), and several trained from different starts (deep ensembles).

Neither claims a posterior: MAP has no spread at all, and that of an ensemble is between modes, from the random starts
and the rows each member was stopped on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.distributions import Points
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import Loss, held_out_rows, negative_log_joint, train
from fspace.predictive_base import check_whole

LEAST_HELD_OUT = 20  # rows: below, all are learned from to the end


@dataclass(frozen=True)
class MAP:
    """The most probable weights under the prior, which is weight decay: each squared weight costs
    1 / (2 prior variance) nats. All rows, no early stopping. It claims no posterior: latent has no variance."""

    name: ClassVar[str] = "map"

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The mode (one state)."""
        problem.require_bayes(self.name)
        found = train(problem, problem.start(1), negative_log_joint(problem), "map")
        problem.report.figures["log_joint"] = log_joint(problem, found.theta)[0].item()
        return Points(found.theta), problem.likelihood


@dataclass(frozen=True)
class Ensemble:
    """Deep ensemble: `members` networks from different starts, equally weighted. It claims no posterior.

    held_out: share of the rows, another draw for each member, on which its best look is chosen (0: trained to the end
        on all rows).
    decay: how often the log prior counts; the method itself has no prior but the stopping (1: as in `MAP`).
    adversarial: the size of an extra step of the inputs against each row (fast gradient sign, in units of scaled x),
        trained on beside the rows themselves; 0: none.
    Source: Lakshminarayanan, Pritzel and Blundell (2017).
    """

    members: int = 5
    held_out: float = 0.1
    decay: float = 0.1
    adversarial: float = 0.0
    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        check_whole("members", self.members)
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held_out={self.held_out!r} must be at least 0 and below 1.")
        if not self.decay >= 0:
            raise OptionError(f"decay={self.decay!r} must be at least 0.")
        if not self.adversarial >= 0:
            raise OptionError(f"adversarial={self.adversarial!r} must be at least 0.")

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The members as states."""
        problem.require_bayes(self.name)
        held_out = kept = None
        if self.held_out > 0 and problem.n >= LEAST_HELD_OUT:
            held_out = held_out_rows(problem, self.members, self.held_out)
            kept = ~held_out
        loss = negative_log_joint(problem, kept, self.decay)
        if self.adversarial:
            loss = _against(problem, kept, self.adversarial, self.decay)
        found = train(problem, problem.start(self.members), loss, "ensemble", held_out)
        if held_out is not None:
            problem.report.figures["held_out_scores"] = found.scores.tolist()
        return Points(found.theta), problem.likelihood


def _against(problem: Problem, kept: Tensor | None, size: float, decay: float) -> Loss:
    """The mean of the loss at the rows and at rows moved by `size` in the direction that hurts each member most."""

    def loss(theta: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        x = problem.x[rows].expand(len(theta), *problem.x[rows].shape).clone().requires_grad_()
        y = problem.y[rows]
        density = _each(problem, theta, x, y)
        (slope,) = torch.autograd.grad(-density.sum(), x, retain_graph=True)
        moved = _each(problem, theta, (x + size * slope.sign()).detach(), y)
        both = 0.5 * (density + moved)
        mine = torch.ones_like(both) if kept is None else kept[:, rows].to(both)
        count = problem.n if kept is None else kept.sum(-1)
        mean = (both * mine).sum(-1) / mine.sum(-1).clamp(min=1.0)
        return -mean - decay * problem.log_prior(theta) / count

    return loss


def _each(problem: Problem, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Log densities [s, b] of rows x [s, b, *row], each state with its own."""
    w, tail = problem.split(theta)
    f = torch.stack([problem.network(a, b) for a, b in zip(w, x)])
    return problem.likelihood.log_prob(f, tail, y)


@torch.no_grad()
def log_joint(problem: Problem, theta: Tensor) -> Tensor:
    """Log joint density of all rows and states [s]."""
    parts = [
        problem.log_likelihood(theta, problem.x[r], problem.y[r]).double().sum(-1)
        for r in torch.arange(problem.n, device=problem.x.device).split(4096)
    ]
    return torch.stack(parts).sum(0) + problem.log_prior(theta).double()
