"""Networks inside BoTorch: joint samples of functions, gradients, batches, and the linear network whose GP is known."""

import subprocess
import sys

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    ScalarizedPosteriorTransform,
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from gpytorch.kernels import ConstantKernel, LinearKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean

import fspace
from fspace.botorch_draws import DrawnFunctions
from fspace.errors import DataError, OptionError
from fspace.inference.gp import Scaling
from fspace.inference.numerics import seeded
from fspace.inference.weights import METHODS, NUTS, Laplace
from fspace.inference.weights.likelihoods import GaussianNoise
from fspace.inference.weights.network import Network
from fspace.inference.weights.posterior import posterior_of
from fspace.inference.weights.priors import GaussianPrior
from fspace.inference.weights.problem import Problem, Report, Training
from fspace.kernels import MLP

BOX = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
GAUSSIAN = ("laplace", "functional_laplace")
DRAWN = ("ensemble", "mfvi", "map")
SLOW = ("swag", "dropout", "sgld", "fvi", "hmc", "nuts", "functional_prior", "sghmc", "csgld", "multiswag")


def inputs(n, seed=0):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hill(x):
    return -((x - 0.3) ** 2).sum(-1)


_fitted = {}


def fitted(name, outputs=1):
    """A quick fit by each method, once."""
    if (name, outputs) not in _fitted:
        x = inputs(20)
        y = hill(x) if outputs == 1 else torch.stack([hill(x), x[:, 0]], 1)
        options = {"hidden": (12,), "activation": "tanh", "epochs": 60, "likelihood": "gaussian"}
        method = NUTS(samples=16, chains=1, warmup=16, max_tree_depth=4) if name == "nuts" else name
        _fitted[name, outputs] = fspace.BNNRegressor(method, progress=False, **options).fit(x, y).posterior_
    return _fitted[name, outputs]


def test_all_methods_are_tested():
    assert {*GAUSSIAN, *DRAWN, *SLOW} >= set(METHODS)


# ---- the linear network, whose posterior is a GP


def linear_network(x, y, noise, scale=None):
    """Laplace's posterior of a linear network with known noise, exact; and the prior variances of weights and bias."""
    network = Network.of(MLP(2, (), 1).double())
    scales = GaussianPrior().scales(network) if scale is None else torch.full((3,), scale).double()
    likelihood = GaussianNoise(1, torch.tensor([noise]).double().log())
    problem = Problem(
        network,
        scales,
        likelihood,
        x,
        y[:, None],
        1.0,
        0,
        Training(epochs=500, batch_size=60, learning_rate=0.1),
        lambda **_: None,
        Report(),
    )
    distribution, likelihood = Laplace("full", tune=False).fit(problem)
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    scaling = Scaling(one, one, zero, one, zero[:1], one[:1])
    return posterior_of(network, distribution, likelihood, scaling, True, "laplace"), scales.square()


def botorch_gp(x, y, noise, variances):
    """BoTorch's exact GP with the kernel w x'x + b of the linear network's prior."""
    slope, offset = LinearKernel(), ConstantKernel()
    slope.variance, offset.constant = variances[0], variances[2]
    likelihood = GaussianLikelihood()
    likelihood.noise = noise
    model = SingleTaskGP(
        x,
        y[:, None],
        likelihood=likelihood,
        covar_module=slope + offset,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    return model.double().eval()


@pytest.fixture(scope="module")
def linear():
    x = inputs(9, 3)
    y = x[:, 0] - 0.5 * x[:, 1] + 0.3 * torch.randn(9, generator=torch.Generator().manual_seed(1)).double()
    ours, variances = linear_network(x, y, 0.1)
    twin, _ = linear_network(x, y, 0.1, scale=0.5)  # another prior is another GP
    return x, y, ours, botorch_gp(x, y, 0.1, variances), twin


def acquisition(name, model, x, y):
    """A fresh acquisition function with its own sampler."""
    sampler = get_sampler(model.posterior(x[:1]), torch.Size([64]), seed=4)
    with seeded(4):
        if name == "qLogEI":
            return qLogExpectedImprovement(model, y.max(), sampler=sampler, X_pending=inputs(1, 9))
        if name.startswith("qLogNEI"):
            # two of the rows: linear functions have rank 3, and the jitter of a singular joint would be compared
            baseline = x[y.topk(2).indices] if name == "qLogNEI of two" else x
            return qLogNoisyExpectedImprovement(model, baseline, sampler=sampler, cache_root=False)
        if name == "LogEI":
            return LogExpectedImprovement(model, y.mean())
        return UpperConfidenceBound(model, beta=4.0)


@pytest.mark.parametrize(
    "name, q", [("qLogEI", 1), ("qLogEI", 2), ("qLogNEI of two", 1), ("LogEI", 1), ("UCB", 1)]
)
def test_acquisition_of_the_linear_network_is_botorchs_of_its_gp(linear, name, q):
    x, y, ours, theirs, twin = linear
    candidates = inputs(12 * q, 5).reshape(12, q, 2)
    values = acquisition(name, ours.as_botorch(), x, y)(candidates)
    assert torch.allclose(values, acquisition(name, theirs, x, y)(candidates), atol=2e-4)
    other = acquisition(name, twin.as_botorch(), x, y)(candidates)
    assert not torch.allclose(other, values, atol=1e-2)


def test_the_linear_network_is_conditioned_as_its_gp(linear):
    x, y, ours, theirs, _ = linear
    new, seen, at = inputs(4, 8), torch.tensor([[1.0], [0.0], [2.0], [0.5]]).double(), inputs(5, 6)
    got = ours.as_botorch().condition_on_observations(new, seen).posterior(at)
    theirs.posterior(at)  # BoTorch conditions what it has cached
    want = theirs.condition_on_observations(new, seen, noise=torch.full((4, 1), 0.1).double()).posterior(at)
    assert torch.allclose(got.mean, want.mean, atol=1e-5)
    assert torch.allclose(got.distribution.covariance_matrix, want.distribution.covariance_matrix, atol=1e-5)
    assert not torch.allclose(got.mean, theirs.posterior(at).mean, atol=1e-2)
    gradient = qKnowledgeGradient(ours.as_botorch(), num_fantasies=2)
    point = inputs(3, 2).reshape(1, 3, 2).requires_grad_()
    gradient(point).sum().backward()
    assert point.grad.abs().sum() > 0


# ---- every method


@pytest.mark.parametrize(
    "name", [*GAUSSIAN, *DRAWN, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_batches_and_joint_samples(name):
    posterior = fitted(name)
    model, batch = posterior.as_botorch(), inputs(24, 3).reshape(2, 4, 3, 2)
    got, alone = model.posterior(batch), model.posterior(batch[1, 2])
    want = posterior.latent(batch[1, 2])
    assert got.mean.shape == got.variance.shape == (2, 4, 3, 1)
    for found in (got.mean[1, 2], alone.mean):
        assert torch.allclose(found[:, 0], want.mean, atol=1e-9)
    assert torch.allclose(got.variance[1, 2, :, 0], want.variance, atol=1e-8)
    noisy = model.posterior(batch, observation_noise=True)
    aleatoric = posterior.observed(batch[1, 2]).aleatoric
    assert torch.allclose((noisy.variance - got.variance)[1, 2, :, 0], aleatoric, atol=1e-6)
    own = model.posterior(batch[0], observation_noise=torch.tensor([[0.7]]).double())
    assert torch.allclose(own.variance - got.variance[0], torch.full((4, 3, 1), 0.7).double(), atol=1e-6)
    samples = got.rsample(torch.Size([5]))
    assert samples.shape == (5, 2, 4, 3, 1)
    assert noisy.rsample(torch.Size([2, 3])).shape == (2, 3, 2, 4, 3, 1)
    assert get_sampler(got, torch.Size([16]), seed=0)(got).shape == (16, 2, 4, 3, 1)


@pytest.mark.parametrize("name", ["laplace", "ensemble", "mfvi"])
def test_samples_have_the_joint_covariance_of_the_functions(name):
    """Monte Carlo error of an entry of the covariance of 4096 samples: its standard error is about sqrt(2 / 4096) times
    the variance; the independent twin has the same marginals and is rejected."""
    posterior, x = fitted(name), inputs(3, 7) * 0.2 + 0.4
    joint = posterior.as_botorch().posterior(x)
    with seeded(0):
        samples = joint.rsample(torch.Size([4096]))[..., 0]
    want = posterior.latent(x).covariance
    error = (2 / 4096) ** 0.5 * want.diagonal().max()
    centred = samples - samples.mean(0)
    assert ((centred.mT @ centred / 4096 - want).abs() < 5 * error).all()
    shuffled = torch.stack([column[torch.randperm(4096)] for column in centred.unbind(1)], 1)
    assert ((shuffled.mT @ shuffled / 4096 - want).abs() > 5 * error).any()


def test_each_sample_is_one_network():
    """All q points of a sample, in all batches, come from the same member of the ensemble."""
    posterior, x = fitted("ensemble"), inputs(12, 4).reshape(4, 3, 2)
    found = posterior.as_botorch().posterior(x)
    members = posterior.latent(x.flatten(0, 1)).values.reshape(-1, 4, 3)
    samples = get_sampler(found, torch.Size([32]), seed=1)(found)[..., 0]
    distance = (samples[:, None] - members).abs().flatten(2).amax(-1)
    assert distance.amin(1).max() < 1e-12
    assert len(distance.argmin(1).unique()) == len(members) == 5
    counts = torch.bincount(distance.argmin(1))
    assert counts.min() >= 6 and counts.max() <= 7  # quasi-random picks are even


@pytest.mark.parametrize("name", ["laplace", "functional_laplace", "ensemble", "mfvi"])
@pytest.mark.parametrize("q", [1, 2])
def test_gradient_is_the_finite_difference(name, q):
    x = inputs(20)
    function = acquisition("qLogNEI", fitted(name).as_botorch(), x, hill(x))
    point = (0.25 + 0.2 * inputs(q, 11))[None].requires_grad_()
    function(point).sum().backward()
    with torch.no_grad():
        step = torch.zeros_like(point)
        step[0, q - 1, 1] = 1e-5
        slope = ((function(point + step) - function(point - step)) / 2e-5).item()
    assert point.grad[0, q - 1, 1].item() == pytest.approx(slope, rel=1e-2, abs=1e-6)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("name", ["laplace", "ensemble"])
def test_a_search_improves(name):
    x = inputs(20)
    function = acquisition("qLogEI", fitted(name).as_botorch(), x, hill(x))
    found, value = optimize_acqf(function, BOX, q=2, num_restarts=2, raw_samples=16, options={"maxiter": 20})
    assert found.shape == (2, 2)
    assert value > function(inputs(64, 1).reshape(32, 2, 2)).max() - 1e-9


@pytest.mark.parametrize("name", ["laplace", "ensemble"])
def test_several_outputs(name):
    posterior, x = fitted(name, 2), inputs(6, 2).reshape(2, 3, 2)
    model = posterior.as_botorch()
    assert model.num_outputs == 2 and model.posterior(x).mean.shape == (2, 3, 2)
    for part in (model.subset_output([1]).posterior(x), model.posterior(x, output_indices=[1])):
        assert torch.allclose(part.mean[..., 0], posterior.latent(x.flatten(0, 1)).mean[:, 1].reshape(2, 3))


def test_a_mixture_of_linearised_networks():
    parts = [fitted("laplace"), fitted("functional_laplace")]
    mixed = fspace.posterior.MixturePosterior(parts, [0.25, 0.75])
    model, x = mixed.as_botorch(), inputs(4)
    assert torch.allclose(model.posterior(x).mean[:, 0], mixed.latent(x).mean)
    seen = model.condition_on_observations(inputs(2, 5), torch.tensor([[0.0], [0.1]]).double())
    assert seen.posterior(x[None]).rsample(torch.Size([3])).shape == (3, 1, 4, 1)


@pytest.mark.parametrize("name", ["laplace", "ensemble"])
def test_no_points_and_too_few_dimensions(name):
    model = fitted(name).as_botorch()
    for shape in ((3, 0), (0, 2)):
        empty = inputs(1).new_empty(*shape, inputs(1).shape[-1])
        assert model.posterior(empty).mean.shape == (*shape, 1)
    with pytest.raises(DataError, match="One point is"):
        model.posterior(inputs(1)[0])


def test_refusals():
    model, x = fitted("ensemble").as_botorch(), inputs(3)
    with pytest.raises(OptionError, match="fit it again"):
        model.condition_on_observations(x, hill(x)[:, None])
    with pytest.raises(OptionError, match="LogExpectedImprovement is a formula for Gaussians"):
        LogExpectedImprovement(model, 0.0)
    with pytest.raises(OptionError, match="objective"):
        model.posterior(x, posterior_transform=ScalarizedPosteriorTransform(torch.ones(1)))
    labels = (hill(x) > hill(x).median()).long().numpy()
    classes = fspace.BNNClassifier("map", hidden=(4,), epochs=5, progress=False).fit(x, labels)
    of_classes = classes.posterior_.as_botorch()
    assert isinstance(of_classes.posterior(x), DrawnFunctions)
    with pytest.raises(OptionError, match="Categorical"):
        of_classes.posterior(x, observation_noise=True)


def test_formulas_are_refused_where_only_a_network_was_used():
    """In a process of its own: what refuses must not hang on another kind of model having been imported."""
    code = """
import torch, fspace
from botorch.acquisition import LogExpectedImprovement
x = torch.rand(8, 2).double().numpy()
model = fspace.BNNRegressor("ensemble", hidden=(4,), epochs=2, progress=False).fit(x, x[:, 0])
LogExpectedImprovement(model.posterior_.as_botorch(), 0.0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is a formula for Gaussians" in done.stderr
