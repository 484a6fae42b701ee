"""The infinitely wide limit: against the textbook posterior, wide random networks, and scikit-learn's algebra."""

import math

import numpy as np
import pytest
from sklearn.base import clone

from fspace.compare.wide import WideNetworkGP, limit_prior_draws, network_prior_draws
from fspace.errors import DataError, OptionError
from fspace.inference.weights.priors import GaussianPrior

rng = np.random.default_rng(0)
X = rng.uniform(-2, 2, (30, 2))
Y = 5 + 3 * np.sin(X[:, 0]) + 0.1 * rng.normal(size=30)


def arc_cosine(a, b, weight=2.0, bias=1.0):
    """One hidden layer of relu units (Cho and Saul 2009), written out."""
    k = lambda u, v: bias + weight * (u * v).sum(-1) / u.shape[-1]  # noqa: E731
    k12, k11, k22 = k(a[:, None], b[None]), k(a, a)[:, None], k(b, b)[None]
    t = np.arccos(np.clip(k12 / np.sqrt(k11 * k22), -1, 1))
    return bias + weight * np.sqrt(k11 * k22) * (np.sin(t) + (math.pi - t) * np.cos(t)) / (2 * math.pi)


def test_posterior_is_the_textbook_one_with_the_kernel_written_out():
    model = WideNetworkGP(noise_variance=0.01).fit(X, Y)
    new = rng.uniform(-3, 3, (7, 2))
    scaled, places = ((a - X.mean(0)) / X.std(0) for a in (X, new))
    noisy = arc_cosine(scaled, scaled) + 0.01 / Y.var() * np.eye(30)
    cross = arc_cosine(scaled, places)
    mean = cross.T @ np.linalg.solve(noisy, (Y - Y.mean()) / Y.std()) * Y.std() + Y.mean()
    cov = (arc_cosine(places, places) - cross.T @ np.linalg.solve(noisy, cross)) * Y.var()
    latent = model.posterior_.latent(new)
    assert np.allclose(latent.mean, mean, atol=1e-6) and np.allclose(latent.covariance, cov, atol=1e-6)
    mean, std = clone(model).fit(X, Y).predict(new, return_std=True)
    assert np.allclose(std**2, np.diag(cov) + 0.01, atol=1e-6)


def test_noise_is_the_most_probable_one():
    """Against a grid of the log joint density; 0.1 is what the data were made with."""
    model = WideNetworkGP().fit(X, Y)
    noise = model.posterior_.noise_variance.item()
    joint = {}
    for factor in (0.8, 1.0, 1.25):
        fixed = WideNetworkGP(noise_variance=factor * noise).fit(X, Y)
        log_noise = math.log(factor * noise / Y.var())
        joint[factor] = fixed.log_evidence_ - 0.5 * ((log_noise - math.log(0.1)) / 2) ** 2
    assert joint[1.0] > max(joint[0.8], joint[1.25])
    assert 0.05 < math.sqrt(noise) < 0.3


@pytest.mark.parametrize("prior", ["scaled", GaussianPrior(0.5, 0.2)])
def test_wide_networks_have_the_moments_of_the_limit_and_narrow_ones_its_covariance_only(prior):
    """Second moments agree at every width; fourth moments only in the limit (one hidden layer: 3 + c / width).

    4,000 draws: a relative standard error of 2.3% of a variance, 8% of a kurtosis."""
    grid = np.linspace(-2, 2, 5)[:, None]
    wide, narrow = (network_prior_draws(grid, (width,), "relu", prior, 4000) for width in (1000, 2))
    limit = limit_prior_draws(grid, 1, "relu", prior, 4000)
    weights = (2.0, 1.0) if prior == "scaled" else (0.5, 0.2)
    exact = arc_cosine(grid, grid, *weights)
    for draws in (wide, narrow, limit):
        assert np.allclose(np.cov(draws.T), exact, atol=5 * 0.05 * exact.max())
    kurtosis = [(d[:, 0] ** 4).mean() / (d[:, 0] ** 2).mean() ** 2 for d in (wide, limit, narrow)]
    assert abs(kurtosis[0] - 3) < 0.5 and abs(kurtosis[1] - 3) < 0.5 < kurtosis[2] - 3


def test_what_is_refused():
    with pytest.raises(OptionError, match="no infinitely wide limit"):
        WideNetworkGP(prior=1.0).fit(X, Y)
    with pytest.raises(OptionError, match="activation"):
        WideNetworkGP(activation="silu").fit(X, Y)
    with pytest.raises(DataError, match="one column"):
        WideNetworkGP().fit(X, np.stack([Y, Y], 1))
