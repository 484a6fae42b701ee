"""Training of many networks side by side by Adam, with their best or last finite states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fspace.errors import DivergedWarning, NumericalError
from fspace.inference.weights.problem import Problem

CHECKS = 40  # looks at the state in a run
JUDGED = 4096  # rows whose outputs are held at once for a held-out score

Loss = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (states, rows of the batch, step) to a loss for each state


@dataclass(frozen=True)
class Trained:
    """States [s, q] at the end, held-out scores [s] (mean log density a row; NaN without held-out rows), and whether
    the run came to its end."""

    theta: Float[Tensor, "s q"]
    scores: Float[Tensor, " s"]
    done: bool


def negative_log_joint(problem: Problem, kept: Bool[Tensor, "s n"] | None = None, decay: float = 1.0) -> Loss:
    """Minus the log joint density a row: the log likelihood of a batch scaled to all rows, plus the log prior.

    kept: rows that each state learns from (None: all). decay: how often the log prior counts."""

    def loss(theta: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        density = problem.log_likelihood(theta, problem.x[rows], problem.y[rows])
        if kept is None:
            return -density.mean(-1) - decay * problem.log_prior(theta) / problem.n
        mine = kept[:, rows].to(density)
        mean = (density * mine).sum(-1) / mine.sum(-1).clamp(min=1.0)
        return -mean - decay * problem.log_prior(theta) / kept.sum(-1)

    return loss


def train(
    problem: Problem,
    start: Float[Tensor, "s q"],
    loss: Loss,
    stage: str,
    held_out: Bool[Tensor, "s n"] | None = None,
    steps: int | None = None,
    stream: int = 1,
    learning_rate: float | None = None,
) -> Trained:
    """Adam with a one-cycle step size on the sum of the states' losses, so that none touches another.

    With held-out rows every state ends at the look where these were most probable. A state or loss that is not finite
    ends the run: all states go back to the last look whose own loss was finite too, a DivergedWarning says so, and
    `problem.report.diverged` has the step; a look whose noise is infinite is never kept, and such an end is told in the
    same way. Ctrl-C keeps the best so far, as well; after one in an earlier run nothing is trained any more.
    """
    if problem.report.interrupted:
        return Trained(start, start.new_full((len(start),), torch.nan), False)
    generator = problem.generator(stream)
    steps = steps or problem.steps
    theta = start.clone().requires_grad_()
    rate = learning_rate or problem.training.learning_rate
    optimiser = torch.optim.Adam([theta], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2))
    between = max(1, steps // CHECKS)
    finite = waiting = start.clone()  # the loss of a look's state is known only in the step after it
    best, scores = start.clone(), start.new_full((len(start),), -torch.inf)
    bad = torch.zeros((), dtype=torch.bool, device=start.device)
    batches = _Batches(problem.n, problem.batch_size, generator, start.device)
    done, lost, overflows, step = True, False, False, 0
    try:
        for step in range(steps):
            rows = batches.next()
            optimiser.zero_grad()
            losses = loss(theta, rows, torch.tensor(step))
            losses.sum().backward()
            optimiser.step()
            schedule.step()
            bad |= ~losses.detach().isfinite().all()
            if (step + 1) % between == 0 or step + 1 == steps:
                with torch.no_grad():
                    if bool(bad) or not bool(theta.isfinite().all()):
                        diverged(problem, stage, step + 1)
                        lost = True
                        break
                    sound = _finite_noise(problem, theta, rows)
                    overflows = not bool(sound.all())
                    if not overflows:
                        finite, waiting = waiting, theta.detach().clone()
                    told = {"stage": stage, "loss": losses.mean().item(), "done": step + 1, "total": steps}
                    if held_out is not None:
                        now = held_out_scores(problem, theta, held_out)
                        better = (now > scores) & sound
                        best = torch.where(better[:, None], theta, best)
                        scores = torch.where(better, now, scores)
                        told["held_out"] = scores.mean().item()
                problem.record(**told)
    except KeyboardInterrupt:
        problem.record(stage=stage, interrupted=True)
        problem.report.interrupted = stage
        done = False
    except NumericalError:  # a loss that factorises what has overflowed
        diverged(problem, stage, step + 1)
        lost = True
    if not lost and not overflows and _has_loss(loss, waiting, batches.next(), steps):
        finite = waiting
    elif not lost:
        diverged(problem, stage, step + 1)
        lost = True
    done = done and not lost
    if held_out is None:
        return Trained(finite, torch.full_like(scores, torch.nan), done)
    return Trained(torch.where(scores.isfinite()[:, None], best, finite), scores, done)


def _has_loss(loss: Loss, theta: Float[Tensor, "s q"], rows: Tensor, steps: int) -> bool:
    """Whether the losses of states are finite."""
    try:
        return bool(loss(theta, rows, torch.tensor(steps - 1)).isfinite().all())
    except NumericalError:
        return False


@torch.no_grad()
def _finite_noise(problem: Problem, theta: Float[Tensor, "s q"], rows: Tensor) -> Bool[Tensor, " s"]:
    """Which states have finite noise at rows: where a log variance has outgrown its exponential, a log density is
    finite all the same. States of other numbers (means and deviations) all count as such."""
    fine = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    if theta.shape[1] != problem.size:
        return fine
    w, tail = problem.split(theta)
    noise = problem.likelihood.noise(problem.network.many(w, problem.x[rows]), tail)
    return fine if noise is None or noise.ndim < 2 else noise.isfinite().flatten(1).all(1)


def diverged(problem: Problem, stage: str, step: int) -> None:
    """Say that a run is not finite any more, and that the last finite state is kept."""
    problem.report.diverged = {"stage": stage, "step": step}
    warnings.warn(
        f"{stage}: the state stopped being finite by step {step}; the fit has diverged, and the last finite state is "
        "kept (diverged_ says where). Take a smaller learning_rate; prior and noise_variance far from those of "
        "standardised x and y (1e-10, say) overflow as well.",
        DivergedWarning,
        stacklevel=2,
    )


@torch.no_grad()
def held_out_scores(
    problem: Problem, theta: Float[Tensor, "s q"], held_out: Bool[Tensor, "s n"]
) -> Float[Tensor, " s"]:
    """Mean log density of the rows that each state has not learned from."""
    rows = held_out.any(0).nonzero()[:, 0]
    densities = torch.cat(
        [problem.log_likelihood(theta, problem.x[r], problem.y[r]) for r in rows.split(JUDGED)], dim=1
    )
    mine = held_out[:, rows].to(densities)
    return (densities * mine).sum(1) / mine.sum(1)


def held_out_rows(problem: Problem, s: int, share: float, stream: int = 2) -> Bool[Tensor, "s n"]:
    """Rows [s, n] that each of s states does not learn from; another draw for each."""
    generator = problem.generator_cpu(stream)
    count = max(1, round(share * problem.n))
    mask = torch.zeros(s, problem.n, dtype=torch.bool)
    for k in range(s):
        mask[k, torch.randperm(problem.n, generator=generator)[:count]] = True
    return mask.to(problem.x.device)


class _Batches:
    """Rows in random order, pass by pass; the same for all states."""

    def __init__(self, n: int, size: int, generator: torch.Generator, device: torch.device):
        self.n, self.size, self.generator, self.device = n, size, generator, device
        self.left: list[Tensor] = []

    def next(self) -> Int[Tensor, " b"]:
        """The next batch; all have one size, the last few rows of a pass are left out of it."""
        if self.size >= self.n:
            return torch.arange(self.n, device=self.device)
        if not self.left:
            order = torch.randperm(self.n, generator=self.generator, device=self.device)
            self.left = [part for part in order.split(self.size) if len(part) == self.size]
        return self.left.pop()
