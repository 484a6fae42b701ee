"""Control: the pendulum's own physics, and that a learned model beats none."""

import math
import sys

import numpy as np
import pytest
import torch

import fspace
from fspace.decisions import GymCartPole, GymPendulum, Pendulum, learn_to_control
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


# ---- gymnasium


def test_our_pendulum_is_gymnasium_s_step_by_step():
    pytest.importorskip("gymnasium")
    theirs, ours, rng = GymPendulum(), Pendulum(), np.random.default_rng(0)
    state, fastest = theirs.reset(rng), 0.0
    assert abs(state[0]) <= math.pi and abs(state[1]) <= 1.0
    for step in range(300):  # torque past its bounds too, and with the motion until it spins
        action = 3.0 * math.copysign(1.0, state[1]) if step < 150 else rng.uniform(-3.0, 3.0)
        after = ours.step(state, action)
        reward = ours.reward(torch.tensor(state)[None], torch.tensor([min(2.0, max(-2.0, action))])).item()
        theirs.env.state = state
        _, want, *_ = theirs.env.step(np.array([action]))
        assert after == pytest.approx(theirs.env.state, abs=1e-12) and reward == pytest.approx(want, abs=1e-9)
        assert theirs.step(state, action) == pytest.approx(after, abs=1e-12)
        state, fastest = after, max(fastest, abs(after[1]))
    assert fastest == 8.0
    other = Pendulum(gravity=9.81).step(np.array([1.0, 0.0]), 0.0)
    assert abs(other[1] - theirs.step(np.array([1.0, 0.0]), 0.0)[1]) > 1e-3


def test_the_cart_is_gymnasium_s_and_ends_where_it_does():
    gymnasium = pytest.importorskip("gymnasium")
    task, env = GymCartPole(), gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(1)
    for _ in range(5):
        state = task.reset(rng)
        assert np.abs(state).max() <= 0.05
        env.reset(seed=0)
        env.state, ended = state, False
        while not ended:
            action = rng.uniform(-1.0, 1.0)
            _, _, ended, _, _ = env.step(int(action > 0))
            state = task.step(state, action)
            assert state == pytest.approx(env.state, abs=1e-12)
            assert bool(task.ended(torch.tensor(state)[None])) == ended
    features = task.features(torch.tensor(state)[None].repeat(2, 1), torch.tensor([0.2, -0.9]).double())
    assert features[:, 3].tolist() == [1.0, -1.0] and features[0, :3].tolist() == state[1:].tolist()


def test_an_episode_ends_where_the_task_says():
    pytest.importorskip("gymnasium")
    run = learn_to_control(GymCartPole(), lambda x, y: 1 / 0, "random", episodes=4, steps=200)
    assert all(8 <= steps < 200 for steps in run.steps) and len(run.states) == run.steps[-1] + 1
    task = GymCartPole()
    ended = task.ended(torch.from_numpy(run.states))
    assert bool(ended[-1]) and not bool(ended[:-1].any())


@pytest.mark.parametrize("planner", ["mean", pytest.param("psrl", marks=pytest.mark.slow)])
def test_a_cart_that_has_learned_holds_its_pole(planner):
    """After one random episode; random pushes, the twin, do not hold it for half as long."""
    pytest.importorskip("gymnasium")

    def fit(x, change):
        return fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=40, progress=False).fit(
            x, change
        )

    assert learn_to_control(GymCartPole(), fit, planner, episodes=2, steps=45).steps[1] == 45
    random = learn_to_control(GymCartPole(), fit, "random", episodes=20, steps=45).steps
    assert np.mean(random) < 30


@pytest.mark.slow
def test_gymnasium_s_pendulum_is_learned():
    """Return of gymnasium's own episodes, started anywhere: learned dynamics against random torque, 4 episodes each."""
    pytest.importorskip("gymnasium")

    def fit(x, change):
        return fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=60, progress=False).fit(
            x, change
        )

    learned = learn_to_control(GymPendulum(), fit, "mean", episodes=5, steps=100).returns[1:]
    random = learn_to_control(GymPendulum(), fit, "random", episodes=5, steps=100).returns[1:]
    assert np.mean(learned) > 0.6 * np.mean(random)  # returns are negative


def test_without_gymnasium_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(OptionError, match="fspace\\[control\\]"):
        GymCartPole()
