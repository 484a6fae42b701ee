"""Gradient estimators for reparameterised latents: what each group of parameters climbs, beside the bound reported.

Every estimator takes LogTerms and returns an Estimate. The value of a surrogate means nothing, its gradient does, and
each is for its own group only: `backward` keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.amortized import bounds
from fspace.inference.amortized.latent import LogTerms

if TYPE_CHECKING:
    from fspace.inference.amortized.control_variates import ControlEstimate


class Estimate(NamedTuple):
    """A bound and the surrogates to climb. Shapes: all [B].

    bound     the value to report, without gradient.
    decoder   its gradient is for the parameters of p (theta).
    encoder   its gradient is for the parameters of q (phi).
    """

    bound: Float[Tensor, " b"]
    decoder: Float[Tensor, " b"]
    encoder: Float[Tensor, " b"]


def backward(
    estimate: Estimate | ControlEstimate, decoder: Iterable[Tensor], encoder: Iterable[Tensor]
) -> None:
    """Add to `.grad` what an optimiser that descends needs: minus the mean over data of each group's surrogate.

    Raises OptionError for a parameter that is in both groups or asks for no gradient, and where a surrogate reaches
    none of the parameters of its group, as that of `stl` and `dreg` with discrete latents.
    """
    theta, phi = list(decoder), list(encoder)
    if {id(p) for p in theta} & {id(p) for p in phi}:
        raise OptionError(
            "A parameter is in both groups; the decoder and the encoder climb different surrogates."
        )
    _check(theta, estimate.decoder, "decoder")
    _check(phi, estimate.encoder, "encoder")
    if estimate.decoder is estimate.encoder:
        torch.autograd.backward(-estimate.decoder.mean(), inputs=[*theta, *phi])
    else:
        if theta:
            torch.autograd.backward(-estimate.decoder.mean(), inputs=theta, retain_graph=bool(phi))
        if phi:
            torch.autograd.backward(-estimate.encoder.mean(), inputs=phi)
    for name, group in (("decoder", theta), ("encoder", phi)):
        if group and all(p.grad is None for p in group):
            raise OptionError(
                f"The {name}'s surrogate depends on none of the {name}'s parameters. Are they another model's? "
                "Discrete latents need an estimator of score.py or control_variates.py: others see no way through z."
            )


def _check(group: list[Tensor], surrogate: Tensor, name: str) -> None:
    """Raises OptionError for a group that cannot have a gradient."""
    held = [place for place, p in enumerate(group) if not p.requires_grad]
    if held:
        raise OptionError(
            f"Tensor {held[0]} of the {name}'s parameters has requires_grad=False; leave it out of the group."
        )
    if group and not surrogate.requires_grad:
        raise OptionError(f"The {name}'s surrogate has no gradient. Was it made under torch.no_grad()?")


def pathwise(terms: LogTerms, bound: Callable[[Tensor], Tensor] = bounds.iwae) -> Estimate:
    """The bound's own gradient, through reparameterised z. Source: Kingma and Welling (2014).

    bound: any function of log-weights [K, B]. With discrete z the encoder's gradient would be wrong; see score.py.
    """
    value = bound(terms.weights)
    return Estimate(value.detach(), value, value)


def stl(terms: LogTerms, bound: Callable[[Tensor], Tensor] = bounds.iwae) -> Estimate:
    """Sticking the landing: the score of q is left out, so the gradient vanishes where q is the posterior.

    Unbiased for the ELBO (bound=elbo, or one sample); biased for the encoder under IWAE with K > 1.
    Source: Roeder, Wu and Duvenaud (2017).
    """
    value = bound(terms.path)
    return Estimate(value.detach(), value, value)


def dreg(terms: LogTerms) -> Estimate:
    """Doubly reparameterised gradient of IWAE: squared normalised weights for the encoder. Unbiased.

    Its signal-to-noise ratio grows with sqrt(K), that of the plain gradient falls. The decoder gets the plain one.
    With several stochastic layers, `stopped` must let the gradient through lower layers, as Chain does.
    Source: Tucker, Lawson, Gu and Maddison (2019); Bauer and Mnih (2021).
    """
    path = terms.path
    value = bounds.iwae(path)
    return Estimate(value.detach(), value, weighted(path.detach().softmax(0).square(), path))


def weighted(shares: Float[Tensor, "k b"], terms: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
    """Sum over samples of share times term; where the share is 0 the term counts for nothing, were it -inf."""
    return (shares * torch.where(shares == 0, 0.0, terms)).sum(0)
