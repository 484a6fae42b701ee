"""A fitted posterior inside BoTorch: the joint, its gradient, noise, conditioning, mixtures, searches that improve."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    PosteriorMean,
    ScalarizedPosteriorTransform,
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qNoisyExpectedImprovement,
    qSimpleRegret,
)
from botorch.acquisition.analytic import LogProbabilityOfImprovement
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling import IIDNormalSampler, SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from scipy import stats

import fspace
from fspace.botorch_model import MixtureOfGaussians
from fspace.errors import DataError, OptionError
from fspace.posterior import MixturePosterior
from fspace.predictive import Samples

BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
WEIGHTS = [0.2, 0.5, 0.3]


def hill(x):
    return -((x - 0.3) ** 2).sum(-1)


def inputs(n, seed=0):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_hill(x, seed=0):
    return hill(x) + 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def fitted():
    x = inputs(15)
    return fspace.GPRegressor(kernel="rbf").fit(x, hill(x)), x


@pytest.fixture(scope="module")
def noisy():
    """A posterior with real noise, and the data."""
    x = inputs(14, 1)
    y = noisy_hill(x)
    return fspace.GPRegressor(kernel="matern", inference="exact").fit(x, y).posterior_, x, y


@pytest.fixture(scope="module")
def two_outputs():
    x = inputs(14, 1)
    y = torch.stack([noisy_hill(x), x[:, 0] + 0.1 * noisy_hill(x, 5)], dim=-1)
    return fspace.GPRegressor(kernel="matern").fit(x, y).posterior_


@pytest.fixture(scope="module")
def mixture():
    """Three fits to different data, so that the members disagree."""
    members = []
    for seed in range(3):
        x = inputs(10, seed)
        members.append(fspace.GPRegressor(kernel="matern").fit(x, noisy_hill(x, seed)).posterior_)
    return MixturePosterior(members, WEIGHTS)


def by_hand(posterior, x, y, query, noise):
    """Conditional mean and covariance of f(query) given noisy y at x, in numpy, one output."""
    joint = posterior.latent(torch.cat([x, query]))
    mean, covariance, n = joint.mean.numpy(), joint.covariance.numpy(), len(x)
    gain = covariance[n:, :n] @ np.linalg.inv(covariance[:n, :n] + noise * np.eye(n))
    return mean[n:] + gain @ (y.numpy() - mean[:n]), covariance[n:, n:] - gain @ covariance[:n, n:]


# ---- Gaussian


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


def test_a_tensor_of_noise_is_added(noisy):
    model, x = noisy[0].as_botorch(), inputs(4, 9)
    added = model.posterior(x, observation_noise=torch.tensor([[0.7]])).variance - model.posterior(x).variance
    assert torch.allclose(added, torch.full((4, 1), 0.7).double(), atol=1e-7)


def test_batches_are_as_one_at_a_time(noisy, two_outputs):
    batch = inputs(24, 3).reshape(2, 4, 3, 2)
    for posterior in (noisy[0], two_outputs):
        model = posterior.as_botorch()
        got = model.posterior(batch)
        assert got.mean.shape == got.variance.shape == (2, 4, 3, model.num_outputs)
        alone = model.posterior(batch[1, 2])
        assert torch.allclose(got.mean[1, 2], alone.mean)
        assert torch.allclose(
            got.distribution.covariance_matrix[1, 2], alone.distribution.covariance_matrix, atol=1e-12
        )


def test_outputs_can_be_picked(two_outputs):
    model, x = two_outputs.as_botorch(), inputs(3, 4)
    want = two_outputs.latent(x)
    for got in (model.posterior(x, output_indices=[1]), model.subset_output([1]).posterior(x)):
        assert torch.allclose(got.mean, want.mean[:, 1:])
        assert torch.allclose(got.distribution.covariance_matrix, want.covariance[1])
    assert (
        model.subset_output([1, 0])
        .subset_output([0])
        .posterior(x)
        .mean.equal(model.posterior(x, output_indices=[1]).mean)
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
    found, _ = optimize_acqf(acquisition, BOUNDS, q=1, num_restarts=3, raw_samples=32)
    assert hill(found).max() > hill(x).max()


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_points_together_or_on_the_data_can_be_sampled(size):
    x = inputs(15)
    source = fspace.GPRegressor(kernel="rbf").fit(x, size * hill(x)).posterior_
    points = torch.cat([x[:3], x[:3], x[3:4].expand(4, 2)])
    posterior = source.as_botorch().posterior(points)
    samples = posterior.rsample(torch.Size([500]))[..., 0]
    error = (samples - size * hill(points)).abs().max() / size
    assert error < 0.02 and torch.isfinite(samples).all()
    variance = posterior.distribution.covariance_matrix.diagonal()
    assert torch.allclose(variance, source.latent(points).variance, rtol=0, atol=1e-6 * size**2)


def test_what_predicts_no_gaussian_is_refused(noisy):
    class Network(type(noisy[0])):
        def observed(self, x):
            return Samples(torch.randn(5, len(x)))

    network = copy.copy(noisy[0])
    network.__class__ = Network
    with pytest.raises(OptionError, match="Network predicts Samples"):
        network.as_botorch().posterior(inputs(2))


# ---- conditioning


def test_conditioning_shrinks_the_variance_there_and_only_informs(fitted):
    model, x = fitted
    new = torch.tensor([[1.4, 1.4]], dtype=torch.float64)
    before = model.posterior_.as_botorch()
    after = before.condition_on_observations(new, hill(new)[:, None])
    assert after.posterior(new).variance.item() < 0.1 * before.posterior(new).variance.item()
    assert before.posterior(new).variance.item() == pytest.approx(
        model.posterior_.latent(new).variance.item()
    )


@pytest.mark.parametrize("noise", [None, 0.04])
def test_batches_of_observations_are_gaussian_conditioning(noisy, noise):
    posterior = noisy[0]
    x, y, query = inputs(12, 5).reshape(4, 3, 2), torch.randn(6, 4, 3, 1).double(), inputs(2, 6)
    given = None if noise is None else torch.full((4, 3, 1), noise)
    after = posterior.as_botorch().condition_on_observations(x, y, noise=given)
    assert after.batch_shape == (6, 4)
    got = after.posterior(query)
    assert got.mean.shape == (6, 4, 2, 1)
    variance = posterior.noise_variance.item() if noise is None else noise
    for i, j in ((0, 0), (5, 2)):
        mean, covariance = by_hand(posterior, x[j], y[i, j, :, 0], query, variance)
        np.testing.assert_allclose(got.mean[i, j, :, 0], mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(got.distribution.covariance_matrix[i, j], covariance, rtol=1e-6, atol=1e-9)


def test_one_batch_is_the_posterior_s_own_condition(noisy, two_outputs):
    x, query = inputs(3, 7), inputs(4, 8)
    for posterior, y in ((noisy[0], torch.randn(3, 1).double()), (two_outputs, torch.randn(3, 2).double())):
        model = posterior.as_botorch()
        permanent = model.condition_on_observations(x, y).posterior(query)
        batched = model.condition_on_observations(x[None], y[None]).posterior(query)
        assert torch.allclose(permanent.mean, batched.mean[0], rtol=1e-5, atol=1e-6)
        assert torch.allclose(permanent.variance, batched.variance[0], rtol=1e-4, atol=1e-6)


def test_conditioning_twice_is_conditioning_on_both(two_outputs):
    model = two_outputs.as_botorch()
    x, y, query = inputs(10, 5).reshape(2, 5, 2), torch.randn(2, 5, 2).double(), inputs(3, 6)
    once = model.condition_on_observations(x, y).posterior(query, observation_noise=True)
    first = model.condition_on_observations(x[:, :2], y[:, :2])
    twice = first.condition_on_observations(x[:, 2:], y[:, 2:]).posterior(query, observation_noise=True)
    assert torch.allclose(once.mean, twice.mean, rtol=1e-6, atol=1e-9)
    assert torch.allclose(once.variance, twice.variance, rtol=1e-6, atol=1e-9)


def test_observations_of_some_outputs_inform_those(two_outputs):
    x, y, query = inputs(3, 5), torch.randn(3, 1).double(), inputs(2, 6)
    part = two_outputs.as_botorch().subset_output([1]).condition_on_observations(x, y)
    whole = two_outputs.as_botorch().condition_on_observations(x, torch.cat([y - 7.0, y], dim=-1))
    assert torch.allclose(
        part.posterior(query).mean, whole.posterior(query).mean[:, 1:], rtol=1e-5, atol=1e-6
    )


def test_observations_of_another_shape_are_refused(noisy):
    with pytest.raises(DataError, match=r"Y must be \[..., 3, 1\]"):
        noisy[0].as_botorch().condition_on_observations(inputs(3), torch.zeros(3, 2))


def reference_model(posterior, x, y) -> SingleTaskGP:
    """BoTorch's exact GP with the parameters that the posterior was fitted with."""
    scale, shift = posterior.scaling.y_scale.item(), posterior.scaling.y_shift.item()
    model = SingleTaskGP(
        x,
        ((y - shift) / scale)[:, None],
        covar_module=copy.deepcopy(posterior.basis.kernel),
        mean_module=ConstantMean(),
        likelihood=GaussianLikelihood(),
        outcome_transform=None,
    )
    model.mean_module.constant.data.zero_()
    model.likelihood.noise = posterior.basis.noise.item()
    forward = model.forward
    model.forward = lambda value: forward(posterior.scaling.inputs(value))
    return model.double().eval()


def test_knowledge_gradient_is_that_of_botorch_s_own_gp(noisy):
    posterior, x, y = noisy
    scale, shift = posterior.scaling.y_scale.item(), posterior.scaling.y_shift.item()
    reference = reference_model(posterior, x, y)
    points = inputs(30, 11).reshape(3, 10, 2)  # q = 2 candidates and 8 fantasies' solutions
    values = []
    for model in (posterior.as_botorch(), reference):
        sampler = SobolQMCNormalSampler(torch.Size([8]), seed=3)
        acquisition = qKnowledgeGradient(model, num_fantasies=8, sampler=sampler)
        point = points.clone().requires_grad_()
        value = acquisition(point)
        value.sum().backward()
        values.append((value.detach(), point.grad))
    (mine, slope), (theirs, their_slope) = values
    assert torch.allclose(mine, theirs * scale + shift, rtol=1e-4, atol=1e-6)
    assert torch.allclose(slope, their_slope * scale, rtol=1e-3, atol=1e-5)
    assert slope[:, :2].abs().max() > 1e-4  # the gradient reaches the candidates, not only the solutions


def test_expected_improvement_is_that_of_botorch_s_own_gp(noisy):
    posterior, x, y = noisy
    scale, shift = posterior.scaling.y_scale.item(), posterior.scaling.y_shift.item()
    reference, points, best = reference_model(posterior, x, y), inputs(20, 12)[:, None], y.max().item()
    mine = LogExpectedImprovement(posterior.as_botorch(), best)(points).exp()
    theirs = LogExpectedImprovement(reference, (best - shift) / scale)(points).exp() * scale
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-9)


def test_knowledge_gradient_search_runs(noisy):
    acquisition = qKnowledgeGradient(noisy[0].as_botorch(), num_fantasies=4)
    found, value = optimize_acqf(
        acquisition, BOUNDS, q=1, num_restarts=2, raw_samples=8, options={"maxiter": 5}
    )
    assert found.shape == (1, 2) and torch.isfinite(value)
    start = PosteriorMean(noisy[0].as_botorch())(inputs(200, 3)[:, None]).max()
    assert value > start - 0.1 * noisy[2].std()


def test_fantasies_of_no_point_change_nothing(noisy):
    model, query = noisy[0].as_botorch(), inputs(2, 6)
    empty = model.fantasize(torch.empty(0, 2).double(), SobolQMCNormalSampler(torch.Size([3])))
    assert torch.allclose(empty.posterior(query).mean, model.posterior(query).mean.expand(3, 2, 1))


# ---- mixtures


def test_mixture_moments(mixture):
    x = inputs(15, 20).reshape(5, 3, 2)
    got = mixture.as_botorch().posterior(x)
    for i in range(5):
        want = mixture.latent(x[i])
        assert torch.allclose(got.mean[i, :, 0], want.mean)
        assert torch.allclose(got.variance[i, :, 0], want.variance)
    noisy = mixture.as_botorch().posterior(x[0], observation_noise=True)
    assert torch.allclose(noisy.variance[:, 0], mixture.observed(x[0]).variance)


def test_mixture_samples_are_joint_and_of_one_component(mixture):
    x, n = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).double(), 40_000
    samples = mixture.as_botorch().posterior(x).rsample(torch.Size([n]))[..., 0]
    want = mixture.latent(x)
    centred = samples - want.mean
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - want.covariance).abs() < 5 * error).all()
    # the twin samples one Gaussian of the same moments: its fourth moments are others
    matched = MultivariateNormal(want.mean, want.covariance).rsample(torch.Size([n]))
    assert stats.kstest(samples[:, 0].numpy(), lambda y: _cdf(want, y)).pvalue > 1e-3
    assert stats.kstest(matched[:, 0].numpy(), lambda y: _cdf(want, y)).pvalue < 1e-6
    # another twin takes a component for every point: the spread of the means is lost from the covariance
    within = sum(w * c.covariance[0, 1] for w, c in zip(want.weights, want.components))
    assert (within - want.covariance[0, 1]).abs() > 10 * error[0, 1]


def _cdf(predictive, y):
    return sum(
        w.item() * stats.norm(c.mean[0].item(), c.stddev[0].item()).cdf(y)
        for w, c in zip(predictive.weights, predictive.components)
    )


@pytest.mark.parametrize("sampler", [SobolQMCNormalSampler, IIDNormalSampler, None])
def test_samplers_give_every_batch_the_same_normals(mixture, sampler):
    x = inputs(3, 20).expand(4, 3, 2)
    posterior = mixture.as_botorch().posterior(x)
    shape = torch.Size([256])
    sampler = get_sampler(posterior, shape, seed=0) if sampler is None else sampler(shape, seed=0)
    samples = sampler(posterior)
    assert samples.shape == (256, 4, 3, 1)
    assert torch.allclose(samples, samples[:, :1].expand_as(samples))
    assert torch.equal(samples, sampler(posterior))
    error = posterior.variance[0].sqrt() / 16
    assert ((samples.mean(0)[0] - posterior.mean[0]).abs() < 5 * error).all()


def test_many_points_fall_back_on_independent_normals():
    few, many = (
        MixtureOfGaussians([SimpleNamespace(mean=torch.zeros(n, 1))], torch.ones(1)) for n in (20_000, 22_000)
    )
    assert isinstance(get_sampler(few, torch.Size([2])), SobolQMCNormalSampler)
    assert isinstance(get_sampler(many, torch.Size([2])), IIDNormalSampler)


def test_mixture_of_several_outputs():
    x = inputs(10)
    y = torch.stack([hill(x), x[:, 0]], dim=-1)
    members = [
        fspace.GPRegressor(kernel=k).fit(x, y + 0.1 * i).posterior_ for i, k in enumerate(("rbf", "matern"))
    ]
    source = MixturePosterior(members, [0.3, 0.7])
    model, point = source.as_botorch(), inputs(6, 3).reshape(2, 3, 2)
    got = model.posterior(point)
    assert torch.allclose(got.mean[0], source.latent(point[0]).mean)
    assert torch.allclose(got.variance[1], source.latent(point[1]).variance)
    assert got.rsample(torch.Size([5])).shape == (5, 2, 3, 2)
    assert torch.allclose(model.posterior(point, output_indices=[1]).mean[..., 0], got.mean[..., 1])
    weights = torch.tensor([2.0, -1.0]).double()
    scalar = model.posterior(point, posterior_transform=ScalarizedPosteriorTransform(weights))
    assert torch.allclose(scalar.mean[..., 0], got.mean @ weights)
    parts = [member.latent(point[0]) for member in members]
    mean = torch.stack([p.mean @ weights for p in parts])
    inner = torch.stack([p.variance @ weights.square() for p in parts])
    share = torch.tensor([[0.3], [0.7]]).double()
    wanted = (share * (inner + mean.square())).sum(0) - (share * mean).sum(0).square()
    assert torch.allclose(scalar.variance[0, :, 0], wanted)
    assert scalar.rsample(torch.Size([4])).shape == (4, 2, 3, 1)


def test_monte_carlo_acquisition_is_the_average_of_the_members(mixture):
    """E max(f - best, 0) under the mixture is the weighted mean of the members' closed forms."""
    points, n = inputs(6, 30)[:, None], 4096
    best = mixture.latent(points[:, 0]).mean.max().item()
    alone = torch.stack([LogExpectedImprovement(m.as_botorch(), best)(points).exp() for m in mixture.members])
    wanted = torch.tensor(WEIGHTS).double() @ alone
    sampler = SobolQMCNormalSampler(torch.Size([n]), seed=0)
    got = qLogExpectedImprovement(mixture.as_botorch(), best, sampler=sampler)(points).exp()
    samples = sampler(mixture.as_botorch().posterior(points))[..., 0]
    error = (samples - best).clamp(min=0).std(0)[:, 0] / math.sqrt(
        n
    )  # of independent draws; Sobol's is smaller
    assert ((got - wanted).abs() < 5 * error + 1e-6).all()
    moments = mixture.latent(points[:, 0])
    z = (moments.mean - best) / moments.stddev  # the twin: expected improvement of the moment match
    normal = torch.distributions.Normal(0.0, 1.0)
    matched = moments.stddev * (normal.log_prob(z).exp() + z * normal.cdf(z))
    assert ((matched - wanted).abs() > 5 * error).any()


def test_gradient_through_a_mixture_is_the_finite_difference(mixture):
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
    acquisition = qLogExpectedImprovement(mixture.as_botorch(), -0.1, sampler=sampler)
    point = inputs(4, 31).reshape(2, 2, 2).requires_grad_()
    acquisition(point).sum().backward()
    step = torch.zeros_like(point)
    step[0, 1, 0] = 1e-5
    slope = (acquisition(point + step) - acquisition(point - step)).sum() / 2e-5
    assert slope.item() == pytest.approx(point.grad[0, 1, 0].item(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:qNoisyExpectedImprovement has known numerical issues")
@pytest.mark.parametrize("kind", [qLogNoisyExpectedImprovement, qNoisyExpectedImprovement])
def test_noisy_improvement_of_a_mixture(mixture, kind):
    sampler = SobolQMCNormalSampler(torch.Size([128]), seed=0)
    acquisition = kind(mixture.as_botorch(), inputs(6, 1), sampler=sampler)
    found, value = optimize_acqf(
        acquisition, BOUNDS, q=2, num_restarts=2, raw_samples=16, options={"maxiter": 8}
    )
    assert found.shape == (2, 2) and value > acquisition(inputs(2, 50)[None]).item()


def test_mean_and_spread_functions_take_mixtures_and_formulas_for_gaussians_refuse(mixture):
    model, points = mixture.as_botorch(), inputs(3, 4)[:, None]
    want = mixture.latent(points[:, 0])
    assert torch.allclose(PosteriorMean(model)(points), want.mean)
    assert torch.allclose(UpperConfidenceBound(model, beta=4.0)(points), want.mean + 2 * want.stddev)
    assert torch.isfinite(qSimpleRegret(model)(points)).all()
    for kind in (LogExpectedImprovement, LogProbabilityOfImprovement):
        with pytest.raises(OptionError, match=rf"{kind.__name__} is a formula for Gaussians.*mixture of 3"):
            kind(model, best_f=0.0)


def test_mixture_is_conditioned_and_reweighted_in_every_batch(mixture):
    x, query = inputs(3, 7), inputs(2, 8)
    y = torch.stack([m.observed(x).mean for m in mixture.members]) + 0.05  # every batch favours one member
    after = mixture.as_botorch().condition_on_observations(x, y[..., None])
    got = after.posterior(query)
    assert got.mean.shape == (3, 2, 1)
    for i in range(3):
        densities = [
            w * stats.multivariate_normal(p.mean.numpy(), p.covariance.numpy()).pdf(y[i].numpy())
            for w, p in zip(WEIGHTS, (m.observed(x) for m in mixture.members))
        ]
        share = np.array(densities) / sum(densities)
        means = [by_hand(m, x, y[i], query, m.noise_variance.item())[0] for m in mixture.members]
        np.testing.assert_allclose(got.mean[i, :, 0], share @ np.array(means), rtol=1e-5, atol=1e-8)
        alone = mixture.as_botorch().condition_on_observations(x, y[i, :, None]).posterior(query)
        assert torch.allclose(alone.mean, got.mean[i], rtol=1e-4, atol=1e-6)
        assert torch.allclose(alone.variance, got.variance[i], rtol=1e-3, atol=1e-6)
    assert got.rsample(torch.Size([5])).shape == (5, 3, 2, 1)


def test_knowledge_gradient_of_a_mixture(mixture):
    acquisition = qKnowledgeGradient(mixture.as_botorch(), num_fantasies=64)
    point = inputs(65 * 2, 40).reshape(2, 65, 2).requires_grad_()
    with torch.no_grad():
        point[:, 1:] = point[:, 1:2]  # all fantasies choose one point: nothing is gained over its mean
    value = acquisition(point)
    value.sum().backward()
    mean = mixture.latent(point[:, 1].detach()).mean
    spread = mixture.latent(point[:, 1].detach()).stddev
    assert ((value - mean).abs() < 5 * spread / 8).all()
    assert torch.isfinite(point.grad).all() and point.grad[:, 0].abs().max() > 0


def test_an_ensemble_of_deep_kernels_is_a_model():
    x = inputs(40)
    estimator = fspace.GPRegressor(kernel="deep", members=2).fit(x, noisy_hill(x))
    model = estimator.posterior_.as_botorch()
    point = inputs(6, 2).reshape(3, 2, 2).requires_grad_()
    value = qLogNoisyExpectedImprovement(model, x[:5], sampler=SobolQMCNormalSampler(torch.Size([32])))(point)
    value.sum().backward()
    assert value.shape == (3,) and torch.isfinite(point.grad).all() and point.grad.abs().max() > 0
    assert torch.allclose(model.posterior(point[1]).mean[:, 0], estimator.posterior_.latent(point[1]).mean)
