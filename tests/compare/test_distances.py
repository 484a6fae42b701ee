"""Distances between posteriors as functions: closed forms, another library's optimal transport, and draws."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from fspace.compare.distances import (
    Functions,
    function_distances,
    gaussian_kl,
    gaussian_wasserstein,
    moments,
    sliced_wasserstein,
)
from fspace.errors import DataError, NumericalError, OptionError
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive import Gaussian, Samples

rng = np.random.default_rng(0)


def spd(n, seed):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T + 0.1 * np.eye(n)


def test_wasserstein_of_gaussians_in_closed_cases():
    a, b = np.array([1.0, -2.0]), np.array([0.0, 0.5])
    c, d = np.diag([1.0, 4.0]), np.diag([9.0, 0.25])  # these commute, so the roots are compared
    expected = math.sqrt(((a - b) ** 2).sum() + (3 - 1) ** 2 + (2 - 0.5) ** 2)
    assert gaussian_wasserstein(a, c, b, d) == pytest.approx(expected)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    assert gaussian_wasserstein(turn @ a, turn @ c @ turn.T, turn @ b, turn @ d @ turn.T) == pytest.approx(
        expected
    )
    assert gaussian_wasserstein(a, 0 * c, b, d) == pytest.approx(
        math.sqrt(((a - b) ** 2).sum() + np.trace(d))
    )
    m, s = rng.normal(size=5), spd(5, 1)
    assert gaussian_wasserstein(m, s, m, s) == pytest.approx(0, abs=1e-6)


def test_kl_of_gaussians_equals_torch():
    (m, c), (n, d) = [(rng.normal(size=4), spd(4, k)) for k in (1, 2)]
    normal = lambda mean, cov: torch.distributions.MultivariateNormal(torch.tensor(mean), torch.tensor(cov))  # noqa: E731
    theirs = torch.distributions.kl_divergence(normal(m, c), normal(n, d)).item()
    assert gaussian_kl(m, c, n, d) == pytest.approx(theirs)
    with pytest.raises(NumericalError, match="fewer probe inputs"):
        gaussian_kl(m, np.ones((4, 4)), n, d)


def test_sliced_distance_in_one_dimension_is_the_distance():
    """Wasserstein-2 of sorted samples by hand; scipy's Wasserstein-1 where all differences are equal."""
    a = rng.normal(size=(50, 1))
    b = rng.normal(2, 3, size=(50, 1))
    by_hand = np.sqrt(((np.sort(a, 0) - np.sort(b, 0)) ** 2).mean())
    assert sliced_wasserstein(a, b) == pytest.approx(by_hand)
    assert sliced_wasserstein(a, a + 1.5) == pytest.approx(wasserstein_distance(a[:, 0], a[:, 0] + 1.5))


def test_sliced_distance_sees_what_two_moments_do_not():
    """Equal means and covariances; 4,000 draws, and two sets of one distribution are three times nearer."""
    n = 4000
    normal, again = rng.normal(size=(2, n, 3))
    signs = rng.choice([-1.0, 1.0], size=(n, 1)) * np.abs(rng.normal(size=(n, 3)))  # all up or all down
    matched = rng.multivariate_normal(np.zeros(3), np.cov(signs.T), size=n)
    chance = sliced_wasserstein(normal, again)
    assert sliced_wasserstein(signs, matched) > 3 * chance
    assert abs(gaussian_wasserstein(signs.mean(0), np.cov(signs.T), matched.mean(0), np.cov(matched.T))) < 0.1


class Lines(FunctionPosterior):
    """f(x) = slope * x with slope from N(mean, std^2); `exact` or known from draws only."""

    num_inputs = 1

    def __init__(self, mean, std, exact):
        self.mean, self.std, self.exact = mean, std, exact

    def latent(self, x):
        x = x[:, 0]
        if self.exact:
            covariance = self.std**2 * x[:, None] * x
            return Gaussian(self.mean * x, covariance.diagonal(), covariance)
        return Samples(torch.stack([f(x[:, None]) for f in self.draw(50, 0)]))

    observed = latent

    def draw(self, n=1, seed=None):
        slopes = self.mean + self.std * np.random.default_rng(seed).standard_normal(n)
        return FunctionDraws([lambda x, s=s: s * x[:, 0] for s in slopes])


X = torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]


def test_moments_are_exact_or_drawn():
    exact, drawn = moments(Lines(1.0, 0.5, True), X), moments(Lines(1.0, 0.5, False), X, 4000)
    assert np.allclose(exact[1], 0.25 * X[:, 0].outer(X[:, 0]))
    assert np.allclose(exact[0], drawn[0], atol=5 * 0.5 * 2 / math.sqrt(4000))
    assert np.allclose(exact[1], drawn[1], atol=5 * 1.0 * math.sqrt(2 / 4000))


def test_distances_to_a_reference_and_who_is_too_sure():
    reference = Functions.of(Lines(1.0, 0.5, True), X, seed=1)
    far = function_distances(Functions.of(Lines(1.3, 0.25, True), X), reference, 0.01)
    rms = float(X.square().mean().sqrt())
    assert far["mean"] == pytest.approx(0.3 * rms) and far["std"] == pytest.approx(0.25 * rms)
    assert far["width"] == pytest.approx(0.5)
    # along the line, Wasserstein-2 of the slopes times the size of the direction
    assert far["wasserstein"] == pytest.approx(math.hypot(0.3, 0.25) * rms)
    same = function_distances(Functions.of(Lines(1.0, 0.5, True), X), reference, 0.01)
    assert same["kl"] == pytest.approx(0, abs=1e-9) and same["sliced"] < 0.2 * far["sliced"]
    n, direction = 6, X[:, 0].numpy()
    size = direction @ direction  # only along it do the two differ
    a, b = 0.25 * size + 0.01, 0.0625 * size + 0.01
    expected = 0.5 * (a / b + 0.09 * size / b - 1 - math.log(a / b)) / n
    assert far["kl"] == pytest.approx(expected)


def test_what_is_refused():
    with pytest.raises(OptionError, match="must be positive"):
        lines = Functions.of(Lines(1.0, 1.0, True), X)
        function_distances(lines, lines, 0.0)
    with pytest.raises(DataError, match="of the same"):
        gaussian_wasserstein(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(DataError, match="NaN"):
        gaussian_kl(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))
    with pytest.raises(DataError, match="must be"):
        sliced_wasserstein(np.zeros((3, 2)), np.zeros((3, 1)))


def test_what_is_no_covariance_and_other_probes_are_refused():
    mean, ours = np.zeros(3), Functions(np.zeros(3), np.eye(3), np.zeros((5, 3)))
    for distance in (gaussian_wasserstein, gaussian_kl):
        with pytest.raises(DataError, match="negative eigenvalue"):
            distance(mean, -np.eye(3), mean, np.eye(3))
        with pytest.raises(DataError, match="no points"):
            distance(mean[:0], np.eye(0), mean[:0], np.eye(0))
    with pytest.raises(DataError, match="at 3 and at 2 probes"):
        function_distances(ours, Functions(np.zeros(2), np.eye(2), np.zeros((5, 2))), 0.1)


def test_a_reference_without_spread_makes_the_width_infinite_without_a_warning():
    ours = Functions(np.zeros(3), np.eye(3), np.zeros((5, 3)))
    certain = Functions(np.zeros(3), np.zeros((3, 3)), np.zeros((5, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function_distances(ours, certain, 0.1)["width"] == math.inf
        assert math.isnan(function_distances(certain, certain, 0.1)["width"])
