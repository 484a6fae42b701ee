"""Noise that varies over the inputs: a second function for its logarithm, learned from residuals.

A squared residual is the noise variance times a chi-square variable, so its logarithm is that of the noise plus
an error of known mean and variance: a Gaussian process regression with fixed noise gives the function.
Source: Kersting, Plagemann, Pfaff and Burgard (2007), with the exact moments of log chi-square in place of samples.
"""

from __future__ import annotations

import math

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor, nn

from fspace.inference.exact import leave_one_out
from fspace.inference.numerics import cholesky
from fspace.inference.optimise import fit_exact, gaussian_likelihood
from fspace.kernels.evaluate import covariance

ROWS = 1500  # residuals the function is made of
LEARNING_ROWS = 600  # those its kernel is learned from
FLOOR = 1e-8  # added to squared residuals, in squared units of standardised y: below it lies rounding


class NoiseFunction(nn.Module):
    """log of the noise variance at embedded inputs, relative to the likelihood's: an ARD Matern-5/2 regression's mean.

    Shapes: inducing_inputs [m, p], weights [m].
    """

    inducing_inputs: Tensor
    weights: Tensor

    def __init__(self, inducing_inputs: Float[Tensor, "m p"], weights: Float[Tensor, " m"]):
        super().__init__()
        base = MaternKernel(nu=2.5, ard_num_dims=inducing_inputs.shape[1])
        self.kernel = ScaleKernel(base).to(device=inducing_inputs.device, dtype=torch.float64)
        self.register_buffer("inducing_inputs", inducing_inputs)
        self.register_buffer("weights", weights)

    def forward(self, z: Float[Tensor, "*b n p"]) -> Float[Tensor, "*b n"]:
        """Log ratio at embedded inputs; 0 far from all data."""
        return covariance(self.kernel, z, self.inducing_inputs.expand(*z.shape[:-2], -1, -1)) @ self.weights


def fit_noise_function(
    z: Float[Tensor, "n p"], squares: Float[Tensor, "n t"], seed: int
) -> tuple[NoiseFunction, Float[Tensor, " n"]]:
    """The noise function of squared residuals at embedded rows z, and what it says of each row without that row.

    Squares are estimates of the noise variance from predictions that did not see their row; outputs share one ratio.
    """
    t = squares.shape[1]
    half = torch.tensor(0.5 * t, dtype=torch.float64)
    bias, spread = torch.digamma(half) - math.log(0.5 * t), torch.polygamma(1, half)
    level = squares.mean(dim=0).clamp(min=1e-300)  # a constant output leaves no residual at all
    target = (squares / level + FLOOR).mean(dim=1).log() - bias.to(z.device)
    centre = target.mean()
    rows = torch.arange(len(z), device=z.device)
    if len(z) > ROWS:
        rows = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    few, learn = rows[:ROWS], rows[:LEARNING_ROWS]
    function = NoiseFunction(z[few], torch.zeros(len(few), dtype=torch.float64, device=z.device))
    function.kernel.base_kernel.lengthscale = math.sqrt(z.shape[1])
    function.kernel.outputscale = 0.5
    known = gaussian_likelihood(1, spread.item(), z.device).requires_grad_(False)
    y = (target - centre)[:, None]
    fit_exact(function.kernel, known, z[learn], y[learn], 30, lambda **_: None, "noise")
    function.requires_grad_(False)
    k = covariance(function.kernel, z[few])
    noisy = k.clone()
    noisy.diagonal().add_(spread.to(z.device))
    factor, _ = cholesky(noisy, "covariance of the log residuals")
    function.weights = torch.cholesky_solve(y[few], factor)[:, 0]
    left_out = function(z)
    left_out[few] = leave_one_out(k, y[few], spread.to(z.device)[None])[0][:, 0]
    return function, left_out
