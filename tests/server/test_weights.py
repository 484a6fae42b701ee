"""The other family: Gaussians over the weights of a module, full and diagonal, on the same server."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fspace.errors import DataError, ModelFileError, OptionError, SiteRefused
from fspace.inference.basis import Site
from fspace.server import PosteriorServer, WeightBasis
from fspace.server.natural import divergence, moments


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def linear_site(basis, x, y, noise, name):
    """The exact site of rows y = x w + noise for a linear module without bias."""
    scaled = x * basis.prior_scale
    precision = (scaled.T @ scaled / noise)[None]
    if basis.diagonal:
        precision = precision.diagonal(dim1=-2, dim2=-1).contiguous()
    return Site(basis.id, precision, (scaled.T @ y / noise)[None], torch.zeros(1).double(), len(x), name)


@pytest.mark.parametrize("diagonal", [True, False])
def test_bases_round_trip(diagonal):
    basis = WeightBasis.of(network(), 0.7, diagonal)
    found = WeightBasis.from_bytes(basis.to_bytes())
    for name in ("layout", "architecture", "prior_scale", "diagonal", "size", "id"):
        assert getattr(found, name) == getattr(basis, name)
    assert WeightBasis.is_in(basis.to_bytes()) and not WeightBasis.is_in(b"other")
    assert basis.layout == (("0.weight", (3, 2)), ("0.bias", (3,)), ("2.weight", (1, 3)), ("2.bias", (1,)))
    assert basis.size == 13


def test_bases_are_told_by_what_they_are():
    others = [
        WeightBasis.of(network(), 1.0),
        WeightBasis.of(network(), 2.0),
        WeightBasis.of(network(), 1.0, False),
        WeightBasis.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))),
        WeightBasis.of(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))),
    ]
    assert len({basis.id for basis in others}) == 5
    assert WeightBasis.of(network()).id == others[0].id


def test_weights_and_coordinates_are_inverse():
    module = network()
    basis = WeightBasis.of(module, 0.3)
    v = basis.coordinates(module)
    assert v.dtype == torch.float64 and v.shape == (13,)
    weights = basis.weights(v)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(weights[name].float(), parameter.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v, torch.cat([w.reshape(-1) for w in weights.values()]) / 0.3)
    x = torch.randn(4, 2)
    cast = {name: value.float() for name, value in weights.items()}
    torch.testing.assert_close(torch.func.functional_call(module, cast, (x,)), module(x))


def test_frozen_weights_stay_out():
    module = network()
    module[0].requires_grad_(False)
    assert WeightBasis.of(module).size == 4


def test_what_is_refused():
    with pytest.raises(OptionError, match="no trainable"):
        WeightBasis.of(nn.Tanh())
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="positive"):
            WeightBasis.of(network(), scale)
    with pytest.raises(OptionError, match="GB"):
        WeightBasis.of(nn.Linear(100, 60), diagonal=False)
    assert WeightBasis.of(nn.Linear(100, 60)).size == 6060
    basis = WeightBasis.of(network())
    for other in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))):
        with pytest.raises(DataError, match="another basis"):
            basis.coordinates(other)
    data = basis.to_bytes()
    for broken in (b"", b"{}", data[:-1], data[:40], data.replace(b"layout", b"loyaut")):
        with pytest.raises(ModelFileError):
            WeightBasis.from_bytes(broken)


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_server_pools_linear_regression_and_comes_back(diagonal, tmp_path):
    """The full Gaussian is the textbook posterior of all rows; the diagonal one keeps its own diagonal."""
    torch.manual_seed(11)
    x, noise = torch.randn(60, 4).double(), 0.25
    y = x @ torch.tensor([1.0, -2.0, 0.0, 0.5]).double() + 0.5 * torch.randn(60).double()
    basis = WeightBasis.of(nn.Linear(4, 1, bias=False), 2.0, diagonal)
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(basis)
        for k in range(3):
            server.put(linear_site(basis, x[k::3], y[k::3], noise, f"s{k}"))
        pooled = linear_site(basis, x, y, noise, "pooled")
        assert divergence(server.total(), pooled) == pytest.approx(0.0, abs=1e-10)
        posterior = server.posterior()
        with pytest.raises(SiteRefused):
            wrong = linear_site(replace(basis, diagonal=not diagonal), x, y, noise, "s0")
            server.put(replace(wrong, basis_id=basis.id, version=1))
    if not diagonal:
        covariance = torch.linalg.inv(x.T @ x / noise + torch.eye(4).double() / 4.0)
        torch.testing.assert_close(4.0 * posterior.covariance, covariance)
        torch.testing.assert_close(2.0 * posterior.mean, covariance @ x.T @ y / noise)
    with PosteriorServer(tmp_path / "server.db") as server:
        found, scaling = server.basis()
        assert found.id == basis.id and scaling is None
        torch.testing.assert_close(server.posterior().mean, posterior.mean, rtol=1e-12, atol=1e-12)
        server.remove("s1")
        rest = [k for k in range(60) if k % 3 != 1]
        left = linear_site(basis, x[rest], y[rest], noise, "rest")
        assert divergence(server.total(), left) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("diagonal", [True, False])
def test_draws_have_the_posteriors_moments(diagonal):
    """20,000 draws, seed 3: every mean and (co)variance within 5 standard errors; the prior's, which the twin has, are
    further away."""
    torch.manual_seed(12)
    basis = WeightBasis.of(nn.Linear(3, 1, bias=False), 1.5, diagonal)
    x, y = torch.randn(10, 3).double(), torch.randn(10).double()
    site = linear_site(basis, x, y, 2.0, "s")
    posterior, n = basis.posterior(site), 20_000
    draws = torch.stack([w["weight"][0] for w in posterior.draw(n, seed=3)])
    mean, covariance = moments(site)
    mean = 1.5 * mean[0]
    covariance = 2.25 * (covariance[0].diag() if diagonal else covariance[0])

    def worst(expected_mean, expected):
        spread = expected.diag()
        in_mean = (draws.mean(0) - expected_mean).abs() / (spread / n).sqrt()
        error = ((spread[:, None] * spread + expected.square()) / n).sqrt()  # of a sample covariance
        return max(in_mean.max().item(), ((draws.T.cov() - expected).abs() / error).max().item())

    assert worst(mean, covariance) < 5.0
    assert worst(torch.zeros(3).double(), 2.25 * torch.eye(3).double()) > 20.0


def test_outputs_are_those_of_the_drawn_weights():
    module = network()
    basis = WeightBasis.of(module)
    with PosteriorServer() as server:
        server.register_basis(basis)
        posterior = server.posterior()  # of the prior
    x = torch.randn(5, 2)
    outputs = posterior.outputs(module, x, 4, seed=1)
    assert outputs.shape == (4, 5, 1)
    before = [p.clone() for p in module.parameters()]
    for found, weights in zip(outputs, posterior.draw(4, seed=1)):
        cast = {name: value.float() for name, value in weights.items()}
        torch.testing.assert_close(found, torch.func.functional_call(module, cast, (x,)))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert np.isfinite(outputs.numpy()).all()
