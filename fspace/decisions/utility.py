"""Expected utility: for each row the action that is best on average over what the posterior holds possible.

A utility is a function of (action, y), vectorised over samples of y [s, n]. Those here also know their expectation in
closed form where the predictive is Gaussian, a mixture of Gaussians, or class probabilities; with any other predictive,
and for any other utility, it is a Monte Carlo average whose standard error is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fspace.decisions.sources import posterior_of, rows_of
from fspace.errors import DataError, OptionError, UtilityError
from fspace.predictive import Categorical, Gaussian, Mixture, Predictive, Samples, as_tensor, check_count
from fspace.predictive_base import Continuous

ROWS = 256  # whose joint samples are drawn at once


@dataclass(frozen=True)
class Decision:
    """The best action of every row, and how sure that choice is.

    Shapes: index [n] (which action; -1 where actions are not a list), action [n, ...] or a list of n, value [n] its
    expected utility. values [n, a] and standard_error [n, a] are of all actions; margin [n] is how much better the best
    is than the next, margin_error [n] the standard error of that (infinite margin where there is one action). exact:
    closed forms, whose standard errors are zero.
    """

    index: Int[Tensor, " n"]
    action: Any
    value: Float[Tensor, " n"]
    values: Float[Tensor, "n a"]
    standard_error: Float[Tensor, "n a"]
    margin: Float[Tensor, " n"]
    margin_error: Float[Tensor, " n"]
    exact: bool


@runtime_checkable
class ClosedForm(Protocol):
    """A utility that knows its expectation; None for a predictive of which it does not."""

    def expected(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Expected utility of every action at every row."""
        ...


@dataclass(frozen=True)
class Newsvendor:
    """Minus the money lost by having `action` where `y` is wanted: underage a unit missing, overage a unit left.

    With underage = p and overage = 1 - p it is minus the pinball loss. The best action is the quantile at underage /
    (underage + overage). Source: Arrow, Harris and Marschak (1951).
    """

    underage: float
    overage: float

    def __post_init__(self) -> None:
        if not (self.underage > 0 and self.overage > 0 and math.isfinite(self.underage + self.overage)):
            raise OptionError(
                f"underage={self.underage} and overage={self.overage} must be positive numbers."
            )

    def __call__(self, action: Any, y: Tensor) -> Tensor:
        short = y - action
        return -(self.underage * short.clamp(min=0.0) + self.overage * (-short).clamp(min=0.0))

    def expected(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Closed form for Gaussians, mixtures of them, and samples."""
        excess = expected_excess(predictive, actions)
        if excess is None:
            return None
        left = excess - (predictive.mean[:, None] - actions)  # E(q - y)+ = E(y - q)+ - E(y) + q
        return -(self.underage * excess + self.overage * left)

    def best(self, predictive: Predictive) -> Tensor:
        """The best of all numbers, [n]: a quantile. Raises OptionError for classes."""
        if not isinstance(predictive, Continuous):
            raise OptionError("Newsvendor is for numbers; for classes give a CostMatrix.")
        return predictive.quantile(self.underage / (self.underage + self.overage))


@dataclass(frozen=True)
class CostMatrix:
    """Minus the cost of an action where the class is y. Shapes: cost [a, c]; actions are rows, classes columns."""

    cost: Any

    def __post_init__(self) -> None:
        cost = as_tensor(self.cost, None, "cost").to(torch.float64)
        if cost.ndim != 2 or 0 in cost.shape or not bool(cost.isfinite().all()):
            raise OptionError(
                f"cost must be finite numbers [actions, classes]; it has shape {tuple(cost.shape)}."
            )
        object.__setattr__(self, "cost", cost)

    def __call__(self, action: Any, y: Tensor) -> Tensor:
        return -self.cost[int(action)].to(y.device)[y]

    def expected(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Minus probabilities times costs; actions are positions of rows."""
        if not isinstance(predictive, Categorical):
            raise OptionError(
                f"A CostMatrix is for classes, but this model predicts numbers ({type(predictive).__name__})."
            )
        if predictive.probs.shape[1] != self.cost.shape[1]:
            raise DataError(
                f"cost has {self.cost.shape[1]} columns, but the model knows {predictive.probs.shape[1]} classes."
            )
        return -(
            predictive.probs.to(torch.float64)
            @ self.cost[actions.long().cpu()].mT.to(predictive.probs.device)
        )


@dataclass(frozen=True)
class Linear:
    """The payoff action * y; of several outputs, with actions [a, t], the sum over them."""

    def __call__(self, action: Any, y: Tensor) -> Tensor:
        return (y * action).sum(-1) if y.ndim == 3 else y * action

    def expected(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Action times mean."""
        if predictive.mean.ndim == 1:
            return predictive.mean[:, None] * actions
        return predictive.mean @ actions.mT


@runtime_checkable
class Risk(Protocol):
    """What counts of a payoff beside its mean."""

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        """Value [n], and each sample's influence [s, n], whose spread over sqrt(s) is the standard error."""
        ...

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        """Closed form for the payoff of `Linear`; None where there is none."""
        ...


@dataclass(frozen=True)
class MeanVariance:
    """Mean minus aversion / 2 times variance of the payoff. Source: Markowitz (1952)."""

    aversion: float

    def __post_init__(self) -> None:
        if not (self.aversion > 0 and math.isfinite(self.aversion)):
            raise OptionError(f"aversion={self.aversion} must be a positive number.")

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        mean, variance = payoff.mean(0), payoff.var(0)
        influence = (payoff - mean) - 0.5 * self.aversion * ((payoff - mean).square() - variance)
        return mean - 0.5 * self.aversion * variance, influence

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        if isinstance(predictive, Categorical):
            return None
        mean, spread = _mean_and_covariance(predictive)
        w = actions.reshape(len(actions), -1)
        variance = torch.einsum("at,nts,as->na", w, spread, w)
        return mean @ w.mT - 0.5 * self.aversion * variance

    def best_linear(self, predictive: Predictive) -> Tensor:
        """The best of all actions for the payoff of `Linear`: covariance^-1 mean / aversion, y-shaped."""
        mean, spread = _mean_and_covariance(predictive)
        return (torch.linalg.solve(spread, mean[..., None])[..., 0] / self.aversion).reshape(
            predictive.mean.shape
        )


@dataclass(frozen=True)
class CVaR:
    """Mean payoff in the worst `share` of cases. Source: Rockafellar and Uryasev (2000)."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(f"share={self.share} must lie strictly between 0 and 1.")

    def of_samples(self, payoff: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
        # Rockafellar and Uryasev: the maximum over q of q - E(q - payoff)+ / share, at the quantile
        q = payoff.quantile(self.share, dim=0)
        terms = q - (q - payoff).clamp(min=0.0) / self.share
        return terms.mean(0), terms - terms.mean(0)

    def of_linear(self, predictive: Predictive, actions: Any) -> Float[Tensor, "n a"] | None:
        parts = _gaussian_parts(predictive)
        if parts is None or predictive.mean.ndim != 1 or not isinstance(predictive, Continuous):
            return None
        low, high = predictive.quantile(self.share), predictive.quantile(1.0 - self.share)
        worst = _tail_mean(parts, low, below=True) / self.share  # where the action is positive
        best = _tail_mean(parts, high, below=False) / self.share  # a negative one fears large y
        return torch.where(actions >= 0, actions * worst[:, None], actions * best[:, None])


@torch.no_grad()
def best_action(
    model: Any,
    x: Any,
    actions: Any,
    utility: Callable[[Any, Tensor], Tensor],
    risk: Risk | None = None,
    samples: int = 1024,
    seed: int = 0,
) -> Decision:
    """For each row of x [n, d] the action of highest expected utility of y (or of highest value under `risk`).

    model: a FunctionPosterior or a fitted estimator (x is then its table). actions: numbers [a], vectors [a, k], or any
    list (utility is then called with its elements); None where the utility knows the best of all actions (Newsvendor;
    Linear with MeanVariance) or has a list of its own (CostMatrix). utility(action, y): y [s, n] or [s, n, t] (classes:
    integers) -> [s, n], higher is better. Samples are shared by the actions, so their differences are sharper than
    their values. Raises UtilityError for NaN, infinity or another shape; OptionError, DataError for the rest.
    """
    check_count(samples, 2)
    posterior, rows = posterior_of(model), rows_of(model, x)
    if actions is None and isinstance(utility, CostMatrix):
        actions = torch.arange(len(utility.cost))
    if actions is None:
        found = [
            _best_of_all(posterior.observed(part), utility, risk, (seed + k) % 2**32)
            for k, part in enumerate(rows.split(ROWS))
        ]
        joined = [torch.cat(column) for column in zip(*(_columns(f) for f in found), strict=True)]
        index, action, value, values, error, margin, margin_error = joined
        exact = all(f.exact for f in found)
        return Decision(index, action, value, values, error, margin, margin_error, exact)
    listed, numbers = _listed(actions)
    parts, exact = [], True
    for k, part in enumerate(rows.split(ROWS)):
        predictive = posterior.observed(part)
        closed = _closed_form(predictive, numbers, utility, risk)
        if closed is not None:
            parts.append((closed, torch.zeros_like(closed), torch.zeros_like(closed[:, 0])))
        else:
            exact = False
            parts.append(_sampled(predictive, listed, utility, risk, samples, (seed + k) % 2**32))
    values, errors, margin_errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return _decided(listed, numbers, values, errors, margin_errors, exact)


def expected_excess(predictive: Predictive, thresholds: Tensor) -> Float[Tensor, "n a"] | None:
    """E(y - q)+ for every row and threshold q, [a] or [n, a]; None where there is no closed form."""
    if isinstance(predictive, Samples) and predictive.noise is None and predictive.mean.ndim == 1:
        return (predictive.values[..., None].to(torch.float64) - thresholds).clamp(min=0.0).mean(0)
    parts = _gaussian_parts(predictive)
    if parts is None or predictive.mean.ndim != 1:
        return None
    total: Tensor | float = 0.0
    for weight, gaussian in parts:
        gap = gaussian.mean[:, None] - thresholds
        s = gaussian.stddev[:, None].clamp(min=1e-300)
        z = gap / s
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
        total = total + weight * (gap * torch.special.ndtr(z) + s * density)
    assert isinstance(total, Tensor)
    return total


def checked(payoff: Any, shape: tuple[int, ...], action: Any) -> Float[Tensor, "s n"]:
    """What a utility gave. Raises UtilityError unless it is finite numbers of the shape asked for."""
    try:
        value = as_tensor(payoff, None, "the utility").to(torch.float64).expand(shape)
    except (DataError, RuntimeError) as error:
        raise UtilityError(
            f"The utility must give one number a sample and row, {shape}, for action {action!r}; it gave "
            f"{getattr(payoff, 'shape', type(payoff).__name__)}."
        ) from error
    bad = ~value.isfinite()
    if bool(bad.any()):
        sample, row = bad.nonzero()[0].tolist()
        raise UtilityError(
            f"The utility of action {action!r} is {value[sample, row].item()} at row {row} (sample {sample}); it must "
            "be a finite number for every y that the model holds possible."
        )
    return value


def _closed_form(
    predictive: Predictive, numbers: Tensor | None, utility: Any, risk: Risk | None
) -> Float[Tensor, "n a"] | None:
    if numbers is None or not isinstance(utility, ClosedForm):
        return None
    numbers = numbers.to(predictive.mean.device)
    if risk is None:
        return utility.expected(predictive, numbers)
    return risk.of_linear(predictive, numbers) if isinstance(utility, Linear) else None


def _sampled(
    predictive: Predictive, listed: Sequence[Any], utility: Any, risk: Risk | None, samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [n, a], their standard errors, and that [n] of the best over the next, from one set of samples."""
    y = predictive.rsample(samples, seed)
    shape = (samples, y.shape[1])
    values, influences = [], []
    for action in listed:
        payoff = checked(utility(action, y), shape, action)
        value, influence = (
            (payoff.mean(0), payoff - payoff.mean(0)) if risk is None else risk.of_samples(payoff)
        )
        values.append(value)
        influences.append(influence)
    value, influence = torch.stack(values, -1), torch.stack(influences, -1)
    error = influence.std(0) / math.sqrt(samples)
    if len(listed) == 1:
        return value, error, error[:, 0]
    top = value.topk(2, dim=-1).indices
    pair = influence.take_along_dim(top[None], -1)
    return value, error, (pair[..., 0] - pair[..., 1]).std(0) / math.sqrt(samples)


def _decided(
    listed: Sequence[Any],
    numbers: Tensor | None,
    values: Float[Tensor, "n a"],
    errors: Float[Tensor, "n a"],
    margin_errors: Float[Tensor, " n"],
    exact: bool,
) -> Decision:
    value, index = values.max(-1)
    if len(listed) > 1:
        best = values.topk(2, dim=-1).values
        margin = best[:, 0] - best[:, 1]
    else:
        margin = torch.full_like(value, math.inf)
    chosen: Any = numbers[index.cpu()] if numbers is not None else [listed[k] for k in index.tolist()]
    return Decision(index, chosen, value, values, errors, margin, margin_errors, exact)


def _best_of_all(predictive: Predictive, utility: Any, risk: Risk | None, seed: int) -> Decision:
    error = torch.zeros(len(predictive.mean), dtype=torch.float64)
    if isinstance(utility, Newsvendor) and risk is None:
        action = utility.best(predictive)
        closed = utility.expected(predictive, action[:, None])
        if closed is None:  # the action is exact all the same
            payoff = utility(action, predictive.rsample(1024, seed))
            value, error = payoff.mean(0), payoff.std(0) / math.sqrt(len(payoff))
        else:
            value = closed[:, 0]
    elif isinstance(utility, Linear) and isinstance(risk, MeanVariance):
        action = risk.best_linear(predictive)
        flat = action.reshape(len(action), -1)
        mean, spread = _mean_and_covariance(predictive)
        value = (flat * mean).sum(-1) - 0.5 * risk.aversion * torch.einsum("nt,nts,ns->n", flat, spread, flat)
    else:
        raise OptionError(
            "actions=None is for utilities that know the best of all actions (Newsvendor; Linear with MeanVariance). "
            "Give the actions to choose from."
        )
    none = torch.full_like(value, math.inf)
    index = torch.full((len(value),), -1)
    exact = not bool(error.any())
    return Decision(
        index, action, value, value[:, None], error[:, None], none, torch.zeros_like(value), exact
    )


def _columns(d: Decision) -> tuple[Any, ...]:
    return d.index, d.action, d.value, d.values, d.standard_error, d.margin, d.margin_error


def _listed(actions: Any) -> tuple[Sequence[Any], Tensor | None]:
    """The actions one by one, and as numbers where they are."""
    try:
        numbers: Tensor | None = as_tensor(actions, None, "actions")
        if numbers is not None and numbers.dtype != torch.bool and not numbers.is_complex():
            numbers = numbers.to(torch.float64)
    except DataError:
        numbers = None
    if numbers is not None and (numbers.ndim == 0 or numbers.ndim > 2):
        raise OptionError(f"actions must be a list, [a] or [a, k]; they have shape {tuple(numbers.shape)}.")
    if len(actions) == 0:
        raise OptionError("actions is empty: there is nothing to choose from.")
    if numbers is not None and not bool(numbers.isfinite().all()):
        raise OptionError("actions hold NaN or infinite values.")
    return (list(numbers) if numbers is not None else list(actions)), numbers


def _gaussian_parts(predictive: Predictive) -> list[tuple[float, Gaussian]] | None:
    """Weights and Gaussians that the marginals are mixtures of; None where they are something else."""
    if isinstance(predictive, Samples) and predictive.noise is not None:
        share = 1.0 / len(predictive.values)
        return [(share, Gaussian(v, s)) for v, s in zip(predictive.values, predictive.noise, strict=True)]
    if isinstance(predictive, Gaussian):
        return [(1.0, predictive)]
    if isinstance(predictive, Mixture) and all(isinstance(c, Gaussian) for c in predictive.components):
        return list(zip(predictive.weights.tolist(), predictive.components, strict=True))
    return None


def _tail_mean(
    parts: list[tuple[float, Gaussian]], q: Float[Tensor, " n"], below: bool
) -> Float[Tensor, " n"]:
    """E[y; y <= q] (or y >= q) of a mixture of Gaussians."""
    sign = 1.0 if below else -1.0
    total = torch.zeros_like(q)
    for weight, gaussian in parts:
        s = gaussian.stddev.clamp(min=1e-300)
        z = sign * (q - gaussian.mean) / s
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
        total = total + weight * (gaussian.mean * torch.special.ndtr(z) - sign * s * density)
    return total


def _mean_and_covariance(predictive: Predictive) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t t"]]:
    """Mean and covariance over the outputs at every row."""
    mean = predictive.mean
    if mean.ndim == 1:
        return mean[:, None], predictive.variance[:, None, None]
    n, t = mean.shape
    if isinstance(predictive, Gaussian | Mixture):
        joint = predictive.joint_covariance.reshape(n, t, n, t)
        return mean, joint[torch.arange(n), :, torch.arange(n), :]
    return mean, torch.diag_embed(predictive.variance)
