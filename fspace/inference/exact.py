"""Exact Gaussian process regression by one Cholesky factorisation on plain tensors.

Sources: Rasmussen and Williams (2006), eq. 2.30 (log marginal likelihood), 5.9 (its gradient), 5.10-5.12
(leave-one-out predictions in closed form; Sundararajan and Keerthi 2001).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.numerics import cholesky, solve_lower


class _LogMarginal(torch.autograd.Function):
    """sum over outputs of log N(y_t; 0, K + noise_t I), with its gradient from one factorisation per output."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        n = y.shape[0]
        factor, _ = cholesky(_add_noise(k, noise), "covariance of the observations")
        alpha = torch.cholesky_solve(y.T[..., None], factor)[..., 0]
        logdet = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = -0.5 * ((y.T * alpha).sum(-1) + logdet + n * math.log(2.0 * math.pi))
        ctx.save_for_backward(alpha, factor)
        return value.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        alpha, factor = ctx.saved_tensors
        grad_k = grad_noise = None
        # K^-1 itself is what the gradient is made of (eq. 5.9); it is never used to solve with
        slope = torch.cholesky_inverse(factor).mul_(-0.5)
        slope += 0.5 * alpha[:, :, None] * alpha[:, None, :]
        if ctx.needs_input_grad[2]:
            grad_noise = gradient * slope.diagonal(dim1=-2, dim2=-1).sum(-1)
        if ctx.needs_input_grad[0]:
            grad_k = (slope[0] if slope.shape[0] == 1 else slope.sum(0)) * gradient
        return grad_k, -gradient * alpha.T if ctx.needs_input_grad[1] else None, grad_noise


def _add_noise(k: Float[Tensor, "n n"], noise: Float[Tensor, " t"]) -> Float[Tensor, "t n n"]:
    noisy = k.expand(noise.shape[0], *k.shape).clone()
    noisy.diagonal(dim1=-2, dim2=-1).add_(noise[:, None])
    return noisy


def log_marginal_likelihood(
    k: Float[Tensor, "n n"], y: Float[Tensor, "n t"], noise: Float[Tensor, " t"]
) -> Float[Tensor, ""]:
    """Log evidence of all outputs, differentiable in all arguments.

    Shapes: k [n, n] kernel matrix without noise, y [n, t], noise [t] variances -> scalar (nats).
    Raises NumericalError when k + noise is not positive definite. Source: Rasmussen and Williams (2006) eq. 2.30.
    """
    return _LogMarginal.apply(k, y, noise)


def leave_one_out(
    k: Float[Tensor, "n n"], y: Float[Tensor, "n t"], noise: Float[Tensor, " t"]
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"]]:
    """Mean and variance of every y_i given all others, noise included.

    Shapes: k [n, n], y [n, t], noise [t] -> [n, t], [n, t]. Source: Rasmussen and Williams (2006) eq. 5.12.
    """
    factor, _ = cholesky(_add_noise(k, noise), "covariance of the observations")
    alpha = torch.cholesky_solve(y.T[..., None], factor)[..., 0]
    eye = torch.eye(y.shape[0], dtype=k.dtype, device=k.device)
    precision = solve_lower(factor, eye).square().sum(-2)
    return y - (alpha / precision).T, (1.0 / precision).T
