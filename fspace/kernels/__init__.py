"""Kernels: deep kernels, feature extractors, infinitely wide networks; any gpytorch kernel is welcome beside them."""

from fspace.kernels.deep import DeepKernel, FeatureNorm, embed, embedded_kernel
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
    "embed",
    "embedded_kernel",
]
