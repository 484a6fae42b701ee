"""What every predictive answers, whatever its form, and the checks they share.

Shapes: "y-shaped" means [n] for one output and [n, t] for several. Gaussians may carry leading batch dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, OptionError


def generator_for(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator of its own, so that the global random state is neither read nor moved."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(check_seed(seed))
    return generator


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises OptionError unless it is a whole number from 0 to 2**32 - 1."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise OptionError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")
    return int(seed)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """An option as an int. Raises OptionError, with its name, unless it is a whole number of at least `least` and
    below 2^63, beyond which arrays count no further."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r} must be a whole number of at least {least}.")
    if value >= 2**63:
        raise OptionError(f"{name} must be below 2^63.")
    return int(value)


def check_count(n: Any, least: int = 0) -> int:
    """How many draws. Raises OptionError unless n is a whole number of at least `least`."""
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < least:
        raise OptionError(f"n={n!r}: how many to draw is a whole number of at least {least}.")
    return int(n)


def normalised_weights(weights: Any, count: int) -> Float[Tensor, " k"]:
    """`count` float64 weights that sum to one (None: equal). Raises OptionError for what cannot be weights."""
    w = torch.ones(count) if weights is None else as_tensor(weights, None, "weights")
    w = w.double()
    if w.shape != (count,) or not bool((w >= 0).all()) or not 0 < w.sum().item() < math.inf:
        raise OptionError(
            f"weights must be {count} finite non-negative numbers, not all zero; got {w.tolist()}."
        )
    return w / w.sum()


def as_tensor(y: Any, device: torch.device | None, name: str = "y") -> Tensor:
    """y (tensor, array, list, series, frame) as a tensor. Raises DataError, with its name, when it holds no numbers."""
    try:
        return torch.as_tensor(y if isinstance(y, Tensor) else np.array(y), device=device)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} holds no numbers, but {type(y).__name__} of another kind ({error})."
        ) from error


class Predictive(ABC):
    """Distribution of the values at n inputs. Variances are in squared units of y, log densities in nats.

    counts: whether values are whole numbers, of which log_prob gives log probabilities.
    """

    counts: bool = False
    mean: Tensor
    variance: Tensor

    @property
    def stddev(self) -> Tensor:
        """Square root of the variance, y-shaped."""
        return self.variance.sqrt()

    @property
    @abstractmethod
    def epistemic(self) -> Tensor:
        """What more data would remove: variance of the function (classes: mutual information)."""

    @property
    @abstractmethod
    def aleatoric(self) -> Tensor:
        """What stays: variance of the noise (classes: expected entropy)."""

    @abstractmethod
    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n samples, joint over the points: [n, *y shape]. Raises OptionError for a negative n or another seed."""

    @abstractmethod
    def log_prob(self, y: Any) -> Tensor:
        """Marginal log density of every entry of y, y-shaped. Raises DataError when y has another shape."""

    def _check(self, y: Any) -> Tensor:
        y = as_tensor(y, self.mean.device).to(self.mean.dtype)
        if y.ndim and y.shape != self.mean.shape:
            raise DataError(
                f"y has shape {tuple(y.shape)}, but the prediction has shape {tuple(self.mean.shape)}."
            )
        return y


class Continuous(Predictive):
    """A predictive of numbers: it has a distribution function, quantiles and intervals."""

    @abstractmethod
    def cdf(self, y: Any) -> Tensor:
        """P(value <= y) at every entry, y-shaped."""

    @abstractmethod
    def _quantile(self, p: float) -> Tensor: ...

    def quantile(self, p: float | Float[Tensor, " k"] | Sequence[float]) -> Tensor:
        """The p-quantile, y-shaped; for k levels [k, *y shape]. Raises OptionError unless 0 < p < 1."""
        try:
            levels = as_tensor(p, None, "p").double()
        except DataError as error:
            raise OptionError(f"quantile(p={p!r}): {error}") from error
        if levels.ndim > 1 or levels.numel() == 0 or not bool(((levels > 0) & (levels < 1)).all()):
            raise OptionError(
                f"quantile(p={p!r}): p must lie strictly between 0 and 1; one number, or some in a row."
            )
        if levels.ndim == 0:
            return self._quantile(levels.item())
        return torch.stack([self._quantile(level) for level in levels.tolist()])

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval that holds `level` of the probability: (lower, upper), each y-shaped."""
        number = isinstance(level, int | float | np.number | Tensor) and np.ndim(level) == 0
        if not number or not (0 < level and 0.5 + 0.5 * float(level) < 1):  # 1 - 1e-17 is 1 as well
            raise OptionError(
                f"interval(level={level!r}): the level must be one number strictly between 0 and 1."
            )
        return self._quantile(0.5 - 0.5 * float(level)), self._quantile(0.5 + 0.5 * float(level))
