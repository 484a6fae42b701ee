"""A torch module as a function of one flat vector of weights, or of many vectors at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fspace.errors import OptionError
from fspace.inference.weights.layer_calls import Handler, LayerCalls
from fspace.kernels.extractors import MLP, SoftSpectralLinear

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Layer:
    """Where a layer's weight and bias lie in the flat vector: `weight[0]:weight[1]` of shape `shape`, and the bias
    (None: it has none). `fan_in`: inputs that meet in one unit; `position`: the how-manieth layer of the module."""

    name: str
    shape: tuple[int, ...]
    weight: tuple[int, int]
    bias: tuple[int, int] | None
    fan_in: int
    position: int


@dataclass(frozen=True, eq=False)
class Network:
    """A module whose weights are passed in. x is [n, *row] in the module's dtype, what comes out [n, o].

    The module itself is a template: its own weights are where `initial` starts and are never changed.
    """

    module: nn.Module

    @staticmethod
    def of(module: nn.Module) -> Network:
        """The network of a module. Raises OptionError for one without parameters, or with a state beside its weights
        that moves in training (batch norm, spectral norm): its outputs would not be a function of the weights."""
        if not any(True for _ in module.parameters()):
            raise OptionError(f"network={type(module).__name__} has no parameter.")
        for name, part in module.named_modules():
            if isinstance(part, SoftSpectralLinear | _BatchNorm):
                raise OptionError(
                    f"network: {name or 'the module'} ({type(part).__name__}) keeps a state beside its weights that "
                    "moves in training, so its output is no function of the weights alone; take a network without "
                    "batch norm and spectral norm, such as MLP or ConvNet."
                )
            if getattr(part, "groups", 1) != 1:
                raise OptionError(
                    f"network: {name} is a convolution in groups, which is not supported; take groups=1."
                )
        return Network(module.eval().requires_grad_(False))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter, in the order of the flat vector."""
        return {name: p.shape for name, p in self.module.named_parameters()}

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in every parameter."""
        return [shape.numel() for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(self.sizes)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers that hold the weights, in order. Raises OptionError where some parameter is in another kind."""
        starts: dict[str, int] = {}
        at = 0
        for name, size in zip(self.shapes, self.sizes):
            starts[name], at = at, at + size
        layers: list[Layer] = []
        for name, part in self.module.named_modules():
            if not isinstance(part, WEIGHTED):
                continue
            key = f"{name}.weight" if name else "weight"
            start, shape = starts.pop(key), part.weight.shape
            bias = None
            if part.bias is not None:
                first = starts.pop(f"{name}.bias" if name else "bias")
                bias = (first, first + part.bias.numel())
            where = (start, start + shape.numel())
            layers.append(Layer(name, tuple(shape), where, bias, shape[1:].numel(), len(layers)))
        if starts:
            raise OptionError(
                f"network: the parameter {next(iter(starts))!r} is in no Linear, Conv1d or Conv2d layer, of which "
                "the methods over weights know what to do; take a network of such layers."
            )
        return layers

    def parameters(self, w: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The flat vector by name."""
        parts = w.split(self.sizes)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def __call__(self, w: Float[Tensor, " p"], x: Tensor) -> Float[Tensor, "n o"]:
        """Outputs under one vector of weights."""
        return functional_call(self.module, self.parameters(w), (x,))

    def watched(self, w: Float[Tensor, " p"], x: Tensor, handler: Handler) -> Float[Tensor, "n o"]:
        """Outputs where `handler` answers for the layers, by their position (see `LayerCalls`)."""
        own = self.parameters(w)
        keys = {layer.position: f"{layer.name}.weight" if layer.name else "weight" for layer in self.layers}
        with LayerCalls(handler, {id(own[key]): position for position, key in keys.items()}):
            return functional_call(self.module, own, (x,))

    def many(self, w: Float[Tensor, "s p"], x: Tensor) -> Float[Tensor, "s n o"]:
        """Outputs under each of s vectors."""
        if type(self.module) is MLP and x.ndim == 2:
            parts = [p.reshape(len(w), *s) for p, s in zip(w.split(self.sizes, dim=1), self.shapes.values())]
            return self.module.stacked(list(zip(parts[::2], parts[1::2])), x)
        if len(w) == 1:
            return self(w[0], x)[None]
        return vmap(self, in_dims=(0, None))(w, x)

    def initial(self, s: int, generator: torch.Generator) -> Float[Tensor, "s p"]:
        """s random starts: weights of each layer from N(0, 2 / fan-in) (He et al. 2015; the last layer: 1 / fan-in),
        biases zero."""
        some = next(self.module.parameters())
        drawn = [torch.randn(self.size, generator=generator, dtype=torch.float64) for _ in range(s)]
        w = torch.stack(drawn)  # one after the other: the first is the same however many follow
        scale = torch.zeros(self.size, dtype=torch.float64)
        for layer in self.layers:
            last = layer.position == len(self.layers) - 1
            scale[slice(*layer.weight)] = ((1.0 if last else 2.0) / layer.fan_in) ** 0.5
        return (w * scale).to(some)
