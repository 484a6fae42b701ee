"""Training of a network: what is held out stays unseen, the better prior wins, the same seed gives the same fit."""

import copy
import warnings

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel

import fspace
from fspace.inference import network
from fspace.inference.candidates import deep_kernel, named_kernel
from fspace.inference.finish import finish_sparse
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels import MLP, DeepKernel


def ridge(n, d=12, seed=0):
    """A sharp function of one hidden direction out of d: a network finds it, an ARD kernel cannot."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    direction = np.ones(d) / np.sqrt(d)
    return X, np.tanh(6.0 * np.sin(2.0 * X @ direction)) + 0.05 * rng.standard_normal(n)


def test_held_out_rows_only_say_when_to_stop(monkeypatch):
    """With the looks at the held-out rows made blind, their targets change nothing; without, they do."""
    X, y = ridge(200, d=3)
    x, y = torch.tensor(X), torch.tensor(y)[:, None]
    held_out, rows = torch.arange(40), torch.arange(40, 200)
    wrong = y.clone()
    wrong[held_out] = 100.0 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).double()

    def features(target):
        torch.manual_seed(0)
        kernel = deep_kernel(3, "silu", torch.float32)
        generator = torch.Generator().manual_seed(0)
        loss = network._squared_error
        network._pretrain(kernel, x, target, rows, held_out, lambda **_: None, "deep", generator, 1, loss)
        return kernel.extractor(x.float())

    assert not torch.equal(features(y), features(wrong))
    kept = network._Best.look
    monkeypatch.setattr(network._Best, "look", lambda self, score: kept(self, max(self.score, 0.0) + 1.0))
    assert torch.equal(features(y), features(wrong))


def test_noise_comes_from_rows_the_network_was_not_trained_on():
    """A network that knows its training rows by heart leaves tiny residuals on them: the noise must not be these."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(150, 10, generator=g, dtype=torch.float64)
    y = torch.randn(150, 1, generator=g, dtype=torch.float64)  # nothing to learn: the noise is 1
    held_out = torch.arange(50)
    torch.manual_seed(0)
    net = MLP(10, hidden=(256,), out_features=4)
    head = torch.nn.Linear(4, 1)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(600):
        optimiser.zero_grad()
        loss = (head(net(x[50:].float())) - y[50:].float()).square().mean()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-2  # by heart
    kernel = DeepKernel(net, named_kernel("matern", 4))
    kernel.eval()
    kernel.fix_statistics(x)
    done = finish_sparse(
        kernel, gaussian_likelihood(1, 0.1, x.device), x, y, held_out, 100, 0.0, False, seed=0
    )
    assert done.basis.noise.item() > 0.5


def test_auto_takes_the_deep_kernel_where_it_is_better_and_not_where_it_is_not():
    X, y = ridge(900)
    X_test, y_test = ridge(400, seed=1)
    model = fspace.GPRegressor(members=1).fit(X, y)
    assert model.choice_["weights"].get("deep 1", 0.0) > 0.5
    plain = fspace.GPRegressor(kernel="matern").fit(X, y)
    densities = [m.predictive(X_test).log_prob(y_test).mean().item() for m in (model, plain)]
    assert densities[0] > densities[1] + 0.2
    rng = np.random.default_rng(0)
    X = rng.standard_normal((150, 5))
    y = X[:, 0] + 0.3 * rng.standard_normal(150)
    model = fspace.GPRegressor(members=1).fit(X, y)
    assert sum(w for name, w in model.choice_["weights"].items() if name.startswith("deep")) < 0.5


def test_the_same_seed_gives_the_same_fit_and_another_seed_another():
    X, y = ridge(120, d=3)
    fits = [fspace.GPRegressor(kernel="deep", members=1, seed=s).fit(X, y).predict(X) for s in (0, 0, 1)]
    np.testing.assert_array_equal(fits[0], fits[1])
    assert np.abs(fits[0] - fits[2]).max() > 1e-6


def test_a_users_extractor_that_is_frozen_stays_as_it_is():
    X, y = ridge(100, d=3)
    net = MLP(3, hidden=(8,), out_features=2)
    net.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fspace.GPRegressor(
            kernel=DeepKernel(net, MaternKernel()), members=1, inference="collapsed"
        ).fit(X, y)
    after = model.posterior_.basis.kernel.extractor.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.gpu
def test_a_fit_on_the_gpu_predicts_as_one_on_the_cpu():
    X, y = ridge(300, d=3)
    fits = [fspace.GPRegressor(kernel="matern", device=device).fit(X, y) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(fits[0].predict(X), fits[1].predict(X), atol=1e-4)
    deep = fspace.GPRegressor(kernel="deep", members=2, likelihood="heteroscedastic", device="cuda").fit(X, y)
    assert deep.score(X, y) > 0.9


def test_targets_without_noise_on_one_input():
    """Inducing rows whose features lie close together leave the statistics positive semi-definite."""
    X = np.random.default_rng(0).uniform(-3.0, 3.0, (120, 1))
    model = fspace.GPRegressor(kernel="deep", members=2).fit(X, np.sin(X[:, 0]))
    assert np.abs(model.predict(X) - np.sin(X[:, 0])).max() < 0.05
