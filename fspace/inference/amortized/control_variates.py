"""REBAR and RELAX: score-function gradients of discrete latents with a reparameterised control variate.

A coupling is a relaxed z whose hard value is the sample, and a second z drawn given that hard value. The objective
f(latents [K, B, ...]) -> [B] takes hard and relaxed latents alike, and may be any function of all K samples together,
such as IWAE. Both estimators are unbiased whatever the control variate.
Sources: Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), REBAR; Grathwohl et al. (2018), RELAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fspace.errors import OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.proposals import one_hot, over_latents

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Coupling:
    """A relaxed sample, its hard value, and another relaxed sample of that hard value.

    Shapes: logits [B, ...]; z, hard, z_given_hard [K, B, ...]; log_prob [K, B] of hard. `squash` maps z / temperature
    to relaxed latents: a sigmoid for bits, a softmax for categories.
    """

    logits: Float[Tensor, "b ..."]
    z: Float[Tensor, "k b ..."]
    hard: Float[Tensor, "k b ..."]
    z_given_hard: Float[Tensor, "k b ..."]
    log_prob: Float[Tensor, "k b"]
    squash: Callable[[Tensor], Tensor]


class ControlEstimate(NamedTuple):
    """As gradients.Estimate, and what a control variate is tuned by. Shapes: all [B].

    second_moment   squared norm of the gradient with respect to the logits. Its mean exceeds the variance by a
                    constant, so its gradient tunes eta, the temperature and a control network without bias.
    """

    bound: Float[Tensor, " b"]
    decoder: Float[Tensor, " b"]
    encoder: Float[Tensor, " b"]
    second_moment: Float[Tensor, " b"]


def couple_binary(logits: Tensor, u: Tensor, v: Tensor) -> Coupling:
    """Bits: z = l + logit(u), hard = (z > 0), and z given hard = l + logit(v') with u' = sigmoid(-l),
    v' = u' + v (1 - u') where hard is 1, else v u'.

    Shapes: logits [B, ...]; u, v [K, B, ...] uniform and independent. The gradient flows through u', on which unbiased
    estimates depend. Raises DataError for noise outside [0, 1] and logits that are not finite.
    Source: Tucker et al. (2017).
    """
    checks.logits(logits, logits.isfinite(), "the logits of a coupling are finite")
    u, v = _open(u, logits, "u"), _open(v, logits, "v")
    z = logits + u.log() - torch.log1p(-u)
    hard = (z > 0).to(z.dtype)
    # l + logit(v'), written so that it has the sign of hard for any logits
    above = F.softplus(logits + v.log()) - torch.log1p(-v)
    below = v.log() - F.softplus(torch.log1p(-v) - logits)
    log_prob = F.logsigmoid(torch.where(hard == 1, logits, -logits))
    return Coupling(
        logits, z, hard, torch.where(hard == 1, above, below), over_latents(log_prob), torch.sigmoid
    )


def couple_categorical(logits: Tensor, u: Tensor, v: Tensor) -> Coupling:
    """Categories: z = log p + Gumbel(u), hard = one-hot argmax, and Gumbels given which of them is the greatest.

    Shapes: logits [B, ..., c]; u, v [K, B, ..., c] uniform and independent. Raises DataError for noise outside [0, 1]
    and logits that are not finite. Source: Tucker et al. (2017).
    """
    checks.logits(logits, logits.isfinite(), "the logits of a coupling are finite")
    u, v = _open(u, logits, "u"), _open(v, logits, "v")
    log_p = logits.log_softmax(-1)
    z = log_p - (-u.log()).log()
    hard = one_hot(z.detach())
    log_e = (-v.log()).log()  # of the exponential variable behind each Gumbel
    top = (log_e * hard).sum(-1, keepdim=True)  # the greatest of all, whichever it is, is a standard Gumbel
    rest = -torch.logaddexp(log_e - log_p, top)
    under = torch.nextafter(-top, torch.full_like(top, -torch.inf))  # where rounding would make a tie of it
    given = torch.where(hard == 1, -top, torch.minimum(rest, under))
    log_prob = (hard * log_p).sum(-1)
    return Coupling(logits, z, hard, given, over_latents(log_prob), _softmax)


def relax(f: Objective, control: Objective, coupling: Coupling) -> ControlEstimate:
    """[f(b) - c(z~)] d log q(b) + d c(z) - d c(z~): unbiased for any control variate c(z [K, B, ...]) -> [B].

    The decoder climbs f at the hard samples. Parameters inside f are differentiated as usual; those of c are tuned by
    `second_moment`. Raises OptionError where logits have no gradient; DataError for values of another shape
    and for what f refuses. Source: Grathwohl et al. (2018).
    """
    logits = coupling.logits
    if not (logits.requires_grad and coupling.log_prob.requires_grad and torch.is_grad_enabled()):
        raise OptionError(
            "The logits of the coupling need a gradient, for that is what is estimated; couple and estimate outside "
            "torch.no_grad()."
        )
    value = checks.asked("f of hard latents", f, coupling.hard)
    at_z, at_given = (checks.asked("control", control, z) for z in (coupling.z, coupling.z_given_hard))
    for source, found in (("f", value), ("control", at_z)):
        checks.of_shape(found, (logits.shape[0],), f"The value of {source}")
    checks.finite(value, "f at the hard samples of datum ")

    def slope(of: Tensor, graph: bool) -> Tensor:
        if not of.requires_grad:
            return torch.zeros_like(logits)
        found = torch.autograd.grad(
            of.sum(), logits, retain_graph=True, create_graph=graph, allow_unused=True
        )[0]
        return torch.zeros_like(logits) if found is None else found

    rows = (-1,) + (1,) * (logits.ndim - 1)
    signal = (value.detach() - at_given).reshape(rows)
    gradient = signal * slope(coupling.log_prob, False) + slope(at_z, True) - slope(at_given, True)
    encoder = value + (gradient.detach() * (logits - logits.detach())).flatten(1).sum(1)
    whole = gradient + slope(value, False)
    return ControlEstimate(value.detach(), value, encoder, whole.square().flatten(1).sum(1))


def rebar(
    f: Objective, coupling: Coupling, temperature: float | Tensor, eta: float | Tensor = 1.0
) -> ControlEstimate:
    """RELAX with the control variate eta f(relaxed latents at a temperature).

    temperature and eta may be tensors to be tuned by `second_moment`. Raises OptionError for a temperature not above 0.
    Source: Tucker et al. (2017), without its changed relaxation.
    """
    checks.temperature(temperature)
    return relax(f, lambda z: eta * f(coupling.squash(z / temperature)), coupling)


def _softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def _open(noise: Tensor, logits: Tensor, name: str) -> Tensor:
    """Noise within the open interval: torch.rand gives 0 now and then."""
    checks.of_shape(noise, (*noise.shape[:1], *logits.shape), name)
    checks.support((noise >= 0) & (noise <= 1), noise, name, "uniform noise lies in [0, 1]")
    info = torch.finfo(logits.dtype)
    return noise.to(logits.dtype).clamp(info.tiny, 1 - info.eps)
