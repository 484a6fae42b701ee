"""Predictives of observations that are not Gaussian, against closed forms and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from gpytorch.likelihoods import BetaLikelihood, StudentTLikelihood
from scipy import integrate, special, stats
from torch import distributions

import fspace
from fspace.compound import Compound, scipy_form
from fspace.errors import OptionError
from fspace.gaussians import Gaussian, Mixture
from fspace.inference.likelihoods import PoissonLikelihood

MEAN = torch.tensor([0.2, 1.0, -0.5], dtype=torch.float64)
VARIANCE = torch.tensor([0.3, 0.1, 0.6], dtype=torch.float64)
KINDS = {
    "poisson": lambda f: distributions.Poisson(f.exp(), validate_args=False),
    "negative_binomial": lambda f: distributions.NegativeBinomial(
        torch.tensor(2.5).double(), logits=f - math.log(2.5), validate_args=False
    ),
    "student_t": lambda f: distributions.StudentT(torch.tensor(5.0).double(), f, 0.7, validate_args=False),
    "laplace": lambda f: distributions.Laplace(f, torch.tensor(0.6).double(), validate_args=False),
    "gamma": lambda f: distributions.Gamma(
        torch.tensor(3.0).double(), 3.0 * torch.exp(-f), validate_args=False
    ),
    "beta": lambda f: distributions.Beta(
        1 + 4 * torch.sigmoid(f), 1 + 4 * torch.sigmoid(-f), validate_args=False
    ),
}


def latent():
    return Gaussian(MEAN, VARIANCE, torch.diag(VARIANCE))


def drawn(kind, n=200_000):
    generator = torch.Generator().manual_seed(0)
    f = MEAN + VARIANCE.sqrt() * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    return KINDS[kind](f).sample()


@pytest.mark.parametrize("kind", KINDS)
def test_moments_cdf_and_quantiles_are_the_monte_carlo_ones(kind):
    predictive, samples = Compound(latent(), KINDS[kind]), drawn(kind)
    n = len(samples)
    assert ((predictive.mean - samples.mean(0)).abs() < 5 * samples.std(0) / math.sqrt(n)).all()
    assert torch.allclose(predictive.variance, samples.var(0), rtol=0.08)
    assert not torch.allclose(predictive.aleatoric, samples.var(0), rtol=0.02)  # the twin: noise alone
    for p in (0.05, 0.5, 0.9):
        q = predictive.quantile(p)
        below, at_most = (samples < q - 1e-9).double().mean(0), (samples <= q + 1e-9).double().mean(0)
        error = 4 * math.sqrt(p * (1 - p) / n)
        assert ((below < p + error) & (at_most > p - error)).all()
        assert ((predictive.cdf(q) - at_most).abs() < error + 1e-3).all()


@pytest.mark.parametrize("kind", ["poisson", "negative_binomial"])
def test_probabilities_of_counts_sum_to_one(kind):
    predictive = Compound(latent(), KINDS[kind])
    total = sum(predictive.log_prob(torch.full((3,), float(k)).double()).exp() for k in range(400))
    assert torch.allclose(total, torch.ones(3).double(), atol=1e-6)
    assert (predictive.log_prob(torch.tensor([0.5, -1.0, 2.5]).double()) == -math.inf).all()


@pytest.mark.parametrize("kind", ["student_t", "laplace", "gamma", "beta"])
def test_densities_integrate_to_one_in_the_units_of_y(kind):
    predictive = Compound(latent(), KINDS[kind], shift=2.0, scale=3.0)
    low, high = {"gamma": (2.0, 400.0), "beta": (2.0, 5.0)}.get(kind, (-300.0, 300.0))
    grid = torch.linspace(low + 1e-6, high - 1e-6, 200_001, dtype=torch.float64)
    for i in range(3):
        one = Compound(Gaussian(MEAN[i : i + 1], VARIANCE[i : i + 1]), KINDS[kind], 2.0, 3.0)
        density = torch.cat([one.log_prob(y[None]) for y in grid[::200]]).exp().detach().numpy()
        assert integrate.simpson(density, x=grid[::200].numpy()) == pytest.approx(1.0, abs=0.02)
    assert torch.allclose(predictive.mean, 2.0 + 3.0 * Compound(latent(), KINDS[kind]).mean)
    again = Compound(latent(), KINDS[kind]).affine(2.0, 3.0)
    assert torch.allclose(predictive.quantile(0.3), again.quantile(0.3))


def test_gaussian_given_gaussian_is_gaussian():
    ours = Compound(latent(), lambda f: distributions.Normal(f, 0.5))
    want = Gaussian(MEAN, VARIANCE + 0.25, None, torch.full_like(MEAN, 0.25))
    y = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    for name in ("mean", "variance", "epistemic", "aleatoric"):
        assert torch.allclose(getattr(ours, name), getattr(want, name), atol=1e-9), name
    assert torch.allclose(ours.log_prob(y), want.log_prob(y), atol=1e-9)
    assert torch.allclose(ours.cdf(y), want.cdf(y), atol=1e-9)
    assert torch.allclose(torch.stack(ours.interval(0.9)), torch.stack(want.interval(0.9)), atol=1e-8)


def test_samples_are_joint_over_the_points():
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=torch.float64)
    joint = Gaussian(torch.full((2,), 3.0).double(), torch.ones(2).double(), covariance)
    samples = Compound(joint, KINDS["poisson"]).rsample(4000, seed=0)
    assert torch.corrcoef(samples.mT)[0, 1] > 0.7
    apart = Gaussian(joint.mean, joint.variance, torch.eye(2).double())  # the twin
    assert torch.corrcoef(Compound(apart, KINDS["poisson"]).rsample(4000, seed=0).mT)[0, 1].abs() < 0.1
    assert torch.equal(samples, Compound(joint, KINDS["poisson"]).rsample(4000, seed=0))


def test_mixtures_of_counts_have_whole_quantiles():
    other = Gaussian(MEAN + 2.0, VARIANCE)
    mixture = Mixture([Compound(latent(), KINDS["poisson"]), Compound(other, KINDS["poisson"])], [0.4, 0.6])
    q = mixture.quantile(0.7)
    assert torch.allclose(q, q.round(), atol=1e-9)
    q = q.round()
    assert (mixture.cdf(q) >= 0.7).all() and (mixture.cdf(q - 1.0) < 0.7).all()


def test_a_distribution_scipy_does_not_know_is_refused_by_name():
    odd = Compound(latent(), lambda f: distributions.Gumbel(f, 1.0))
    assert torch.isfinite(odd.log_prob(MEAN)).all()
    with pytest.raises(OptionError, match="Gumbel"):
        odd.quantile(0.5)


def test_scipy_has_the_same_negative_binomial():
    f = torch.tensor([0.7], dtype=torch.float64)
    ours = Compound(Gaussian(f, torch.zeros(1).double()), KINDS["negative_binomial"])
    want = stats.nbinom(2.5, 2.5 / (2.5 + math.exp(0.7)))
    counts = np.arange(6.0)
    got = [ours.log_prob(torch.tensor([k])).item() for k in counts]
    assert np.allclose(got, want.logpmf(counts))
    assert ours.cdf(torch.tensor([3.0])).item() == pytest.approx(want.cdf(3))


@pytest.mark.parametrize("p", [1e-12, 0.05, 0.5, 0.95, 1 - 1e-9])
def test_counts_have_the_quantiles_that_scipy_knows(p):
    levels = np.full(4, p)
    rates = torch.tensor([1e-9, 0.4, 7.0, 3e4], dtype=torch.float64)
    poisson = scipy_form(distributions.Poisson(rates, validate_args=False))
    assert (poisson.ppf(levels) == stats.poisson(rates.numpy()).ppf(p)).all()
    binomial = distributions.NegativeBinomial(0.3, logits=rates.log() - math.log(0.3), validate_args=False)
    expected = stats.nbinom(0.3, 1 / (1 + rates.numpy() / 0.3)).ppf(p)
    assert np.allclose(scipy_form(binomial).ppf(levels), expected, rtol=1e-9)


def test_large_counts_have_quantiles_and_samples():
    """Scipy's are NaN for a Poisson mean of a billion, and take for ever for some negative binomials."""
    wide = Gaussian(torch.tensor([21.0, 340.0]).double(), torch.tensor([0.1, 900.0]).double())
    poisson = Compound(wide, lambda f: PoissonLikelihood()(f))
    lower, upper = poisson.interval(0.9)
    assert ((0 < lower) & (lower < upper) & upper.isfinite()).all()
    assert (poisson.cdf(lower) >= 0.05 - 1e-9).all() and (poisson.cdf(lower * 0.99) < 0.05).all()
    rare = distributions.NegativeBinomial(
        torch.tensor([1e-6]).double(), logits=torch.tensor([35.0]).double(), validate_args=False
    )
    assert np.isfinite(scipy_form(rare).ppf(np.array([0.999999]))).all()


def test_quantiles_over_hundreds_of_decades():
    wide = Gaussian(torch.tensor([0.0]).double(), torch.tensor([900.0]).double())
    gamma = Compound(wide, KINDS["gamma"])
    for p in (0.3, 0.5, 0.7):
        q = gamma.quantile(p)
        assert (gamma.cdf(q * (1 + 1e-9)) >= p).all() and (gamma.cdf(q * (1 - 1e-9)) <= p).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_number_is_the_same_at_all_points_and_none_are_no_samples(kind):
    predictive = Compound(latent(), KINDS[kind])
    y = 0.5 if kind in ("beta", "gamma", "student_t", "laplace") else 2.0
    assert torch.equal(predictive.log_prob(y), predictive.log_prob([y] * 3))
    assert predictive.log_prob(math.nan).isnan().all()
    assert predictive.rsample(0).shape == (0, 3)


@pytest.mark.parametrize("p", [1e-40, 1e-200, 1e-300])
@pytest.mark.parametrize("size", [0.5, 2.0, 50.0, 1e4])
def test_shares_have_quantiles_far_out(p, size):
    """Close to 0 the cdf of a share is w^a / (a B(a, b)); scipy's quantiles are NaN there, or far too large."""
    mean = torch.tensor([-4.0, 0.0, 0.5], dtype=torch.float64)
    likelihood = BetaLikelihood().double()
    likelihood.scale = torch.tensor(size)
    found = Compound(Gaussian(mean, torch.zeros_like(mean)), lambda f: likelihood(f)).quantile(p)
    size = likelihood.scale.item()  # what rounding left of it
    a = 1.0 + size * torch.sigmoid(mean).numpy()
    b = 2.0 + size - a
    expected = np.exp((np.log(p * a) + special.betaln(a, b)) / a)
    near = expected < 1e-12  # where that is what is left of the series
    assert near.any() or size > 100
    np.testing.assert_allclose(found.numpy()[near], expected[near], rtol=1e-8)
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("p", [1e-40, 1e-200, 1e-300])
def test_heavy_tails_have_quantiles_far_out(p):
    """Far out the cdf is a power; scipy's quantile is plus infinity where it should be below all else."""
    likelihood = StudentTLikelihood().double()
    likelihood.deg_free = torch.tensor(3.0)
    likelihood.noise = torch.tensor(4.0)
    mean = torch.tensor([-1.0, 1e6], dtype=torch.float64)
    found = Compound(Gaussian(mean, torch.zeros_like(mean)), lambda f: likelihood(f)).quantile(p)
    # P(T < -t) = 2 sqrt(3) / (pi t^3) for three degrees of freedom
    np.testing.assert_allclose(
        found.numpy(), -2.0 * np.cbrt(2.0 * np.sqrt(3.0) / np.pi / p) * np.ones(2), rtol=1e-6
    )


@pytest.mark.parametrize(
    "likelihood", ["beta", "student_t", "laplace", "gamma", "poisson", "negative_binomial"]
)
def test_quantiles_of_a_fit_are_ordered_down_to_the_smallest_level(likelihood):
    X = np.linspace(0, 1, 30)[:, None]
    y = {"beta": 0.5 + 0.4 * np.sin(6 * X[:, 0])}.get(likelihood, np.round(3 + 2 * np.sin(6 * X[:, 0])) + 1.0)
    predictive = fspace.GPRegressor(kernel="matern", likelihood=likelihood).fit(X, y).predictive(X)
    levels = [5e-324, 1e-300, 1e-100, 1e-31, 1e-29, 1e-5, 0.5, 1 - 1e-16]
    found = predictive.quantile(levels)
    assert found.isfinite().all() and (found.diff(dim=0) >= 0).all()
