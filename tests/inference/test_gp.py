"""Posteriors and their draws at batches, at no rows, and at what is no number."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch.kernels import AdditiveKernel, LinearKernel, MaternKernel, RBFKernel, RFFKernel, ScaleKernel

import fspace
from fspace.errors import DataError, OptionError
from fspace.kernels.evaluate import covariance
from fspace.posterior import MixturePosterior

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
KERNELS = {
    "matern": "matern",
    "neural": "neural",  # its draws remember their values
    "sum": AdditiveKernel(ScaleKernel(RBFKernel()), ScaleKernel(MaternKernel())),
}


def fit(kernel="matern", outputs=0):
    y = torch.sin(3 * X[:, 0]) + X[:, 1]
    y = torch.stack([y, -2 * y], dim=1)[:, :outputs] if outputs else y
    return fspace.GPRegressor(kernel=kernel, inference="exact").fit(X, y).posterior_


@pytest.fixture(scope="module", params=["one", "mixture"])
def posterior(request):
    return fit() if request.param == "one" else MixturePosterior([fit(), fit("rbf")])


@pytest.mark.parametrize("outputs", [0, 1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_draw_at_batches_is_the_same_function(kernel, outputs):
    f = fit(KERNELS[kernel], outputs).draw(1, seed=0)[0]
    x = torch.rand(3, 2, 4, 2, dtype=torch.float64)
    whole = f(x)
    assert whole.shape == (3, 2, 4, *([outputs] if outputs else []))
    apart = torch.stack([torch.stack([f(part) for part in row]) for row in x])
    torch.testing.assert_close(whole, apart, rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)  # a twin that answers for the first batch only


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_everywhere(posterior, bad):
    x = torch.tensor([[0.1, bad]], dtype=torch.float64)
    draw = posterior.draw(1, seed=0)[0]
    model = posterior.as_botorch()
    for ask in (posterior.latent, posterior.observed, draw, lambda x: model.posterior(x).mean):
        with pytest.raises(DataError, match="NaN or infinite"):
            ask(x)
    with pytest.raises(DataError, match="NaN or infinite"):
        posterior.condition(x, [0.0])
    with pytest.raises((DataError, OptionError), match="NaN or infinite|weights"):
        posterior.condition([[0.1, 0.1]], [bad])
    for y in (torch.full((1, 1), bad), torch.full((4, 1, 1), bad)):
        with pytest.raises(DataError, match="NaN or infinite"):
            model.condition_on_observations(torch.rand(1, 2, dtype=torch.float64), y)


def test_a_refused_row_leaves_a_draw_as_it_was():
    f = fit("neural").draw(1, seed=0)[0]
    before = f(X)
    with pytest.raises(DataError):
        f([[math.nan, 0.0]])
    torch.testing.assert_close(f(X), before, rtol=0, atol=1e-8)
    assert f([[0.3, 0.4]]).isfinite().all()


def test_frames_and_lists_are_taken_and_text_is_refused(posterior):
    at = posterior.latent(X[:2]).mean
    for x in (X[:2].tolist(), X[:2].numpy(), pd.DataFrame(X[:2].numpy())):
        torch.testing.assert_close(posterior.latent(x).mean, at)
        assert posterior.draw(2, seed=0)(x).shape == (2, 2)
    for ask in (posterior.latent, posterior.draw(1)[0]):
        with pytest.raises(DataError, match="x holds no numbers"):
            ask("abc")


@pytest.mark.parametrize("n", [0, -1])
def test_a_draw_is_at_least_one_function(posterior, n):
    with pytest.raises(OptionError, match="at least 1"):
        posterior.draw(n)


def test_no_rows(posterior):
    none = X[:0]
    assert posterior.observed(none).mean.shape == (0,)
    assert posterior.draw(2, seed=0)(none).shape == (2, 0)
    same = posterior.condition(none, none[:, 0])
    assert torch.equal(same.latent(X).mean, posterior.latent(X).mean)


def test_observations_of_another_shape_are_refused():
    one, two = fit(), fit(outputs=2)
    for posterior, x, y in [
        (one, X[:2], [1.0, 2.0, 3.0]),
        (one, X[:1], [[1.0, 2.0]]),
        (two, X[:2], [1.0, 2.0]),
    ]:
        with pytest.raises(DataError, match="y must have shape"):
            posterior.condition(x, y)
    with pytest.raises(DataError, match="x must have shape"):
        one.condition(X[0], [1.0])


@pytest.mark.parametrize("kernel", [LinearKernel(), RFFKernel(50), RBFKernel(active_dims=[1])])
def test_the_gradient_to_the_second_inputs_is_there_where_they_equal_the_first(kernel):
    kernel = kernel.double()
    weight = torch.rand(6, 6, dtype=torch.float64)

    def loss(x2):
        return (weight * covariance(kernel, X, x2)).sum()

    x2 = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x2), x2)
    with torch.no_grad():
        for i, j in np.ndindex(6, 2):
            step = torch.zeros_like(X)
            step[i, j] = 1e-6
            slope = (loss(X + step) - loss(X - step)) / 2e-6
            assert gradient[i, j].item() == pytest.approx(slope.item(), abs=1e-6)
    torch.testing.assert_close(covariance(kernel, X, x2).detach(), covariance(kernel, X))
