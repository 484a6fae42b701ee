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

from fspace.decisions.risks import MeanVariance, Risk, expected_excess, mean_and_covariance
from fspace.decisions.sources import MOST, check_callable, check_number, posterior_of, rows_of
from fspace.errors import DataError, OptionError, UtilityError
from fspace.predictive import Categorical, Predictive, as_tensor
from fspace.predictive_base import Continuous, check_seed, check_whole

FOR_NUMBERS = "{} is for numbers; for classes give a CostMatrix (in a utility file: costs)."
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
        for name in ("underage", "overage"):
            cost = check_number(getattr(self, name), name, f"be a positive number below {MOST:g}", 0.0, MOST)
            object.__setattr__(self, name, cost)

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
            raise OptionError(FOR_NUMBERS.format("Newsvendor"))
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
    check_whole("samples", samples, 2), check_seed(seed)
    check_callable(utility, "utility")
    if risk is not None and not isinstance(risk, Risk):
        raise OptionError(f"risk={risk!r}: pass CVaR(share), MeanVariance(aversion), or None.")
    posterior, rows = posterior_of(model), rows_of(model, x)
    if actions is None and isinstance(utility, CostMatrix):
        actions = torch.arange(len(utility.cost))
    listed, numbers = (None, None) if actions is None else _listed(actions)
    _require_fits(posterior.observed(rows[:1]), listed, numbers, utility)
    if listed is None:
        found = [
            _best_of_all(posterior.observed(part), utility, risk, (seed + k) % 2**32)
            for k, part in enumerate(rows.split(ROWS))
        ]
        joined = [torch.cat(column) for column in zip(*(_columns(f) for f in found), strict=True)]
        index, action, value, values, error, margin, margin_error = joined
        exact = all(f.exact for f in found)
        return Decision(index, action, value, values, error, margin, margin_error, exact)
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


def _require_fits(
    predictive: Predictive, listed: Sequence[Any] | None, numbers: Tensor | None, utility: Any
) -> None:
    """Raises OptionError where a utility of this file is not for what the model predicts, or for such actions."""
    outputs = tuple(predictive.mean.shape[1:]) if isinstance(predictive, Continuous) else ()
    if isinstance(utility, CostMatrix):
        utility.expected(predictive, torch.zeros(1))  # of these classes?
        rows = len(utility.cost)
        if listed is not None and (
            numbers is None or any(int(a) != a or not 0 <= a < rows for a in numbers.flatten().tolist())
        ):
            raise OptionError(
                f"actions of a CostMatrix are positions of its {rows} rows, or None for all of them."
            )
    if not isinstance(utility, Linear | Newsvendor):
        return
    name = type(utility).__name__
    if isinstance(predictive, Categorical):
        raise OptionError(FOR_NUMBERS.format(name))
    if isinstance(utility, Newsvendor) and outputs:
        raise OptionError(f"Newsvendor is for one output, but the model predicts {outputs[0]}.")
    if listed is not None and (numbers is None or tuple(numbers.shape[1:]) != outputs):
        wanted = f"[a, {outputs[0]}], a number for each output" if outputs else "[a]"
        raise OptionError(f"actions of {name} for this model must be numbers {wanted}.")


def checked(utility: Any, action: Any, y: Tensor, shape: tuple[int, ...]) -> Float[Tensor, "s n"]:
    """What a utility gives for samples y. Raises UtilityError unless it is finite numbers of the shape asked for.

    One number for all is taken where it is the same for fewer samples: a cost of the action, not a sum over all y.
    """
    payoff = utility(action, y)
    shown = f"{action.item():g}" if isinstance(action, Tensor) and action.ndim == 0 else repr(action)
    try:
        given = as_tensor(payoff, None, "the utility").to(torch.float64)
        if given.ndim == 0:
            again = as_tensor(utility(action, y[:1]), None, "the utility").to(given)
            fits = torch.equal(again, given) or bool(given.isnan())
        else:
            fits = tuple(given.shape) == shape
        value = given.expand(shape) if fits else None
    except (DataError, RuntimeError):
        value = None
    if value is None:
        raise UtilityError(
            f"The utility must give one number a sample and row, {shape}, for action {shown}; it gave "
            f"{_shape_of(payoff)}."
        )
    bad = ~(value.abs() <= MOST)
    if bool(bad.any()):
        sample, row = bad.nonzero()[0].tolist()
        raise UtilityError(
            f"The utility of action {shown} is {value[sample, row].item()} at row {row} (sample {sample}); it must "
            f"be a finite number, at most {MOST:g} in size, for every y that the model holds possible."
        )
    return value


def _shape_of(payoff: Any) -> str:
    shape = getattr(payoff, "shape", None)
    if shape is None:
        return type(payoff).__name__
    return "one number that is not the same for fewer samples" if len(shape) == 0 else str(tuple(shape))


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
        payoff = checked(utility, action, y, shape)
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
        mean, spread = mean_and_covariance(predictive)
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
    if isinstance(actions, str | bytes) or not hasattr(actions, "__len__"):
        raise OptionError(f"actions={actions!r:.60} must be a list of actions.")
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
