"""Networks that turn a row of a table, an image or a sequence into a few features for a kernel.

Each has `config` (the constructor's arguments, as JSON), `out_features` and `input_dims` (of one row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fspace.errors import DataError, OptionError

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # name: (function, its Lipschitz constant)
    "relu": (F.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "elu": (F.elu, 1.0),
    "softplus": (F.softplus, 1.0),
    "silu": (F.silu, 1.0999),
    "gelu": (F.gelu, 1.1290),
}


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], float]:
    if name not in _ACTIVATIONS:
        raise OptionError(
            f"activation={name!r} does not exist; choose one of {', '.join(sorted(_ACTIVATIONS))}."
        )
    return _ACTIVATIONS[name]


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise OptionError(f"{name}={size} must be at least 1.")


class MLP(nn.Module):
    """Fully connected network `[..., d] -> [..., k]`."""

    input_dims: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (64, 64),
        out_features: int = 8,
        activation: str = "silu",
    ):
        super().__init__()
        sizes = [in_features, *hidden, out_features]
        _positive(in_features=in_features, hidden=min([*hidden, 1]), out_features=out_features)
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "hidden": list(hidden),
            "out_features": out_features,
            "activation": activation,
        }
        self.out_features = out_features
        self._act, _ = _activation(activation)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Features of the rows of x."""
        for layer in self.layers[:-1]:
            x = self._act(layer(x))
        return self.layers[-1](x)

    def stacked(
        self, weights: Sequence[tuple[Float[Tensor, "s _ _"], Float[Tensor, "s _"]]], x: Float[Tensor, "n i"]
    ) -> Float[Tensor, "s n o"]:
        """Outputs of s networks of this shape, whose weights and biases are given layer by layer: one batched product a
        layer, at less than half the overhead of `vmap` where networks are small."""
        h = x.expand(len(weights[0][0]), *x.shape)
        for k, (weight, bias) in enumerate(weights):
            h = self._act(h) if k else h
            h = torch.baddbmm(bias[:, None], h, weight.mT)
        return h


class SoftSpectralLinear(nn.Module):
    """Linear map whose weight is divided by max(1, sigma / coeff), sigma its largest singular value.

    sigma comes from power iteration: one step per training pass, more on leaving it, none in evaluation,
    which is a fixed function. Source: Miyato et al. 2018; the soft form: Behrmann et al. 2019.
    """

    left: Tensor
    right: Tensor

    def __init__(self, in_features: int, out_features: int, coeff: float = 0.95):
        super().__init__()
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.coeff = coeff
        self.register_buffer("left", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(in_features), dim=0))
        self.power_iteration(15)
        self._moved = False  # passes in training since: a module just loaded must stay as it was saved

    @torch.no_grad()
    def power_iteration(self, steps: int = 1) -> None:
        """Improve the estimate of the leading singular vectors."""
        left = self.left
        for _ in range(steps):
            right = F.normalize(self.weight.T @ left, dim=0)
            left = F.normalize(self.weight @ right, dim=0)
        # new tensors, not in-place: an earlier pass may still wait for its backward pass
        self.left, self.right = left, right

    def train(self, mode: bool = True) -> SoftSpectralLinear:
        """Switch between training and evaluation; sigma lags while the weights move and catches up here."""
        if self._moved and not mode:
            self.power_iteration(20)
            self._moved = False
        return super().train(mode)

    def normalized_weight(self) -> Float[Tensor, "out in"]:
        """The weight in use; its spectral norm is at most `coeff` once the power iteration has converged."""
        sigma = self.left @ (self.weight @ self.right)
        return self.weight / (sigma / self.coeff).clamp_min(1.0)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """W x + b with the normalised W."""
        if self.training:
            self.power_iteration()
            self._moved = True
        return F.linear(x, self.normalized_weight(), self.bias)


class ResidualMLP(nn.Module):
    """Residual network `[..., d] -> [..., k]` that keeps distances: h + act(W h + b), ||W|| <= spectral_norm.

    Every block multiplies distances by 1 - c to 1 + c, c = spectral_norm < 1. The input map is a fixed random
    isometry (for width >= d): training cannot collapse it. `out_features=None` hands all `width` features on,
    which keeps the bound to the end; a smaller `out_features` adds a learnt linear map, which need not.
    Source: SNGP (Liu et al. 2020), DUE (van Amersfoort et al. 2021).
    """

    input_dims: ClassVar[int] = 1
    isometry: Tensor

    def __init__(
        self,
        in_features: int,
        width: int = 64,
        depth: int = 4,
        out_features: int | None = None,
        spectral_norm: float = 0.95,
        activation: str = "silu",
    ):
        super().__init__()
        _positive(in_features=in_features, width=width, depth=depth, out_features=out_features or 1)
        if not 0.0 < spectral_norm:
            raise OptionError(f"spectral_norm={spectral_norm} must be positive; below 1 keeps distances.")
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "width": width,
            "depth": depth,
            "out_features": out_features,
            "spectral_norm": spectral_norm,
            "activation": activation,
        }
        self.out_features = width if out_features is None else out_features
        self._act, self._lipschitz = _activation(activation)
        isometry = torch.empty(width, in_features)
        nn.init.orthogonal_(isometry)
        self.register_buffer("isometry", isometry)
        self.blocks = nn.ModuleList(SoftSpectralLinear(width, width, spectral_norm) for _ in range(depth))
        self.output = nn.Identity() if out_features is None else nn.Linear(width, out_features)

    def branch(self, index: int, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The residual branch of one block; its Lipschitz constant is at most `spectral_norm`."""
        return self._act(self.blocks[index](h)) / self._lipschitz

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Features of the rows of x."""
        h = F.linear(x, self.isometry)
        for index in range(len(self.blocks)):
            h = h + self.branch(index, h)
        return self.output(h)


class ConvNet(nn.Module):
    """Convolutional network for images `[n, c, h, w] -> [n, k]` of any h and w."""

    input_dims: ClassVar[int] = 3

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 64),
        out_features: int = 16,
        kernel_size: int = 3,
        activation: str = "silu",
    ):
        super().__init__()
        _positive(in_channels=in_channels, channels=min(channels, default=0), out_features=out_features)
        if kernel_size % 2 == 0:
            raise OptionError(f"kernel_size={kernel_size} must be odd, so that the image keeps its size.")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": list(channels),
            "out_features": out_features,
            "kernel_size": kernel_size,
            "activation": activation,
        }
        self.out_features = out_features
        self._act, _ = _activation(activation)
        sizes = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size, padding=kernel_size // 2) for a, b in pairwise(sizes)
        )
        self.output = nn.Linear(2 * sizes[-1], out_features)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        """Features of images `[n, c, h, w]`: halved by every stage, then mean and maximum over positions."""
        if x.dim() != 4 or x.shape[1] != self.config["in_channels"]:
            raise DataError(
                f"ConvNet: x has shape {tuple(x.shape)}; expected [n, {self.config['in_channels']}, h, w]."
            )
        last = len(self.convolutions) - 1
        for index, convolution in enumerate(self.convolutions):
            x = self._act(convolution(x))
            if index < last:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.output(torch.cat([x.mean((-2, -1)), x.amax((-2, -1))], dim=-1))


class CausalConv(nn.Module):
    """Dilated causal convolutions for sequences `[n, t, d] -> [n, k]`: the features of the last valid step.

    What `steps` says at time s depends on the inputs up to s only. Ragged sequences: give `lengths`, or fill
    the end of the shorter ones with steps that are NaN throughout.
    Source: WaveNet (van den Oord et al. 2016): gated units, residual and skip connections.
    """

    input_dims: ClassVar[int] = 2

    def __init__(
        self,
        in_features: int,
        channels: int = 32,
        dilations: Sequence[int] = (1, 2, 4, 8),
        out_features: int = 8,
        kernel_size: int = 2,
    ):
        super().__init__()
        _positive(
            in_features=in_features,
            channels=channels,
            dilations=min(dilations, default=0),
            out_features=out_features,
            kernel_size=kernel_size,
        )
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "channels": channels,
            "dilations": list(dilations),
            "out_features": out_features,
            "kernel_size": kernel_size,
        }
        self.out_features = out_features
        self.input = nn.Conv1d(in_features, channels, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, kernel_size, dilation=r) for r in dilations
        )
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.output = nn.Sequential(nn.SiLU(), nn.Conv1d(channels, out_features, 1))

    @property
    def receptive_field(self) -> int:
        """How many steps, the present one included, the output looks back."""
        return 1 + (self.config["kernel_size"] - 1) * sum(self.config["dilations"])

    def steps(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t k"]:
        """Features after every step."""
        h = self.input(x.transpose(-2, -1))
        skip = torch.zeros_like(h)
        layers = zip(self.config["dilations"], self.gates, self.residuals, self.skips, strict=True)
        for dilation, gate, residual, to_skip in layers:
            padding = (self.config["kernel_size"] - 1) * dilation  # on the left only: nothing looks ahead
            signal, valve = gate(F.pad(h, (padding, 0))).chunk(2, dim=-2)
            unit = torch.tanh(signal) * torch.sigmoid(valve)
            skip = skip + to_skip(unit)
            h = h + residual(unit)
        return self.output(skip).transpose(-2, -1)

    def forward(self, x: Tensor, lengths: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n k"]:
        """Features at the last valid step of x `[n, t, d]`; DataError for an empty one or NaN within it."""
        if x.dim() != 3 or x.shape[-1] != self.config["in_features"]:
            raise DataError(
                f"CausalConv: x has shape {tuple(x.shape)}; expected [n, t, {self.config['in_features']}]."
            )
        n, t, _ = x.shape
        time = torch.arange(t, device=x.device)
        if lengths is None:
            filled = ~x.isnan().all(-1)
            lengths = torch.where(filled, time + 1, 0).amax(-1) if t else torch.zeros(n, dtype=torch.long)
        elif lengths.shape != (n,) or bool((lengths > t).any()):
            raise DataError(
                f"CausalConv: lengths must be {n} numbers of at most {t}; got {lengths.tolist()[:10]}."
            )
        lengths = lengths.to(x.device)
        valid = (time < lengths[:, None])[..., None]
        x = torch.where(valid, x, 0.0)  # what stands in the padding is never read, not even as NaN
        bad = (lengths < 1) | x.isnan().any(-1).any(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DataError(
                f"CausalConv: sequence {row} is empty or holds NaN before its end; remove or fill it in."
            )
        return self.steps(x)[torch.arange(n, device=x.device), lengths - 1]
