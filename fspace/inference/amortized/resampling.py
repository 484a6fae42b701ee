"""Ancestors drawn in proportion to weights: each scheme is a pure function of weights and uniform numbers.

All are unbiased, E[children of k] = N W_k, and differ in how much that number varies (Douc, Cappe and Moulines 2005).
Weights [N, B] need not be normalised; uniforms in [0, 1) are [N, B], for "systematic" one a series, [1, B].
The arithmetic is float64 whatever the weights' own precision. NaN weights give indices that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BELOW_ONE = 1.0 - 2.0**-53  # the largest double below 1, which (N - 1 + u) / N may round up to


def inverse_cdf(weights: Float[Tensor, "n *b"], points: Float[Tensor, "k *b"]) -> Int[Tensor, "k *b"]:
    """The index whose stretch of the cumulated weights holds each point of [0, 1); one of weight 0 never does.

    The points are scaled by the weights' own sum, not the weights by 1: float32 weights may sum to 1 - 1e-7, and the
    points above that would fall past the end.
    """
    cumulated = weights.detach().double().cumsum(0)
    points = points.double().clamp(max=BELOW_ONE) * cumulated[-1:]
    index = torch.searchsorted(
        cumulated.movedim(0, -1).contiguous(), points.movedim(0, -1).contiguous(), right=True
    )
    return index.movedim(-1, 0).clamp(
        max=len(weights) - 1
    )  # NaN weights have no place, and the filter says so


def multinomial(weights: Float[Tensor, "n b"], uniforms: Float[Tensor, "n b"]) -> Int[Tensor, "n b"]:
    """Independent draws."""
    return inverse_cdf(weights, uniforms)


def stratified(weights: Float[Tensor, "n b"], uniforms: Float[Tensor, "n b"]) -> Int[Tensor, "n b"]:
    """One draw in each stretch of length 1/N (Kitagawa 1996)."""
    return inverse_cdf(weights, (_slots(weights) + uniforms) / len(weights))


def systematic(weights: Float[Tensor, "n b"], uniforms: Float[Tensor, "1 b"]) -> Int[Tensor, "n b"]:
    """Points 1/N apart with one random offset: each has floor or ceil of N W children (Carpenter et al. 1999).

    As the points are even, the number of them up to the end of each particle's stretch is a formula, and the parent of
    slot i is the number of stretches that end by i: several times faster than searching.
    """
    particles = len(weights)
    cumulated = weights.detach().double().cumsum(0)
    # A hair away from 0 and 1, so that no rounding error of the sum moves a point across the end of a stretch.
    offset = uniforms.double().clamp(2.0**-30, 1.0 - 2.0**-30)
    ends = cumulated.mul_(particles / cumulated[-1:]).sub_(offset).ceil_().long().clamp_(0, particles)
    stretches = ends.new_zeros(particles + 1, weights.shape[1])
    return stretches.scatter_add_(0, ends, ends.new_ones(()).expand_as(ends)).cumsum(0)[:particles]


def residual(weights: Float[Tensor, "n b"], uniforms: Float[Tensor, "n b"]) -> Int[Tensor, "n b"]:
    """floor(N W) children for certain, the others multinomial in what is left of N W (Liu and Chen 1998)."""
    particles = len(weights)
    expected = particles * weights.detach().double() / weights.detach().double().sum(0)
    certain = expected.floor()
    slots = _slots(weights)
    owner = torch.searchsorted(
        certain.cumsum(0).mT.contiguous(), slots.mT.expand(weights.shape[1], -1).contiguous(), right=True
    ).mT
    settled = slots < certain.sum(0)  # the first slots; where it is all of them nothing is left to draw from
    left = torch.where(settled.all(0), 1.0, expected - certain)
    return torch.where(settled, owner.clamp(max=particles - 1), inverse_cdf(left, uniforms))


def _slots(weights: Float[Tensor, "n b"]) -> Float[Tensor, "n 1"]:
    return torch.arange(len(weights), dtype=torch.float64, device=weights.device)[:, None]


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}


def relaxed(
    log_weights: Float[Tensor, "n b"], uniforms: Float[Tensor, "n n b"], temperature: float
) -> Float[Tensor, "n n b"]:
    """Concrete ancestors [child, parent, b], each row a point of the simplex (Maddison et al. 2017): multinomial
    ancestors are its corners, reached as the temperature goes to 0."""
    gumbel = -(-uniforms.double().log()).log()
    return ((log_weights.double()[None] + gumbel) / temperature).softmax(1)
