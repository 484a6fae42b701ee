"""Inducing inputs by greedy conditional variance, without the n x n matrix.

Each step takes the row that the ones taken so far explain least (pivoted Cholesky with full pivoting on the diagonal).
Source: Burt, Rasmussen and van der Wilk (2020), section 4.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from fspace.kernels.evaluate import covariance, diagonal

SMALL = 2048


@torch.no_grad()
def greedy_variance(
    kernel: Kernel, z: Float[Tensor, "n p"], most: int, tolerance: float = 0.0
) -> Int[Tensor, " m"]:
    """Rows of z to induce on, in the order taken; at most `most`, fewer once tr(K - Q) <= tolerance tr(K).

    Shapes: z [n, p] embedded inputs -> indices [m]. Memory O(n m). Duplicated rows are taken once.
    """
    left = diagonal(kernel, z).clone()
    whole = left.sum()
    rows = torch.empty(min(most, z.shape[0]), z.shape[0], dtype=z.dtype, device=z.device)
    taken: list[int] = []
    # of few rows the whole matrix is quicker than one row of it at a time
    matrix = covariance(kernel, z) if len(z) <= min(8 * most, SMALL) else None
    while len(taken) < rows.shape[0]:
        j = int(left.argmax())
        best = left[j]
        if best <= 1e-12 * whole / z.shape[0] or (taken and left.sum() <= tolerance * whole):
            break
        m = len(taken)
        row = covariance(kernel, z[j : j + 1], z)[0] if matrix is None else matrix[j]
        if m:
            row = row - rows[:m, j] @ rows[:m]
        rows[m] = row / best.sqrt()
        left = (left - rows[m].square()).clamp(min=0.0)
        left[j] = 0.0
        taken.append(j)
    return torch.tensor(taken, device=z.device)
