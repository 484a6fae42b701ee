"""Generalised Gauss-Newton curvature of a network's log likelihood: full, Kronecker-factored, diagonal.

All are of whitened weights v = w / prior scale, in float64. With Lambda_n = L_n L_n' minus the second derivative of the
log density in the outputs of row n, and J_n their Jacobian, the curvature is the sum of J_n' Lambda_n J_n.
Sources: Schraudolph (2002); Martens and Grosse (2015); Immer, Korzepa and Bauer (2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.weights.layer_calls import Call
from fspace.inference.weights.network import Layer, Network
from fspace.inference.weights.problem import Problem

NUMBERS = 2**24  # of Jacobians that are held at once


@dataclass(frozen=True)
class Region:
    """The weights with a distribution: flat positions first to last; the others stay where they are."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.last - self.first


def region_of(network: Network, layers: str) -> Region:
    """All weights, or those of the last layer."""
    if layers == "all":
        return Region(0, network.size)
    last = network.layers[-1]
    ends = [*last.weight, *(last.bias or ())]
    return Region(min(ends), max(ends))


def jacobian(network: Network, w: Float[Tensor, " p"], x: Tensor, region: Region) -> Float[Tensor, "n o r"]:
    """Derivatives of the outputs in the weights of a region, in float64."""

    def of_row(row: Tensor) -> Tensor:
        def outputs(part: Tensor) -> Tensor:
            return network(torch.cat([w[: region.first], part, w[region.last :]]), row[None])[0]

        return torch.func.jacrev(outputs)(w[region.first : region.last])

    if x.ndim == 3:  # networks for sequences look at the lengths of rows, which vmap cannot
        return torch.stack([of_row(row) for row in x]).double()
    return torch.func.vmap(of_row)(x).double()


def _eigen(matrix: Float[Tensor, "*k o o"]) -> tuple[Float[Tensor, "*k o"], Float[Tensor, "*k o o"]]:
    """Eigenvalues and vectors. Raises NumericalError for a matrix that is not finite."""
    if not bool(matrix.isfinite().all()):
        raise NumericalError(
            "The curvature at the trained weights is not finite: weights, noise or prior scales have overflowed. Take "
            "a smaller learning_rate, prior and noise_variance nearer to those of standardised x and y, or "
            "dtype='float64'."
        )
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def roots(problem: Problem, theta: Float[Tensor, " q"], x: Tensor) -> Float[Tensor, "n o o"]:
    """L_n with L_n L_n' = Lambda_n, by eigenvalues: that of classes is singular."""
    w, tail = problem.split(theta)
    f = problem.network(w, x).double()
    curvature = problem.likelihood.curvature(f, tail.double())
    assert curvature is not None
    values, vectors = _eigen(curvature)
    return vectors * values.clamp(min=0.0).sqrt()[..., None, :]


def rooted_jacobians(
    problem: Problem, theta: Float[Tensor, " q"], region: Region, rows: Tensor
) -> Iterator[Float[Tensor, "k r"]]:
    """L_n' J_n S, S the prior scales, some rows at a time: the curvature is the sum of their squares."""
    w, _ = problem.split(theta)
    scale = problem.scales[region.first : region.last]
    at_once = max(1, NUMBERS // (region.size * problem.likelihood.outputs))
    for part in rows.split(at_once):
        x = problem.x[part]
        j = jacobian(problem.network, w, x, region) * scale
        yield (roots(problem, theta, x).mT @ j).flatten(0, 1)


@torch.no_grad()
def full(
    problem: Problem, theta: Float[Tensor, " q"], region: Region, rows: Tensor
) -> tuple[Float[Tensor, " k"], Float[Tensor, "r k"]]:
    """Eigenvalues [k] and vectors [r, k] of the curvature, k the lesser of the numbers of weights and of outputs of
    all rows; other eigenvalues are zero."""
    count = len(rows) * problem.likelihood.outputs
    if count < region.size:
        b = torch.cat(list(rooted_jacobians(problem, theta, region, rows)))
        values, vectors = _eigen(b @ b.mT)
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return values[keep], (b.mT @ vectors[:, keep] / values[keep].sqrt()).contiguous()
    h = problem.scales.new_zeros(region.size, region.size)
    for b in rooted_jacobians(problem, theta, region, rows):
        h += b.mT @ b
    values, vectors = _eigen(h)
    return values.clamp(min=0.0), vectors.contiguous()  # of a file they come back so, to the last bit


@torch.no_grad()
def diagonal(problem: Problem, theta: Float[Tensor, " q"], region: Region) -> Float[Tensor, " r"]:
    """The diagonal of the curvature."""
    rows = torch.arange(problem.n, device=problem.x.device)
    total = problem.scales.new_zeros(region.size)
    for b in rooted_jacobians(problem, theta, region, rows):
        total += b.square().sum(0)
    return total


@dataclass(frozen=True, eq=False)
class Factors:
    """Curvature of one layer, A ⊗ G, by eigenvalues and vectors of both: inputs (a one for the bias at the end) and
    outputs."""

    input_values: Float[Tensor, " i"]
    input_vectors: Float[Tensor, "i i"]
    output_values: Float[Tensor, " o"]
    output_vectors: Float[Tensor, "o o"]


def kronecker(problem: Problem, theta: Float[Tensor, " q"], layers: list[Layer]) -> list[Factors]:
    """Factors of each of these layers: A the sum of its inputs' squares, G the mean of its gradients'; positions of
    an image or sequence count as rows (Grosse and Martens 2016; "expand" of Eschenhagen et al. 2023)."""
    w, _ = problem.split(theta)
    inner: dict[int, Tensor] = {}
    outer: dict[int, Tensor] = {}
    positions: dict[int, int] = {}
    for rows in torch.arange(problem.n, device=problem.x.device).split(1024):
        _add_squares(problem, theta, w, problem.x[rows], layers, inner, outer, positions)
    factors = []
    for layer in layers:
        k = layer.position
        scale = problem.scales[layer.weight[0]]  # one of all weights of a layer, another of its biases
        column = scale.expand(inner[k].shape[0]).clone()
        if layer.bias is not None:
            column[-1] = problem.scales[layer.bias[0]]
        a = _eigen(inner[k] * column[:, None] * column)
        g = _eigen(outer[k] / (problem.n * positions[k]))
        factors.append(
            Factors(a[0].clamp(min=0.0), a[1].contiguous(), g[0].clamp(min=0.0), g[1].contiguous())
        )
    return factors


def _add_squares(  # type: ignore[no-untyped-def]
    problem, theta, w, x, layers, inner, outer, positions
) -> None:
    """Add what some rows give: inputs of each layer as it is called, gradients at its outputs, one pass an output."""
    wanted = {layer.position: layer for layer in layers}
    probes: dict[int, Tensor] = {}

    def watch(k: int, call: Call, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = call(value, weight, bias)
        if k not in wanted:
            return out
        seen = value.detach()
        if weight.ndim == 2:
            a, count = seen.flatten(0, -2), seen.shape[1:-1].numel()
        else:
            a, count = _patches(call, seen, weight), out.shape[2:].numel()
        a = a.double()
        if bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        inner[k] = inner.get(k, 0) + a.mT @ a
        positions[k] = count
        probes[k] = torch.zeros_like(out).requires_grad_()
        return out + probes[k]

    with torch.enable_grad():
        f = problem.network.watched(w.detach(), x, watch)
    root = roots(problem, theta, x).detach().to(f)
    for c in range(f.shape[1]):
        gradients = torch.autograd.grad(
            (root[..., c] * f).sum(),
            list(probes.values()),
            retain_graph=c + 1 < f.shape[1],
            allow_unused=True,
        )
        for k, g in zip(probes, gradients):
            g = (
                torch.zeros_like(probes[k]) if g is None else g
            )  # a layer that nothing of the output depends on
            flat = (g if len(wanted[k].shape) == 2 else g.movedim(1, -1)).reshape(-1, wanted[k].shape[0])
            outer[k] = outer.get(k, 0) + flat.double().mT @ flat.double()


def _patches(call: Call, value: Tensor, weight: Tensor) -> Tensor:
    """The inputs of a convolution that meet in each output, [rows * positions, fan-in]: what a convolution with the
    identity gives."""
    fan_in = weight[0].numel()
    identity = torch.eye(fan_in, dtype=value.dtype, device=value.device).reshape(fan_in, *weight.shape[1:])
    return call(value, identity, None).movedim(1, -1).reshape(-1, fan_in)
