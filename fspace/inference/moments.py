"""What a site says about function values once the kernel has moved, with gradients written by hand.

With A = across, P = I + A' Lambda A and c = A' b, the posterior of the whitened inducing values is N(P^-1 c, P^-1), so
    mean_i = v_i' P^-1 c,    known_i = v_i' P^-1 v_i,
    KL = (tr P^-1 + |P^-1 c|^2 - m + log|P|) / 2
for every function. All three depend on A through P and c alone: one gradient in P, made of P^-1 and U = P^-1 V, does
for them all, where automatic differentiation goes back through a factorisation and three solves for every function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fspace.inference.numerics import cholesky_unseen, solve_lower


class MovedMoments(torch.autograd.Function):
    """v [m, n], across [m, m], precision [t, m, m], shift [t, m] -> mean [t, n], known [t, n], KL divergence [t]
    (nats), and precision and shift in the new coordinates. The site and what it becomes are constants."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, across: Tensor, precision: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        half = precision @ across  # Lambda A
        precision, new_shift = across.mT @ half, shift @ across
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        factor = cholesky_unseen(eye + precision, "I + site precision")[0]
        inverse = solve_lower(factor, eye.expand_as(factor))
        w = solve_lower(factor, v.expand(len(factor), *v.shape))
        centre = (inverse.mT @ (inverse @ new_shift[..., None]))[..., 0]  # P^-1 c
        divergence = 0.5 * (inverse.square().sum((-2, -1)) + centre.square().sum(-1) - len(v))
        divergence = divergence + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ctx.mark_non_differentiable(precision, new_shift)
        ctx.save_for_backward(half, shift, inverse, w, centre)
        return centre @ v, w.square().sum(-2), divergence, precision, new_shift

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, in_mean: Tensor, in_known: Tensor, in_divergence: Tensor, *_: Any) -> Any:
        half, shift, inverse, w, centre = ctx.saved_tensors
        u = inverse.mT @ w
        weighed = u * in_known[:, None, :]
        in_v = centre.mT @ in_mean + 2.0 * weighed.sum(0)

        covariance = inverse.mT @ inverse  # P^-1
        in_centre = (u @ in_mean[..., None])[..., 0]  # P^-1 times the gradient in the posterior mean
        in_centre = in_centre + in_divergence[:, None] * (covariance @ centre[..., None])[..., 0]
        rest = 0.5 * in_divergence[:, None, None]
        in_p = rest * covariance - (rest * covariance) @ covariance - weighed @ u.mT
        outer = in_centre[:, :, None] * centre[:, None, :]
        in_p = in_p - 0.5 * (outer + outer.mT)
        in_across = 2.0 * torch.einsum("tij,tjk->ik", half, in_p) + shift.mT @ in_centre
        return in_v, in_across, None, None
