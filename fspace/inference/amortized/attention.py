"""DRAW's selective attention: a grid of Gaussian filters that reads a patch from an image, or writes one into it.

Source: Gregor et al. (2015), section 3.2, eq. 19-29. Positions are in pixels, the first pixel at 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Grid(NamedTuple):
    """Where the filters are. Shapes: all [B]; x along the width, y along the height, stride and deviation in pixels;
    intensity multiplies what is read and divides what is written."""

    x: Float[Tensor, " b"]
    y: Float[Tensor, " b"]
    stride: Float[Tensor, " b"]
    deviation: Float[Tensor, " b"]
    intensity: Float[Tensor, " b"]


def grid_from(numbers: Float[Tensor, "b 5"], height: int, width: int, n: int) -> Grid:
    """The grid that five numbers of a network ask for: zeros give one over the whole image, deviation 1.

    Source: eq. 21-24.
    """
    x, y, log_variance, log_stride, log_intensity = numbers.unbind(-1)
    whole = (max(height, width) - 1) / max(n - 1, 1)
    return Grid(
        0.5 * (width - 1) + 0.5 * (width + 1) * x,
        0.5 * (height - 1) + 0.5 * (height + 1) * y,
        whole * log_stride.clamp(-8, 4).exp(),
        (0.5 * log_variance.clamp(-8, 8)).exp(),
        log_intensity.clamp(-8, 8).exp(),
    )


def filters(centre: Float[Tensor, " b"], grid: Grid, n: int, length: int) -> Float[Tensor, "b n length"]:
    """n Gaussian filters along one side of the image, each summing to one. Source: eq. 25-26 (normalised)."""
    steps = torch.arange(n, device=centre.device, dtype=centre.dtype) - 0.5 * (n - 1)
    means = centre[:, None] + steps * grid.stride[:, None]
    pixels = torch.arange(length, device=centre.device, dtype=centre.dtype)
    scaled = (pixels - means[..., None]) / grid.deviation[:, None, None]
    return (
        (-0.5 * scaled.square()).log_softmax(-1).exp()
    )  # far outside the image: the nearest pixel, not 0 / 0


def read(image: Float[Tensor, "b c h w"], grid: Grid, n: int) -> Float[Tensor, "b c n n"]:
    """The n x n patch that the grid sees. Source: eq. 27."""
    rows, columns = (
        filters(grid.y, grid, n, image.shape[-2]), filters(grid.x, grid, n, image.shape[-1]),
    )  # fmt: skip
    return grid.intensity[:, None, None, None] * torch.einsum("bnh,bchw,bmw->bcnm", rows, image, columns)


def write(patch: Float[Tensor, "b c n n"], grid: Grid, height: int, width: int) -> Float[Tensor, "b c h w"]:
    """An image that holds the patch where the grid is. Source: eq. 29."""
    n = patch.shape[-1]
    rows, columns = filters(grid.y, grid, n, height), filters(grid.x, grid, n, width)
    return torch.einsum("bnh,bcnm,bmw->bchw", rows, patch, columns) / grid.intensity[:, None, None, None]
