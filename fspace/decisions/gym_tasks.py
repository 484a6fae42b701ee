"""gymnasium's classic control environments as tasks for `learn_to_control`: their own dynamics, and its planners.

The environment is set to a state and stepped from there; what is planned in is learned. Needs gymnasium:
pip install 'fspace[control]'. Sources: Towers et al. (2024, gymnasium); Barto, Sutton and Anderson (1983), the cart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fspace.decisions.control import Pendulum, checked_step
from fspace.errors import OptionError


class GymPendulum(Pendulum):
    """gymnasium's Pendulum-v1: `Pendulum`, but started anywhere and stepped by gymnasium."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "env", environment("Pendulum-v1"))  # `Pendulum` is frozen

    def reset(self, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
        """As gymnasium starts: any angle, velocity in [-1, 1]."""
        return _start(self.env, rng)  # type: ignore[attr-defined]

    def step(self, state: Float[np.ndarray, " s"], action: float) -> Float[np.ndarray, " s"]:
        """gymnasium's step. Raises DataError for NaN, infinity, or another shape."""
        self.env.state = checked_step(state, action, 2)  # type: ignore[attr-defined]
        self.env.step(np.array([action]))  # type: ignore[attr-defined]
        return np.array(self.env.state)  # type: ignore[attr-defined]


class GymCartPole:
    """gymnasium's CartPole-v1 in the state (position, velocity, angle, angular velocity): keep a pole up on a cart.

    It knows two actions, so that the sign of an action in [-1, 1] is what pushes. gymnasium's return is the number of
    steps until the cart leaves 2.4 or the pole 12 degrees (`ControlRun.steps`). The reward that is planned for is 1
    less the squares of position and angle in units of these, which tells plans apart before they fail.
    """

    action_limit = 1.0

    def __init__(self) -> None:
        self.env = environment("CartPole-v1")
        self._limits = (self.env.x_threshold, self.env.theta_threshold_radians)

    def reset(self, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
        """As gymnasium starts: all within 0.05 of upright at rest."""
        return _start(self.env, rng)

    def step(self, state: Float[np.ndarray, " s"], action: float) -> Float[np.ndarray, " s"]:
        """gymnasium's step. Raises DataError for NaN, infinity, or another shape."""
        self.env.state, self.env.steps_beyond_terminated = checked_step(state, action, 4), None
        self.env.step(int(action > 0))
        return np.array(self.env.state)

    def ended(self, states: Float[Tensor, "n s"]) -> Bool[Tensor, " n"]:
        """Where gymnasium says that it has failed."""
        return (states[:, 0].abs() > self._limits[0]) | (states[:, 2].abs() > self._limits[1])

    def features(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """All but the position, on which nothing depends, and the push."""
        push = torch.where(actions > 0, 1.0, -1.0).to(states)
        return torch.cat([states[:, 1:], push[:, None]], -1)

    def reward(self, states: Float[Tensor, "n s"], actions: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 less the squares of position and angle in units of their limits."""
        return 1.0 - (states[:, 0] / self._limits[0]).square() - (states[:, 2] / self._limits[1]).square()


def environment(name: str) -> Any:
    """An environment without time limit. Raises OptionError where gymnasium is missing."""
    try:
        import gymnasium
    except ImportError as error:
        raise OptionError("This task needs gymnasium: pip install 'fspace[control]'.") from error
    return gymnasium.make(name).unwrapped


def _start(env: Any, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
    env.reset(seed=int(rng.integers(2**31)))
    return np.array(env.state, dtype=np.float64)
