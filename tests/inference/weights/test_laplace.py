"""Laplace's approximation against the closed form of linear regression and dense algebra done another way."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, hessian

from fspace.errors import OptionError
from fspace.inference.gp import Scaling
from fspace.inference.weights import Laplace
from fspace.inference.weights.curvature import Region, diagonal, full, kronecker, region_of
from fspace.inference.weights.likelihoods import GaussianNoise, VaryingNoise
from fspace.inference.weights.posterior import posterior_of
from fspace.inference.weights.problem import Training

KNOWN = {"likelihood": GaussianNoise(1, torch.tensor([0.05]).double().log())}
CONVERGED = Training(epochs=600, batch_size=60, learning_rate=0.1)  # to 1e-8 on the linear problem


def posterior(problem, method):
    distribution, likelihood = method.fit(problem)
    t = likelihood.outputs
    one, zero = torch.ones(problem.x.shape[1]).double(), torch.zeros(problem.x.shape[1]).double()
    scaling = Scaling(one, one, zero, one, torch.zeros(t).double(), torch.ones(t).double())
    return posterior_of(problem.network, distribution, likelihood, scaling, True, method.name)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_linear_regression_is_exact(linear, structure, layers, temperature):
    case = linear(temperature=temperature, training=CONVERGED)
    found = posterior(case.problem, Laplace(structure, layers, tune=False))
    grid = torch.randn(7, 3).double()
    design = torch.cat([grid, torch.ones(7, 1).double()], 1)
    latent = found.latent(grid)
    torch.testing.assert_close(latent.mean, design @ case.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(latent.covariance, design @ case.covariance @ design.mT, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(found.observed(grid).aleatoric, torch.full((7,), 0.3).double())
    drawn = found.draw(800, seed=0)
    samples = torch.stack([f(grid[:2]) for f in drawn]) - (design @ case.mean)[:2]
    exact = latent.variance[:2]
    assert ((samples.square().mean(0) - exact).abs() < 5 * exact * (2 / 800) ** 0.5).all()
    assert not ((samples.square().mean(0) - 1.5 * exact).abs() < 5 * exact * (2 / 800) ** 0.5).any()


def test_diagonal_is_one_over_the_diagonal_of_the_precision(linear):
    case = linear(training=Training(epochs=200))
    distribution, _ = Laplace("diagonal", tune=False).fit(case.problem)
    torch.testing.assert_close(distribution.deviation.square(), case.diagonal, rtol=1e-8, atol=0)
    assert (distribution.deviation.square() < 0.99 * case.covariance.diagonal()).any()


def test_evidence_of_linear_regression_is_exact(linear):
    case = linear(training=CONVERGED)
    Laplace("full", tune=False).fit(case.problem)
    prior = torch.diag(case.problem.scales.square())
    covariance = case.design @ prior @ case.design.mT + 0.3 * torch.eye(60).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(60).double(), covariance).log_prob(
        case.problem.y[:, 0]
    )
    assert case.problem.report.figures["log_evidence"] == pytest.approx(exact.item(), abs=1e-6)


def test_tuning_finds_the_greatest_evidence(linear):
    case = linear(n=200, likelihood=GaussianNoise(1), training=Training(1000, 200, 0.1))
    _, likelihood = Laplace("full", rounds=6).fit(case.problem)
    figures = case.problem.report.figures
    noise = likelihood.log_variance.exp().item()
    assert noise == pytest.approx(0.3, rel=4 * (2 / 200) ** 0.5)
    assert figures["noise_factor"] == pytest.approx(1.0, abs=0.02)
    assert figures["precision_factors"][0] == pytest.approx(1.0, abs=0.1)  # the last round changed little


def dense(problem, theta, region):
    """The Gauss-Newton matrix of whitened weights from one Hessian: that of sum_n log_prob(f0 + J (w - w0)), which is
    linear in w before the likelihood, so that nothing but Gauss-Newton is left."""
    w, tail = problem.split(theta)
    module, names = problem.network.module, list(problem.network.shapes)

    def outputs(v):
        parts = dict(zip(names, v.split(problem.network.sizes)))
        parts = {k: p.reshape(problem.network.shapes[k]) for k, p in parts.items()}
        return functional_call(module, parts, (problem.x,))

    j = torch.autograd.functional.jacobian(outputs, w)
    f = outputs(w)

    def value(v):
        return problem.likelihood.log_prob(f + j @ (v - w), tail, problem.y).sum()

    h = -hessian(value)(w) * problem.scales[:, None] * problem.scales
    return h[region.first : region.last, region.first : region.last], j


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", ["numbers", "two outputs", "two classes", "four classes"])
@pytest.mark.parametrize("few", [False, True])
def test_curvature_is_the_dense_one(small, layers, kind, few):
    """few: fewer outputs of rows than weights, where eigenvalues come from the other side."""
    options = {
        "numbers": {},
        "two outputs": {"outputs": 2},
        "two classes": {"classes": 2},
        "four classes": {"classes": 4},
    }
    problem = small(**options[kind], n=6 if few else 40)
    theta = problem.start(1)[0]
    region = region_of(problem.network, layers)
    h, _ = dense(problem, theta, region)
    values, vectors = full(problem, theta, region, torch.arange(problem.n))
    torch.testing.assert_close(vectors * values @ vectors.mT, h, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(diagonal(problem, theta, region), h.diagonal(), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("classes", [0, 4])
def test_kronecker_factors_of_the_last_layer_are_those_of_its_inputs_and_outputs(small, classes):
    problem = small(classes=classes)
    theta = problem.start(1)[0]
    layer = problem.network.layers[-1]
    (factors,) = kronecker(problem, theta, [layer])
    w, tail = problem.split(theta)
    hidden = torch.tanh(problem.x @ w[:10].reshape(5, 2).mT + w[10:15])
    a = torch.cat([hidden, torch.ones(40, 1).double()], 1)
    column = torch.cat([problem.scales[15:20], problem.scales[-1:]])
    g = problem.likelihood.curvature(problem.network(w, problem.x), tail).mean(0)
    inner = factors.input_vectors * factors.input_values @ factors.input_vectors.mT
    outer = factors.output_vectors * factors.output_values @ factors.output_vectors.mT
    torch.testing.assert_close(inner, (a.mT @ a) * column[:, None] * column)
    torch.testing.assert_close(outer, g)


def test_kronecker_of_a_convolution_on_one_position_is_that_of_a_linear_layer(made):
    x = torch.randn(30, 2, 3, 3).double()
    y = torch.randn(30, 1).double()
    conv = made(torch.nn.Sequential(torch.nn.Conv2d(2, 1, 3), torch.nn.Flatten()), x, y)
    flat = made(torch.nn.Linear(18, 1), x.flatten(1), y)
    theta = conv.start(1)[0]
    ours, theirs = (
        kronecker(conv, theta, conv.network.layers)[0],
        kronecker(flat, theta, flat.network.layers)[0],
    )
    torch.testing.assert_close(ours.input_values, theirs.input_values)
    torch.testing.assert_close(ours.output_values, theirs.output_values)


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal"])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_predictions_are_those_of_the_dense_precision(small, structure, layers):
    """Moments, draws and class probabilities from the covariance of the weights, taken from its draws or directly."""
    problem = small(outputs=2, training=Training(epochs=200))
    found = posterior(problem, Laplace(structure, layers, tune=False))
    region = region_of(problem.network, layers)
    theta = found.distribution.mean
    _, j = dense(problem, torch.cat([theta, theta.new_zeros(2)]), region)
    j = j[:, :, region.first : region.last]
    eye = torch.eye(region.size).double()
    covariance = found.distribution.covariance(eye, eye)
    if structure == "full":
        noise = found.likelihood
        at = replace(problem, likelihood=noise)
        h, _ = dense(at, theta, region)
        scale = problem.scales[region.first : region.last]
        exact = torch.linalg.inv((h + eye) / scale / scale[:, None])
        torch.testing.assert_close(covariance, exact, atol=1e-9, rtol=1e-7)
    latent = found.latent(problem.x)
    torch.testing.assert_close(latent.covariance, torch.einsum("nta,ab,mtb->tnm", j, covariance, j))
    torch.testing.assert_close(latent.variance, latent.covariance.diagonal(dim1=1, dim2=2).mT)
    moves = found.distribution.deviations(20000, torch.Generator().manual_seed(0))
    error = (moves.mT @ moves / 20000 - covariance).abs()
    limit = (torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()).sqrt()
    assert (error < 5 * limit / 20000**0.5).all()
    f = found.draw(2, seed=3)
    torch.testing.assert_close(f[0](problem.x[3:5]), f[0](problem.x)[3:5])
    move = found.distribution.deviations(2, torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(f[0](problem.x), latent.mean + j @ move)


@pytest.mark.parametrize("classes", [0, 4])
def test_covariances_are_inverses_of_precisions_written_out(small, classes):
    """Diagonal and Kronecker-factored covariances of all weights from Jacobians by hand: of a layer tanh(V x + b) and
    outputs W h + c, the factors of the first are sum (x, 1)(x, 1)' and mean (dh W)' Lambda (dh W), and so on."""
    problem = small(classes=classes, training=Training(epochs=100), **({} if classes else KNOWN))
    eye = torch.eye(problem.network.size).double()
    prior = problem.scales.square().reciprocal()
    for structure in ("diagonal", "kronecker"):
        found = posterior(problem, Laplace(structure, "all", tune=False))
        theta, outputs = found.distribution.mean, problem.likelihood.outputs
        v, b, w, c = theta.split([10, 5, 5 * outputs, outputs])
        h, w = torch.tanh(problem.x @ v.reshape(5, 2).mT + b), w.reshape(outputs, 5)
        back = w * (1 - h.square())[:, None, :]  # derivatives of outputs in what goes into tanh [n, o, 5]
        one = torch.ones(40, 1).double()
        inner = [torch.cat([problem.x, one], 1), torch.cat([h, one], 1)]
        outer = [back, torch.eye(outputs).double().expand(40, -1, -1)]
        lam = problem.likelihood.curvature(h @ w.mT + c, theta.new_zeros(0))
        precision = torch.zeros_like(eye)
        at = 0
        for a, g in zip(inner, outer):
            i, o = a.shape[1], g.shape[2]
            # the order of weights: those of unit after unit, then all biases
            place = torch.cat(
                [torch.arange(o * (i - 1)).reshape(o, -1), o * (i - 1) + torch.arange(o)[:, None]], 1
            )
            place = (at + place).flatten()
            square = torch.einsum("noa,nop,npb->nab", g, lam, g)
            if structure == "kronecker":
                block = torch.kron(square.mean(0), a.mT @ a)
            else:
                block = torch.diag_embed(
                    torch.einsum("na,nb->ab", square.diagonal(dim1=1, dim2=2), a.square()).flatten()
                )
            precision[place[:, None], place] = block
            at += o * i
        exact = torch.linalg.inv(precision + torch.diag(prior))
        torch.testing.assert_close(found.distribution.covariance(eye, eye), exact, atol=1e-10, rtol=1e-7)
        other = torch.linalg.inv(precision + 1.01 * torch.diag(prior))
        assert not torch.allclose(found.distribution.covariance(eye, eye), other, atol=1e-10, rtol=1e-7)


def test_class_probabilities_average_over_linearised_functions(small):
    problem = small(classes=3, training=Training(epochs=300))
    found = posterior(problem, Laplace("full", tune=False))
    latent = found.latent(problem.x)
    probs = found.observed(problem.x)
    assert probs.samples.shape == (128, 40, 3)
    logits = torch.stack([f(problem.x) for f in found.draw(400, seed=1)])
    direct = logits.softmax(-1)
    limit = 5 * (direct.var(0) * (1 / 128 + 1 / 400)).sqrt() + 1e-6
    assert ((probs.probs - direct.mean(0)).abs() < limit).all()
    assert latent.variance.min() > 0 and probs.mutual_information.max() > 0


def test_what_laplace_cannot_do_is_refused(small):
    with pytest.raises(OptionError, match="constant"):
        Laplace().fit(small(outputs=1, hidden=(3,), likelihood=VaryingNoise(1)))
    for options, words in (
        ({"structure": "lowrank"}, "structure"),
        ({"layers": "first"}, "layers"),
        ({"rounds": 0}, "rounds"),
    ):
        with pytest.raises(OptionError, match=words):
            Laplace(**options)
    assert region_of(small().network, "last") == Region(15, 21)
