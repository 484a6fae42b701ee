"""Relevance and additive parts, on functions whose answer is known."""

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel

import fspace
from fspace import interpret
from fspace.errors import NotFittedError, OptionError


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (300, 3))
    y = 3.0 * np.sin(2 * X[:, 0]) + X[:, 1] + 0.1 * rng.standard_normal(300)
    return X, y, fspace.GPRegressor(kernel="matern").fit(X, y)


@pytest.mark.parametrize("method", ["slope", "ard", "permutation", "shapley"])
def test_inputs_are_ranked_by_what_they_do(case, method):
    X, y, model = case
    if method == "shapley":
        pytest.importorskip("shap", reason="shap is not installed")
    shares = interpret.relevance(model, X, y, method)
    assert list(shares) == ["x0", "x1", "x2"] and sum(shares.values()) == pytest.approx(1.0)
    assert shares["x0"] > shares["x1"] > shares["x2"] and shares["x2"] < 0.15


def test_what_a_method_needs_is_said(case):
    X, y, model = case
    with pytest.raises(OptionError, match="give y"):
        interpret.relevance(model, X, method="permutation")
    with pytest.raises(OptionError, match="choose one of"):
        interpret.relevance(model, X, method="magic")
    with pytest.raises(NotFittedError, match="not fitted"):
        interpret.relevance(fspace.GPRegressor(), X)
    with pytest.raises(OptionError, match="no sum"):
        interpret.components(model.posterior_, X)
    deep = fspace.GPRegressor(kernel=fspace.DeepKernel(torch.nn.Linear(3, 2), MaternKernel()), members=1)
    with pytest.raises(OptionError, match="lengthscale"):
        interpret.relevance(deep.fit(X, y), X, method="ard")


def test_parts_of_an_additive_kernel_are_the_functions_and_sum_to_the_whole(case):
    X, y, _ = case
    model = fspace.GPRegressor(kernel="additive").fit(X, y)
    parts = interpret.components(model.posterior_, X)
    assert len(parts) == 3
    total = sum(part.mean for part in parts.values())
    whole = model.posterior_.latent(X).mean - model.posterior_.scaling.y_shift
    assert torch.allclose(total, whole, atol=1e-6)
    first = list(parts.values())[0].mean.detach().numpy()
    truth = 3.0 * np.sin(2 * X[:, 0])
    assert np.std(first - first.mean() - truth + truth.mean()) < 0.2
    assert not np.std(whole.detach().numpy() - truth) < 0.2  # the twin: the sum is not the part
    shares = list(interpret.anova(model.posterior_, X).values())
    assert shares[0] == pytest.approx(np.var(truth) / (np.var(truth) + np.var(X[:, 1])), abs=0.08)
    assert shares[2] < 0.02
