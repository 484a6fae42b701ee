"""What the objectives of amortised inference refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fspace.errors import DataError, FspaceError, NumericalError, OptionError

_AXES = {2: "[samples, data]", 3: "[repeats, samples, data]"}


def log_weights(given: Tensor, dims: int = 2, positive: bool = False) -> None:
    """One finite normaliser a datum, or an error that names datum and sample. `positive` refuses every weight of zero.

    Raises DataError for axes other than [K, B] (dims=3: [M, K, B]) or whole numbers; NumericalError for NaN, +inf, or a
    datum whose weights are all zero.
    """
    shaped(given, dims)
    worst = given.detach().amin(-2) if positive else given.detach().amax(-2)  # NaN wins either
    if bool(worst.isfinite().all()) and not (positive and bool((given == torch.inf).any())):
        return
    for what, wrong in (("NaN", given.isnan()), ("+inf", given == torch.inf)):
        if bool(wrong.any()):
            raise NumericalError(
                f"log_weights{wrong.nonzero()[0].tolist()} is {what}: {_first(wrong)}, {int(wrong.sum())} such in all. "
                + (
                    "Is the datum NaN or outside the likelihood's support?"
                    if what == "NaN"
                    else "Does the proposal's density underflow, or a scale of the likelihood reach 0?"
                )
            )
    zero = given == -torch.inf
    if positive:
        raise NumericalError(
            f"log_weights{zero.nonzero()[0].tolist()} is -inf: {_first(zero)}. The baseline of this estimator is a "
            "mean of log-weights, so every weight must be positive; `reinforce` and `rebar` need no such mean."
        )
    datum = zero.all(-2).nonzero()[0, -1].item()
    raise NumericalError(
        f"All {given.shape[-2]} log-weights of datum {datum} are -inf: no sample could have given it. Is it inside the "
        "likelihood's support? More samples, or a proposal that sees the datum, may help."
    )


def shaped(given: Tensor, dims: int = 2) -> None:
    """Raises DataError unless log-weights are floating point with dims axes, none empty."""
    if not isinstance(given, Tensor):
        raise DataError(f"log_weights must be a tensor {_AXES[dims]}, not {type(given).__name__}.")
    if given.ndim != dims:
        raise DataError(
            f"log_weights must be {_AXES[dims]}, data last; they have shape {tuple(given.shape)}."
        )
    if not given.is_floating_point():
        raise DataError(f"log_weights must be floating point, not {str(given.dtype).removeprefix('torch.')}.")
    if not given.numel():
        raise DataError(
            f"log_weights of shape {tuple(given.shape)} are empty; there must be a sample and a datum."
        )


def finite(given: Tensor, name: str) -> None:
    """Raises NumericalError for NaN or an infinite value, naming the first."""
    if not bool(given.isfinite().all()):
        place = (~given.isfinite()).nonzero()[0].tolist()
        raise NumericalError(f"{name}{place} is {given[tuple(place)].item()}; it must be finite.")


def known(log_weights: Tensor, datum: int, sample: int) -> None:
    """Raises NumericalError for NaN or +inf in a part [k, b] of the weights that begins at that datum and sample."""
    wrong = log_weights.isnan() | (log_weights == torch.inf)
    if bool(wrong.any()):
        k, b = wrong.nonzero()[0].tolist()
        raise NumericalError(
            f"The log-weight of datum {datum + b}, sample {sample + k} is {log_weights[k, b].item()}. Is the datum NaN "
            "or outside the likelihood's support, or does the proposal's density underflow?"
        )


def some(total: Tensor, datum: int, samples: int) -> None:
    """Raises NumericalError for a datum, counted from that one, whose summed log-weight is -inf."""
    if bool((total == -torch.inf).any()):
        b = int((total == -torch.inf).nonzero()[0])
        raise NumericalError(
            f"All {samples} log-weights of datum {datum + b} are -inf: no sample could have given it. Is it inside the "
            "likelihood's support? More samples, or a proposal that sees the datum, may help."
        )


def count(given: Any, name: str) -> int:
    """Raises OptionError unless a whole number, at least 1."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise OptionError(f"{name}={given!r} must be a whole number, at least 1.")
    return given


def asked(source: str, function: Callable[..., Any], *given: Any, data: Any = None) -> Any:
    """What a function of the model says. Its ValueError, with which torch.distributions refuses NaN and what is outside
    the support, becomes a DataError that names the function, and the first row of `data` that is not finite."""
    try:
        return function(*given)
    except FspaceError:
        raise
    except ValueError as error:
        where = ""
        if isinstance(data, Tensor) and not bool(data.isfinite().all()):
            where = (
                f" Row {int((~data.isfinite()).flatten(1).any(1).nonzero()[0])} of the data is not finite."
            )
        raise DataError(
            f"{source} refused its values.{where} Is a datum outside the support of the likelihood, or NaN? It said: "
            f"{error}"
        ) from error


def several(given: Tensor, name: str) -> None:
    """Raises OptionError for one sample only, where the others are the baseline."""
    shaped(given)
    if given.shape[0] < 2:
        raise OptionError(
            f"{name} needs at least two samples a datum: the others are the baseline of each. There is one."
        )


def of_shape(given: Tensor, shape: tuple[int, ...], source: str) -> None:
    """Raises DataError for a tensor of another shape, so that nothing is broadcast by accident."""
    if tuple(given.shape) != shape:
        raise DataError(f"{source} has shape {list(given.shape)}; it must be {list(shape)}.")


def same(proposal: Tensor, stopped: Tensor) -> None:
    """Raises DataError where log q(z) and the same of the stopped proposal differ by more than rounding."""
    far = (proposal - stopped).detach().abs() > 1e-3 * (
        1 + proposal.detach().abs()
    )  # NaN is for the bound to name
    if bool(far.any()):
        k, b = far.nonzero()[0].tolist()
        raise DataError(
            f"log q of sample {k} of datum {b} is {proposal[k, b].item():.6g}, but {stopped[k, b].item():.6g} from "
            "`stopped()`: it must be the same distribution, and the same at every call. Is there dropout in a layer?"
        )


def temperature(given: float | Tensor) -> None:
    """Raises OptionError unless one number above 0: with one a row, densities would broadcast to [n, n]."""
    if not isinstance(given, (int, float, Tensor)):
        raise OptionError(f"temperature must be a number, not {type(given).__name__}.")
    if isinstance(given, Tensor) and given.numel() != 1:
        raise OptionError(
            f"temperature must be one number for all; it is a tensor of shape {tuple(given.shape)}."
        )
    value = given.item() if isinstance(given, Tensor) else given
    if not 0 < value < float("inf"):
        raise OptionError(f"temperature={value} must be a finite number above 0.")


def logits(given: Tensor, fine: Tensor, what: str) -> None:
    """Raises DataError for whole numbers, and for the first logits that are not fine."""
    if not given.is_floating_point():
        raise DataError(f"logits must be floating point, not {str(given.dtype).removeprefix('torch.')}.")
    support(fine, given, "logits", what)


def support(inside: Tensor, values: Tensor, name: str, what: str) -> None:
    """Raises DataError with the first of the values that is not inside; `inside` leads with the axes of values."""
    if not bool(inside.all()):
        place = (~inside).nonzero()[0].tolist()
        raise DataError(f"{name}{place} = {values[tuple(place)].tolist()} is outside the support: {what}.")


def _first(wrong: Tensor) -> str:
    place = wrong.nonzero()[0].tolist()
    repeat = f"repeat {place[0]}, " if len(place) == 3 else ""
    return f"{repeat}sample {place[-2]} of datum {place[-1]}"
