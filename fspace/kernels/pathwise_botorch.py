"""Random features of fspace's kernels for BoTorch's pathwise sampling (`draw_matheron_paths`).

Importing this module registers them. A kernel of fspace does so by itself when it is made after
`botorch.sampling.pathwise` was imported; import this module by hand in the other order.
BoTorch knows features of RBF and Matern kernels and of ScaleKernels; `base` and `plain` must be of these.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from botorch.sampling.pathwise.features.generators import GenKernelFeatures, gen_kernel_features
from botorch.sampling.pathwise.features.maps import FeatureMap
from botorch.sampling.pathwise.utils import ChainedTransform, TensorTransform
from jaxtyping import Float
from torch import Tensor

from fspace.kernels.deep import DeepKernel, SplitKernel
from fspace.kernels.neural import NeuralKernel


class EmbeddingTransform(TensorTransform):
    """Inputs to what the kernel's `on_embedding` acts on."""

    def __init__(self, kernel: DeepKernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, values: Tensor, **kwargs: object) -> Tensor:
        """`[..., n, d]` to `[..., n, p]`."""
        return self.kernel.embed(values)


class SplitFeatureMap(FeatureMap):
    """Features of a sum of two kernels on separate columns: those of both, side by side."""

    def __init__(self, kernel: SplitKernel, on_features: FeatureMap, on_inputs: FeatureMap):
        super().__init__()
        self.kernel = kernel
        self.on_features = on_features
        self.on_inputs = on_inputs
        self.input_transform = None
        self.output_transform = None

    def forward(self, x: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n m"]:
        """Features of the embedding x."""
        split = self.kernel.split
        return torch.cat([self.on_features(x[..., :split]), self.on_inputs(x[..., split:])], dim=-1)

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """Number of features."""
        return self.on_features.num_outputs + self.on_inputs.num_outputs

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        """Batch shape of the kernel."""
        return self.kernel.batch_shape


class RandomNetworkMap(FeatureMap):
    """Last hidden layer of one wide random network: features of a NeuralKernel, exact as the width grows.

    Layers are drawn in standard form and scaled by the kernel's variances, so gradients reach these.
    """

    def __init__(self, kernel: NeuralKernel, num_inputs: int, num_outputs: int):
        super().__init__()
        self.kernel = kernel
        self.num_outputs = num_outputs
        self.input_transform = None
        self.output_transform = None
        width = num_outputs - 1  # the last feature is the output's bias
        for layer in range(kernel.depth):
            fan_in = num_inputs if layer == 0 else width
            weight = torch.randn(*kernel.batch_shape, width, fan_in, dtype=kernel.dtype, device=kernel.device)
            bias = torch.randn(*kernel.batch_shape, 1, width, dtype=kernel.dtype, device=kernel.device)
            self.register_buffer(f"weight_{layer}", weight / math.sqrt(fan_in))
            self.register_buffer(f"bias_{layer}", bias)

    def forward(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n m"]:
        """Features of x; their inner products approximate the kernel."""
        kernel = self.kernel
        if kernel.active_dims is not None:
            x = x.index_select(-1, kernel.active_dims)
        h = x / kernel.lengthscale if kernel.has_lengthscale else x
        s_w, s_b = kernel.weight_variance.sqrt(), kernel.bias_variance.sqrt()
        for layer in range(kernel.depth):
            weight = cast(Tensor, getattr(self, f"weight_{layer}"))
            bias = cast(Tensor, getattr(self, f"bias_{layer}"))
            h = s_w * (h @ weight.mT) + s_b * bias
            h = h.relu() if kernel.activation == "relu" else h.erf()
        constant = torch.ones_like(h[..., :1])
        return torch.cat([s_w * h / math.sqrt(h.shape[-1]), s_b * constant], dim=-1)

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        """Batch shape of the kernel."""
        return self.kernel.batch_shape


@GenKernelFeatures.register(DeepKernel)
def _deep_features(kernel: DeepKernel, *, num_inputs: int, num_outputs: int) -> FeatureMap:
    wide = 0 if kernel.plain is None else num_inputs
    features = kernel.num_features
    inner = gen_kernel_features(
        kernel.on_embedding, num_inputs=wide + (features or num_inputs), num_outputs=num_outputs
    )
    embedding = EmbeddingTransform(kernel)
    before = inner.input_transform
    inner.input_transform = embedding if before is None else ChainedTransform(before, embedding)
    return inner


@GenKernelFeatures.register(SplitKernel)
def _split_features(kernel: SplitKernel, *, num_inputs: int, num_outputs: int) -> FeatureMap:
    half = num_outputs // 4 * 2  # Fourier features come in pairs
    on_features = gen_kernel_features(kernel.base, num_inputs=kernel.split, num_outputs=num_outputs - half)
    on_inputs = gen_kernel_features(kernel.plain, num_inputs=num_inputs - kernel.split, num_outputs=half)
    return SplitFeatureMap(kernel, on_features, on_inputs)


@GenKernelFeatures.register(NeuralKernel)
def _neural_features(kernel: NeuralKernel, *, num_inputs: int, num_outputs: int) -> FeatureMap:
    if kernel.active_dims is not None:
        num_inputs = len(kernel.active_dims)
    return RandomNetworkMap(kernel, num_inputs, num_outputs)
