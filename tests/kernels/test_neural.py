"""The infinite-width kernel against random wide networks, closed forms, quadrature and finite differences."""

import math

import numpy as np
import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.priors import GammaPrior
from torch import Tensor

from fspace.errors import OptionError
from fspace.kernels import NeuralKernel

NETWORKS, WIDTH = 20_000, 128
WEIGHT_VARIANCE, BIAS_VARIANCE = 1.6, 0.3


def make(depth: int, activation: str, **options) -> NeuralKernel:
    kernel = NeuralKernel(depth, activation, **options).double()
    kernel.weight_variance = WEIGHT_VARIANCE
    kernel.bias_variance = BIAS_VARIANCE
    return kernel


def network_outputs(x: Tensor, depth: int, activation: str, chunk: int = 500) -> Tensor:
    """Outputs `[NETWORKS, n]` of explicit networks of WIDTH units in each of `depth` hidden layers."""
    act = {"relu": torch.relu, "erf": torch.erf}[activation]
    outputs = []
    for _ in range(NETWORKS // chunk):
        h = x.expand(chunk, *x.shape)
        for width in [WIDTH] * depth + [1]:
            weight = torch.randn(chunk, h.shape[-1], width) * math.sqrt(WEIGHT_VARIANCE / h.shape[-1])
            z = torch.baddbmm(torch.randn(chunk, 1, width) * math.sqrt(BIAS_VARIANCE), h, weight)
            h = act(z)
        outputs.append(z[..., 0])
    return torch.cat(outputs).double()


def z_scores(outputs: Tensor, covariance: Tensor) -> Tensor:
    """How many standard errors each entry of the sample covariance (known mean zero) is off `covariance`."""
    products = outputs[:, :, None] * outputs[:, None, :]
    return (products.mean(0) - covariance) / (products.std(0) / math.sqrt(len(outputs)))


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_covariance_of_random_wide_networks(depth, activation):
    x = torch.randn(5, 3)
    x[4] = -x[0]
    with torch.no_grad():
        outputs = network_outputs(x, depth, activation)
        scores = z_scores(outputs, make(depth, activation)(x.double()).to_dense())
        assert scores.abs().max() < 4.5  # 15 different entries

        # the twin: kernels that are nearly right fail the same test
        other = {"relu": "erf", "erf": "relu"}[activation]
        for wrong in (make(depth + 1, activation), make(depth, other)):
            assert z_scores(outputs, wrong(x.double()).to_dense()).abs().max() > 10
        forgot_bias = make(depth, activation)
        forgot_bias.bias_variance = 1e-6
        assert z_scores(outputs, forgot_bias(x.double()).to_dense()).abs().max() > 10


@pytest.mark.parametrize(
    ("angle", "expected"),
    [
        (0.0, 0.5),
        (math.pi / 2, 1 / (2 * math.pi)),
        (math.pi, 0.0),
        (math.pi / 3, (math.sqrt(3) / 2 + math.pi / 3) / 6.283185307179586),
    ],
)
def test_one_relu_layer_in_closed_form(angle, expected):
    """Cho & Saul 2009 equation 6 by hand: unit vectors at a known angle, no bias."""
    kernel = NeuralKernel(1, "relu").double()
    kernel.weight_variance = 1.0
    kernel.bias_variance = 1e-14
    x = math.sqrt(2) * torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert kernel(x).to_dense()[0, 1].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("depth", [1, 3])
def test_erf_layers_against_quadrature(depth):
    kernel = make(depth, "erf")
    x = torch.randn(4, 2, dtype=torch.float64)
    k = BIAS_VARIANCE + WEIGHT_VARIANCE * (x @ x.T).numpy() / 2
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    weights = weights / weights.sum()
    for _ in range(depth):
        step = np.empty_like(k)
        for i in range(4):
            for j in range(4):
                root = np.linalg.cholesky(k[np.ix_([i, j], [i, j])] + 1e-12 * np.eye(2))
                u = root[0, 0] * nodes[:, None]
                v = root[1, 0] * nodes[:, None] + root[1, 1] * nodes[None, :]
                values = torch.erf(torch.tensor(u)).numpy() * torch.erf(torch.tensor(v)).numpy()
                step[i, j] = weights @ values @ weights
        k = BIAS_VARIANCE + WEIGHT_VARIANCE * step
    np.testing.assert_allclose(kernel(x).to_dense().detach().numpy(), k, rtol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("ard", [None, 3])
def test_diagonal_and_definiteness(activation, ard):
    kernel = make(3, activation, ard_num_dims=ard)
    if ard:
        kernel.lengthscale = torch.tensor([0.5, 1.0, 3.0])
    x = torch.randn(60, 3, dtype=torch.float64) * torch.logspace(-3, 2, 60, dtype=torch.float64)[:, None]
    full = kernel(x).to_dense()
    torch.testing.assert_close(kernel(x, diag=True), full.diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(full, full.mT, rtol=1e-12, atol=0)
    scale = full.diagonal().sqrt()
    assert torch.linalg.eigvalsh(full / scale / scale[:, None])[0] > -1e-12


def test_lengthscales_divide_the_inputs():
    x = torch.randn(6, 3, dtype=torch.float64)
    ard = make(2, "relu", ard_num_dims=3)
    ard.lengthscale = torch.tensor([0.5, 1.0, 3.0])
    same = make(2, "relu")(x / torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)).to_dense()
    torch.testing.assert_close(ard(x).to_dense(), same)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_gradients_against_finite_differences(activation):
    x1, x2 = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    kernel = make(3, activation, ard_num_dims=2)

    def value(a: Tensor, b: Tensor, *raw: Tensor) -> Tensor:
        names = [name for name, _ in kernel.named_parameters()]
        return torch.func.functional_call(kernel, dict(zip(names, raw, strict=True)), (a, b)).to_dense()

    assert torch.autograd.gradcheck(value, (x1, x2, *kernel.parameters()))


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_right_where_points_coincide(activation, dtype):
    """Composed from arccos and sqrt these would be NaN; they equal those of finite differences."""
    kernel = make(3, activation, ard_num_dims=2).to(dtype)
    base = torch.tensor([[0.3, -0.8], [0.0, 0.0], [0.3, -0.8], [1e3, 2e3]], dtype=dtype)
    x = base.clone().requires_grad_()
    kernel(x, base).to_dense().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kernel.parameters())
    if dtype is torch.float64:
        with torch.no_grad():
            shift = torch.zeros_like(base)
            shift[:3, 1] = 1e-5
            up, down = (kernel(base + s * shift, base).to_dense().sum(-1) for s in (1, -1))
        torch.testing.assert_close(x.grad[:3, 1], ((up - down) / 2e-5)[:3], rtol=1e-4, atol=1e-6)


def test_gradient_through_both_sides_at_once():
    """d k(x, x) / dx through the full matrix is that of the diagonal."""
    kernel = make(2, "relu")
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    (full,) = torch.autograd.grad(kernel(x).to_dense().diagonal().sum(), x)
    (diagonal,) = torch.autograd.grad(kernel(x, diag=True).sum(), x)
    torch.testing.assert_close(full, diagonal)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_both_dtypes_agree(activation):
    x = torch.randn(20, 4)
    single = make(3, activation).float()(x).to_dense()
    double = make(3, activation)(x.double()).to_dense()
    assert single.dtype is torch.float32 and double.dtype is torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_batches_of_inputs_and_of_kernels():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    kernel = make(2, "erf")
    assert kernel(x).to_dense().shape == (2, 5, 5)
    torch.testing.assert_close(kernel(x).to_dense()[1], kernel(x[1]).to_dense())
    assert kernel(x, diag=True).shape == (2, 5)

    several = NeuralKernel(2, "relu", ard_num_dims=3, batch_shape=torch.Size([2])).double()
    several.weight_variance = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    assert several(x).to_dense().shape == (2, 5, 5)
    one = NeuralKernel(2, "relu", ard_num_dims=3).double()
    one.weight_variance = 2.0
    torch.testing.assert_close(several(x).to_dense()[1], one(x[1]).to_dense())
    torch.testing.assert_close(several(x, diag=True), several(x).to_dense().diagonal(dim1=-2, dim2=-1))
    assert one.expand_batch(torch.Size([3]))(x[:1].expand(3, 5, 3)).to_dense().shape == (3, 5, 5)


def test_constraints_and_priors():
    kernel = NeuralKernel(
        weight_variance_constraint=GreaterThan(0.1), bias_variance_prior=GammaPrior(2.0, 1.0), ard_num_dims=2
    )
    assert kernel.weight_variance > 0.1
    (name, _, prior, closure, setter), *rest = kernel.named_priors()
    assert not rest and name == "bias_variance_prior" and isinstance(prior, GammaPrior)
    setter(kernel, 0.7)
    assert closure(kernel).item() == pytest.approx(0.7)
    assert not kernel.is_stationary


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"depth": 0}])
def test_options_that_do_not_exist(options):
    with pytest.raises(OptionError, match=str(next(iter(options.values())))):
        NeuralKernel(**options)
