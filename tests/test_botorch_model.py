"""A fitted posterior inside BoTorch: the joint, its gradient, noise, conditioning, and a search that improves."""

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.optim import optimize_acqf

import fspace


def hill(x):
    return -((x - 0.3) ** 2).sum(-1)


@pytest.fixture(scope="module")
def fitted():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(15, 2, generator=generator, dtype=torch.float64)
    return fspace.GPRegressor(kernel="rbf").fit(x, hill(x)), x


def test_joint_is_the_posterior_s(fitted):
    model, x = fitted
    point = x[:4] + 0.05
    got, want = model.posterior_.as_botorch().posterior(point), model.posterior_.latent(point)
    assert torch.allclose(got.mean[:, 0], want.mean)
    assert torch.allclose(got.distribution.covariance_matrix, want.covariance)
    noisy = model.posterior_.as_botorch().posterior(point, observation_noise=True)
    assert torch.allclose(
        noisy.variance - got.variance, model.posterior_.noise_variance.expand(4, 1), atol=1e-12
    )


def test_gradient_to_x_is_the_finite_difference(fitted):
    model, x = fitted
    acquisition = LogExpectedImprovement(model.posterior_.as_botorch(), best_f=hill(x).mean())
    point = torch.tensor([[[0.35, 0.6]]], dtype=torch.float64, requires_grad=True)
    acquisition(point).sum().backward()
    step = torch.tensor([[[1e-5, 0.0]]], dtype=torch.float64)
    slope = (acquisition(point + step) - acquisition(point - step)) / 2e-5
    assert slope.item() == pytest.approx(point.grad[0, 0, 0].item(), rel=1e-3)


def test_search_finds_a_better_point(fitted):
    model, x = fitted
    acquisition = qLogExpectedImprovement(model.posterior_.as_botorch(), best_f=hill(x).max())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=3, raw_samples=32)
    assert hill(found).max() > hill(x).max()


def test_conditioning_shrinks_the_variance_there_and_only_informs(fitted):
    model, x = fitted
    new = torch.tensor([[1.4, 1.4]], dtype=torch.float64)
    before = model.posterior_.as_botorch()
    after = before.condition_on_observations(new, hill(new)[:, None])
    assert after.posterior(new).variance.item() < 0.1 * before.posterior(new).variance.item()
    assert before.posterior(new).variance.item() == pytest.approx(
        model.posterior_.latent(new).variance.item()
    )
