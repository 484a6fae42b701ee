"""The networks of a VAE: from rows of data to numbers about latents, and back, dense or convolutional."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import OptionError
from fspace.kernels.extractors import MLP

CHANNELS = (16, 32)  # of the two convolutions that halve an image


class ConvEncoder(nn.Module):
    """Images [..., c h w] (flat) to k numbers: two convolutions of stride 2, one hidden layer."""

    def __init__(self, image: Sequence[int], width: int, out: int):
        super().__init__()
        c, h, w = image
        if h % 4 or w % 4:
            raise OptionError(
                f"Images of {h} x {w} cannot be halved twice; use network='dense', or pad them."
            )
        self.image = (c, h, w)
        small, large = CHANNELS
        self.convolutions = nn.Sequential(
            nn.Conv2d(c, small, 4, 2, 1), nn.SiLU(), nn.Conv2d(small, large, 4, 2, 1), nn.SiLU()
        )
        self.head = MLP(large * h * w // 16, (width,), out)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Numbers about the images."""
        features = self.convolutions(x.reshape(-1, *self.image)).flatten(1)
        return self.head(features).reshape(*x.shape[:-1], -1)


class ConvDecoder(nn.Module):
    """Latents [..., k] to `out` images' worth of numbers, flat: the encoder backwards."""

    def __init__(self, latents: int, width: int, image: Sequence[int], out: int = 1):
        super().__init__()
        c, h, w = image
        small, large = CHANNELS
        self.small = (large, h // 4, w // 4)
        self.head = MLP(latents, (width,), large * h * w // 16)
        self.convolutions = nn.Sequential(
            nn.SiLU(),
            nn.ConvTranspose2d(large, small, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(small, c * out, 4, 2, 1),
        )

    def forward(self, z: Float[Tensor, "*b k"]) -> Float[Tensor, "*b d"]:
        """Numbers about images."""
        features = self.head(z.reshape(-1, z.shape[-1])).reshape(-1, *self.small)
        return self.convolutions(features).flatten(1).reshape(*z.shape[:-1], -1)
