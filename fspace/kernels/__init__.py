"""Deep kernels, feature extractors, infinitely wide networks; any gpytorch kernel is welcome beside them."""

from fspace.kernels.deep import DeepKernel, FeatureNorm, SplitKernel, embed, embedded_kernel
from fspace.kernels.describe import kernel_from_spec, kernel_to_spec
from fspace.kernels.extractors import MLP, CausalConv, ConvNet, ResidualMLP
from fspace.kernels.neural import NeuralKernel

__all__ = [
    "MLP",
    "CausalConv",
    "ConvNet",
    "DeepKernel",
    "FeatureNorm",
    "NeuralKernel",
    "ResidualMLP",
    "SplitKernel",
    "embed",
    "embedded_kernel",
    "kernel_from_spec",
    "kernel_to_spec",
]
