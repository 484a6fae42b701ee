"""Hamiltonian Monte Carlo, all chains in one batch: the reference for small networks.

In coordinates in which every prior is N(0, 1) no weight can be wider than 1, so that a quarter of a period of the
widest, a time of pi / 2, is long enough for any; no mass matrix is needed, nor a search for U-turns, which no two
chains would end at the same step.
Sources: Duane et al. (1987); Neal (2011); Hoffman and Gelman (2014, section 3.2: dual averaging of the step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.weights.chains import watch
from fspace.inference.weights.distributions import Points
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.whitened import Whitened
from fspace.predictive_base import check_whole

LARGEST = 5000  # weights
ROWS = 20_000
LONGEST = 1024  # steps of a trajectory
DIVERGENT = (
    1000.0  # error of the energy, in nats, beyond which a trajectory is no approximation (Stan's bound)
)


@dataclass(frozen=True)
class HMC:
    """The posterior itself, but for the length of the chains: all rows in every step, float64 where dtype is.

    samples: kept over all chains; chains: side by side, from random starts; warmup: trajectories in which the step
    size is adapted; length: mean time of a trajectory (each is drawn from half to one and a half of it), as a share of
    the prior's deviation; acceptance: share of proposals to aim at. R-hat and effective sample size of function values
    (the worst, at rows and between them), the step size, the share accepted and how many trajectories diverged are in
    the figures: do not believe chains with R-hat above 1.05.
    """

    samples: int = 1600
    chains: int = 16
    warmup: int = 150
    length: float = 1.0
    acceptance: float = 0.8
    name: ClassVar[str] = "hmc"

    def __post_init__(self) -> None:
        for name in ("samples", "chains", "warmup"):
            check_whole(name, getattr(self, name))
        if not 0 < self.length < math.inf:
            raise OptionError(f"length={self.length!r} must be a positive number.")
        if not 0 < self.acceptance < 1:
            raise OptionError(f"acceptance={self.acceptance!r} must be between 0 and 1.")

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The kept states of all chains."""
        if problem.size > LARGEST or problem.n > ROWS:
            raise OptionError(
                f"inference='hmc' is for at most {LARGEST:,} weights and {ROWS:,} rows, and this fit has "
                f"{problem.size:,} and {problem.n:,}; take a smaller network (hidden=(20,)), or inference='sghmc'."
            )
        target = _Target(problem)
        generator = problem.generator(10)
        u = target.space.coordinates(problem.start(self.chains))
        point = _Point(u, *target(u))
        stiffness = [target.space.stiffness(chain, target.rows) for chain in u[:4]]
        if not (bool(point.energy.isfinite().all()) and all(0 < value < math.inf for value in stiffness)):
            raise NumericalError(
                "inference='hmc': the log density or its curvature is not finite where the chains start. Take prior, "
                "noise_variance and temperature nearer to 1 (in units of standardised x and y), or dtype='float64'."
            )
        start = 1.0 / math.sqrt(max(stiffness))
        step = _StepSize(start * math.sqrt(problem.temperature), self.acceptance)
        time = self.length * math.sqrt(problem.temperature)  # the prior's deviation is that much smaller
        kept = -(-self.samples // self.chains)
        states: list[Tensor] = []
        accepted, divergences, steps = 0.0, 0, 0
        try:
            for k in range(self.warmup + kept):
                size = step.size if k < self.warmup else step.averaged
                jitter = 0.5 + torch.rand((), generator=generator, device=u.device).item()
                count = min(max(1, math.ceil(jitter * time / size)), LONGEST)
                momentum = torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)
                proposal, gain = trajectory(target, point, momentum, size, count)
                probability = gain.clamp(max=0.0).exp().nan_to_num(0.0)
                coins = torch.rand(len(u), generator=generator, dtype=u.dtype, device=u.device)
                point = point.moved(proposal, coins < probability)
                rate = probability.mean().item()
                steps += count
                if k < self.warmup:
                    step.update(rate)
                else:
                    states.append(target.space.theta(point.u))
                    accepted += rate / kept
                    divergences += int((~(gain > -DIVERGENT)).sum())
                problem.record(stage=self.name, done=k + 1, total=self.warmup + kept)
        except KeyboardInterrupt:
            problem.record(stage=self.name, interrupted=True)
            problem.report.interrupted = self.name
        chains = torch.stack(states or [target.space.theta(point.u)], dim=1)
        problem.report.figures |= {
            "step_size": step.averaged,
            "gradients": steps,
            "acceptance": accepted,
            "divergences": divergences,
        }
        watch(problem, chains)
        return Points(chains.flatten(0, 1)), problem.likelihood


class _Target:
    """The tempered energy of all rows and its slope, at whitened coordinates."""

    def __init__(self, problem: Problem):
        self.space = Whitened(problem, torch.ones_like(problem.prior_scales))
        self.rows = torch.arange(problem.n, device=problem.x.device)
        self.temperature = problem.temperature

    def __call__(self, u: Float[Tensor, "c q"]) -> tuple[Float[Tensor, " c"], Float[Tensor, "c q"]]:
        energy, slope = self.space.energy_and_gradient(u, self.rows)
        return energy / self.temperature, slope / self.temperature


@dataclass(frozen=True, eq=False)
class _Point:
    """Where chains are: coordinates, energy, slope."""

    u: Float[Tensor, "c q"]
    energy: Float[Tensor, " c"]
    slope: Float[Tensor, "c q"]

    def moved(self, other: _Point, where: Bool[Tensor, " c"]) -> _Point:
        """The other point for the chains in `where`."""
        pick = where[:, None]
        return _Point(
            torch.where(pick, other.u, self.u),
            torch.where(where, other.energy, self.energy),
            torch.where(pick, other.slope, self.slope),
        )


def trajectory(
    target: _Target, point: _Point, momentum: Float[Tensor, "c q"], size: float, count: int
) -> tuple[_Point, Float[Tensor, " c"]]:
    """The end of `count` leapfrog steps, and the log of the ratio of densities that a proposal is accepted with
    (Neal 2011, section 5.3.2)."""
    before = point.energy + 0.5 * momentum.square().sum(-1)
    u, slope = point.u, point.slope
    momentum = momentum - 0.5 * size * slope
    for k in range(count):
        u = u + size * momentum
        energy, slope = target(u)
        momentum = momentum - (size if k + 1 < count else 0.5 * size) * slope
    return _Point(u, energy, slope), before - energy - 0.5 * momentum.square().sum(-1)


class _StepSize:
    """Dual averaging: the step at which so many proposals are accepted. Constants as in Hoffman and Gelman (2014)."""

    def __init__(self, start: float, acceptance: float):
        self.acceptance, self.centre = acceptance, math.log(2.0 * start)
        self.log_size = self.log_averaged = math.log(start)
        self.error, self.count = 0.0, 0

    def update(self, rate: float) -> None:
        """Learn from the share of a trajectory's proposals that was accepted."""
        self.count += 1
        weight = 1.0 / (self.count + 10)
        self.error += weight * (self.acceptance - rate - self.error)
        self.log_size = self.centre - math.sqrt(self.count) / 0.05 * self.error
        self.log_averaged += self.count**-0.75 * (self.log_size - self.log_averaged)

    @property
    def size(self) -> float:
        """The step to try next."""
        return math.exp(self.log_size)

    @property
    def averaged(self) -> float:
        """The step to keep."""
        return math.exp(self.log_averaged)
