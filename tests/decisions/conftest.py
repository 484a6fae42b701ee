"""GP posteriors whose parameters are known, so that textbooks and BoTorch can be asked the same question."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.optimise import gaussian_likelihood


@pytest.fixture(scope="session")
def known_gp():
    """Builds the exact posterior of fixed parameters: known_gp(x [n, d], y [n], lengthscale, scale, noise, kernel)."""

    def build(x, y, lengthscale=0.3, scale=1.0, noise=0.1, kernel="rbf"):
        x, y = x.double(), y.double()
        d = x.shape[1]
        inner = kernel
        if isinstance(kernel, str):
            inner = ScaleKernel(RBFKernel() if kernel == "rbf" else MaternKernel(nu=2.5))
            inner.outputscale, inner.base_kernel.lengthscale = scale, lengthscale
        inner = inner.double().requires_grad_(False)
        likelihood = gaussian_likelihood(1, noise, torch.device("cpu")).requires_grad_(False)
        likelihood.noise = torch.tensor([[noise]]).double()
        basis = Basis(inner, x, likelihood)
        one = torch.ones(d).double()
        scaling = Scaling(one, one, 0 * one, one, 0 * one[:1], one[:1])
        return GPPosterior(basis, fit_site(basis, x, y[:, None]), scaling)

    return build
