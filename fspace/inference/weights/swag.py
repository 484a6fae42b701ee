"""SWAG: a Gaussian from the path of gradient descent with a constant step, once or from several starts.

The step is the one at which the stationary distribution of SGD is nearest the posterior (Mandt, Hoffman and Blei 2017,
eq. 15): 2 D S / (N tr C) for batches of S rows, C the covariance of the rows' gradients in whitened coordinates. Where
the inputs of a linear model are not correlated the two are equal; elsewhere SGD's is the rounder one.
Source: Maddox et al. (2019); Wilson and Izmailov (2020, MultiSWAG).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.distributions import LowRankPaths
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import diverged
from fspace.inference.weights.whitened import Whitened, settled
from fspace.predictive_base import check_whole


@dataclass(frozen=True)
class SWAG:
    """One Gaussian: mean of the path, half its variance for each weight by itself, half from `rank` deviations.

    collect: states taken from the path, `every` steps apart. step_size: of SGD in whitened coordinates on the mean
    loss (None: Mandt's, no more than is stable; then "capped" is in the figures, and variances come out too small).
    """

    rank: int = 20
    collect: int = 100
    every: int = 10
    step_size: float | None = None
    name: ClassVar[str] = "swag"

    def __post_init__(self) -> None:
        for name, least in (("rank", 2), ("collect", 2), ("every", 1)):
            check_whole(name, getattr(self, name), least)
        if self.step_size is not None and not self.step_size > 0:
            raise OptionError(f"step_size={self.step_size!r} must be positive, or None.")

    @property
    def starts(self) -> int:
        """How many paths."""
        return 1

    def fit(self, problem: Problem) -> tuple[LowRankPaths, NetworkLikelihood]:
        """A Gaussian from each path."""
        start = settled(problem, self.starts, self.name)
        over = problem.report.interrupted or problem.report.diverged
        space = Whitened(problem, torch.ones_like(problem.prior_scales))
        u = space.coordinates(start)
        step = self.step_size or (0.0 if over else self._step(space, u[0]))
        generator = problem.generator(13)
        states: list[Tensor] = []
        warmup = self.collect * self.every // 4
        total = 0 if over else warmup + self.collect * self.every
        try:
            for k in range(total):
                rows = torch.randint(
                    problem.n, (problem.batch_size,), generator=generator, device=problem.x.device
                )
                u = u - step / problem.n * space.gradient(u, rows)
                if k >= warmup and (k - warmup + 1) % self.every == 0:
                    if not bool(u.isfinite().all()):
                        diverged(problem, self.name, k + 1)
                        break
                    states.append(space.theta(u))
                    problem.record(stage=self.name, done=k + 1, total=total)
        except KeyboardInterrupt:
            problem.record(stage=self.name, interrupted=True)
            problem.report.interrupted = self.name
        path = torch.stack(states or [start], dim=1)
        mean = path.mean(1)
        # deviations of states spread over the whole path: neighbours say the same
        spread = path[:, torch.linspace(0, path.shape[1] - 1, min(self.rank, path.shape[1])).long()]
        root = problem.temperature**0.5
        deviations = (spread - mean[:, None]) * root
        return LowRankPaths(mean, path.var(1, correction=0) * root**2, deviations), problem.likelihood

    def _step(self, space: Whitened, u: Tensor) -> float:
        problem = space.problem
        rows = torch.randperm(problem.n, generator=problem.generator_cpu(14))[:1024].to(u.device)
        squares = torch.cat([space.squares(u, part) for part in rows.split(256)])
        trace = squares.var(0).sum().item()
        wanted = 2.0 * len(u) * problem.batch_size / (problem.n * trace) if trace > 0 else float("inf")
        stable = problem.n / space.stiffness(u, rows)  # half of the largest that is
        problem.report.figures |= {"step_size": min(wanted, stable), "capped": wanted > stable}
        return min(wanted, stable)


@dataclass(frozen=True)
class MultiSWAG(SWAG):
    """SWAG from several starts, equally weighted."""

    members: int = 4
    name: ClassVar[str] = "multiswag"

    @property
    def starts(self) -> int:
        """How many paths."""
        return self.members
