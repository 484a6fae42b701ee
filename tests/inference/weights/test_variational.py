"""Mean-field inference and dropout against what is known of them."""

import math
from dataclasses import replace

import pytest
import torch

from fspace.errors import OptionError
from fspace.inference.weights import MAP, MFVI, Dropout, Ensemble, GaussianPrior
from fspace.inference.weights.likelihoods import VaryingNoise
from fspace.inference.weights.mfvi import drawn_outputs
from fspace.inference.weights.problem import Training
from fspace.kernels import CausalConv, ConvNet

LONG = Training(epochs=700, batch_size=60, learning_rate=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_linear_regression_has_the_mean_and_the_diagonal_of_the_precision(linear, temperature):
    case = linear(temperature=temperature, training=LONG)
    q, _ = MFVI(tune=False).fit(case.problem)
    exact = case.diagonal
    # the bound's gradient is drawn; what is left of it at the end of the step sizes is far below a deviation
    assert ((q.mean - case.mean).abs() < 0.15 * exact.sqrt()).all()
    torch.testing.assert_close(q.scale.square(), exact, rtol=0.1, atol=0)
    assert (
        case.covariance.diagonal() / q.scale.square()
    ).max() > 1.5  # the twin: marginal variances are not these


def test_the_bound_is_below_the_evidence_and_near_it_where_inputs_do_not_correlate(linear):
    case = linear(orthogonal=True, training=LONG)
    MFVI(tune=False).fit(case.problem)
    prior = torch.diag(case.problem.scales.square())
    covariance = case.design @ prior @ case.design.mT + 0.3 * torch.eye(60).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(60).double(), covariance).log_prob(
        case.problem.y[:, 0]
    )
    bound = case.problem.report.figures["elbo"]
    # 32 draws of the log likelihood, whose deviation is that of half a chi-square of 4: sqrt(2)
    assert exact - bound > -5 * (2 / 32) ** 0.5 and exact - bound < 5 * (2 / 32) ** 0.5


def tuned_by_hand(case, noise):
    """Mean, variances, factor and bound of the best independent Gaussian and the best factor on its prior, in turns."""
    design, y, prior = case.design, case.problem.y[:, 0], case.problem.scales.square()
    gram, factor = design.mT @ design / noise, 1.0
    for _ in range(500):
        precision = gram + torch.diag(1.0 / (factor * prior))
        mean = torch.linalg.solve(precision, design.mT @ y / noise)
        variance = 1.0 / precision.diagonal()
        factor = ((mean.square() + variance) / prior).mean().item()
    misfit = (y - design @ mean).square().sum() + (variance * design.square().sum(0)).sum()
    likelihood = -0.5 * len(y) * math.log(2 * math.pi * noise) - 0.5 * misfit / noise
    divergence = 0.5 * (math.log(factor) * len(mean) - (variance / prior).log().sum())
    return mean, variance, factor, (likelihood - divergence).item()


def test_a_tuned_prior_has_the_factor_of_the_best_bound(linear):
    """The prior is too small: untuned, the mean is pulled to zero; tuned, the factor makes up for it."""
    case = linear(prior=GaussianPrior(0.05, 0.05), training=replace(LONG, epochs=1500))
    mean, variance, factor, bound = tuned_by_hand(case, 0.3)
    assert factor > 5
    q, _ = MFVI(tune=True).fit(case.problem)
    assert ((q.mean - mean).abs() < 0.15 * variance.sqrt()).all()
    torch.testing.assert_close(q.scale.square(), variance, rtol=0.1, atol=0)
    found = case.problem.report.figures["elbo"]
    assert abs(found - bound) < 5 * (2 / 32) ** 0.5  # as above, of 32 draws
    plain, _ = MFVI(tune=False).fit(replace(case.problem, training=replace(LONG, epochs=300)))  # the twin
    assert ((plain.mean - mean).abs() > 0.15 * variance.sqrt()).any()
    assert case.problem.report.figures["elbo"] < bound - 5 * (2 / 32) ** 0.5


@pytest.mark.parametrize("kind", ["linear", "conv", "sequence"])
def test_outputs_drawn_in_layers_have_the_moments_of_outputs_under_drawn_weights(made, kind):
    """One layer of weights with a deviation, the rest fixed, so that moments are known; both ways of drawing."""
    torch.manual_seed(0)
    if kind == "linear":
        module, x = torch.nn.Linear(3, 2), torch.randn(4, 3).double()
    elif kind == "conv":
        module, x = ConvNet(2, (2,), 2), torch.randn(4, 2, 4, 4).double()
    else:
        module, x = CausalConv(2, 2, (1,), 2), torch.randn(4, 4, 2).double()
    problem = made(module, x, torch.zeros(4, 2).double())
    mean = problem.start(1)[0] / problem.prior_scales
    mean[problem.network.size :] = 0
    scale = torch.zeros(problem.size).double()
    first = problem.network.layers[0]
    scale[slice(*first.weight)] = 0.3
    scale[slice(*first.bias)] = 0.2
    generator = torch.Generator().manual_seed(0)
    count = 400
    ours = torch.stack([drawn_outputs(problem, mean, scale, x, generator)[0] for _ in range(count)])
    states = problem.prior_means + problem.prior_scales * (
        mean + scale * torch.randn(count, problem.size).double()
    )
    theirs = problem.network.many(states[:, : problem.network.size], x)
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (2 / count) ** 0.5).all()
    kurtosis = ((theirs - theirs.mean(0)) / spread).pow(4).mean(0)
    assert ((ours.var(0) / theirs.var(0) - 1).abs() < 5 * (2 * (kurtosis - 1) / count).sqrt()).all()
    # rows are uncorrelated here, under one draw of weights for all they are not
    between = lambda f: (f[:, 0, 0] - f[:, 0, 0].mean()) @ (f[:, 1, 0] - f[:, 1, 0].mean()) / count  # noqa: E731
    assert between(ours).abs() < 5 * spread[0, 0] * spread[1, 0] / count**0.5


def test_dropped_weights_are_dropped_inputs(small):
    """A draw of dropout is the network with the same units off in every row, and its mean that of masks in training."""
    problem = small(training=Training(epochs=20))
    q, _ = Dropout(0.3).fit(problem)
    states = q.sample(4000, torch.Generator().manual_seed(0))
    second = states[:, 15:20]
    kept = (second != 0).double().mean().item()
    assert kept == pytest.approx(0.7, abs=5 * (0.21 / 20000) ** 0.5)
    torch.testing.assert_close(second[second != 0].abs().max(), (q.mean[15:20].abs() / 0.7).max())
    first = states[:, :10].reshape(-1, 5, 2)
    assert ((first == 0).all(1) | (first != 0).all(1)).all()  # whole inputs
    bias = states[:, 10:15]
    assert (bias == q.mean[10:15]).all()
    assert problem.report.figures["rate"] == 0.3


def test_the_rate_is_chosen_by_rows_not_learned_from(small):
    problem = small(n=60, training=Training(epochs=10))
    Dropout().fit(problem)
    figures = problem.report.figures
    assert figures["rate"] == float(max(figures["held_out_scores"], key=figures["held_out_scores"].get))


@pytest.mark.parametrize("method", [MAP(), Ensemble(2), Dropout(0.1)])
def test_methods_without_a_posterior_have_no_temperature(small, method):
    with pytest.raises(OptionError, match="claims none"):
        method.fit(small(temperature=0.1))


def test_map_of_linear_regression_is_ridge_and_has_no_spread(linear):
    case = linear(training=Training(epochs=600, batch_size=60, learning_rate=0.1))
    points, _ = MAP().fit(case.problem)
    torch.testing.assert_close(points.states[0], case.mean, atol=1e-6, rtol=0)


def test_an_ensemble_of_one_is_its_member(small):
    """Trained together or alone, a member is the same: it has its own start and own held-out rows."""
    both, _ = Ensemble(2, held_out=0.0, decay=1.0).fit(small(n=30, training=Training(epochs=20)))
    one, _ = Ensemble(1, held_out=0.0, decay=1.0).fit(small(n=30, training=Training(epochs=20)))
    alone, _ = MAP().fit(small(n=30, training=Training(epochs=20)))
    torch.testing.assert_close(one.states[0], both.states[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(one.states[0], alone.states[0], atol=1e-12, rtol=0)
    assert (both.states[0] - both.states[1]).abs().max() > 0.1


def test_adversarial_training_moves_rows_against_each_member(small):
    """With a step of zero size it is plain training; with one it is smoother: slopes are lower."""
    plain, _ = Ensemble(2).fit(small(training=Training(epochs=60)))
    none, _ = Ensemble(2, adversarial=1e-12).fit(small(training=Training(epochs=60)))
    hard, _ = Ensemble(2, adversarial=0.3).fit(small(training=Training(epochs=60)))
    torch.testing.assert_close(plain.states, none.states, atol=1e-6, rtol=0)
    problem = small()

    def slope(points):
        x = problem.x.clone().requires_grad_()
        f = problem.network.many(points.states[:, : problem.network.size], x)
        return torch.autograd.grad(f.sum(), x)[0].abs().mean()

    assert slope(hard) < slope(plain)


@pytest.mark.parametrize("log_variance", [-200.0, 0.0, 80.0, 200.0])
def test_noise_that_varies_has_a_slope_however_large_it_is(log_variance):
    """A row far outside can have any log variance on the way; 200 is past what a 32-bit float holds after exp."""
    f = torch.tensor([[1.5, log_variance]], requires_grad=True)
    density = VaryingNoise(1).log_prob(f, f.new_zeros(0), torch.tensor([[0.5]]))
    (slope,) = torch.autograd.grad(density.sum(), f)
    exact = torch.tensor([[1.5, log_variance]], dtype=torch.float64, requires_grad=True)
    wide = VaryingNoise(1).log_prob(exact, exact.new_zeros(0), torch.tensor([[0.5]], dtype=torch.float64))
    (wide_slope,) = torch.autograd.grad(wide.sum(), exact)
    torch.testing.assert_close(density.double(), wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), wide_slope, rtol=1e-4, atol=1e-6)
    assert slope.isfinite().all()
