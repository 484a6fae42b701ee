"""Thresholds against MAPIE's risk control on the same doubts and losses, where the definitions agree.

`conformal_threshold` is its CRC with loss x kept as the risk of a threshold; of `selective_threshold` the p-values of
bounded losses are its Hoeffding-Bentkus ones, whose coverages fspace tests with a share of the error each (Bonferroni).
"""

import math

import numpy as np
import pytest
import torch

from fspace.decisions.rejecting import LEVELS, conformal_threshold, selective_threshold
from fspace.errors import InfeasibleError

mapie = pytest.importorskip("mapie.risk_control.methods", reason="the package mapie: pip install mapie")


def cases(n, seed, binary):
    """Losses grow with doubt; half of the doubts are repeated."""
    rng = np.random.default_rng(seed)
    doubt = np.concatenate([rng.random(n - n // 2), np.round(rng.random(n // 2), 1)])
    wrong = rng.random(n) < doubt**2
    return doubt, (wrong if binary else wrong * rng.random(n)).astype(float)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_conformal_threshold_is_mapies_conformal_risk_control(seed, binary):
    doubt, losses = cases(80, seed, binary)
    thresholds = np.unique(doubt)
    risks = losses[:, None] * (doubt[:, None] <= thresholds)
    upper = mapie.get_r_hat_plus(risks, thresholds, "crc", None, None, None)[1]
    for target in (0.0501, 0.1003, 0.2007):
        kept = doubt <= conformal_threshold(doubt, losses, target)
        if upper[0] >= target:  # MAPIE then gives the least threshold, though its risk is too high
            assert not kept.any()
            continue
        theirs = mapie.find_best_predict_param(thresholds, upper, np.array([target]))[0]
        assert (kept == (doubt <= theirs)).all()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_selective_threshold_takes_the_largest_coverage_that_mapies_p_value_passes(seed, binary):
    doubt, losses = cases(400, seed, binary)
    target, confidence, order = 0.1, 0.9, np.sort(doubt)
    want = None
    for level in range(LEVELS, 0, -1):
        edge = order[math.ceil(level * 400 / LEVELS) - 1]
        below = losses[doubt < edge]
        if len(below) == 0:
            continue
        p = mapie.compute_hoeffding_bentkus_p_value(np.array([below.mean()]), len(below), target, binary)
        # where losses are 0 or 1 the binomial is exact; MAPIE takes the smaller of it and Hoeffding's, which is larger
        if p[0, 0] <= (1 - confidence) / LEVELS:
            want = doubt < edge
            break
    if want is None:
        with pytest.raises(InfeasibleError):
            selective_threshold(doubt, losses, target, confidence)
        return
    kept = doubt <= selective_threshold(doubt, losses, target, confidence)
    assert (kept == want).all()


def test_p_values_are_mapies():
    from fspace.decisions.rejecting import _p_value

    rng = np.random.default_rng(0)
    for _ in range(200):
        losses = rng.random(int(rng.integers(5, 200))) * rng.uniform(0.05, 1.0)
        target = float(rng.uniform(0.05, 0.9))
        theirs = mapie.compute_hoeffding_bentkus_p_value(np.array([losses.mean()]), len(losses), target)[0, 0]
        assert min(_p_value(torch.tensor(losses), target), 1.0) == pytest.approx(min(theirs, 1.0), rel=1e-9)
