"""What a decision is made with: a posterior over functions and rows of numbers, or an estimator and its table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import as_tensor

MOST = 1e150  # in size of what is told or paid: its square is finite


def posterior_of(model: Any) -> FunctionPosterior:
    """The posterior of a model: itself, or that of a fitted estimator. Raises OptionError, NotFittedError."""
    if isinstance(model, FunctionPosterior):
        return model
    if hasattr(model, "posterior_"):
        return model.posterior_
    if hasattr(model, "fit") and hasattr(model, "get_params"):
        raise NotFittedError(f"This {type(model).__name__} instance is not fitted yet. Call 'fit' first.")
    raise OptionError(f"{type(model).__name__} is no posterior over functions and no estimator that has one.")


def check_callable(f: Any, name: str) -> None:
    """Raises OptionError for what cannot be called: a number where a function belongs, say."""
    if not callable(f):
        raise OptionError(f"{name} must be a function, not {type(f).__name__} ({f!r:.60}).")


def check_number(
    value: Any,
    name: str,
    must: str,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
) -> float:
    """The value as a float. Raises OptionError ("NAME=... must {must}.") unless it is a number between the first two,
    and at least `least`."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (above < number < below and number >= least):
        raise OptionError(f"{name}={value!r} must {must}.")
    return number


def rows_of(model: Any, x: Any, name: str = "x") -> Float[Tensor, "n d"]:
    """Rows as the posterior takes them: a table goes through the estimator's encoder, by column names.

    Raises DataError for no rows, NaN or infinity, or other columns than the model was fitted on.
    """
    if hasattr(model, "encoder_"):
        rows = torch.as_tensor(model.encoder_.transform(x), dtype=torch.float64)
    else:
        rows = as_tensor(x, None, name).to(torch.float64)
    expected = getattr(posterior_of(model), "num_inputs", None)
    if rows.ndim != 2 or (expected is not None and rows.shape[1] != expected):
        raise DataError(
            f"{name} must be rows of the {expected} columns that the model was fitted on; it has shape "
            f"{tuple(rows.shape)}."
        )
    if len(rows) == 0:
        raise DataError(f"{name} is empty: there is no row to decide about.")
    bad = ~rows.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(
            f"{name} holds NaN or infinite values (row {int(bad.nonzero()[0])}); remove such rows."
        )
    return rows


def parts_of(model: Any, pool: Any, size: int) -> Iterator[Float[Tensor, "c d"]]:
    """A pool in parts of at most `size` rows: an array, a table, or an iterable of them (a stream from disk).

    Raises DataError as `rows_of`, and where there is no row at all.
    """
    if hasattr(pool, "shape") or isinstance(pool, list | tuple):
        length = len(pool)
        wholes: Iterable[Any] = (
            pool.iloc[i : i + size] if hasattr(pool, "iloc") else pool[i : i + size]
            for i in range(0, length, size)
        )
    elif isinstance(pool, Iterable):
        wholes = pool
    else:
        raise DataError(f"A pool is a table, an array or an iterable of them, not {type(pool).__name__}.")
    seen = False
    for whole in wholes:
        if len(whole):
            seen = True
            yield from rows_of(model, whole, "the pool").split(size)
    if not seen:
        raise DataError("The pool is empty: there is no candidate to choose from.")
