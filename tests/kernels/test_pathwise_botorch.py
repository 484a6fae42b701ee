"""BoTorch's pathwise sampling draws functions with fspace's kernels."""

import subprocess
import sys

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.sampling.pathwise.features import gen_kernel_features
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from fspace.kernels import MLP, DeepKernel, NeuralKernel

KERNELS = {
    "deep": lambda: DeepKernel(MLP(3, (16,), 4), ScaleKernel(RBFKernel(ard_num_dims=4))),
    "deep and plain": lambda: DeepKernel(
        MLP(3, (16,), 4), ScaleKernel(MaternKernel(2.5)), ScaleKernel(MaternKernel(1.5, ard_num_dims=3))
    ),
    "deep, some columns": lambda: DeepKernel(MLP(2, (8,), 4), RBFKernel(), active_dims=(0, 2)),
    "relu": lambda: NeuralKernel(2, "relu", ard_num_dims=3),
    "erf": lambda: NeuralKernel(1, "erf"),
    "neural, some columns": lambda: NeuralKernel(1, "erf", active_dims=(0, 2)),
}


def ready(name: str, x: torch.Tensor):
    kernel = KERNELS[name]()
    if isinstance(kernel, DeepKernel):
        kernel.fix_statistics(x)
    return kernel.double().eval()


@pytest.mark.parametrize("name", KERNELS)
def test_inner_products_of_features_approach_the_kernel(name):
    x = torch.rand(12, 3, dtype=torch.float64)
    kernel = ready(name, x)
    errors = []
    for num_outputs in (64, 4096):
        features = gen_kernel_features(kernel, num_inputs=3, num_outputs=num_outputs)
        phi = features(x)
        assert phi.shape == (12, features.num_outputs) and features.num_outputs == num_outputs
        errors.append((phi @ phi.mT - kernel(x).to_dense()).abs().max() / kernel(x, diag=True).max())
    assert errors[1] < 0.1 and errors[1] < errors[0]


@pytest.mark.parametrize("name", KERNELS)
def test_matheron_paths_have_the_posterior_moments(name):
    x = torch.rand(25, 3, dtype=torch.float64)
    y = torch.sin(6 * x[:, :1])
    kernel = ready(name, x)
    model = SingleTaskGP(x, y, torch.full_like(y, 0.01), covar_module=kernel, outcome_transform=None).eval()
    new = torch.rand(6, 3, dtype=torch.float64)
    n = 2000
    with torch.no_grad():
        paths = draw_matheron_paths(model, torch.Size([n]))
        values = paths(new).reshape(n, -1)
        posterior = model.posterior(new)
        mean, std = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1).sqrt()
        # the features are approximate, so allow for a little more than the Monte Carlo error
        assert ((values.mean(0) - mean).abs() / (std / n**0.5)).max() < 6
        assert ((values.std(0) / std).log().abs()).max() < 0.25
        torch.testing.assert_close(paths(new), paths(new))  # the same functions again
        # the twin: the prior's moments are not these
        assert ((values.mean(0) - 0.0).abs() / (std / n**0.5)).max() > 6


def test_paths_have_gradients():
    x = torch.rand(25, 3, dtype=torch.float64)
    model = SingleTaskGP(x, x[:, :1], covar_module=ready("deep and plain", x)).eval()
    paths = draw_matheron_paths(model, torch.Size([3]))
    new = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    paths(new).sum().backward()
    assert new.grad is not None and new.grad.isfinite().all() and new.grad.abs().sum() > 0


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_botorch_is_not_imported_for_nothing():
    code = "import sys, gpytorch, fspace.kernels as k; k.DeepKernel(k.MLP(2), gpytorch.kernels.RBFKernel()); "
    assert run(code + "print('botorch' in sys.modules)") == "False"


def test_registration_happens_by_itself_after_botorch():
    code = (
        "import botorch.sampling.pathwise.features as f, gpytorch, fspace.kernels as k; "
        "d = k.DeepKernel(k.MLP(2), gpytorch.kernels.RBFKernel()).double(); "
        "print(f.gen_kernel_features(d, num_inputs=2, num_outputs=8).num_outputs)"
    )
    assert run(code) == "8"
