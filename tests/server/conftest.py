"""A small problem that server tests share: rows, their basis and the shards they are split into."""

from dataclasses import dataclass

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from torch import Tensor

from fspace.inference.basis import Basis
from fspace.inference.likelihoods import BernoulliLikelihood, with_offset
from fspace.inference.optimise import gaussian_likelihood


@dataclass
class Problem:
    basis: Basis
    x: Tensor
    y: Tensor

    def shard(self, k: int, of: int) -> tuple[Tensor, Tensor]:
        """Every `of`-th row, from the k-th."""
        return self.x[k::of], self.y[k::of]


def _kernel() -> ScaleKernel:
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = torch.tensor([[0.8, 1.2]])
    kernel.outputscale = 1.3
    return kernel.requires_grad_(False)


@pytest.fixture
def gaussian() -> Problem:
    """400 rows of two outputs with Gaussian noise, 30 inducing inputs."""
    torch.manual_seed(1)
    x = torch.randn(400, 2, dtype=torch.float64)
    y = torch.stack([torch.sin(2 * x[:, 0]), x[:, 1].tanh()], dim=1) + 0.2 * torch.randn(400, 2).double()
    likelihood = gaussian_likelihood(2, 0.04, torch.device("cpu"))
    likelihood.noise = torch.tensor([[0.04], [0.06]])
    return Problem(Basis(_kernel(), x[:30].clone(), likelihood.requires_grad_(False)), x, y)


@pytest.fixture
def binary() -> Problem:
    """480 rows of two classes, 25 inducing inputs."""
    torch.manual_seed(2)
    x = torch.randn(480, 2, dtype=torch.float64)
    f = 2 * torch.sin(2 * x[:, 0]) + x[:, 1]
    y = (torch.rand(480).double() < torch.special.ndtr(f)).double()[:, None]
    likelihood = with_offset(BernoulliLikelihood(), y).requires_grad_(False)
    return Problem(Basis(_kernel(), x[:25].clone(), likelihood), x, y)
