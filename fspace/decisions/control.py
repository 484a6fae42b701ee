"""Model-based control: a posterior over the dynamics is learned from trajectories, plans are made in functions drawn
from it.

Posterior sampling (PSRL) draws one function for an episode and acts as if it were the truth, which explores where the
dynamics are not known; a planner on the mean does not. Plans come from the cross-entropy method.
gymnasium's environments as tasks are in `fspace.decisions.gym_tasks`.
Sources: Osband, Russo and Van Roy (2013), PSRL; Rubinstein and Kroese (2004); Deisenroth and Rasmussen (2011), the
pendulum as a task for GPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fspace.decisions.sources import check_callable
from fspace.errors import DataError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive_base import check_seed, check_whole

PLANNERS = ("psrl", "mean", "random")


@runtime_checkable
class Task(Protocol):
    """Dynamics to control; rewards are a known function of state and action."""

    action_limit: float

    def reset(self, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
        """The first state of an episode."""
        ...

    def step(self, state: Float[np.ndarray, " s"], action: float) -> Float[np.ndarray, " s"]:
        """The next state."""
        ...

    def features(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """What the dynamics are learned from."""
        ...

    def reward(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Reward of an action in a state."""
        ...

    def ended(self, states: Float[Tensor, "n s"]) -> Bool[Tensor, " n"]:
        """Where an episode is over, after which there are no rewards."""
        ...


def checked_step(state: Any, action: Any, size: int) -> Float[np.ndarray, " s"]:
    """The state as numbers [size]. Raises DataError for another shape, and for a state or an action that is NaN or
    infinite: clipped to what the task allows, it would look like an action."""
    try:
        numbers, push = np.asarray(state, dtype=np.float64), float(action)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"state={state!r}, action={action!r}: a step takes a state [{size}] and a number."
        ) from error
    if numbers.shape != (size,) or not np.isfinite(numbers).all() or not math.isfinite(push):
        raise DataError(
            f"state={state!r}, action={action!r}: a step takes a state of {size} finite numbers and a finite action."
        )
    return numbers


@dataclass(frozen=True)
class Pendulum:
    """Swing a pendulum up and hold it: gymnasium's Pendulum-v1 in the state (angle from upright, angular velocity).

    Torque in [-2, 2], steps of 0.05 s, reward -(angle^2 + 0.1 velocity^2 + 0.001 torque^2).
    """

    action_limit: float = 2.0
    gravity: float = 10.0
    dt: float = 0.05

    def reset(self, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
        """Hanging down, nearly at rest (gymnasium starts anywhere)."""
        return np.array([math.pi, 0.0]) + 0.05 * rng.standard_normal(2)

    def step(self, state: Float[np.ndarray, " s"], action: float) -> Float[np.ndarray, " s"]:
        angle, velocity = checked_step(state, action, 2)
        torque = min(self.action_limit, max(-self.action_limit, action))
        velocity = velocity + (1.5 * self.gravity * math.sin(angle) + 3.0 * torque) * self.dt
        velocity = min(8.0, max(-8.0, velocity))
        return np.array([angle + velocity * self.dt, velocity])

    def features(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        angle, velocity = states.unbind(-1)
        return torch.stack([angle.sin(), angle.cos(), velocity, actions], -1)

    def reward(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        angle = torch.remainder(states[:, 0] + math.pi, 2.0 * math.pi) - math.pi
        return -(angle.square() + 0.1 * states[:, 1].square() + 0.001 * actions.square())

    def ended(self, states: Float[Tensor, "n s"]) -> Bool[Tensor, " n"]:
        """Never: rewards are negative, and go on."""
        return torch.zeros(len(states), dtype=torch.bool)


@dataclass
class ControlRun:
    """Return and steps of every episode, and what the last one went through."""

    returns: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    states: Float[np.ndarray, "t s"] | None = None
    actions: Float[np.ndarray, " t"] | None = None


def learn_to_control(
    task: Task,
    fit: Callable[[Float[np.ndarray, "n d"], Float[np.ndarray, "n s"]], Any],
    planner: str = "psrl",
    episodes: int = 6,
    steps: int = 100,
    horizon: int = 20,
    seed: int = 0,
) -> ControlRun:
    """Learn to control a task from nothing: the first episode is random, the model is fitted anew after each.

    fit(features [n, d], changes of state [n, s]) gives a posterior over functions, or an estimator that has one.
    planner: "psrl" (a function drawn for every episode), "mean" (the posterior mean), "random" (no model). An episode
    is over after `steps`, or where the task says so. Raises OptionError, also for a model that does not predict the
    changes of all states, DataError for one of other features.
    """
    if not isinstance(task, Task) or isinstance(task, type):
        raise OptionError(f"task={task!r} is no Task; pass for example Pendulum().")
    for name, count in (("episodes", episodes), ("steps", steps), ("horizon", horizon)):
        check_whole(name, count)
    check_seed(seed)
    if planner not in PLANNERS:
        raise OptionError(f"planner={planner!r} does not exist; choose one of {', '.join(PLANNERS)}.")
    if planner != "random":
        check_callable(fit, "fit")
    rng, run = np.random.default_rng(seed), ControlRun()
    inputs, changes = [], []
    dynamics: Callable[[Tensor], Tensor] | None = None
    for episode in range(episodes):
        state, plan = task.reset(rng), torch.zeros(horizon, dtype=torch.float64)
        states, actions, total = [state], [], 0.0
        for step in range(steps):
            if dynamics is None:
                action = float(rng.uniform(-task.action_limit, task.action_limit))
            else:
                plan = _plan(task, dynamics, state, plan, seed=seed * 1_000_003 + episode * steps + step)
                action, plan = float(plan[0]), torch.cat([plan[1:], plan.new_zeros(1)])
            here, taken = torch.tensor(state)[None], torch.tensor([action], dtype=torch.float64)
            total += float(task.reward(here, taken))
            after = task.step(state, action)
            inputs.append(task.features(here, taken)[0].numpy())
            changes.append(after - state)
            state = after
            states.append(state)
            actions.append(action)
            if bool(task.ended(torch.tensor(state)[None])):
                break
        run.returns.append(total)
        run.steps.append(len(actions))
        run.states, run.actions = np.array(states), np.array(actions)
        if planner != "random" and episode + 1 < episodes:
            fitted = fit(np.array(inputs), np.array(changes))
            posterior = getattr(fitted, "posterior_", fitted)
            if not isinstance(posterior, FunctionPosterior):
                raise OptionError(
                    f"fit gave {fitted!r}, which is neither a posterior nor a fitted estimator."
                )
            if posterior.num_outputs != len(state):
                raise OptionError(
                    f"fit gave a posterior of {posterior.num_outputs} outputs for the changes of {len(state)} states."
                )
            dynamics = (
                _mean(posterior) if planner == "mean" else posterior.draw(1, (seed + episode) % 2**32)[0]
            )
    return run


def _mean(posterior: FunctionPosterior) -> Callable[[Tensor], Tensor]:
    return lambda x: posterior.latent(x).mean


@torch.no_grad()
def _plan(
    task: Task,
    dynamics: Callable[[Tensor], Tensor],
    state: Float[np.ndarray, " s"],
    start: Float[Tensor, " h"],
    seed: int,
    plans: int = 64,
    elite: int = 8,
    rounds: int = 3,
) -> Float[Tensor, " h"]:
    """Actions of the best plan, by the cross-entropy method from the plan of the step before."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    mean, spread = start, torch.full_like(start, task.action_limit)
    best, best_value = start, -math.inf
    for _ in range(rounds):
        noise = torch.randn(plans, len(mean), generator=generator, dtype=torch.float64)
        actions = (mean + spread * noise).clamp(-task.action_limit, task.action_limit)
        states, value = torch.tensor(state).expand(plans, -1), torch.zeros(plans, dtype=torch.float64)
        going = torch.ones(plans, dtype=torch.bool)
        for step in range(len(mean)):
            value = value + torch.where(going, task.reward(states, actions[:, step]), 0.0)
            states = states + dynamics(task.features(states, actions[:, step]))
            going = going & ~task.ended(states)
        value = torch.where(value.isfinite(), value, -math.inf)
        top = value.topk(elite).indices
        mean, spread = actions[top].mean(0), actions[top].std(0) + 0.05
        if float(value[top[0]]) > best_value:
            best, best_value = actions[top[0]], float(value[top[0]])
    return best
