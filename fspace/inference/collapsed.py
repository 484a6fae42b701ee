"""Titsias' collapsed bound from statistics that add over rows, so that memory does not grow with their number.

With Phi = sum k_u(x) k_u(x)', b = sum k_u(x) y, yy = sum y^2, kappa = sum k(x, x), L L' = K_uu, A = L^-1 Phi L^-T and
B = I + A / s2, the bound of one output is
    F = -N/2 log(2 pi s2) - 1/2 log|B| - yy / (2 s2) + b' L^-T B^-1 L^-1 b / (2 s2^2) - (kappa - tr A) / (2 s2).
Source: Titsias (2009), eq. 9; statistics as in Gal et al. (2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.source import Inputs
from fspace.kernels.deep import embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal

CHUNK = 4096  # rows whose kernel block is in memory at once


@dataclass(frozen=True)
class Statistics:
    """Sums over rows. Shapes: outer [m, m] (Phi), cross [m, t] (b), squares [t] (yy), trace scalar (kappa).

    Where the noise varies, every row stands divided by the root of its noise ratio, and log_ratio [] is the sum of
    the logarithms of these ratios.
    """

    outer: Float[Tensor, "m m"]
    cross: Float[Tensor, "m t"]
    squares: Float[Tensor, " t"]
    trace: Float[Tensor, ""]
    count: int
    log_ratio: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.outer + other.outer,
            self.cross + other.cross,
            self.squares + other.squares,
            self.trace + other.trace,
            self.count + other.count,
            self.log_ratio + other.log_ratio,
        )


def chunks(x: Inputs, y: Float[Tensor, "n t"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of at most `size` rows of x and y, in order."""
    for start in range(0, y.shape[0], size):
        yield x[start : start + size], y[start : start + size]


def statistics(
    kernel: Kernel, inducing_inputs: Float[Tensor, "m p"], x: Tensor, y: Float[Tensor, "n t"]
) -> Statistics:
    """Statistics of one block of rows, differentiable. Shapes: x [n, d], y [n, t], inducing inputs embedded [m, p]."""
    z, inner = embed(kernel, x), embedded_kernel(kernel)
    cross = covariance(inner, inducing_inputs, z)
    return Statistics(cross @ cross.mT, cross @ y, y.square().sum(0), diagonal(inner, z).sum(), y.shape[0])


def gather(
    kernel: Kernel,
    inducing_inputs: Float[Tensor, "m p"],
    x: Tensor,
    y: Float[Tensor, "n t"],
    chunk: int = CHUNK,
) -> Statistics:
    """Statistics of all rows, block by block: memory O(m^2 + m chunk) beside x and y themselves."""
    with torch.no_grad():
        blocks = (statistics(kernel, inducing_inputs, xc, yc) for xc, yc in chunks(x, y, chunk))
        total = next(blocks)
        for block in blocks:
            total = total + block
    return total


def bound_from(
    stats: Statistics,
    kuu: Float[Tensor, "m m"],
    noise: Float[Tensor, " t"],
    scale: float = 1.0,
    factorise: Callable[..., tuple[Tensor, Any]] = cholesky,
) -> Float[Tensor, ""]:
    """The collapsed bound (nats), summed over outputs; `scale` multiplies the statistics (minibatches: N / batch).

    Shapes: kuu [m, m], noise [t] variances. Raises NumericalError when K_uu cannot be factorised. factorise: how
    (training loops: `cholesky_unseen`).
    """
    factor, _ = factorise(kuu, "kernel matrix of the inducing inputs", FIRST_JITTER)
    outer = solve_lower(factor, solve_lower(factor, stats.outer).mT)
    whitened = replace(stats, outer=outer, cross=solve_lower(factor, stats.cross))
    return bound_of_whitened(whitened, noise, scale, factorise)


def bound_of_whitened(
    stats: Statistics,
    noise: Float[Tensor, " t"],
    scale: float = 1.0,
    factorise: Callable[..., tuple[Tensor, Any]] = cholesky,
) -> Float[Tensor, ""]:
    """`bound_from` for statistics of L^-1 k_u(x) in place of k_u(x)."""
    a = scale * stats.outer
    identity = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    inner, _ = factorise(identity + a / noise[:, None, None], "I + A / noise")
    c = solve_lower(inner, scale * stats.cross.T[..., None])[..., 0] / noise[:, None]
    n = scale * stats.count
    value = (
        -0.5 * n * torch.log(2.0 * math.pi * noise)
        - 0.5 * scale * stats.log_ratio
        - inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - 0.5 * scale * stats.squares / noise
        + 0.5 * c.square().sum(-1)
        - 0.5 * (scale * stats.trace - a.diagonal().sum()) / noise
    )
    return value.sum()


def backward_bound(
    kernel: Kernel,
    inducing_inputs: Float[Tensor, "m p"],
    noise: Float[Tensor, " t"],
    x: Tensor,
    y: Float[Tensor, "n t"],
    chunk: int = CHUNK,
) -> float:
    """Value of the bound over all rows; its exact gradients are added to `.grad` of all parameters involved.

    Two passes: one gathers the statistics without a graph, one sends the gradient with respect to them through each
    block, so that memory stays O(m^2 + m chunk) whatever the number of rows.
    """
    fixed = gather(kernel, inducing_inputs, x, y, chunk)
    leaves = [t.clone().requires_grad_() for t in (fixed.outer, fixed.cross, fixed.trace)]
    kuu = covariance(embedded_kernel(kernel), inducing_inputs)
    value = bound_from(Statistics(leaves[0], leaves[1], fixed.squares, leaves[2], fixed.count), kuu, noise)
    inputs_need_it = inducing_inputs.requires_grad and not inducing_inputs.is_leaf
    value.backward(retain_graph=inputs_need_it)
    outer, cross, trace = (leaf.grad for leaf in leaves)
    for xc, yc in chunks(x, y, chunk):
        block = statistics(kernel, inducing_inputs, xc, yc)
        assert outer is not None and cross is not None and trace is not None
        share = (outer * block.outer).sum() + (cross * block.cross).sum() + trace * block.trace
        share.backward(retain_graph=inputs_need_it)
    return value.item()


def gather_whitened(basis: Basis, x: Inputs, y: Float[Tensor, "n t"], chunk: int = CHUNK) -> Statistics:
    """Statistics of all rows with L^-1 k_u(x) in place of k_u(x): A is then positive semi-definite by construction,
    which L^-1 Phi L^-T computed from Phi is not once K_uu is ill-conditioned."""
    total: Statistics | None = None
    with torch.no_grad():
        for xc, yc in chunks(x, y, chunk):
            z = basis.embed(xc)
            log_ratio = basis.log_noise_ratio(z)
            weight = torch.exp(-0.5 * log_ratio)
            v, yc, prior = (
                basis.whiten(z) * weight,
                yc * weight[:, None],
                basis.prior_variance(z) * weight.square(),
            )
            block = Statistics(
                v @ v.mT, v @ yc, yc.square().sum(0), prior.sum(), len(yc), log_ratio.sum().item()
            )
            total = block if total is None else total + block
    assert total is not None
    return total


def site_from(basis: Basis, whitened: Statistics, site_id: str = "data") -> Site:
    """The exact site of Gaussian observations from whitened statistics: Lambda = A / s2, b = L^-1 cross / s2."""
    noise = basis.noise
    precision = whitened.outer / noise[:, None, None]
    shift = whitened.cross.T / noise[:, None]
    log_scale = (
        -0.5 * whitened.count * torch.log(2.0 * math.pi * noise)
        - 0.5 * whitened.log_ratio
        - 0.5 * whitened.squares / noise
        - 0.5 * (whitened.trace - whitened.outer.diagonal().sum()) / noise
    )
    return Site(basis.id, precision, shift, log_scale, whitened.count, site_id)


def fit_site(
    basis: Basis, x: Inputs, y: Float[Tensor, "n t"], chunk: int = CHUNK, site_id: str = "data"
) -> Site:
    """The site that all rows of x [n, d], y [n, t] make together."""
    return site_from(basis, gather_whitened(basis, x, y, chunk), site_id)


def log_evidence(sites: Sequence[Site]) -> float:
    """Log evidence (the collapsed bound, nats) of the product of all sites: for one site equal to `bound_from`."""
    total = sites[0]
    for site in sites[1:]:
        total = total + site
    identity = torch.eye(total.shift.shape[-1], dtype=total.shift.dtype, device=total.shift.device)
    inner, _ = cholesky(identity + total.precision, "I + site precision")
    c = solve_lower(inner, total.shift[..., None])[..., 0]
    value = total.log_scale + 0.5 * c.square().sum(-1) - inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value.sum().item()
