"""Control: the pendulum's own physics, and that a learned model beats none."""

import math

import numpy as np
import pytest
import torch

import fspace
from fspace.decisions import Pendulum, learn_to_control
from fspace.errors import OptionError


def test_the_pendulum_is_gymnasiums():
    """Its step by hand: th'' = 3 g / (2 l) sin th + 3 / (m l^2) u, semi-implicit Euler, both bounded."""
    task = Pendulum()
    after = task.step(np.array([0.3, -1.0]), 5.0)
    velocity = -1.0 + (15 * math.sin(0.3) + 3 * 2.0) * 0.05
    assert after == pytest.approx([0.3 + velocity * 0.05, velocity])
    assert task.step(np.array([math.pi / 2, 7.9]), 2.0)[1] == 8.0
    reward = task.reward(torch.tensor([[2 * math.pi + 0.1, 2.0]]).double(), torch.tensor([1.0]).double())
    assert reward.item() == pytest.approx(-(0.01 + 0.4 + 0.001))


def test_a_random_planner_needs_no_model():
    run = learn_to_control(Pendulum(), lambda x, y: 1 / 0, "random", episodes=2, steps=10)
    assert len(run.returns) == 2 and run.states.shape == (11, 2)
    with pytest.raises(OptionError, match="does not exist"):
        learn_to_control(Pendulum(), lambda x, y: None, "best")


@pytest.mark.slow
def test_a_learned_model_swings_up():
    def fit(x, change):
        return fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=60, progress=False).fit(
            x, change
        )

    learned = learn_to_control(Pendulum(), fit, "psrl", episodes=5, steps=80)
    random = learn_to_control(Pendulum(), fit, "random", episodes=5, steps=80)
    assert max(learned.returns[1:]) > 0.6 * max(random.returns)  # returns are negative: 40% less cost
    assert np.cos(learned.states[-1, 0]) > 0.8 or max(learned.returns) > -350
