"""The posterior over functions that a distribution over a network's weights is, in the units of the data."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.inference.gp import Scaling
from fspace.inference.weights.distributions import StateDistribution
from fspace.inference.weights.likelihoods import Classes, NetworkLikelihood
from fspace.inference.weights.network import Network
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive import Predictive, Samples, as_tensor, check_count, generator_for

SAMPLES = 128  # states behind latent and observed, where a distribution has infinitely many
VALUES = 2**22  # hidden values that are held at once


class NetworkPosterior(FunctionPosterior):
    """A network whose state (weights, noise) has a distribution; predictives are those of equally likely draws.

    latent and observed of a distribution with infinitely many states use 128 draws of it, always the same ones, so
    that means carry a sampling error of 1/11 of the epistemic deviation. method: the inference that made it.
    """

    def __init__(
        self,
        network: Network,
        distribution: StateDistribution,
        likelihood: NetworkLikelihood,
        scaling: Scaling,
        vector: bool = True,
        method: str = "",
    ):
        self.network, self.distribution, self.likelihood = network, distribution, likelihood
        self.scaling, self.method = scaling, method
        self.num_outputs = len(scaling.y_shift)
        self.num_inputs = scaling.shift.shape[0]
        self.vector = vector and self.num_outputs == 1
        some = next(network.module.parameters())
        self._dtype, self._device = some.dtype, some.device
        self._states: Tensor | None = distribution.fixed()

    @property
    def states(self) -> Float[Tensor, "s q"]:
        """The states behind latent and observed."""
        if self._states is None:
            self._states = self.distribution.sample(SAMPLES, generator_for(0, torch.device("cpu")))
        return self._states

    def rows(self, x: Any) -> Tensor:
        """Rows as the network sees them. Raises DataError for NaN and for other shapes."""
        x = as_tensor(x, self._device, "x").to(torch.float64)
        row = self.scaling.shift.shape  # [d], or [c, 1, 1] for images
        ends = x.ndim == 3 and len(row) == 1  # of sequences, which a network looks after
        if not bool(x.isfinite().all()) and not ends:
            raise DataError("x holds NaN or infinite values; remove such rows.")
        fits = x.ndim > len(row) and all(a in (1, b) for a, b in zip(row, x.shape[-len(row) :]))
        if not fits or x.ndim > 4:
            raise DataError(f"x must have shape [n, {self.num_inputs}]; it has {tuple(x.shape)}.")
        return self.scaling.inputs(x).to(self._dtype)

    def outputs(self, states: Float[Tensor, "s q"], rows: Tensor) -> Float[Tensor, "s n o"]:
        """What the network says under each state, in float64; some rows at a time."""
        w = states[:, : self.network.size]
        width = max(layer.shape[0] for layer in self.network.layers)
        width *= rows.shape[1:].numel() if rows.ndim > 2 else 1  # of images and sequences, at every position
        size = max(1, VALUES // (len(states) * width))
        return torch.cat([self.network.many(w, part) for part in rows.split(size)], dim=1).double()

    def _tail(self, states: Float[Tensor, "s q"]) -> Float[Tensor, "s r"]:
        return states[:, self.network.size :].double()

    def latent(self, x: Any) -> Predictive:
        """Predictive of f at x [n, *row]: values of equally likely functions."""
        f = self.likelihood.functions(self.outputs(self.states, self.rows(x)))
        return Samples(self._shaped(f * self.scaling.y_scale + self.scaling.y_shift))

    def observed(self, x: Any) -> Predictive:
        """Predictive of y at x [n, *row]: the mixture over functions, noise included."""
        f = self.outputs(self.states, self.rows(x))
        y = self.likelihood.observed(f, self._tail(self.states), self.scaling.y_scale, self.scaling.y_shift)
        if isinstance(y, Samples) and self.vector:
            assert y.noise is not None
            return Samples(self._shaped(y.values), self._shaped(y.noise))
        return y

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions, each of one set of weights."""
        states = self.distribution.sample(check_count(n, 1), generator_for(seed, torch.device("cpu")))
        return FunctionDraws([self._function(state[None]) for state in states])

    def _function(self, state: Float[Tensor, "1 q"]):  # type: ignore[no-untyped-def]
        def function(x: Any) -> Tensor:
            f = self.likelihood.functions(self.outputs(state, self.rows(x)))
            return self._shaped(f * self.scaling.y_scale + self.scaling.y_shift)[0]

        return function

    def _shaped(self, values: Float[Tensor, "*s n t"]) -> Tensor:
        return values[..., 0] if self.vector else values

    def response(self, f: Tensor) -> Tensor:
        """E[y | f]: probabilities of classes, else f."""
        if isinstance(self.likelihood, Classes) and self.vector:
            return torch.sigmoid(f)
        return self.likelihood.response(f)


def posterior_of(
    network: Network,
    distribution: StateDistribution,
    likelihood: NetworkLikelihood,
    scaling: Scaling,
    vector: bool,
    method: str,
) -> NetworkPosterior:
    """The posterior over functions that a distribution over states defines."""
    return NetworkPosterior(network, distribution, likelihood, scaling, vector, method)
