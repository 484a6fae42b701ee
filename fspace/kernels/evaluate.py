"""Kernel matrices as plain tensors, with hand-written gradients for the common stationary kernels.

Any gpytorch kernel can be evaluated here. RBF and Matern kernels, alone or inside Scale, Additive and Product
kernels, take a path that keeps one n x m temporary for the backward pass and turns the gradient with respect to
the lengthscales into two matrix products, instead of the several n x m temporaries of the general path.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ProductKernel, RBFKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor

from fspace.kernels.deep import SplitKernel


def _minus_twice_product(squares: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    if x1.ndim == 2:
        return torch.addmm(squares, x1, x2.mT, alpha=-2.0)
    return squares.sub_(x1 @ x2.mT, alpha=2.0)


class _Stationary(torch.autograd.Function):
    """k(r) and its first derivatives, for inputs already divided by the lengthscale."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, nu: float) -> Tensor:
        squares = x1.square().sum(-1)[..., :, None] + x2.square().sum(-1)[..., None, :]
        squares = _minus_twice_product(squares, x1, x2)
        squares.clamp_(min=0.0)
        wants_gradient = any(ctx.needs_input_grad)
        slope = None  # dk / d(r^2)
        if nu == math.inf:
            k = squares.mul_(-0.5).exp_()
            slope = k * -0.5 if wants_gradient else None
        else:
            scaled = squares.mul_(2.0 * nu).sqrt_()
            decay = (-scaled).exp_()
            if nu == 0.5:
                slope = decay / scaled.clamp(min=1e-15) * -0.5 if wants_gradient else None
                k = decay
            elif nu == 1.5:
                slope = decay * -1.5 if wants_gradient else None
                k = decay.mul_(scaled.add_(1.0))
            else:
                slope = (scaled + 1.0).mul_(decay).mul_(-5.0 / 6.0) if wants_gradient else None
                k = decay.mul_(scaled.square().div_(3.0).add_(scaled).add_(1.0))
        ctx.save_for_backward(x1, x2, slope)
        return k

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x1, x2, slope = ctx.saved_tensors
        weight = slope.mul(gradient)
        first = second = None
        if ctx.needs_input_grad[0]:
            first = 2.0 * (weight.sum(-1, keepdim=True) * x1 - weight @ x2)
        if ctx.needs_input_grad[1]:
            second = 2.0 * (weight.sum(-2)[..., None] * x2 - weight.mT @ x1)
        return first, second, None


def covariance(
    kernel: Kernel, x1: Float[Tensor, "*batch n d"], x2: Float[Tensor, "*batch m d"] | None = None
) -> Float[Tensor, "*out n m"]:
    """Kernel matrix k(x1, x2) as a dense tensor; x2=None means x1 (exactly symmetric).

    Shapes: x1 [..., n, d], x2 [..., m, d] -> [..., n, m].
    """
    other = x1 if x2 is None else x2
    kind = type(kernel)
    if kind is SplitKernel:
        k = kernel.split
        left, right = (x1[..., :k], x1[..., k:]), (other[..., :k], other[..., k:])
        total = covariance(kernel.base, left[0], None if x2 is None else right[0])
        if kernel.plain is not None:
            total = total + covariance(kernel.plain, left[1], None if x2 is None else right[1])
        return total
    # a Scale kernel takes over its base's active_dims, and gpytorch then selects once, not twice
    if kind is ScaleKernel and kernel.base_kernel.active_dims is not None:
        return kernel.outputscale[..., None, None] * covariance(kernel.base_kernel, x1, x2)
    if kernel.active_dims is not None:
        x1, other = x1[..., kernel.active_dims], other[..., kernel.active_dims]
        x2 = None if x2 is None else other
    if kind is ScaleKernel:
        return kernel.outputscale[..., None, None] * covariance(kernel.base_kernel, x1, x2)
    if kind is AdditiveKernel or kind is ProductKernel:
        parts = [covariance(part, x1, x2) for part in kernel.kernels]
        total = parts[0]
        for part in parts[1:]:
            total = total + part if kind is AdditiveKernel else total * part
        return total
    if kind is RBFKernel or kind is MaternKernel:
        centre = x1.detach().mean(dim=-2, keepdim=True)
        scaled1 = (x1 - centre) / kernel.lengthscale
        scaled2 = scaled1 if x2 is None else (other - centre) / kernel.lengthscale
        if scaled1.ndim != scaled2.ndim or scaled1.shape[:-2] != scaled2.shape[:-2]:
            batch = torch.broadcast_shapes(scaled1.shape[:-2], scaled2.shape[:-2])
            scaled1 = scaled1.expand(*batch, *scaled1.shape[-2:])
            scaled2 = scaled2.expand(*batch, *scaled2.shape[-2:])
        matrix = _Stationary.apply(scaled1, scaled2, kernel.nu if kind is MaternKernel else math.inf)
        if x2 is None:  # rounding in r^2 must not leave the diagonal off one
            matrix = matrix.clone() if matrix.requires_grad else matrix
            matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return matrix
    # where x2 equals x1, some gpytorch kernels (linear, random features) take x1 for both: x2's gradient would be lost
    same = x2 is not None and other.requires_grad and torch.equal(x1, other)
    if same:
        other = torch.cat([other, other[..., :1, :] + 1.0], dim=-2)
    selected = kernel.active_dims
    try:
        kernel.active_dims = None  # selected above; the general path would select again
        matrix = kernel(x1, other).to_dense()
    finally:
        kernel.active_dims = selected
    return matrix[..., :-1] if same else matrix


def diagonal(kernel: Kernel, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*out n"]:
    """Prior variances k(x_i, x_i). Shapes: x [..., n, d] -> [..., n]."""
    kind = type(kernel)  # gpytorch's own way compares x with x, for which the host waits
    if kind is SplitKernel:
        k = kernel.split
        return diagonal(kernel.base, x[..., :k]) + diagonal(kernel.plain, x[..., k:])
    if kind is ScaleKernel:
        return kernel.outputscale[..., None] * diagonal(kernel.base_kernel, x)
    if kind is AdditiveKernel:
        return torch.stack([diagonal(part, x) for part in kernel.kernels]).sum(0)
    if kind is RBFKernel or kind is MaternKernel:
        return x.new_ones(torch.broadcast_shapes(x.shape[:-1], (*kernel.batch_shape, 1)))
    return kernel(x, x, diag=True)
