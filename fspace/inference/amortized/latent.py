"""What a latent variable model is to the objectives, and the log-weights it gives.

    model.encode(x)         -> q(z | x) for the B data of x: a Proposal
    model.log_joint(x, z)   -> log p(x, z) [K, B], of z [K, B, ...] or a tuple of such

A Proposal draws z and says its log density. Any torch module will do for either: nothing here asks for a base class.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.amortized import checks


@runtime_checkable
class Proposal(Protocol):
    """q(z | x) of B data. z is a tensor [K, B, ...], or a tuple of such where there are several stochastic layers."""

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Any:
        """K draws of z, reparameterised (with a gradient to the parameters of q) where the distribution can be."""
        ...

    def log_prob(self, z: Any) -> Tensor:
        """log q(z | x) [K, B]."""
        ...

    def stopped(self) -> Proposal:
        """The same distribution without gradient to its own parameters; z keeps its gradient, wherever it enters."""
        ...


@runtime_checkable
class LatentModel(Protocol):
    """A joint density of data and latents, and the encoder that proposes latents for data."""

    def encode(self, x: Tensor) -> Proposal:
        """q(z | x) of the rows of x."""
        ...

    def log_joint(self, x: Tensor, z: Any) -> Tensor:
        """log p(x, z_k) [K, B]."""
        ...


class LogTerms(NamedTuple):
    """What every gradient estimator is made of: three tensors [K, B].

    joint     log p(x, z_k)
    proposal  log q(z_k | x), with its gradient to everything
    stopped   the same numbers, the parameters of q held constant: a gradient only through z
    """

    joint: Float[Tensor, "k b"]
    proposal: Float[Tensor, "k b"]
    stopped: Float[Tensor, "k b"]

    @property
    def weights(self) -> Float[Tensor, "k b"]:
        """Log-weights with their whole gradient."""
        return self.joint - self.proposal

    @property
    def path(self) -> Float[Tensor, "k b"]:
        """The same log-weights, the encoder's gradient only through z. Source: Roeder, Wu and Duvenaud (2017)."""
        return self.joint - self.stopped

    @property
    def score(self) -> Float[Tensor, "k b"]:
        """Zeros whose gradient is that of log q at fixed z, whether or not z is reparameterised."""
        return self.proposal - self.stopped


def log_terms(
    model: LatentModel, x: Tensor, samples: int, generator: torch.Generator | None = None
) -> LogTerms:
    """The terms of `samples` latents for each row of x.

    Raises OptionError for samples < 1, DataError where the model's log densities are not [K, B], where it refuses x,
    and where the proposal's density of the same z changes from call to call.
    """
    shape = (checks.count(samples, "samples"), x.shape[0])
    q = checks.asked("model.encode", model.encode, x, data=x)
    z = q.sample(samples, generator)
    joint = checks.asked("model.log_joint", model.log_joint, x, z, data=x)
    terms = LogTerms(joint, q.log_prob(z), q.stopped().log_prob(z))
    for source, term in zip(
        ("model.log_joint", "log_prob of model.encode", "log_prob of the stopped proposal"), terms
    ):
        checks.of_shape(term, shape, source)
    checks.same(terms.proposal, terms.stopped)
    return terms


def log_weights(
    model: LatentModel, x: Tensor, samples: int, generator: torch.Generator | None = None
) -> Float[Tensor, "k b"]:
    """log p(x, z_k) - log q(z_k | x) of `samples` latents for each row of x; for what needs no more than a bound.

    Raises as log_terms does.
    """
    q = checks.asked("model.encode", model.encode, x, data=x)
    return weights_of(model, x, q, checks.count(samples, "samples"), generator)


def weights_of(
    model: LatentModel, x: Tensor, q: Proposal, samples: int, generator: torch.Generator | None
) -> Float[Tensor, "k b"]:
    """Log-weights of new draws from a proposal that is already there."""
    z = q.sample(samples, generator)
    joint = checks.asked("model.log_joint", model.log_joint, x, z, data=x)
    proposal = q.log_prob(z)
    checks.of_shape(joint, (samples, x.shape[0]), "model.log_joint")
    checks.of_shape(proposal, (samples, x.shape[0]), "log_prob of model.encode")
    return joint - proposal
