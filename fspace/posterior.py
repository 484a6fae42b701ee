"""The contract every model ends in: a posterior over functions, whatever made it.

    posterior.latent(x)    -> Predictive of f(x)
    posterior.observed(x)  -> Predictive of y at x, noise included
    posterior.draw(n)      -> n functions, callable anywhere and always answering as the same functions
    posterior.as_botorch() -> a BoTorch Model

x is `[..., n, d]` in original units, tensor or array; y is `[n]` or `[n, t]` in original units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.categorical import Categorical
from fspace.errors import DataError, OptionError
from fspace.mixtures import Mixture, Samples, check_weights
from fspace.predictive import Gaussian, Predictive, make_generator

if TYPE_CHECKING:
    from fspace.botorch_model import FunctionModel

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


class FunctionPosterior(ABC):
    """Posterior over functions from `[d]` to one or `num_outputs` numbers.

    Attributes: `num_outputs`, `num_inputs` (d), `batch_shape` (axes of independent posteriors held at once, usually none).
    Predictives of `[..., n, d]` inputs have y of shape `[..., n]` or `[..., n, t]`; leading axes broadcast with `batch_shape`.
    """

    num_outputs: int
    num_inputs: int
    batch_shape: torch.Size = torch.Size()

    @abstractmethod
    def latent(self, x: Any) -> Predictive:
        """Distribution of f(x): what is not known about the function."""

    @abstractmethod
    def observed(self, x: Any) -> Predictive:
        """Distribution of y at x: the function and the noise, told apart by `.epistemic` and `.aleatoric`."""

    @abstractmethod
    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions from the posterior; the same seed gives the same functions."""

    def condition(self, x: Any, y: Any) -> FunctionPosterior:
        """The posterior after also seeing y at x, hyperparameters unchanged.

        x `[..., m, d]`, y `[..., m]` or `[..., m, t]`; leading axes broadcast with each other and with `batch_shape`, and
        become the new `batch_shape` (y may have more of them than x: many fantasies at the same inputs).
        Raises OptionError where the model cannot be conditioned.
        """
        raise OptionError(f"{type(self).__name__} cannot be conditioned on new data; fit it again with the data included.")

    def as_botorch(self) -> FunctionModel:
        """This posterior as a BoTorch Model, with gradients to x, for acquisition functions and their optimisers."""
        from fspace.botorch_model import FunctionModel  # BoTorch takes seconds to import; most users never need it here.

        return FunctionModel(self)


class FunctionDraws(Sequence[Callable[[Any], Tensor]]):
    """n functions drawn from a posterior, as a sequence of callables.

    draws[i](x): `[N, d]` to `[N]` or `[N, t]`; draws(x): all at once, `[n, N]` or `[n, N, t]`.
    evaluate: optional faster way to all of them at once, x to `[n, N(, t)]`; must agree with the functions.
    """

    def __init__(
        self, functions: Sequence[Callable[[Any], Tensor]], evaluate: Callable[[Any], Tensor] | None = None
    ) -> None:
        if len(functions) == 0:
            raise DataError("FunctionDraws: no functions given; draw at least one.")
        self.functions = tuple(functions)
        self._evaluate = evaluate

    def __call__(self, x: Any) -> Float[Tensor, "n ..."]:
        """Values of all functions at x, `[n, N]` or `[n, N, t]`."""
        if self._evaluate is not None:
            return self._evaluate(x)
        return torch.stack([f(x) for f in self.functions])

    def __len__(self) -> int:
        return len(self.functions)

    @overload
    def __getitem__(self, index: int) -> Callable[[Any], Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> FunctionDraws: ...

    def __getitem__(self, index: int | slice) -> Callable[[Any], Tensor] | FunctionDraws:
        if isinstance(index, slice):
            return FunctionDraws(self.functions[index])
        return self.functions[index]


class MixturePosterior(FunctionPosterior):
    """Mixture of posteriors over the same inputs and outputs: an ensemble of models, each with its weight.

    members: posteriors whose predictives are Gaussian (or mixtures of Gaussians); weights: `[k]` of sum 1, None: equal.
    Raises DataError when the members' inputs, outputs or the weights do not fit.
    """

    def __init__(self, members: Sequence[FunctionPosterior], weights: Any = None) -> None:
        if len(members) == 0:
            raise DataError("MixturePosterior: no members given; give at least one posterior.")
        first = members[0]
        for i, member in enumerate(members):
            if (member.num_inputs, member.num_outputs) != (first.num_inputs, first.num_outputs):
                raise DataError(
                    f"MixturePosterior: member {i} maps {member.num_inputs} inputs to {member.num_outputs} outputs, "
                    f"member 0 maps {first.num_inputs} to {first.num_outputs}; all must agree."
                )
        self.members = tuple(members)
        self.weights = check_weights(weights, len(members), torch.float64)
        self.num_inputs, self.num_outputs = first.num_inputs, first.num_outputs
        self.batch_shape = torch.broadcast_shapes(*(m.batch_shape for m in members))

    def latent(self, x: Any) -> Mixture:
        """Mixture of the members' predictives of f(x)."""
        return Mixture([m.latent(x) for m in self.members], self.weights)  # type: ignore[misc]

    def observed(self, x: Any) -> Mixture:
        """Mixture of the members' predictives of y at x."""
        return Mixture([m.observed(x) for m in self.members], self.weights)  # type: ignore[misc]

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions, each from one member picked with probability equal to its weight."""
        if n < 1:
            raise DataError(f"draw: n is {n}; ask for at least one function.")
        generator = make_generator(seed, torch.device("cpu"))
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        seeds = torch.randint(2**62, (len(self.members),), generator=generator).tolist()
        groups: list[tuple[Tensor, FunctionDraws]] = []
        functions: list[Callable[[Any], Tensor]] = [_never] * n
        for k, member in enumerate(self.members):
            places = (chosen == k).nonzero().squeeze(-1)
            if len(places) == 0:
                continue
            draws = member.draw(len(places), seeds[k])
            groups.append((places, draws))
            for place, function in zip(places.tolist(), draws, strict=True):
                functions[place] = function
        back = torch.argsort(torch.cat([places for places, _ in groups]))

        def evaluate(x: Any) -> Tensor:
            # Member by member, so that each can evaluate its functions together.
            values = torch.cat([draws(x) for _, draws in groups])
            return values[back.to(values.device)]

        return FunctionDraws(functions, evaluate)

    def condition(self, x: Any, y: Any) -> MixturePosterior:
        """Every member conditioned on y at x; the weights stay, as in an ensemble (they are not model evidences)."""
        return MixturePosterior([m.condition(x, y) for m in self.members], self.weights)


def _never(x: Any) -> Tensor:
    raise AssertionError("a drawn function was not filled in")
