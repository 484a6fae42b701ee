"""The posterior over functions that a distribution over a network's weights is, in the units of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError
from fspace.inference.gp import Scaling
from fspace.inference.weights.curvature import NUMBERS, Region, jacobian
from fspace.inference.weights.distributions import (
    LOCAL,
    DiagonalPrecision,
    LowRankPrecision,
    StateDistribution,
)
from fspace.inference.weights.likelihoods import Classes, GaussianNoise, NetworkLikelihood
from fspace.inference.weights.network import Network
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive import Gaussian, Predictive, Samples, as_tensor, check_count, generator_for

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
        # trained in float32, used in float64: what is said of a row does not depend on the rows beside it
        self.network = Network.of(copy.deepcopy(network.module).double())
        self.distribution, self.likelihood = distribution, likelihood
        self.scaling, self.method = scaling, method
        self.num_outputs = len(scaling.y_shift)
        self.num_inputs = scaling.shift.shape[0]
        self.vector = vector and self.num_outputs == 1
        self._device = next(network.module.parameters()).device
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
        return self.scaling.inputs(x)

    def outputs(self, states: Float[Tensor, "s q"], rows: Tensor) -> Float[Tensor, "s n o"]:
        """What the network says under each state, in float64; some rows at a time."""
        w = states[:, : self.network.size].double()
        size = max(1, VALUES // (len(states) * self._width(rows)))
        return torch.cat([self.network.many(w, part) for part in rows.split(size)], dim=1)

    def _width(self, rows: Tensor) -> int:
        """Values of a layer at one row; of images and sequences at every position."""
        width = max(layer.shape[0] for layer in self.network.layers)
        return width * (rows.shape[1:].numel() if rows.ndim > 2 else 1)

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

    def as_botorch(self) -> Any:
        """A BoTorch Model of the draws behind latent and observed: each is one function at all points of a batch."""
        from fspace.botorch_draws import DrawnModel

        return DrawnModel(self)

    def response(self, f: Tensor) -> Tensor:
        """E[y | f]: probabilities of classes, else f."""
        if isinstance(self.likelihood, Classes) and self.vector:
            return torch.sigmoid(f)
        return self.likelihood.response(f)


class LinearisedPosterior(NetworkPosterior):
    """A Gaussian over weights around one state, seen through the network linearised there: f(x) is Gaussian, with the
    network's own answer as mean and J C J' as covariance. Draws move the weights along this tangent.

    Source: Immer, Korzepa and Bauer (2021).
    """

    distribution: Any

    @property
    def _mean(self) -> tuple[Tensor, Tensor]:
        theta = self.distribution.mean.double()
        return theta[: self.network.size], theta[self.network.size :]

    @property
    def _region(self) -> Region:
        first = self.distribution.first
        sizes = {LowRankPrecision: "scale", DiagonalPrecision: "deviation"}
        name = sizes.get(type(self.distribution))
        size = self.distribution.size if name is None else len(getattr(self.distribution, name))
        return Region(first, first + size)

    def _jacobians(self, rows: Tensor) -> Iterator[Tensor]:
        at_once = max(1, NUMBERS // (self._region.size * self.likelihood.outputs))
        for part in rows.split(at_once):
            yield jacobian(self.network, self._mean[0], part, self._region)

    def _moments(self, x: Any, noise: bool) -> Gaussian:
        rows = self.rows(x)
        scale, shift = self.scaling.y_scale, self.scaling.y_shift
        f = self.outputs(self.distribution.mean[None], rows)[0]
        variance = torch.cat([self.distribution.variance(j) for j in self._jacobians(rows)])
        aleatoric = torch.zeros_like(f)
        if noise:
            assert isinstance(self.likelihood, GaussianNoise)
            aleatoric = self.likelihood.log_noise(self._mean[1]).exp().expand_as(f) * scale.square()
        mean, variance = f * scale + shift, variance * scale.square() + aleatoric

        def joint() -> Tensor:
            j = torch.cat(list(self._jacobians(rows))).movedim(1, 0)  # [t, n, r]
            parts = [self.distribution.covariance(part, part) for part in j]
            total = torch.stack(parts) * scale.square()[:, None, None]
            total = 0.5 * (total + total.mT) + torch.diag_embed(aleatoric.mT)
            return total[0] if self.vector else total

        if self.vector:
            return Gaussian(mean[:, 0], variance[:, 0], joint, aleatoric[:, 0], outputs=0)
        return Gaussian(mean, variance, joint, aleatoric, outputs=self.num_outputs)

    def latent(self, x: Any) -> Gaussian:
        """Predictive of f at x [n, *row]; the covariance only when it is asked for."""
        return self._moments(x, noise=False)

    def observed(self, x: Any) -> Predictive:
        """Predictive of y at x [n, *row]: Gaussian; of classes, averaged over 128 draws of the function."""
        if not isinstance(self.likelihood, Classes):
            return self._moments(x, noise=True)
        if self._moves is None:
            self._moves = self.distribution.deviations(SAMPLES, generator_for(0, torch.device("cpu")))
        f = self._along(self._moves, self.rows(x))
        return self.likelihood.observed(f, self._mean[1], self.scaling.y_scale, self.scaling.y_shift)

    def observed_batches(self, x: Float[Tensor, "*b n d"]) -> Predictive:
        """Predictive of y at batches of n rows of a table, joint within each; gradients flow to x."""
        if isinstance(self.likelihood, Classes):
            return self.observed(x.flatten(0, -2))
        batch, n = x.shape[:-2], x.shape[-2]
        rows, scale = self.rows(x.flatten(0, -2)), self.scaling.y_scale
        assert isinstance(self.likelihood, GaussianNoise)
        f = self.outputs(self.distribution.mean[None], rows)[0] * scale + self.scaling.y_shift
        aleatoric = (self.likelihood.log_noise(self._mean[1]).exp() * scale.square()).expand_as(f)
        j = torch.cat(list(self._jacobians(rows))).unflatten(0, (*batch, n)).movedim(-2, 0)  # [t, *b, n, r]
        parts = [self.distribution.covariance(part, part) for part in j]
        latent = torch.stack(parts, -3) * scale.square()[:, None, None]
        mean, aleatoric = f.unflatten(0, (*batch, n)), aleatoric.unflatten(0, (*batch, n))
        covariance = 0.5 * (latent + latent.mT) + torch.diag_embed(aleatoric.mT)
        variance = covariance.diagonal(dim1=-2, dim2=-1).mT
        if self.vector:
            return Gaussian(mean[..., 0], variance[..., 0], covariance[..., 0, :, :], aleatoric[..., 0], 0)
        return Gaussian(mean, variance, covariance, aleatoric, self.num_outputs)

    def as_botorch(self) -> Any:
        """A BoTorch Model of the joint Gaussians, which can be conditioned: the network is linear in its weights."""
        return FunctionPosterior.as_botorch(self)

    _moves: Tensor | None = None

    def _along(self, moves: Float[Tensor, "s r"], rows: Tensor) -> Float[Tensor, "s n o"]:
        """Outputs linearised in the weights, moved by each of `moves`."""
        w, region = self._mean[0], self._region
        tangents = torch.zeros(len(moves), self.network.size, dtype=w.dtype, device=w.device)
        tangents[:, region.first : region.last] = moves.to(w)

        def along(part: Tensor) -> Tensor:
            def one(tangent: Tensor) -> Tensor:
                moved: Any = torch.func.jvp(lambda v: self.network(v, part), (w,), (tangent,))
                return moved[0] + moved[1]

            return torch.func.vmap(one)(tangents)

        size = max(1, VALUES // (len(moves) * self._width(rows)))
        return torch.cat([along(part) for part in rows.split(size)], dim=1)

    def draw(self, n: int = 1, seed: int | None = None) -> FunctionDraws:
        """n functions, each of one move of the weights."""
        moves = self.distribution.deviations(check_count(n, 1), generator_for(seed, torch.device("cpu")))
        return FunctionDraws([self._tangent(move[None]) for move in moves])

    def _tangent(self, move: Float[Tensor, "1 r"]):  # type: ignore[no-untyped-def]
        def function(x: Any) -> Tensor:
            f = self._along(move, self.rows(x))
            return self._shaped(f * self.scaling.y_scale + self.scaling.y_shift)[0]

        return function


def posterior_of(
    network: Network,
    distribution: StateDistribution,
    likelihood: NetworkLikelihood,
    scaling: Scaling,
    vector: bool,
    method: str,
) -> NetworkPosterior:
    """The posterior over functions that a distribution over states defines: linearised where it is a Gaussian around
    one state that was made from the curvature there."""
    kind = LinearisedPosterior if isinstance(distribution, LOCAL) else NetworkPosterior
    return kind(network, distribution, likelihood, scaling, vector, method)
