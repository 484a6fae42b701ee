"""Bandit problems with known best arms, and a run of a bandit on one: its regret, with rewards that come late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from fspace.decisions.bandits import Bandit
from fspace.errors import DataError, OptionError


@runtime_checkable
class Problem(Protocol):
    """Contexts that come one by one, and expected rewards of arms."""

    arms: int
    width: int

    def context(self, rng: np.random.Generator) -> Float[np.ndarray, " d"]:
        """The next context."""
        ...

    def means(self, context: Float[np.ndarray, " d"]) -> Float[np.ndarray, " a"]:
        """Expected reward of every arm."""
        ...

    def reward(self, context: Float[np.ndarray, " d"], arm: int, rng: np.random.Generator) -> float:
        """A reward."""
        ...


@dataclass(frozen=True)
class Wheel:
    """Contexts in the unit disc; beyond radius `delta` one of four arms, by quadrant, pays 50, else the fifth is best.

    Expected rewards 1, of the fifth arm 1.2; standard deviation 0.05, of the large reward 0.01.
    Source: Riquelme, Tucker and Snoek (2018), with the constants of its published code.
    """

    delta: float
    arms: int = 5
    width: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise OptionError(f"delta={self.delta} must lie strictly between 0 and 1.")

    def context(self, rng: np.random.Generator) -> Float[np.ndarray, " d"]:
        radius, angle = np.sqrt(rng.random()), 2 * np.pi * rng.random()
        return radius * np.array([np.cos(angle), np.sin(angle)])

    def means(self, context: Float[np.ndarray, " d"]) -> Float[np.ndarray, " a"]:
        means = np.array([1.0, 1.0, 1.0, 1.0, 1.2])
        if np.hypot(*context) >= self.delta:
            means[2 * int(context[0] < 0) + int(context[1] < 0)] = 50.0
        return means

    def reward(self, context: Float[np.ndarray, " d"], arm: int, rng: np.random.Generator) -> float:
        mean = self.means(context)[arm]
        return float(mean + (0.01 if mean == 50.0 else 0.05) * rng.standard_normal())


class TableProblem:
    """Rows of a classification table; the arm that is the row's class pays 1, all others nothing."""

    def __init__(self, X: Any, labels: Any):
        X = np.asarray(X, dtype=np.float64)
        self.classes, self._labels = np.unique(labels, return_inverse=True)
        if X.ndim != 2 or len(X) != len(self._labels) or len(self.classes) < 2:
            raise DataError(
                f"A table bandit needs X [n, d] and labels [n] of two classes or more; X is {X.shape}."
            )
        scale = X.std(0)
        self._x = (X - X.mean(0)) / np.where(scale > 0, scale, 1.0)
        self._of = {row.tobytes(): label for row, label in zip(self._x, self._labels, strict=True)}
        self.arms, self.width = len(self.classes), X.shape[1]

    def context(self, rng: np.random.Generator) -> Float[np.ndarray, " d"]:
        return self._x[rng.integers(len(self._x))]

    def means(self, context: Float[np.ndarray, " d"]) -> Float[np.ndarray, " a"]:
        return (np.arange(self.arms) == self._of[np.ascontiguousarray(context).tobytes()]).astype(np.float64)

    def reward(self, context: Float[np.ndarray, " d"], arm: int, rng: np.random.Generator) -> float:
        return float(self.means(context)[arm])


class LinearProblem:
    """Standard normal contexts; expected rewards are linear in them, with N(0, 1 / width) weights of every arm."""

    def __init__(self, width: int, arms: int, noise: float = 0.5, seed: int = 0):
        self.width, self.arms, self.noise = width, arms, noise
        self.weights = np.random.default_rng(seed).standard_normal((arms, width)) / np.sqrt(width)

    def context(self, rng: np.random.Generator) -> Float[np.ndarray, " d"]:
        return rng.standard_normal(self.width)

    def means(self, context: Float[np.ndarray, " d"]) -> Float[np.ndarray, " a"]:
        return self.weights @ context

    def reward(self, context: Float[np.ndarray, " d"], arm: int, rng: np.random.Generator) -> float:
        return float(self.means(context)[arm] + self.noise * rng.standard_normal())


def simulate(
    bandit: Bandit,
    problem: Problem,
    steps: int,
    batch: int = 1,
    delay: int = 0,
    seed: int = 0,
    each: Callable[[int], None] | None = None,
) -> NDArray:
    """Expected regret [steps] of every choice: that of the best arm's expected reward, never of a lucky draw.

    batch: rewards are told so many at a time; delay: a reward is known so many steps after its choice at the earliest.
    each: called with the number of every step.
    """
    if bandit.known.arms != problem.arms:
        raise OptionError(f"The bandit has {bandit.known.arms} arms, the problem {problem.arms}.")
    rng = np.random.default_rng(seed)
    waiting: list[tuple[int, int, float]] = []  # known from this step on, choice, reward
    regret = np.empty(steps)
    for step in range(steps):
        context = problem.context(rng)
        choice = bandit.choose(context, propensity=False)
        means = problem.means(context)
        regret[step] = means.max() - means[choice.arm]
        waiting.append((step + delay, choice.id, problem.reward(context, choice.arm, rng)))
        ready = [entry for entry in waiting if entry[0] <= step]
        if len(ready) >= batch:
            bandit.tell([i for _, i, _ in ready], [r for _, _, r in ready])
            waiting = waiting[len(ready) :]
        if each is not None:
            each(step)
    return regret
