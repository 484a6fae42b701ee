"""The one contract: every model ends in a posterior over functions that answers latent, observed and draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.predictive import (
    Categorical,
    Gaussian,
    Mixture,
    Predictive,
    Samples,
    check_count,
    generator_for,
    mixed,
    normalised_weights,
)

__all__ = [
    "Categorical",
    "FunctionDraws",
    "FunctionPosterior",
    "Gaussian",
    "Mixture",
    "MixturePosterior",
    "Predictive",
    "Samples",
]


class FunctionDraws(Sequence[Callable[[Any], Tensor]]):
    """n functions; each is callable anywhere, any number of times, and always answers as the same function.

    draws[i](x) gives [n] or [n, t]; draws(x) gives the answers of all, stacked in front.
    """

    def __init__(self, functions: Sequence[Callable[[Any], Tensor]]):
        self._functions = list(functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FunctionDraws(self._functions[index])
        return self._functions[index]

    def __call__(self, x: Any) -> Tensor:
        return torch.stack([f(x) for f in self._functions])


class FunctionPosterior(ABC):
    """Posterior over functions. x is [n, d] in the units of the data; what comes back is in the units of y."""

    num_outputs: int = 1
    num_inputs: int
    batch_shape: torch.Size = torch.Size()

    @abstractmethod
    def latent(self, x: Any) -> Predictive:
        """Predictive of f(x): what is not known about the function."""

    @abstractmethod
    def observed(self, x: Any) -> Predictive:
        """Predictive of y at x: the function plus noise."""

    @abstractmethod
    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions from the posterior, at least one."""

    def response(self, f: Tensor) -> Tensor:
        """E[y | f] for values of the function: f itself, unless the observations have a link."""
        return f

    def condition(self, x: Any, y: Any) -> FunctionPosterior:
        """The posterior after also seeing y [n] or [n, t] at x [n, d]; this one stays as it is."""
        raise OptionError(f"{type(self).__name__} cannot take in more observations; refit it with them.")

    def as_botorch(self) -> Any:
        """A BoTorch Model (posterior with gradients to x, observation_noise, condition_on_observations, fantasize)."""
        from fspace.botorch_model import botorch_model

        return botorch_model(self)


class MixturePosterior(FunctionPosterior):
    """Several posteriors of which one is right; weights [k] say how probable each is."""

    def __init__(self, members: Sequence[FunctionPosterior], weights: Sequence[float] | Tensor | None = None):
        if not members:
            raise OptionError("A mixture posterior needs at least one member.")
        self.members = list(members)
        self.weights = normalised_weights(weights, len(self.members))
        self.num_outputs, self.num_inputs = members[0].num_outputs, members[0].num_inputs
        if any((m.num_outputs, m.num_inputs) != (self.num_outputs, self.num_inputs) for m in members):
            raise DataError("All members of a mixture must have the same numbers of inputs and outputs.")

    def latent(self, x: Any) -> Predictive:
        return mixed([m.latent(x) for m in self.members], self.weights)

    def observed(self, x: Any) -> Predictive:
        return mixed([m.observed(x) for m in self.members], self.weights)

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions, each from a member picked with the probability of its weight."""
        n, generator = check_count(n, 1), generator_for(seed, torch.device("cpu"))
        picks = torch.multinomial(self.weights, n, replacement=True, generator=generator).tolist()
        seeds = torch.randint(2**31, (len(self.members),), generator=generator).tolist()
        pools = [
            list(m.draw(picks.count(k), seeds[k])) if k in picks else [] for k, m in enumerate(self.members)
        ]
        return FunctionDraws([pools[k].pop() for k in picks])

    def response(self, f: Tensor) -> Tensor:
        """E[y | f]: members share their link."""
        return self.members[0].response(f)

    def condition(self, x: Any, y: Any) -> MixturePosterior:
        """Every member takes in the observations; each weight is multiplied by how well it predicted them (jointly,
        where predictives are Gaussian; else one by one)."""
        scores = torch.stack([_score(m.observed(x), y).cpu() for m in self.members])
        weights = torch.softmax(self.weights.log() + scores.detach(), dim=0)
        return MixturePosterior([m.condition(x, y) for m in self.members], weights)


def _score(predictive: Predictive, y: Any) -> Tensor:
    return predictive.joint_log_prob(y) if isinstance(predictive, Gaussian) else predictive.log_prob(y).sum()
