"""What another policy would have earned, from the log of the one that acted.

With p the probability the logged arm was taken with and q that under the policy in question:
    IPS = mean q/p r,    self-normalised IPS = sum q/p r / sum q/p,
    doubly robust = mean [ sum_a q_a rhat_a + q/p (r - rhat) ].
IPS is unbiased where p is right; doubly robust where p or the reward model is.
Sources: Horvitz and Thompson (1952); Swaminathan and Joachims (2015); Dudik, Langford and Li (2011), eq. 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fspace.errors import DataError, OptionError, UtilityError
from fspace.predictive import as_tensor

METHODS = ("ips", "snips", "doubly_robust")


@dataclass(frozen=True)
class PolicyValue:
    """Estimated mean reward of a policy, its standard error, and the rows that the weights amount to (Kish 1965)."""

    value: float
    standard_error: float
    effective_rows: float


def off_policy_value(
    rewards: Any,
    arms: Any,
    logged: Any,
    target: Any,
    reward_model: Any = None,
    method: str = "doubly_robust",
) -> PolicyValue:
    """Mean reward that the policy `target` would have had.

    Shapes: rewards [n], arms [n] (taken), logged [n] (probability of the arm taken, above 0), target [n, a]
    (probabilities under the policy in question), reward_model [n, a] (of doubly_robust; from other data than these).
    Raises DataError for shapes and for probabilities that are none, OptionError.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r} does not exist; choose one of {', '.join(METHODS)}.")
    r, p, q = _numbers(rewards, "rewards"), _numbers(logged, "logged"), _numbers(target, "target")
    a = _numbers(arms, "arms")
    n = len(r)
    if n < 2 or r.shape != (n,) or p.shape != (n,) or a.shape != (n,) or q.ndim != 2 or len(q) != n:
        raise DataError(
            f"rewards, arms, logged must be [n] and target [n, a], n at least 2; they are {tuple(r.shape)}, "
            f"{tuple(a.shape)}, {tuple(p.shape)}, {tuple(q.shape)}."
        )
    if not bool(((p > 0) & (p <= 1)).all()):
        row = int((~((p > 0) & (p <= 1))).nonzero()[0])
        raise DataError(f"logged must be probabilities above 0; row {row} has {p[row].item():g}.")
    if bool((q < 0).any()) or not torch.allclose(q.sum(1), torch.ones_like(r), atol=1e-6):
        raise DataError("target must be probabilities that sum to one over the arms of every row.")
    if not bool(((a >= 0) & (a < q.shape[1]) & (a == a.round())).all()):
        raise DataError(f"arms must be whole numbers from 0 to {q.shape[1] - 1}.")
    a = a.long()
    ratio = q.gather(1, a[:, None])[:, 0] / p
    effective = float(ratio.sum().square() / ratio.square().sum()) if bool(ratio.any()) else 0.0
    if method == "ips":
        terms = ratio * r
    elif method == "snips":
        if effective == 0.0:
            raise DataError("The policy never takes a logged arm; the log says nothing about it.")
        centre = (ratio * r).sum() / ratio.sum()
        terms = centre + ratio * (r - centre) / ratio.mean()
    else:
        if reward_model is None:
            raise OptionError("doubly_robust needs reward_model [n, a]; without one take method='snips'.")
        guess = _numbers(reward_model, "reward_model")
        if guess.shape != q.shape:
            raise DataError(f"reward_model must be {tuple(q.shape)}, as target; it is {tuple(guess.shape)}.")
        terms = (q * guess).sum(1) + ratio * (r - guess.gather(1, a[:, None])[:, 0])
    return PolicyValue(float(terms.mean()), float(terms.std() / math.sqrt(n)), effective)


def _numbers(values: Any, name: str) -> Tensor:
    numbers = as_tensor(values, None, name).to(torch.float64)
    if not bool(numbers.isfinite().all()):
        raise UtilityError(f"{name} holds NaN or infinite values.")
    return numbers
