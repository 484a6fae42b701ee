"""Stochastic-gradient Markov chains over states: Langevin, Hamiltonian with friction, and Langevin in cycles.

All chains run side by side in coordinates in which the curvature at the start has about a unit diagonal, with step
sizes relative to the largest curvature there. With all rows in a step the only error is that of the finite step; rows
in batches add their own noise to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.chains import watch
from fspace.inference.weights.distributions import Points
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import diverged
from fspace.inference.weights.whitened import Whitened, preconditioned, settled
from fspace.predictive_base import check_whole

ALL_ROWS = 1024  # up to so many rows a step takes all
RETRIES = 5  # runs, each with half the step of the one before, until one stays finite


@dataclass(frozen=True)
class _Chains:
    """What the samplers share.

    samples: states kept over all chains; chains: from starts of their own; thinning: steps between kept states;
    warmup: share of all steps that is thrown away. R-hat and effective sample size of function values (the worst of
    64 rows) are in the figures.
    """

    samples: int = 160
    chains: int = 8
    thinning: int = 200
    warmup: float = 0.3
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in ("samples", "chains", "thinning"):
            check_whole(name, getattr(self, name))
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup={self.warmup!r} must be at least 0 and below 1.")

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The kept states of all chains."""
        return self.sample(problem), problem.likelihood

    def sample(self, problem: Problem) -> Points:
        """The kept states of all chains."""
        start = settled(problem, self.chains, self.name)
        if problem.report.interrupted or problem.report.diverged:
            return Points(start)
        space = preconditioned(problem, start[0])
        everything = torch.arange(problem.n, device=problem.x.device)
        u = space.coordinates(start)
        stiffness = max(space.stiffness(chain, everything[:4096]) for chain in u)
        kept = -(-self.samples // self.chains)
        burn = math.ceil(kept * self.thinning * self.warmup / (1 - self.warmup))
        steps = burn + kept * self.thinning
        for _ in range(RETRIES):  # the curvature may grow along the way
            states, at = self._run(space, u, stiffness, burn, steps)
            if at is None:
                break
            stiffness *= 4.0
        else:
            diverged(problem, self.name, at or steps)
        chains = torch.stack(states or [start], dim=1)
        watch(problem, chains)
        problem.report.figures["stiffness"] = stiffness
        return Points(chains.flatten(0, 1))

    def _run(
        self, space: Whitened, u: Tensor, stiffness: float, burn: int, steps: int
    ) -> tuple[list[Tensor], int | None]:
        """The kept states [c, q], and the step at which they stopped being finite (None: they did not)."""
        problem = space.problem
        states: list[Tensor] = []
        try:
            for step, now in enumerate(self._moves(space, u, stiffness, steps)):
                if (step + 1) % self.thinning == 0 or step + 1 == steps:
                    if not bool(now.isfinite().all()):
                        return states, step + 1
                    problem.record(stage=self.name, done=step + 1, total=steps)
                if self._keeps(step, burn, steps):
                    states.append(space.theta(now))
        except KeyboardInterrupt:
            problem.record(stage=self.name, interrupted=True)
            problem.report.interrupted = self.name
        return states, None

    def _keeps(self, step: int, burn: int, steps: int) -> bool:
        return step >= burn and (step - burn + 1) % self.thinning == 0

    def _moves(self, space: Whitened, u: Tensor, stiffness: float, steps: int) -> Iterator[Tensor]:
        """The chains after every step."""
        raise NotImplementedError


def _rows(problem: Problem, generator: torch.Generator) -> Tensor:
    if problem.n <= ALL_ROWS:
        return torch.arange(problem.n, device=problem.x.device)
    size = problem.training.batch_size or ALL_ROWS // 2
    return torch.randint(problem.n, (size,), generator=generator, device=problem.x.device)


def _white(u: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)


@dataclass(frozen=True)
class SGLD(_Chains):
    """Stochastic-gradient Langevin dynamics (Welling and Teh 2011), with a constant step of step_size over the largest
    curvature: variances in the stiffest direction come out 1 / (1 - step_size / 2) times too large, and the softest
    take 1 / step_size times the condition number of steps to be explored: where noise is small, R-hat says that these
    settings are not enough, and `SGHMC`, which takes the square root of that, is the better choice. The preconditioner
    is fixed, so it adds no error."""

    step_size: float = 0.4
    thinning: int = 800
    name: ClassVar[str] = "sgld"

    def _moves(self, space: Whitened, u: Tensor, stiffness: float, steps: int) -> Iterator[Tensor]:
        generator = space.problem.generator(10)
        step = self.step_size / stiffness
        noise = math.sqrt(2.0 * step * space.problem.temperature)
        for _ in range(steps):
            u = u - step * space.gradient(u, _rows(space.problem, generator)) + noise * _white(u, generator)
            yield u


@dataclass(frozen=True)
class SGHMC(_Chains):
    """Stochastic-gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum and friction, by the BAOAB
    splitting, whose variances are exact where the posterior is Gaussian, whatever the (stable) step. step_size: times
    the square root of the largest curvature (below 2 is stable); friction: in units of the least frequency, 1.

    Sources: Chen, Fox and Guestrin (2014); Leimkuhler and Matthews (2013, BAOAB).
    """

    step_size: float = 0.7
    friction: float = 1.0
    name: ClassVar[str] = "sghmc"

    def _moves(self, space: Whitened, u: Tensor, stiffness: float, steps: int) -> Iterator[Tensor]:
        problem, generator = space.problem, space.problem.generator(10)
        h = self.step_size / math.sqrt(stiffness)
        keep = math.exp(-self.friction * h)
        noise = math.sqrt((1.0 - keep**2) * problem.temperature)
        momentum = math.sqrt(problem.temperature) * _white(u, generator)
        slope = space.gradient(u, _rows(problem, generator))
        for _ in range(steps):
            momentum = momentum - 0.5 * h * slope
            u = u + 0.5 * h * momentum
            momentum = keep * momentum + noise * _white(u, generator)
            u = u + 0.5 * h * momentum
            slope = space.gradient(u, _rows(problem, generator))
            momentum = momentum - 0.5 * h * slope
            yield u


@dataclass(frozen=True)
class CyclicalSGLD(_Chains):
    """Langevin dynamics whose step goes from step_size down to nothing in each of `cycles`: the first half of a cycle
    explores without noise, the second samples. Each cycle samples around a mode, so that R-hat tells how different the
    modes are as functions. Source: Zhang et al. (2020)."""

    samples: int = 100
    chains: int = 4
    step_size: float = 0.5
    cycles: int = 4
    thinning: int = 50
    warmup: float = 0.0
    name: ClassVar[str] = "csgld"

    def _phase(self, step: int, steps: int) -> float:
        length = max(1, steps // self.cycles)
        return (step % length) / length

    def _keeps(self, step: int, burn: int, steps: int) -> bool:
        return (step + 1) % self.thinning == 0 and self._phase(step, steps) >= 0.6

    def _moves(self, space: Whitened, u: Tensor, stiffness: float, steps: int) -> Iterator[Tensor]:
        generator = space.problem.generator(10)
        for k in range(steps):
            phase = self._phase(k, steps)
            step = self.step_size / stiffness * 0.5 * (math.cos(math.pi * phase) + 1.0)
            noise = math.sqrt(2.0 * step * space.problem.temperature) if phase >= 0.5 else 0.0
            u = u - step * space.gradient(u, _rows(space.problem, generator)) + noise * _white(u, generator)
            yield u
