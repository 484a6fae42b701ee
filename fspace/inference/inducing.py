"""Inducing inputs by greedy conditional variance, without the n x n matrix.

Each step takes the row that the ones taken so far explain least (pivoted Cholesky with full pivoting on the diagonal).
Source: Burt, Rasmussen and van der Wilk (2020), section 4.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from fspace.inference.numerics import host_may_look
from fspace.kernels.evaluate import covariance, diagonal

LOOKS = 64  # rows taken between two looks at whether they are enough, where a look makes the host wait


@torch.no_grad()
def greedy_variance(
    kernel: Kernel, z: Float[Tensor, "n p"], most: int, tolerance: float = 0.0
) -> Int[Tensor, " m"]:
    """Rows of z to induce on, in the order taken; at most `most`, fewer once tr(K - Q) <= tolerance tr(K).

    Shapes: z [n, p] embedded inputs -> indices [m]. Memory O(n m). Duplicated rows are taken once. On a GPU the host
    waits once in LOOKS rows.
    """
    left = diagonal(kernel, z).clone()
    whole = left.sum()
    rows = torch.empty(min(most, z.shape[0]), z.shape[0], dtype=z.dtype, device=z.device)
    taken = torch.zeros(len(rows), dtype=torch.long, device=z.device)
    enough = torch.zeros(len(rows), dtype=torch.bool, device=z.device)  # before this one was taken
    for m in range(len(rows)):
        best, j = left.max(dim=0, keepdim=True)
        enough[m] = (best[0] <= 1e-12 * whole / z.shape[0]) | ((left.sum() <= tolerance * whole) & (m > 0))
        if (host_may_look(z.device) or m % LOOKS == LOOKS - 1) and enough[: m + 1].any():
            break
        row = covariance(kernel, z.index_select(0, j), z)[0]
        if m:
            row = row - rows[:m].index_select(1, j)[:, 0] @ rows[:m]
        rows[m] = row / best.sqrt()
        left = (left - rows[m].square()).clamp(min=0.0).index_fill(0, j, 0.0)
        taken[m : m + 1] = j
    return taken[: int((enough.cumsum(0) == 0).sum())]
