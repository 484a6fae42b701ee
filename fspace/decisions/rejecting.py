"""Rejecting: hand a case to a person where the model's expected loss is more than a person costs.

How far the model can be trusted with the rest is a question about losses on held-out cases: the risk-coverage curve,
and a threshold that keeps a risk with a guarantee for any number of held-out cases. Two guarantees are offered, of
different risks:
- `conformal_threshold`: E[loss x kept] <= target for the next case, on average over held-out sets. The risk is that of
  all cases, where a case handed on counts as no loss.
- `selective_threshold`: with a stated confidence over held-out sets, E[loss | kept] <= target.
Both suppose that held-out and later cases are exchangeable (i.i.d. for the second).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from fspace.decisions.sources import check_number
from fspace.decisions.utility import CostMatrix
from fspace.errors import DataError, InfeasibleError, OptionError, UtilityError
from fspace.predictive import Categorical, Predictive, as_tensor

LEVELS = 20  # coverages among which `selective_threshold` looks; each costs a share of the error probability


@dataclass(frozen=True)
class RiskCoverage:
    """Mean loss of the cases kept, as more and more are kept, the surest first.

    Shapes: coverage, risk, threshold [k], one entry for every distinct doubt (cases of equal doubt are kept together).
    aurc: area under the curve (Geifman, Uziel and El-Yaniv 2019): the risk averaged over the n ranks.
    """

    coverage: Float[Tensor, " k"]
    risk: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"]
    aurc: float


@dataclass(frozen=True)
class Reject:
    """Keep a case where its doubt (expected loss) is at most `threshold`; hand it to a person otherwise.

    threshold: what a person costs, in units of the loss, or what one of the functions here found.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, float) and math.isinf(self.threshold)):  # keep all, keep none
            must = "be a number, not NaN: what it costs to hand a case on"
            object.__setattr__(self, "threshold", check_number(self.threshold, "threshold", must))

    def keep(self, doubt: Any) -> Bool[Tensor, " n"]:
        """Which cases the model decides. Raises UtilityError for NaN."""
        return _numbers(doubt, "doubt") <= self.threshold


def expected_loss(predictive: Predictive, loss: str | CostMatrix = "auto") -> Float[Tensor, " n"]:
    """Expected loss of the model's best answer at every row: its doubt.

    "auto": of classes the probability of error of the likeliest ("error"), of numbers the variance ("squared", of
    the mean; several outputs are summed). A CostMatrix: cost of its cheapest action. Raises OptionError.
    """
    if isinstance(loss, CostMatrix):
        costs = loss.expected(predictive, torch.arange(len(loss.cost)))
        assert costs is not None
        return -costs.amax(-1)
    kind = "error" if isinstance(predictive, Categorical) else "squared"
    if loss not in ("auto", kind):
        raise OptionError(
            f"loss={loss!r} is not of this model, which has 'auto', {kind!r} or (classes) a CostMatrix."
        )
    if isinstance(predictive, Categorical):
        return 1.0 - predictive.probs.amax(-1)
    variance = predictive.variance
    return variance if variance.ndim == 1 else variance.sum(-1)


def risk_coverage(doubt: Any, losses: Any) -> RiskCoverage:
    """The curve of cases with these doubts and realised losses, both [n]. Raises DataError, UtilityError."""
    doubt, losses = _pair(doubt, losses)
    order = doubt.argsort(stable=True)
    sorted_doubt, total = doubt[order], losses[order].cumsum(0)
    ends = torch.cat([sorted_doubt[1:] != sorted_doubt[:-1], torch.ones(1, dtype=torch.bool)])
    last = ends.nonzero()[:, 0]
    count = (last + 1).to(losses)
    risk = total[last] / count
    share = torch.diff(count, prepend=count.new_zeros(1)) / len(doubt)
    return RiskCoverage(count / len(doubt), risk, sorted_doubt[last], float((risk * share).sum()))


def conformal_threshold(doubt: Any, losses: Any, target: float, most: float = 1.0) -> float:
    """The largest threshold for which E[loss x kept] of the next case is at most `target`, from held-out [n] cases.

    Losses lie between 0 and `most`. loss x kept never falls as the threshold grows, so the threshold with
    n / (n + 1) mean(loss x kept) + most / (n + 1) <= target keeps the promise for any n (a little unused). Raises
    InfeasibleError where even keeping nothing cannot be promised: n is less than most / target - 1.
    Source: Angelopoulos, Bates, Fisch, Lei and Schuster (2024), theorem 1.
    """
    doubt, losses = _pair(doubt, losses)
    _require_range(losses, target, most)
    n = len(doubt)
    if most / (n + 1) > target:
        raise InfeasibleError(
            f"{n} held-out cases cannot promise a risk of {target:g} for losses up to {most:g}: at least "
            f"{math.ceil(min(most / target, 1e15) - 1):,} are needed."
        )
    order = doubt.argsort(stable=True)
    sorted_doubt, risk = doubt[order], (losses[order].cumsum(0) + most) / (n + 1)
    too_much = risk > target
    if not bool(too_much.any()):
        return math.inf
    first = sorted_doubt[too_much.nonzero()[0, 0]]  # whose cases, kept together, would break the promise
    return float(torch.nextafter(first, torch.full_like(first, -math.inf)))


def selective_threshold(
    doubt: Any, losses: Any, target: float, confidence: float = 0.9, most: float = 1.0
) -> float:
    """The largest threshold for which E[loss | kept] <= `target` is certain to degree `confidence`, from held-out [n].

    For some coverages fixed beforehand, the cases below an order statistic of the doubts are i.i.d. given that
    statistic; each is tested (exactly for losses that are 0 or `most`, else by Hoeffding's and Bentkus' bounds) at its
    share of 1 - confidence. Raises InfeasibleError where no coverage passes.
    Sources: Geifman and El-Yaniv (2017), algorithm 1; Bates, Angelopoulos et al. (2021), proposition 7.
    """
    doubt, losses = _pair(doubt, losses)
    _require_range(losses, target, most)
    check_number(confidence, "confidence", "lie strictly between 0 and 1", 0.0, 1.0)
    n, order = len(doubt), doubt.argsort(stable=True)
    doubt, scaled = doubt[order], losses[order] / most
    for level in range(LEVELS, 0, -1):
        rank = math.ceil(level * n / LEVELS) - 1  # cases strictly below this one are kept
        kept = scaled[doubt < doubt[rank]]
        if len(kept) and _p_value(kept, target / most) <= (1.0 - confidence) / LEVELS:
            return float(torch.nextafter(doubt[rank], torch.full_like(doubt[rank], -math.inf)))
    raise InfeasibleError(
        f"No coverage has a risk of at most {target:g} with confidence {confidence:g} on these {n} cases; take more "
        "held-out cases, a larger target, or a better model."
    )


def _p_value(losses: Float[Tensor, " m"], target: float) -> float:
    """Probability of so small a mean where the risk is `target` or more, at most."""
    m, total = len(losses), float(losses.sum())
    if bool(((losses == 0) | (losses == 1)).all()):
        return float(stats.binom.cdf(round(total), m, target))
    mean = total / m
    if mean >= target:
        return 1.0
    divergence = (mean * math.log(mean / target) if mean > 0 else 0.0) + (1 - mean) * math.log(
        (1 - mean) / (1 - target)
    )
    return min(math.exp(-m * divergence), math.e * float(stats.binom.cdf(math.ceil(total), m, target)))


def _pair(doubt: Any, losses: Any) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    doubt, losses = _numbers(doubt, "doubt"), _numbers(losses, "losses")
    if len(doubt) != len(losses):
        raise DataError(f"There are {len(doubt)} doubts for {len(losses)} losses.")
    return doubt, losses


def _numbers(values: Any, name: str) -> Float[Tensor, " n"]:
    values = as_tensor(values, torch.device("cpu"), name).detach().to(torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(
            f"{name} must be one number a case, [n], at least one; it has shape {tuple(values.shape)}."
        )
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise UtilityError(f"{name} holds NaN or infinite values (case {int(bad.nonzero()[0])}).")
    return values


def _require_range(losses: Tensor, target: float, most: float) -> None:
    most = check_number(most, "most", "be a positive number", 0.0)
    check_number(target, "target", f"lie strictly between 0 and most={most:g}", 0.0, most)
    outside = (losses < 0) | (losses > most)
    if bool(outside.any()):
        case = int(outside.nonzero()[0])
        raise DataError(
            f"Losses must lie between 0 and most={most:g}; that of case {case} is {losses[case]:g}."
        )


def losses_of(predictive: Predictive, y: Any) -> Float[Tensor, " n"]:
    """Realised losses of the model's answers: of classes (y holds their positions) 1 for an error, of numbers the
    squared error. Raises DataError where y is of other rows."""
    answer = predictive.mode if isinstance(predictive, Categorical) else predictive.mean
    given = as_tensor(y, answer.device)
    if given.shape != answer.shape:
        raise DataError(f"y has shape {tuple(given.shape)}, but the predictive {tuple(answer.shape)}.")
    if isinstance(predictive, Categorical):
        return (answer != given).to(torch.float64)
    error = (given.to(answer) - answer).square()
    return error if error.ndim == 1 else error.sum(-1)
