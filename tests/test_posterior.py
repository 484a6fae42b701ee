"""Mixtures of posteriors and drawn functions: against hand computation and Monte Carlo (standard errors stated)."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fspace
from fspace.errors import DataError, OptionError
from fspace.posterior import FunctionDraws, FunctionPosterior, MixturePosterior
from fspace.predictive import Samples

WEIGHTS = [0.1, 0.3, 0.6]


def fit(shift: float, outputs: int = 0, seed: int = 0):
    """A small fit whose values lie around `shift`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    noise = 0.1 * torch.randn(9, max(outputs, 1), generator=generator).double()
    y = torch.sin(3 * x) + shift + noise
    return fspace.GPRegressor(kernel="matern", inference="exact").fit(x, y if outputs else y[:, 0]).posterior_


@pytest.fixture(scope="module")
def members():
    return [fit(shift, seed=k) for k, shift in enumerate((0.0, 0.2, 30.0))]


@pytest.fixture(scope="module")
def mixture(members):
    return MixturePosterior(members, WEIGHTS)


@pytest.fixture(scope="module")
def two_outputs():
    return MixturePosterior([fit(shift, outputs=2, seed=3) for shift in (0.0, 5.0)], [0.25, 0.75])


X = torch.tensor([[-1.3], [0.05], [0.1], [1.4]], dtype=torch.float64)


# ---- predictions and weights


def test_predictions_are_the_weighted_components(mixture, members):
    for kind in ("latent", "observed"):
        got, parts = getattr(mixture, kind)(X), [getattr(m, kind)(X) for m in members]
        assert torch.allclose(got.mean, sum(w * p.mean for w, p in zip(WEIGHTS, parts)))
        second = sum(w * (p.variance + p.mean.square()) for w, p in zip(WEIGHTS, parts))
        assert torch.allclose(got.variance, second - got.mean.square())
    noise = sum(w * m.noise_variance.item() for w, m in zip(WEIGHTS, members))
    assert torch.allclose(mixture.observed(X).aleatoric, torch.full((4,), noise).double())
    assert torch.equal(mixture.latent(X).aleatoric, torch.zeros(4).double())


def test_weights_are_normalised_in_float64(members):
    assert MixturePosterior(members).weights.tolist() == [1 / 3] * 3
    assert (
        MixturePosterior(members, [1 / 3, 1 / 3, 1 / 3]).weights.tolist() == [1 / 3] * 3
    )  # as a file gives them
    assert MixturePosterior(members, torch.tensor([2.0, 1.0, 1.0])).weights.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0, -1.0], [0.0] * 3, [1.0, 1.0, math.nan], [1.0, 1.0, math.inf]]
)
def test_weights_that_are_none_are_refused(members, weights):
    with pytest.raises(OptionError, match="3 finite non-negative numbers"):
        MixturePosterior(members, weights)


def test_members_must_fit_together(members, two_outputs):
    with pytest.raises(OptionError, match="at least one member"):
        MixturePosterior([])
    with pytest.raises(DataError, match="same numbers of inputs and outputs"):
        MixturePosterior([members[0], two_outputs.members[0]])


def test_members_must_predict_gaussians(members, mixture):
    class Network(FunctionPosterior):
        num_inputs = 1

        def latent(self, x):
            return Samples(torch.randn(3, len(x)))

        observed = latent

        def draw(self, n=1, seed=None):
            return FunctionDraws([lambda x: x[:, 0]] * n)

    with pytest.raises(OptionError, match="not Samples"):
        MixturePosterior([members[0], Network()]).latent(X)
    with pytest.raises(OptionError, match="not Mixture"):
        MixturePosterior([members[0], mixture]).latent(X)
    with pytest.raises(OptionError, match="Network cannot take in more observations"):
        Network().condition(X, X[:, 0])


# ---- draws


def test_members_are_drawn_in_proportion_to_their_weights(members):
    n = 600
    far = MixturePosterior([members[0], members[2]], [0.3, 0.7])  # 30 apart: a value tells its member
    high = (far.draw(n, seed=0)(X[1:2]) > 15).double().mean().item()
    error = math.sqrt(0.3 * 0.7 / n)
    assert high == pytest.approx(0.7, abs=4 * error)
    assert abs(high - 0.5) > 4 * error  # the twin: members in turn, whatever their weights


def test_every_draw_stays_with_one_member_and_answers_as_the_same_function(members):
    draws = MixturePosterior([members[0], members[2]]).draw(20, seed=1)
    values = draws(X)
    assert values.shape == (20, 4)
    near = values > 15
    assert (near.all(1) | (~near).all(1)).all() and near[:, 0].any() and not near[:, 0].all()
    for k in (0, 7, 19):  # anywhere, in any order and company, again and again
        function = draws[k]
        assert torch.allclose(function(X), values[k])
        assert torch.allclose(function(X.flip(0)), values[k].flip(0))
        assert torch.allclose(function(X[2:3]), values[k, 2:3])


def test_draws_are_a_sequence(mixture):
    draws = mixture.draw(5, seed=0)
    assert len(draws) == 5 and len(list(draws)) == 5
    part = draws[1:3]
    assert isinstance(part, FunctionDraws) and len(part) == 2
    assert torch.equal(part(X), draws(X)[1:3])
    assert torch.equal(draws[-1](X), draws(X)[4])
    with pytest.raises(IndexError):
        draws[5]


def test_draws_have_the_mixture_s_joint_moments(members):
    n = 4000
    mixture = MixturePosterior(members[:2], [0.3, 0.7])
    values, want = mixture.draw(n, seed=2)(X), mixture.latent(X)
    assert ((values.mean(0) - want.mean).abs() < 5 * values.std(0) / math.sqrt(n)).all()
    centred = values - want.mean
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / math.sqrt(n)
    # pathwise draws have a prior of finitely many features: allow 2 % of the prior variance beside the error
    slack = 0.02 * members[0].scaling.y_scale.item() ** 2
    assert ((products.mean(0) - want.covariance).abs() < 5 * error + slack).all()
    twin = torch.stack([values[torch.randperm(n), j] for j in range(4)], dim=1) - want.mean  # marginal draws
    assert ((twin[:, 1] * twin[:, 2]).mean() - want.covariance[1, 2]).abs() > 5 * error[1, 2]


def test_a_seed_gives_the_same_functions_and_leaves_the_global_state(mixture):
    before = torch.get_rng_state()
    first, again, other = (mixture.draw(6, seed)(X) for seed in (3, 3, 4))
    fresh = [mixture.draw(2)(X) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(*fresh)


def test_several_outputs(two_outputs):
    assert two_outputs.latent(X).mean.shape == (4, 2)
    assert two_outputs.draw(3, seed=0)(X).shape == (3, 4, 2)
    assert two_outputs.observed(X).rsample(5, seed=0).shape == (5, 4, 2)


# ---- conditioning


@pytest.mark.parametrize("size", [1, 3])
def test_conditioning_reweights_by_the_joint_density_of_what_was_seen(members, size):
    mixture = MixturePosterior(members[:2], [0.3, 0.7])
    x = torch.tensor([[0.3], [0.35], [1.2]]).double()[:size]
    y = members[0].latent(x).mean + 0.05
    after = mixture.condition(x, y)
    parts = [m.observed(x) for m in mixture.members]
    joint = np.array(
        [
            w * stats.multivariate_normal(p.mean.numpy(), p.covariance.numpy()).pdf(y.numpy())
            for w, p in zip([0.3, 0.7], parts)
        ]
    )
    np.testing.assert_allclose(after.weights.numpy(), joint / joint.sum(), rtol=1e-8)
    assert mixture.weights.tolist() == [0.3, 0.7]  # this one stays as it is
    if size == 3:  # the twin multiplies marginal densities
        marginal = np.array([w * p.log_prob(y).sum().exp().item() for w, p in zip([0.3, 0.7], parts)])
        assert np.abs(after.weights.numpy() - marginal / marginal.sum()).max() > 0.01


def test_conditioned_members_are_gaussian_conditionals(members):
    x, y = torch.tensor([[0.3], [1.2]]).double(), torch.tensor([0.5, -0.4]).double()
    after = MixturePosterior(members[:2], [0.3, 0.7]).condition(x, y)
    for before, now in zip(members[:2], after.members):
        joint = before.latent(torch.cat([x, X]))
        mean, covariance = joint.mean.numpy(), joint.covariance.numpy()
        seen = covariance[:2, :2] + before.noise_variance.item() * np.eye(2)
        gain = covariance[2:, :2] @ np.linalg.inv(seen)
        np.testing.assert_allclose(now.latent(X).mean, mean[2:] + gain @ (y.numpy() - mean[:2]), atol=1e-6)
        np.testing.assert_allclose(
            now.latent(X).covariance, covariance[2:, 2:] - gain @ covariance[:2, 2:], atol=1e-6
        )


def test_conditioning_all_at_once_or_in_turn_gives_the_same_mixture(members):
    mixture = MixturePosterior(members[:2], [0.3, 0.7])
    x, y = torch.tensor([[0.3], [1.2]]).double(), torch.tensor([0.5, -0.4]).double()
    once, twice = mixture.condition(x, y), mixture.condition(x[:1], y[:1]).condition(x[1:], y[1:])
    assert torch.allclose(once.weights, twice.weights, rtol=1e-5)
    assert torch.allclose(once.latent(X).mean, twice.latent(X).mean, atol=1e-5)


def test_an_impossible_member_is_ruled_out_without_overflow(mixture):
    after = mixture.condition(X, torch.zeros(4).double() + 1e-3)
    assert after.weights[2].item() < 1e-12 and torch.isfinite(after.weights).all()
    assert after.weights.sum().item() == pytest.approx(1.0)
    assert torch.isfinite(after.latent(X).mean).all()


def test_conditioning_several_outputs(two_outputs):
    x = torch.tensor([[0.3], [1.2]]).double()
    y = two_outputs.members[1].latent(x).mean
    after = two_outputs.condition(x, y)
    joint = []
    for w, m in zip([0.25, 0.75], two_outputs.members):
        p = m.observed(x)
        columns = [
            stats.multivariate_normal(p.mean[:, i].numpy(), p.covariance[i].numpy()).logpdf(y[:, i].numpy())
            for i in range(2)
        ]
        joint.append(math.log(w) + sum(columns))
    wanted = 1 / (1 + math.exp(joint[0] - joint[1]))
    assert after.weights[1].item() == pytest.approx(wanted, abs=1e-9)
    assert after.latent(X).mean.shape == (4, 2)
