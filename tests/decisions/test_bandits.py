"""Bandits: conjugate posteriors, regret, feedback that comes late, logs of other policies, and a killed process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fspace
from fspace.decisions import (
    ArmPosterior,
    Bandit,
    LinearProblem,
    NeuralLinear,
    TableProblem,
    Wheel,
    linear_basis,
    off_policy_value,
    simulate,
)
from fspace.errors import DataError, ModelFileError, OptionError, UtilityError


def linear(width=3, arms=3, noise=0.25):
    return ArmPosterior(linear_basis(width, noise=noise), arms)


def test_arms_are_bayesian_linear_regressions():
    """Weights' posterior by the textbook's normal equations, one arm at a time; an unseen arm stays at the prior."""
    rng = np.random.default_rng(0)
    x, r, a = rng.standard_normal((40, 3)), rng.standard_normal(40), rng.integers(0, 2, 40)
    known = linear()
    for rows in np.array_split(np.arange(40), 5):
        known.update(torch.tensor(x[rows]), torch.tensor(a[rows]), torch.tensor(r[rows]))
    at = rng.standard_normal((7, 3))
    moments = known.moments(torch.tensor(at))
    features, places = np.column_stack([x, np.ones(40)]), np.column_stack([at, np.ones(7)])
    for arm in range(3):
        h = features[a == arm]
        covariance = np.linalg.inv(np.eye(4) + h.T @ h / 0.25)
        mean = places @ covariance @ h.T @ r[a == arm] / 0.25
        assert np.allclose(moments.mean[:, arm], mean, atol=1e-7)
        want = np.sqrt(np.einsum("ni,ij,nj->n", places, covariance, places))
        assert np.allclose(moments.stddev[:, arm], want, atol=1e-6)


def test_draws_have_the_posterior_moments():
    known = linear(2, 2)
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.standard_normal((20, 2)))
    known.update(x, torch.tensor([0, 1] * 10), x[:, 0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([known.inducing_draw(generator) for _ in range(4000)])
    place = torch.tensor([[0.5, -1.0]]).double()
    values = draws @ torch.tensor([0.5, -1.0, 1.0]).double()
    at = known.moments(place)
    error = at.stddev[0] / math.sqrt(4000)
    assert ((values.mean(0) - at.mean[0]).abs() < 4.5 * error).all()
    assert ((values.std(0) / at.stddev[0]).log().abs() < 4.5 / math.sqrt(8000)).all()


def sphere_regret(policy, steps=1600, runs=40, width=3, noise=0.5):
    """Cumulative regret [runs, steps] where every point of the unit sphere is an arm; the runs are the arms of one
    ArmPosterior, so that they share its code and nothing else."""
    generator = torch.Generator().manual_seed(5)
    theta = torch.randn(runs, width, generator=generator, dtype=torch.float64)
    known = ArmPosterior(linear_basis(width, noise=noise**2), runs)
    arms, regret = torch.arange(runs), torch.empty(runs, steps)
    for step in range(steps):
        weights = known.inducing_draw(generator)[:, :width]
        if policy == "uniform":
            weights = torch.randn(runs, width, generator=generator, dtype=torch.float64)
        action = weights / weights.norm(dim=1, keepdim=True)
        mean = (action * theta).sum(1)
        regret[:, step] = theta.norm(dim=1) - mean
        known.update(action, arms, mean + noise * torch.randn(runs, generator=generator, dtype=torch.float64))
    return regret.cumsum(1)


def growth(regret, first=50):
    """Exponent p of regret(T) = a + b T^p, and its standard error (jackknife over runs). a is what was spent before the
    first rewards, so p is read off the regret a step, which falls like T^(p - 1): means over octaves."""
    edges = [first]
    while 2 * edges[-1] <= regret.shape[1]:
        edges.append(2 * edges[-1])
    spent = regret[:, np.array(edges) - 1].diff(dim=1).numpy() / np.diff(edges)
    middle = np.log(edges[:-1])
    slope = lambda rows: np.polyfit(middle, np.log(rows.mean(0)), 1)[0] + 1.0  # noqa: E731
    n = len(spent)
    left_out = np.array([slope(np.delete(spent, i, 0)) for i in range(n)])
    return slope(spent), math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())


@pytest.mark.slow
def test_regret_of_linear_thompson_sampling_grows_like_the_root():
    """Every unit vector an arm: O(sqrt T), and no policy does better (Rusmevichientong and Tsitsiklis 2010)."""
    exponent, error = growth(sphere_regret("thompson"))
    assert error < 0.04
    assert abs(exponent - 0.5) < 3 * error, (exponent, error)
    exponent, error = growth(sphere_regret("uniform", 200), 25)
    assert abs(exponent - 0.5) > 3 * error


@pytest.mark.parametrize("policy", ["thompson", "ucb"])
def test_contextual_regret_flattens(policy):
    problem = LinearProblem(3, 3)
    regret = simulate(Bandit(linear(), policy), problem, 400)
    uniform = simulate(Bandit(linear(), "uniform"), problem, 400)
    assert regret[200:].sum() < 0.1 * uniform[200:].sum()
    assert regret.min() >= 0


def test_late_feedback_still_teaches():
    problem = LinearProblem(3, 3)
    bandit = Bandit(linear())
    regret = simulate(bandit, problem, 400, batch=20, delay=30)
    assert bandit.told == 400 - len(bandit.pending) and 30 <= len(bandit.pending) < 60
    uniform = simulate(Bandit(linear(), "uniform"), problem, 400)
    assert regret[200:].sum() < 0.15 * uniform[200:].sum()


def test_a_gp_basis_finds_what_a_line_cannot():
    """Two arms whose rewards cross twice."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (60, 1))
    fitted = fspace.GPRegressor(kernel="rbf", progress=False).fit(
        x, np.abs(x[:, 0]) + 0.05 * rng.standard_normal(60)
    )

    class Crossing(LinearProblem):
        def context(self, rng):
            return rng.uniform(-1, 1, 1)

        def means(self, context):
            return np.array([abs(context[0]), 0.5])

    member = fitted.posterior_
    known = ArmPosterior(member.basis, 2, mean=0.5, reward_scale=float(member.scaling.y_scale[0]))
    problem = Crossing(1, 2, noise=0.05)
    curved = simulate(Bandit(known), problem, 300)
    straight = simulate(Bandit(linear(1, 2, 0.0025)), problem, 300)
    assert curved[100:].sum() < 0.3 * straight[100:].sum()


def test_wheel():
    """Shares and rewards of the published problem."""
    wheel, rng = Wheel(0.5), np.random.default_rng(0)
    contexts = np.array([wheel.context(rng) for _ in range(4000)])
    outside = np.hypot(*contexts.T) >= 0.5
    assert abs(outside.mean() - 0.75) < 4.5 * math.sqrt(0.75 * 0.25 / 4000)
    for context in contexts[:200]:
        means = wheel.means(context)
        assert means.max() == (50.0 if np.hypot(*context) >= 0.5 else 1.2)
        assert (means == 50.0).sum() <= 1
    large = {np.argmax(wheel.means(np.array([a, b]))) for a in (0.7, -0.7) for b in (0.7, -0.7)}
    assert large == {0, 1, 2, 3}
    draws = [wheel.reward(np.array([0.1, 0.1]), 4, rng) for _ in range(2000)]
    assert abs(np.mean(draws) - 1.2) < 4.5 * 0.05 / math.sqrt(2000)


@pytest.mark.slow
def test_neural_linear_learns_a_table():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2))
    problem = TableProblem(x, (x[:, 0] * x[:, 1] > 0).astype(int))  # no line parts them
    neural = simulate(Bandit(NeuralLinear(2, 2)), problem, 800)
    straight = simulate(Bandit(linear(2, 2)), problem, 800)
    assert neural[500:].mean() < 0.2 < 0.3 < straight[500:].mean()


def test_probabilities_are_those_that_are_taken():
    known = linear(1, 3)
    known.update(
        torch.tensor([[0.0]] * 4).double(),
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([0.2, 0.5, 0.1, 0.3]).double(),
    )
    bandit = Bandit(known)
    shares = bandit.probabilities([[0.3]])[0]
    assert shares.sum().item() == pytest.approx(1.0)
    taken = np.bincount([bandit.choose([0.3], propensity=False).arm for _ in range(2000)], minlength=3) / 2000
    assert np.allclose(taken, shares, atol=4.5 * math.sqrt(0.25 / 2000 + 0.25 / 1024))


def logged(n, seed, wrong=1.0):
    """Rewards under a policy whose probabilities depend on the context; the value of always taking arm 1 is 0.5."""
    rng = np.random.default_rng(seed)
    x = rng.random(n)
    p1 = 0.2 + 0.6 * x
    arm = (rng.random(n) < p1).astype(int)
    reward = np.where(arm == 1, x, 1 - x) + 0.1 * rng.standard_normal(n)
    p = np.where(arm == 1, p1, 1 - p1) ** wrong
    return reward, arm, p, np.tile([0.0, 1.0], (n, 1)), np.stack([1 - x, x], 1)


@pytest.mark.parametrize("method", ["ips", "snips", "doubly_robust"])
def test_off_policy_values_are_unbiased(method):
    """400 logs; the mean estimate within 4.5 standard errors of the truth, and the reported error that of repeats."""
    found = [off_policy_value(*logged(300, s)[:4], logged(300, s)[4], method) for s in range(400)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - 0.5) < 4.5 * values.std() / 20 + (0.002 if method == "snips" else 0)
    assert abs(np.log(np.mean([f.standard_error for f in found]) / values.std())) < 0.2
    assert 50 < found[0].effective_rows < 300


def test_doubly_robust_is_robust_twice():
    """With wrong propensities and a right reward model it holds, and so with a wrong model; IPS does not (the twin)."""
    value = lambda method, wrong, model: np.array([  # noqa: E731
        off_policy_value(*logged(300, s, wrong)[:4], logged(300, s)[4] * model, method).value for s in range(300)
    ])  # fmt: skip
    for values in (value("doubly_robust", 2.0, 1.0), value("doubly_robust", 1.0, 0.3)):
        assert abs(values.mean() - 0.5) < 4.5 * values.std() / math.sqrt(300)
    twin = value("ips", 2.0, 1.0)
    assert abs(twin.mean() - 0.5) > 4.5 * twin.std() / math.sqrt(300)


def test_a_journal_goes_on(tmp_path):
    path = tmp_path / "bandit.jsonl"
    rng = np.random.default_rng(0)
    first = Bandit(linear(), journal=path)
    choices = [first.choose(rng.standard_normal(3)) for _ in range(10)]
    first.tell([c.id for c in choices[2:8]], rng.standard_normal(6))
    first.journal.close()
    with path.open("ab") as file:
        file.write(b'{"id": 9, "rew')  # killed while writing
    second = Bandit(linear(), journal=path)
    assert sorted(second.pending) == [0, 1, 8, 9]
    x = torch.randn(4, 3).double()
    for ours, theirs in zip(first.known.moments(x), second.known.moments(x)):
        assert torch.allclose(ours, theirs, atol=1e-10)
    assert second.choose(np.zeros(3)).id == 10
    second.tell([9], [1.0])
    with pytest.raises(ModelFileError):
        (tmp_path / "other").write_text("no journal\n")
        Bandit(linear(), journal=tmp_path / "other")


def test_the_journal_of_a_bandit_with_more_arms(tmp_path):
    first = Bandit(linear(2, 3), "uniform", journal=tmp_path / "bandit.jsonl")
    while first.choose([0.0, 0.0]).arm < 2:
        pass
    with pytest.raises(OptionError, match="another bandit's"):
        Bandit(linear(2, 2), journal=tmp_path / "bandit.jsonl")


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_killing_loses_no_reward(tmp_path, seed):
    path = tmp_path / "bandit.jsonl"
    script = Path(__file__).with_name("killed_bandit.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), str(seed)], stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(4)]
    time.sleep(0.01 + 0.013 * seed)
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    told = {int(i): float(r) for i, r in (line.split() for line in lines if len(line.split()) == 2)}
    bandit = Bandit(ArmPosterior(linear_basis(2), 3), journal=path)
    kept = {e["id"]: e["reward"] for e in bandit.journal.entries if "reward" in e}
    assert len(told) >= 4
    assert {i: kept.get(i) for i in list(told)[:-1]} == {i: told[i] for i in list(told)[:-1]}
    assert len(told) <= bandit.told <= len(told) + 2
    assert json.loads(path.read_text().splitlines()[0])["id"] == 0


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda b: b.tell([0], [1.0]), DataError, "not waiting"),
        (lambda b: b.tell([b.choose([0.0, 0.0, 0.0]).id], [math.nan]), UtilityError, "NaN|nan"),
        (lambda b: b.tell([b.choose([0.0, 0.0, 0.0]).id] * 2, [1.0, 2.0]), DataError, "twice"),
        (lambda b: b.choose([0.0, 0.0]), DataError, "2 numbers"),
        (lambda b: b.choose(["low", "high", "low"]), DataError, "low"),
        (lambda b: b.tell(b.choose([0.0, 0.0, 0.0]).id, [1.0]), DataError, "choice.id"),
        (lambda b: b.tell([b.choose([0.0, 0.0, 0.0])], [1.0]), DataError, "choice.id"),
        (lambda b: b.choose([math.nan, 0.0, 0.0]), DataError, "finite"),
        (lambda b: Bandit(linear(), "best"), OptionError, "does not exist"),
        (lambda b: simulate(b, Wheel(0.5), 3), OptionError, "5"),
        (lambda b: Wheel(1.0), OptionError, "delta"),
        (lambda b: TableProblem(np.zeros((3, 2)), [1, 1, 1]), DataError, "two classes"),
        (
            lambda b: off_policy_value([1.0, 2.0], [0, 1], [0.5, 0.0], [[1, 0], [0, 1.0]], method="ips"),
            DataError,
            "row 1",
        ),
        (
            lambda b: off_policy_value([1.0, 2.0], [0, 1], [0.5, 0.5], [[1, 0], [0, 1.0]]),
            OptionError,
            "reward_model",
        ),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call(Bandit(linear()))
