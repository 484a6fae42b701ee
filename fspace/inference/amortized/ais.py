"""Annealed importance sampling: a slower, sharper estimate of log p(x) against which an encoder's bound is checked."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import bounds, checks
from fspace.inference.amortized.latent import LatentModel, Proposal

SHARPNESS = 4.0  # of the sigmoid that spaces the temperatures, as in Wu et al. (2017)
ACCEPTANCE = 0.65  # of HMC proposals; Neal (2011), MCMC using Hamiltonian dynamics


class AnnealedEvidence(NamedTuple):
    """What the chains say of each datum.

    Shapes: log_evidence [B], nats, exp of it unbiased; log_weights [K, B]; ess [B]; acceptance [B], mean over the run.
    """

    log_evidence: Float[Tensor, " b"]
    log_weights: Float[Tensor, "k b"]
    ess: Float[Tensor, " b"]
    acceptance: Float[Tensor, " b"]


def annealed_importance(
    model: LatentModel,
    x: Tensor,
    chains: int = 16,
    temperatures: int = 200,
    leapfrog: int = 10,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> AnnealedEvidence:
    """log p(x) by chains from q(z | x) to p(x, z) over q^(1-b) p^b, one HMC transition at each inverse temperature b.

    z must be one tensor [K, B, ...] of real numbers. A first run, thrown away, finds the step size of each datum and
    temperature; the second keeps them, so that its weights are unbiased. step_size: where the first run begins.
    Raises OptionError for counts < 1 or a step size not above 0; DataError for discrete or several latents;
    NumericalError where a datum's weights are NaN or all zero. Sources: Neal (2001); Wu et al. (2017).
    """
    for name, given in (("chains", chains), ("temperatures", temperatures), ("leapfrog", leapfrog)):
        checks.count(given, name)
    if not 0 < step_size < math.inf:
        raise OptionError(f"step_size={step_size} must be a finite number above 0.")
    with torch.no_grad():
        q = checks.asked("model.encode", model.encode, x, data=x).stopped()
    ladder = schedule(temperatures)
    first = torch.full((len(x),), step_size, dtype=torch.float64, device=x.device)
    _, _, sizes = _run(model, q, x, chains, ladder, leapfrog, [first], generator)
    log_weights, acceptance, _ = _run(model, q, x, chains, ladder, leapfrog, sizes, generator)
    checks.log_weights(log_weights)
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
    return AnnealedEvidence(bounds.iwae(log_weights), log_weights, ess, acceptance)


def schedule(temperatures: int) -> list[float]:
    """Inverse temperatures from 0 to 1, close together at both ends. Source: Wu et al. (2017)"""
    raw = [math.tanh(0.5 * SHARPNESS * (2 * t / temperatures - 1)) for t in range(temperatures + 1)]
    return [0.0, *(0.5 + 0.5 * value / raw[-1] for value in raw[1:-1]), 1.0]


def _run(
    model: LatentModel,
    q: Proposal,
    x: Tensor,
    chains: int,
    ladder: list[float],
    leapfrog: int,
    sizes: list[Tensor],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-weights [K, B], mean acceptance [B] and the step sizes; a single size given is adapted as it goes."""
    tune = len(sizes) == 1
    with torch.no_grad():
        z = q.sample(chains, generator)
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 3:
        raise DataError(
            "annealed_importance needs one real latent [chains, data, ...]; HMC moves nothing else."
        )
    base, joint, slopes = _densities(model, q, x, z)
    weights, accepted = torch.zeros_like(base), torch.zeros_like(base[0])
    used, size = [], sizes[0].to(z.dtype)
    for t in range(1, len(ladder)):
        weights = weights + (ladder[t] - ladder[t - 1]) * (joint - base)
        size = size if tune else sizes[t - 1]
        used.append(size)
        momentum = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        # a step of random length a chain: with one for all, a chain in a steep place would stay there
        jitter, chance = torch.rand((2, *base.shape), generator=generator, dtype=z.dtype, device=z.device)
        z, base, joint, slopes, taken = _transition(
            model,
            q,
            x,
            (z, base, joint, slopes),
            ladder[t],
            size * (0.4 + 0.8 * jitter),
            leapfrog,
            momentum,
            chance,
        )
        accepted = accepted + taken
        if tune:
            size = size * (0.3 * (taken - ACCEPTANCE)).exp()
    return weights, accepted / (len(ladder) - 1), used


def _transition(
    model: LatentModel,
    q: Proposal,
    x: Tensor,
    state: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]],
    beta: float,
    size: Tensor,
    leapfrog: int,
    momentum: Tensor,
    chance: Tensor,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """One HMC step of sizes [K, B] that leaves q^(1-beta) p^beta invariant; new state, share accepted [B]."""
    z, base, joint, slopes = state
    eps = size.reshape(*size.shape, *[1] * (z.ndim - 2))
    before = _tempered(base, joint, beta) - 0.5 * momentum.square().flatten(2).sum(-1)
    new, now = z, (base, joint, slopes)
    for _ in range(leapfrog):
        momentum = momentum + 0.5 * eps * _tempered(*now[2], beta)
        new = new + eps * momentum
        now = _densities(model, q, x, new)
        momentum = momentum + 0.5 * eps * _tempered(*now[2], beta)
    after = _tempered(now[0], now[1], beta) - 0.5 * momentum.square().flatten(2).sum(-1)
    take = _accept(after - before, chance)
    wide = take.reshape(*take.shape, *[1] * (z.ndim - 2))
    kept = tuple(torch.where(wide, a, b) for a, b in zip(now[2], slopes))
    return (
        torch.where(wide, new, z),
        torch.where(take, now[0], base),
        torch.where(take, now[1], joint),
        (kept[0], kept[1]),
        take.to(z.dtype).mean(0),
    )


def _accept(log_ratio: Tensor, chance: Tensor) -> Tensor:
    """Metropolis: NaN, from a trajectory that ran away, is never accepted."""
    return chance.log() < log_ratio


def _tempered(base: Tensor, joint: Tensor, beta: float) -> Tensor:
    return joint if beta == 1 else (1 - beta) * base + beta * joint


def _densities(
    model: LatentModel, q: Proposal, x: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """log q(z | x) and log p(x, z), each [K, B], and their gradients in z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        base, joint = q.log_prob(z), checks.asked("model.log_joint", model.log_joint, x, z, data=x)
        checks.of_shape(joint, tuple(base.shape), "model.log_joint")
        slopes = _slope(base, z, "log q(z | x)"), _slope(joint, z, "log p(x, z)")
    return base.detach(), joint.detach(), slopes


def _slope(density: Tensor, z: Tensor, name: str) -> Tensor:
    """Its gradient in z; DataError where it has none, as that of a discrete latent."""
    found = torch.autograd.grad(density.sum(), z, allow_unused=True)[0] if density.requires_grad else None
    if found is None:
        raise DataError(
            f"{name} has no gradient in z. annealed_importance needs real latents; HMC moves nothing else."
        )
    return found
