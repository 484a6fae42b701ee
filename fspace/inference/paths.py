"""Functions drawn from a GP prior that can be evaluated anywhere.

Stationary kernels (RBF, Matern, inside Scale, Additive and Split kernels) are drawn by random Fourier features (Rahimi
and Recht 2007); any other kernel by remembering each value it has given and drawing new ones from the conditional.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

from fspace.inference.numerics import cholesky, solve_lower
from fspace.kernels.deep import SplitKernel
from fspace.kernels.evaluate import covariance

FEATURES = 2048
Path = Callable[[Tensor], Tensor]  # embedded inputs [..., n, p] -> values [..., t, n]


def prior_path(kernel: Kernel, width: int, outputs: int, generator: torch.Generator) -> Path:
    """One draw of `outputs` independent functions with covariance `kernel` over embedded inputs of width p."""
    path = _spectral(kernel, width, outputs, generator)
    return path if path is not None else _Remembered(kernel, outputs, generator)


def _spectral(kernel: Kernel, width: int, outputs: int, generator: torch.Generator) -> Path | None:
    kind = type(kernel)
    dims = kernel.active_dims
    passed_on = kind is ScaleKernel and kernel.base_kernel.active_dims is not None  # which then selects once
    if dims is not None and not passed_on and kind not in (RBFKernel, MaternKernel):
        return None
    if kind is SplitKernel:
        left = _spectral(kernel.base, kernel.split, outputs, generator)
        right = _spectral(kernel.plain, width - kernel.split, outputs, generator)
        if left is None or right is None:
            return None
        return lambda z: left(z[..., : kernel.split]) + right(z[..., kernel.split :])
    if kind is AdditiveKernel:
        parts = [_spectral(part, width, outputs, generator) for part in kernel.kernels]
        found = [p for p in parts if p is not None]
        return (lambda z: torch.stack([p(z) for p in found]).sum(0)) if len(found) == len(parts) else None
    if kind is ScaleKernel:
        inner = _spectral(kernel.base_kernel, width, outputs, generator)
        return None if inner is None else (lambda z: kernel.outputscale.sqrt() * inner(z))
    if kind not in (RBFKernel, MaternKernel):
        return None
    lengthscale = kernel.lengthscale.detach()
    width = width if dims is None else len(dims)
    options = {"dtype": torch.float64, "device": lengthscale.device}
    omega = torch.randn(width, FEATURES, generator=generator, **options)
    if kind is MaternKernel:  # its spectral density is a multivariate t with 2 nu degrees of freedom
        squares = torch.randn(round(2 * kernel.nu), FEATURES, generator=generator, **options).square().mean(0)
        omega = omega / squares.sqrt()
    omega = omega / lengthscale.reshape(-1, 1)
    phase = 2 * math.pi * torch.rand(FEATURES, generator=generator, **options)
    weights = torch.randn(outputs, FEATURES, generator=generator, **options) * math.sqrt(2.0 / FEATURES)
    return lambda z: weights @ torch.cos((z if dims is None else z[..., dims]) @ omega + phase).mT


class _Remembered:
    """A path known where it has been asked: new values are drawn given all earlier ones (cubic in their number)."""

    def __init__(self, kernel: Kernel, outputs: int, generator: torch.Generator):
        self.kernel, self.outputs, self.generator = kernel, outputs, generator
        self.points: Tensor | None = None
        self.white: Tensor | None = None  # [t, k]: the values are factor @ white

    def __call__(self, z: Tensor) -> Tensor:
        if z.ndim > 2:  # batches: [..., n, p] -> [..., t, n]
            values = self(z.reshape(-1, z.shape[-1]))
            return values.reshape(self.outputs, *z.shape[:-1]).movedim(0, -2)
        known = 0 if self.points is None else len(self.points)
        points = z.detach() if self.points is None else torch.cat([self.points, z.detach()])
        points, index = _distinct(points, known)
        fresh = torch.randn(
            self.outputs, len(points) - known, generator=self.generator, dtype=z.dtype, device=z.device
        )
        factor, _ = cholesky(covariance(self.kernel, points), "kernel matrix of a function draw", 1e-10)
        self.white = fresh if self.white is None else torch.cat([self.white, fresh], dim=1)
        self.points = points  # after the factorisation: where that fails, the path stays as it was
        if not z.requires_grad:
            return (self.white @ factor.mT)[:, index]
        return (solve_lower(factor, covariance(self.kernel, points, z)).mT @ self.white.mT).mT


def _distinct(points: Tensor, known: int) -> tuple[Tensor, Tensor]:
    """Known points first, then the new ones that are not among them; and where each new row stands."""
    rows = {tuple(row): i for i, row in enumerate(points[:known].tolist())}
    index, keep = [], list(range(known))
    for i, row in enumerate(points[known:].tolist(), start=known):
        if tuple(row) not in rows:
            rows[tuple(row)] = len(keep)
            keep.append(i)
        index.append(rows[tuple(row)])
    return points[keep], torch.tensor(index, device=points.device)
