"""Rejecting: the promise of a threshold is kept over repeated draws, and a threshold without it is found out."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fspace.decisions.rejecting import (
    Reject,
    conformal_threshold,
    expected_loss,
    losses_of,
    risk_coverage,
    selective_threshold,
)
from fspace.decisions.utility import CostMatrix
from fspace.errors import DataError, InfeasibleError, OptionError, UtilityError
from fspace.predictive import Categorical, Gaussian

REPEATS = 2000


def cases(n, seed):
    """Doubt is uniform; errors come with the probability doubt squared, so doubt ranks but does not calibrate."""
    rng = np.random.default_rng(seed)
    doubt = rng.random(n)
    return torch.tensor(doubt), torch.tensor((rng.random(n) < doubt**2).astype(float))


def naive_threshold(doubt, losses, target):
    """The largest threshold whose risk on the held-out cases is the target: no correction for their number."""
    order = doubt.argsort()
    risk = losses[order].cumsum(0) / len(doubt)
    return doubt[order][risk <= target][-1].item()


def breaches(threshold, n, target):
    """How often the next case is kept and wrong, one next case a repetition."""
    found = 0
    for seed in range(REPEATS):
        doubt, losses = cases(n + 1, seed)
        rule = Reject(threshold(doubt[:n], losses[:n], target))
        found += bool(rule.keep(doubt[n:])[0]) * losses[n].item()
    return int(found)


def test_conformal_risk_stays_under_its_target():
    """Losses of the next case are Bernoulli with a mean of at most the target: a one-sided binomial test."""
    n, target = 30, 0.1
    kept = breaches(conformal_threshold, n, target)
    assert stats.binomtest(kept, REPEATS, target, alternative="greater").pvalue > 0.01
    # not by keeping nothing: the promise is used up to most / (n + 1) on average, here to more than 0.05
    assert stats.binomtest(kept, REPEATS, 0.05, alternative="less").pvalue > 0.01
    twin = breaches(naive_threshold, n, target)
    assert twin > kept
    assert stats.binomtest(twin, REPEATS, target, alternative="greater").pvalue < 0.01, twin


def test_conformal_threshold_is_the_formula():
    """By search over all thresholds."""
    doubt, losses = cases(60, 3)
    for target in (0.05, 0.1, 0.3):
        found = conformal_threshold(doubt, losses, target)
        for t in np.linspace(-0.1, 1.1, 2000):
            risk = (losses[doubt <= t].sum() + 1) / 61
            assert (risk <= target) == (t <= found), t
    assert conformal_threshold(doubt, losses, 0.99) == math.inf


def test_selective_risk_holds_with_its_confidence():
    """The true risk of the cases kept is t^2 / 3; it may be over the target in at most 10% of held-out sets."""
    target, confidence, over, kept = 0.05, 0.9, 0, []
    for seed in range(400):
        try:
            t = selective_threshold(*cases(2000, seed), target, confidence)
        except InfeasibleError:  # nothing is kept, and nothing promised
            t = 0.0
        over += t**2 / 3 > target
        kept.append(t)
    assert stats.binomtest(over, 400, 1 - confidence, alternative="greater").pvalue > 0.01
    assert 0.2 < np.mean(kept) < math.sqrt(3 * target)
    twin = sum(naive_selective(*cases(2000, seed), target) ** 2 / 3 > target for seed in range(400))
    assert stats.binomtest(twin, 400, 1 - confidence, alternative="greater").pvalue < 0.01


def naive_selective(doubt, losses, target):
    curve = risk_coverage(doubt, losses)
    return curve.threshold[curve.risk <= target][-1].item()


def test_bounded_losses_are_tested_by_bounds_that_hold():
    """Uniform losses with mean just over the target: rejecting the null may happen in at most delta of the sets."""
    from fspace.decisions.rejecting import _p_value

    generator = torch.Generator().manual_seed(0)
    small = [_p_value(0.4 * torch.rand(40, generator=generator).double(), 0.2) for _ in range(500)]
    assert np.mean(np.array(small) <= 0.1) <= 0.1
    assert _p_value(0.01 * torch.rand(200, generator=generator).double(), 0.2) < 1e-6


def test_risk_coverage_by_enumeration():
    doubt, losses = torch.tensor([0.3, 0.1, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, 0.0, 0.5]).double()
    curve = risk_coverage(doubt, losses)
    assert curve.coverage.tolist() == [0.25, 0.5, 1.0]
    assert curve.risk.tolist() == [0.0, 0.25, 0.375]
    assert curve.aurc == pytest.approx(0.25 * 0.0 + 0.25 * 0.25 + 0.5 * 0.375)


def test_aurc_against_torch_uncertainty_formula():
    """Without ties the area is the mean over ranks of the mean loss so far."""
    doubt, losses = cases(200, 1)
    order = np.argsort(doubt.numpy())
    want = np.mean(np.cumsum(losses.numpy()[order]) / np.arange(1, 201))
    assert risk_coverage(doubt, losses).aurc == pytest.approx(want)
    assert want < risk_coverage(-doubt, losses).aurc


def test_expected_losses():
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double()
    assert torch.allclose(expected_loss(Categorical(probs)), torch.tensor([0.1, 0.5]).double())
    cost = CostMatrix([[0.0, 5.0], [1.0, 0.0]])
    assert torch.allclose(expected_loss(Categorical(probs), cost), torch.tensor([0.5, 0.5]).double())
    normal = Gaussian(torch.zeros(2).double(), torch.tensor([1.0, 4.0]).double())
    assert expected_loss(normal).tolist() == [1.0, 4.0]
    assert losses_of(normal, [1.0, 3.0]).tolist() == [1.0, 9.0]
    assert losses_of(Categorical(probs), [1, 0]).tolist() == [1.0, 0.0]
    assert Reject(1.5).keep(expected_loss(normal)).tolist() == [True, False]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: conformal_threshold([0.1] * 5, [0.0] * 5, 0.1), InfeasibleError, "at least 9"),
        (lambda: conformal_threshold([0.1] * 20, [2.0] * 20, 0.1), DataError, "case 0 is 2"),
        (lambda: conformal_threshold([0.1], [0.0], 1.5), OptionError, "target"),
        (lambda: conformal_threshold([0.1, math.nan], [0.0, 0.0], 0.5), UtilityError, "case 1"),
        (lambda: risk_coverage([], []), DataError, "at least one"),
        (lambda: risk_coverage([0.1], [0.1, 0.2]), DataError, "1 doubts"),
        (lambda: selective_threshold([0.1, 0.2], [1.0, 1.0], 0.1), InfeasibleError, "No coverage"),
        (lambda: Reject(math.nan), OptionError, "NaN"),
        (lambda: expected_loss(Gaussian(torch.zeros(1), torch.ones(1)), "error"), OptionError, "squared"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
