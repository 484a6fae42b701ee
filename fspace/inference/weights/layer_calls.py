"""Every call of a linear or convolution layer, whatever module makes it, in other hands for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CALLS = {F.linear, F.conv1d, F.conv2d}
Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) to outputs
Handler = Callable[[int, Call, Tensor, Tensor, Tensor | None], Tensor]


class LayerCalls(TorchFunctionMode):
    """Inside, `handler(position, call, x, weight, bias)` answers for each layer whose weight is in `positions` (by
    identity); call(x, weight, bias) is what would have been done."""

    def __init__(self, handler: Handler, positions: Mapping[int, int]):
        super().__init__()
        self.handler, self.positions = handler, positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in CALLS:
            return func(*args, **kwargs)
        names = ("input", "weight", "bias")
        given = {**dict(zip(names, args)), **{k: kwargs.pop(k) for k in names if k in kwargs}}
        position, rest = self.positions.get(id(given["weight"])), args[3:]

        def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *rest, **kwargs)

        if position is None:
            return call(given["input"], given["weight"], given.get("bias"))
        return self.handler(position, call, given["input"], given["weight"], given.get("bias"))


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """One number a row and channel, [b, c], shaped to meet what a layer takes or gives: [b, c], or [b, c, *positions]
    of a convolution."""
    return values.reshape(*values.shape, *[1] * (like.ndim - 2))
