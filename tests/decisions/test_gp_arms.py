"""The GP bandit that learns its kernel: exact GPs of its own parameters, constant cost, nothing lost, and regret."""

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
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fspace.decisions import Bandit, GPArms, LinearProblem, TableProblem, gp_arms, linear_basis, simulate
from fspace.decisions.bandits import ArmPosterior
from fspace.errors import DataError, OptionError
from fspace.inference.collapsed import fit_site
from fspace.kernels.evaluate import covariance


def rewards(n, seed=0, width=2, arms=3):
    rng = np.random.default_rng(seed)
    x, a = rng.standard_normal((n, width)), rng.integers(0, arms, n)
    r = np.where(a == 0, np.sin(2 * x[:, 0]), 0.3 * a * x[:, 1]) + 0.2 * rng.standard_normal(n)
    return torch.tensor(x), torch.tensor(a), torch.tensor(r)


def test_after_a_refit_arms_are_exact_gps_of_the_learned_kernel():
    """Rasmussen and Williams (2006), eq. 2.25-2.26, arm by arm; every row is an inducing input."""
    x, a, r = rewards(40)
    known = GPArms(2, 3, mean=0.5, reward_scale=2.0)
    known.update(x, a, r)
    assert known.refitted == 40
    places = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    moments = known.moments(places)
    basis = known.known.basis
    z, at = (x - x.mean(0)) / x.std(0), (places - x.mean(0)) / x.std(0)
    for arm in range(3):
        mine = a == arm
        k = covariance(basis.kernel, z[mine]) + basis.noise * torch.eye(int(mine.sum())).double()
        cross = covariance(basis.kernel, at, z[mine])
        mean = cross @ torch.linalg.solve(k, (r[mine] - 0.5) / 2.0)
        variance = covariance(basis.kernel, at) - cross @ torch.linalg.solve(k, cross.mT)
        # the inducing inputs leave 1e-4 of the prior variance unexplained
        assert torch.allclose(moments.mean[:, arm], 0.5 + 2.0 * mean, atol=0.01)
        assert torch.allclose(moments.stddev[:, arm], 2.0 * variance.diagonal().sqrt(), atol=0.01)


def test_sites_of_steps_are_the_fit_from_scratch():
    """300 rewards in batches of 7 on a fixed basis, against the collapsed site of all rows of an arm."""
    x, a, r = rewards(300)
    known = GPArms(2, 3, most=20, remember=80)
    for rows in torch.arange(300).split(7):
        known.update(x[rows], a[rows], r[rows])
    basis, seen = known.known.basis, (x - x[:80].mean(0)) / x[:80].std(0)
    assert known.refitted == 80 and len(basis.inducing_inputs) == 20
    for arm in range(3):
        site = fit_site(basis, seen[a == arm], r[a == arm, None])
        assert torch.allclose(known.known.precision[arm], site.precision[0], atol=1e-8)
        assert torch.allclose(known.known.shift[arm], site.shift[0], atol=1e-8)


@pytest.mark.parametrize("most", [15, 60])
def test_batches_do_not_matter(most):
    """One reward at a time, by 13, or all at once: the same state, also while inducing inputs still come."""
    x, a, r = rewards(150)
    states = []
    for size in (1, 13, 150):
        known = GPArms(2, 3, most=most, remember=90)
        for rows in torch.arange(150).split(size):
            known.update(x[rows], a[rows], r[rows])
        states.append(known)
    at = states[0].moments(x)
    for other in states[1:]:
        assert torch.equal(states[0].known.basis.inducing_inputs, other.known.basis.inducing_inputs)
        assert torch.allclose(at.mean, other.moments(x).mean, atol=1e-8)
        assert torch.allclose(at.stddev, other.moments(x).stddev, atol=1e-8)


def test_grown_arms_know_what_they_knew():
    """New inducing inputs change no moment; then a row at one of them teaches as on a basis that always had it."""
    x, a, r = rewards(40)
    known, whole = GPArms(2, 3, most=10), GPArms(2, 3, most=10)
    known.update(x, a, r)
    whole.update(x, a, r)
    arms, before = known.known, known.known.moments(x)
    arms.grow(x[:4] + 3.0)
    for old, new in zip(before, arms.moments(x), strict=True):
        assert torch.allclose(old, new, atol=1e-6)
    rebuilt = ArmPosterior(arms.basis, 3)
    rebuilt.precision, rebuilt.shift = arms.precision.clone(), arms.shift.clone()
    rebuilt._refresh(range(3))
    for one in (arms, rebuilt):
        one.update(x[:4] + 3.0, a[:4], r[:4])
    for old, new in zip(rebuilt.moments(x + 2.0), arms.moments(x + 2.0), strict=True):
        assert torch.allclose(old, new, atol=1e-8)
    assert (arms.moments(x[:4] + 3.0).stddev < whole.known.moments(x[:4] + 3.0).stddev + 1e-9).all()


class Operations(TorchFunctionMode):
    """Counts the numbers that torch functions return."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numbers += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def test_a_step_costs_the_same_between_refits_and_memory_is_bounded():
    x, a, r = rewards(1500)
    known = GPArms(2, 3, most=20, remember=640)
    costs, kept = [], []
    for start in range(0, 1500, 10):
        rows, refitted = slice(start, start + 10), known.refitted
        with Operations() as count, FlopCounterMode(display=False) as flops:
            known.update(x[rows], a[rows], r[rows])
            known.moments(x[rows])
        kept.append(sum(len(part.rewards) for part in known._rows))
        if known.refitted == refitted and start > 160:
            costs.append((count.numbers, flops.get_total_flops()))
    assert known.refitted == 640 and known.seen == 1500 and len(costs) > 100
    # of a step only how many arms a batch of ten happened to hold differs
    early, late = costs[:20], costs[20:]
    assert max(c for c, _ in late) <= max(c for c, _ in early)
    assert max(f for _, f in late) <= max(f for _, f in early)
    assert max(kept) <= 640 and kept[-1] == 0


def test_refits_are_few():
    """The number of refits grows like the logarithm of the rewards."""
    x, a, r = rewards(700)
    known, refits = GPArms(2, 3, most=10), set()
    for rows in torch.arange(700).split(10):
        known.update(x[rows], a[rows], r[rows])
        refits.add(known.refitted)
    assert sorted(refits) == [10, 20, 40, 80, 160, 320, 640]


def test_units_of_contexts_and_rewards_do_not_matter():
    x, a, r = rewards(60)
    one, other = GPArms(2, 3), GPArms(2, 3, mean=7.0, reward_scale=100.0)
    one.update(x, a, r)
    factor = torch.tensor([1e4, 1e-3]).double()
    other.update(x * factor - 5.0, a, 100.0 * r + 7.0)
    ours, theirs = one.moments(x[:9]), other.moments(x[:9] * factor - 5.0)
    assert torch.allclose(100.0 * ours.mean + 7.0, theirs.mean, rtol=1e-4, atol=1e-3)
    assert torch.allclose(100.0 * ours.stddev, theirs.stddev, rtol=1e-4, atol=1e-3)


def test_a_constant_column_is_harmless():
    x, a, r = rewards(45)
    known = GPArms(3, 3)
    known.update(torch.cat([x, torch.full_like(x[:, :1], 1e6)], 1), a, r)
    at = known.moments(torch.cat([x[:5], torch.full_like(x[:5, :1], 1e6)], 1))
    assert at.mean.isfinite().all() and at.stddev.isfinite().all()


def test_rare_rewards_are_still_looked_for():
    """Rewards that were all alike leave a doubt of the order of reward_scale where nothing was tried."""
    x, a, _ = rewards(80)
    known = GPArms(2, 3, reward_scale=50.0)
    inside = x.norm(dim=1) < 1.0
    known.update(x[inside], a[inside], torch.ones(int(inside.sum())).double())
    far = known.moments(torch.tensor([[6.0, -6.0]]).double())
    assert (far.stddev > 0.25 * 50.0).all()


def test_learns_a_table_that_no_line_parts():
    """Regret of the second half at most a third of linear UCB's, whose cause is the model."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    problem = TableProblem(x, (x[:, 0] * x[:, 1] > 0).astype(int))
    curved = simulate(Bandit(GPArms(2, 2), "ucb", width=1.0), problem, 400, batch=10)
    lines = ArmPosterior(linear_basis(2, noise=0.1), 2)
    straight = simulate(Bandit(lines, "ucb", width=1.0), problem, 400, batch=10)
    assert curved[200:].mean() < straight[200:].mean() / 3.0
    assert curved[200:].mean() < 0.12


def test_the_floor_of_the_noise_ends_exploration(monkeypatch):
    """Rewards of classes are free of noise: without the floor Thompson sampling goes on exploring (the twin)."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 4))
    problem = TableProblem(x, (x @ np.array([1.0, -1.0, 0.5, 0.0]) > 0).astype(int))
    run = lambda: simulate(Bandit(GPArms(4, 2)), problem, 300, batch=10)[100:].sum()  # noqa: E731
    with_floor = run()
    monkeypatch.setattr(gp_arms, "NOISE_FLOOR", 1e-6)
    assert with_floor < run()


def test_a_journal_goes_on_where_it_was(tmp_path):
    """Told in pieces of 7, a refit and growing inducing inputs among them; replayed at once."""
    rng = np.random.default_rng(0)
    problem = LinearProblem(3, 3)
    first = Bandit(GPArms(3, 3), journal=tmp_path / "bandit.jsonl")
    for _ in range(10):
        choices = [first.choose(problem.context(rng), propensity=False) for _ in range(7)]
        first.tell([c.id for c in choices], rng.standard_normal(7))
    second = Bandit(GPArms(3, 3), journal=tmp_path / "bandit.jsonl")
    assert second.told == 70 and second.known.refitted == 40
    x = torch.tensor(rng.standard_normal((5, 3)))
    for ours, theirs in zip(first.known.moments(x), second.known.moments(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_killing_loses_no_reward(tmp_path):
    """Killed after some refits; every reward whose `tell` returned is in the memory of the next bandit."""
    path = tmp_path / "bandit.jsonl"
    script = Path(__file__).with_name("killed_gp_bandit.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), "0"], stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(25)]
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    told = [line.split() for line in lines if len(line.split()) == 2]
    bandit = Bandit(GPArms(2, 3), journal=path)
    assert len(told) <= bandit.told <= len(told) + 1
    kept = {e["id"]: e["reward"] for e in bandit.journal.entries if "reward" in e}
    assert all(kept[int(i)] == float(r) for i, r in told[:-1])
    assert bandit.known.refitted >= 20 and bandit.known.seen == bandit.told


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: GPArms(2, 1), OptionError, "arms=1 must be a whole number of at least 2"),
        (lambda: GPArms(2.5, 3), OptionError, "width=2.5"),
        (lambda: GPArms(2, 3, remember=math.inf), OptionError, "remember=inf"),
        (lambda: GPArms(2, 3, reward_scale=0.0), OptionError, "above 0"),
        (lambda: GPArms(2, 3, mean=math.nan), OptionError, "finite"),
        (lambda: GPArms(2, 3, remember=5), OptionError, "10"),
        (lambda: Bandit(GPArms(2, 3)).choose([0.0, 0.0, 0.0]), DataError, "3 numbers, but the arms know 2"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
