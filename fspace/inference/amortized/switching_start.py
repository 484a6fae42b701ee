"""Where the training of switching linear dynamics starts: a hidden Markov model of linear regressions by EM.

The scores of principal components stand for the latents; their next value is regressed on the present one, with another
regression in each state. EM finds local optima only, so that it runs from several random starts, all in one batch.
Source: Hamilton (1990), analysis of time series subject to changes in regime.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

RESTARTS, SWEEPS, KEPT = 20, 25, 6
PIECE = 50  # steps of a series that EM takes as one: what is longer is cut
STRETCH = 10  # steps that are in one state at first
RIDGE = 1.0  # precision of the prior of a regression's coefficients, in observations


class Regressions(NamedTuple):
    """A regression for each of k states, z' = a z + b + N(0, q), and the probabilities of the next state."""

    a: Float[Tensor, "k l l"]
    b: Float[Tensor, "k l"]
    q: Float[Tensor, "k l"]
    transition: Float[Tensor, "k k"]


def scores(series: list[Tensor], latents: int) -> list[Tensor]:
    """Standardised scores [T, l] of the principal components of every series [T, p]; where p < l, of its last few
    values together. Where the values have fewer directions, the rest is 0."""
    lags = math.ceil(latents / series[0].shape[1])
    rows = []
    for y in series:
        first = y[:1].expand(lags - 1, -1)
        longer = torch.cat([first, y])
        rows.append(torch.cat([longer[lags - 1 - k : len(longer) - k] for k in range(lags)], dim=1))
    every = torch.cat(rows)
    mean = every.mean(0)
    axes = torch.linalg.svd(every - mean, full_matrices=False)
    scale = axes.S[:latents] / len(every) ** 0.5
    inverse = torch.where(scale > 1e-6 * scale[0].clamp(min=1e-300), 1.0 / scale, 0.0)
    found = [((row - mean) @ axes.Vh[:latents].mT) * inverse for row in rows]
    return [nn.functional.pad(z, (0, latents - z.shape[1])) for z in found]


def regressions(parts: list[Tensor], components: int, generator: torch.Generator) -> list[Regressions]:
    """What the restarts of EM on scores [T, l] of every series end in, the different ones, most probable first."""
    before, after, there = _pieces(parts)
    known = torch.cat([before, torch.ones_like(before[..., :1])], dim=-1)
    stretches = (RESTARTS, len(before), -(-before.shape[1] // STRETCH), components)
    share = torch.rand(stretches, generator=generator, dtype=before.dtype, device=before.device).pow(4)
    share = share.repeat_interleave(STRETCH, 2)[:, :, : before.shape[1]]
    share = share / share.sum(-1, keepdim=True)
    transition = torch.full((components, components), 0.1 / max(components - 1, 1), dtype=before.dtype)
    transition = (
        transition.fill_diagonal_(0.9 if components > 1 else 1.0).to(before.device).expand(RESTARTS, -1, -1)
    )
    variance = after[there].var(0, correction=0)
    for _ in range(SWEEPS):
        weight = share * there[..., None]
        coefficients, noise = _regressed(known, after, weight, variance)
        error = after[None, :, :, None] - torch.einsum("btd,rkdl->rbtkl", known, coefficients)
        each = -0.5 * (
            error.square() / noise[:, None, None] + (2 * math.pi * noise).log()[:, None, None]
        ).sum(-1)
        share, counts, evidence = _smoothed(each * there[..., None], transition, there)
        transition = (counts + 1.0) / (counts + 1.0).sum(-1, keepdim=True)
    different = {round(value): r for r, value in enumerate(evidence.tolist())}  # nats
    return [
        Regressions(coefficients[r, :, :-1].mT, coefficients[r, :, -1], noise[r], transition[r])
        for _, r in sorted(different.items(), reverse=True)[:KEPT]
    ]


def _pieces(
    parts: list[Tensor],
) -> tuple[Float[Tensor, "b t l"], Float[Tensor, "b t l"], Bool[Tensor, "b t"]]:
    """Scores and those one step later, padded, and which are there."""
    cut = [piece for z in parts for piece in torch.cat([z[:-1], z[1:]], dim=1).split(PIECE) if len(piece)]
    longest = max(len(piece) for piece in cut)
    padded = torch.stack([nn.functional.pad(piece, (0, 0, 0, longest - len(piece))) for piece in cut])
    lengths = torch.tensor([len(piece) for piece in cut], device=padded.device)
    before, after = padded.chunk(2, dim=-1)
    return before, after, torch.arange(longest, device=padded.device) < lengths[:, None]


def _regressed(
    known: Float[Tensor, "b t d"],
    after: Float[Tensor, "b t l"],
    weight: Tensor,
    variance: Float[Tensor, " l"],
) -> tuple[Float[Tensor, "r k d l"], Float[Tensor, "r k l"]]:
    """Weighted ridge regressions and their residual variances."""
    gram = torch.einsum("rbtk,btd,bte->rkde", weight, known, known)
    eye = RIDGE * torch.eye(known.shape[-1], dtype=known.dtype, device=known.device)
    target = torch.einsum("rbtk,btd,btl->rkdl", weight, known, after)
    coefficients = torch.linalg.solve(gram + eye, target)
    error = after[None, :, :, None] - torch.einsum("btd,rkdl->rbtkl", known, coefficients)
    squares = torch.einsum("rbtk,rbtkl->rkl", weight, error.square())
    prior = 0.1 * variance + 1e-4
    return coefficients, (squares + prior) / (weight.sum((1, 2))[..., None] + 1.0)


def _smoothed(
    each: Float[Tensor, "r b t k"], transition: Float[Tensor, "r k k"], there: Bool[Tensor, "b t"]
) -> tuple[Float[Tensor, "r b t k"], Float[Tensor, "r k k"], Float[Tensor, " r"]]:
    """Forward and backward: probabilities of the states, expected transitions, log evidence."""
    move = transition.log()[:, None]  # [r, 1, k, k]
    steps = each.shape[2]
    forward = [each[:, :, 0] - math.log(each.shape[-1])]
    for t in range(1, steps):
        forward.append((forward[-1][..., None] + move).logsumexp(-2) + each[:, :, t])
    backward = [torch.zeros_like(forward[0])]
    for t in range(steps - 1, 0, -1):
        backward.append((move + (each[:, :, t] + backward[-1])[..., None, :]).logsumexp(-1))
    ahead, behind = torch.stack(forward, 2), torch.stack(backward[::-1], 2)
    total = forward[-1].logsumexp(-1)
    pairs = ahead[:, :, :-1, :, None] + move[:, :, None] + (each + behind)[:, :, 1:, None, :]
    shares = (pairs - total[..., None, None, None]).exp() * there[:, 1:, None, None]
    return (ahead + behind).softmax(-1), shares.sum((1, 2)), total.sum(-1)
