"""The GP state space against the Kalman filter where its transition is linear, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized.gp_state_space import GPStateSpace
from fspace.inference.amortized.model import load

QUIET = {"progress": False, "epochs": 3}
REPEATS = 400


def kalman(y, a, q, c, r):
    """log p(y) and filtered means of z' = a z + N(0, q), y = c z + N(0, r), z_0 ~ N(0, I). Plain float64."""
    mean, cov = torch.zeros(len(a)).double(), torch.eye(len(a)).double()
    total, means = 0.0, []
    for t in range(len(y)):
        if t:
            mean, cov = a @ mean, a @ cov @ a.T + q
        spread = c @ cov @ c.T + r
        gain = torch.linalg.solve(spread, c @ cov).T
        error = y[t] - c @ mean
        total += torch.distributions.MultivariateNormal(torch.zeros(len(y[t])).double(), spread).log_prob(
            error
        )
        mean, cov = mean + gain @ error, cov - gain @ c @ cov
        means.append(mean)
    return total, torch.stack(means)


def linear_model(latents=2, outputs=2, steps=15, series=1):
    torch.manual_seed(5)
    model = GPStateSpace(latents, "linear", particles=50, hidden=4)
    data = [
        np.cumsum(0.5 * np.random.default_rng(k).standard_normal((steps, outputs)), 0) for k in range(series)
    ]
    rows = model.prepare(data)
    model._make(model.shape_of(rows))
    model.begin(rows)
    model.y_shift.zero_(), model.y_scale.fill_(1.0)
    with torch.no_grad():
        model.emission.weight.copy_(torch.randn(outputs, latents))
        model.log_noise.fill_(math.log(0.3))
        model.log_process_noise.fill_(math.log(0.2))
        model.message.weight.zero_(), model.message.bias.fill_(-3.0)  # proposes almost from the transition
    return model, rows, data


def matrices(model, v):
    """a, q, c, r of the Kalman filter when v [l, m] is what f is made of."""
    scale = model.prior.variance.detach().reshape(()).sqrt()
    latents = model.latents
    c = model.emission.weight.detach()
    q = model.log_process_noise.exp().detach().diag()
    return torch.eye(latents) + scale * v, q, c, model.log_noise.exp().detach().diag()


def mean_ratio(model, rows, expected, own, weighed):
    """exp(log Z - log p) of many filters: mean and standard error."""
    many = tuple(r.expand(REPEATS, *r.shape[1:]) for r in rows)
    with torch.no_grad():
        found = model._filtered(many, 200, torch.Generator().manual_seed(0), own=own, weighed=weighed)
    ratio = (found.log_evidence - expected).exp()
    return ratio.mean().item(), ratio.std().item() / REPEATS**0.5, found.log_evidence


def test_a_linear_transition_that_is_known_equals_the_kalman_filter():
    model, rows, data = linear_model()
    model.emission.bias.data.zero_()
    model.v_root.data.mul_(1e-12)
    model.v_mean.data = torch.tensor([[-0.3, 0.2], [-0.1, -0.2]]).double()
    expected, means = kalman(torch.tensor(data[0]), *matrices(model, model.v_mean.data))
    ratio, error, logs = mean_ratio(model, rows, expected, own=False, weighed=False)
    assert abs(ratio - 1) < 4 * error and error < 0.05
    assert logs.mean() < expected  # FIVO is a lower bound
    model.shape_ = model.shape_of(rows)
    assert (model.encode(data[0], 20_000) - means).abs().max() < 0.05
    model.v_mean.data[0, 0] += 0.3  # the twin
    ratio, error, _ = mean_ratio(model, rows, expected, own=False, weighed=False)
    assert abs(ratio - 1) > 4 * error


def evidence(model, data, weights):
    """log of the integral over v of N(v; 0, 1) prod_k p(y_k | v), one latent and one output, by quadrature."""
    grid = torch.linspace(-8, 8, 201).double()
    logs = []
    for v in grid:
        each = sum(kalman(torch.tensor(y), *matrices(model, v.reshape(1, 1)))[0] for y in data)
        logs.append(each - 0.5 * weights * v**2 - 0.5 * weights * math.log(2 * math.pi))
    return torch.logsumexp(torch.stack(logs), 0) + math.log(16 / 200)


def test_functions_carried_by_particles_integrate_f_out():
    model, rows, data = linear_model(1, 1, 10)
    model.emission.bias.data.zero_()
    model.v_mean.data, model.v_root.data = torch.tensor([[-0.4]]).double(), torch.tensor([[[0.5]]]).double()
    expected = evidence(model, data, 1)
    ratio, error, _ = mean_ratio(model, rows, expected, own=True, weighed=True)
    assert abs(ratio - 1) < 4 * error and error < 0.05
    ratio, error, _ = mean_ratio(model, rows, expected, own=True, weighed=False)  # the twin: no p / q
    assert abs(ratio - 1) > 4 * error


def test_the_bound_of_several_series_that_share_f_is_below_their_joint_evidence():
    model, rows, data = linear_model(1, 1, 10, series=3)
    model.emission.bias.data.zero_()
    model.v_mean.data, model.v_root.data = torch.tensor([[-0.1]]).double(), torch.tensor([[[0.2]]]).double()
    expected = evidence(model, data, 1)
    many = tuple(r.repeat(1000, *[1] * (r.ndim - 1)) for r in rows)
    with torch.no_grad():
        bounds = model.step(many, torch.Generator().manual_seed(0)).bound.reshape(1000, 3).sum(1)
    assert bounds.mean() + 4 * bounds.std() / 1000**0.5 < expected
    assert bounds.mean() > expected - 3  # and not far below


def test_the_transition_answers_the_contract():
    y = np.sin(np.linspace(0, 12, 60))[:, None] * [1.0, 0.5]
    model = GPStateSpace(2, inducing=8, particles=4, hidden=4).fit(y, **QUIET)
    z = torch.randn(5, 2).double()
    found = model.transition_.latent(z)
    with torch.no_grad():
        a = torch.linalg.solve_triangular(
            model._factor(), model.prior(model.inducing_inputs, z).to_dense(), upper=False
        )
        root = model._root_of_v()
        variance = model.prior(z, diag=True) - a.square().sum(0) + (root.mT @ a).square().sum(-2)
    assert torch.allclose(found.mean, (model.v_mean @ a).mT, atol=1e-7)
    assert torch.allclose(found.variance, variance.mT, atol=1e-7)
    assert model.transition_.draw(3, seed=0)(z).shape == (3, 5, 2)


def test_padding_says_nothing_and_files_hold_all(tmp_path):
    rng = np.random.default_rng(0)
    series = [(rng.standard_normal((n, 2)), rng.standard_normal(n)) for n in (9, 14, 12)]
    model = GPStateSpace(2, "matern", inducing=6, particles=4, hidden=4, device="cpu").fit(series, **QUIET)
    rows = model.prepare(series)
    filled = [r.clone() for r in rows]
    filled[0][0, 9:], filled[1][0, 9:] = float("nan"), float("nan")
    found = []
    for r in (rows, tuple(filled)):
        model.zero_grad()
        step = model.step(r, torch.Generator().manual_seed(0))
        step.ascents[0][0].backward()
        found.append((step.bound, model.v_mean.grad.clone(), model.encoder.weight_ih_l0.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    again = load(model.save(tmp_path / "s.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(series, 20), model.log_likelihood(series, 20))
    forecast = again.forecast(series[0], 5, controls=np.ones(5))
    assert forecast.mean.shape == (5, 2) and bool((forecast.variance > 0).all())
    assert again.sample(2, seed=0, steps=7).shape == (2, 7, 2)


def test_bad_input_is_named():
    y = np.random.default_rng(0).standard_normal((12, 2))
    model = GPStateSpace(1, particles=3, inducing=4, hidden=3)
    with pytest.raises(NotFittedError):
        model.forecast(y, 3)
    for bad, words in (
        ([], "no series"),
        ([y, y[:, :1]], "differ"),
        (y[:1], "at least 2"),
        (np.where(y > y.max() - 1e-9, np.nan, y), "holds NaN"),
        ((y, np.ones(5)), "controls"),
    ):
        with pytest.raises(DataError, match=words):
            model.fit(bad, **QUIET)
    for wrong in ({"kernel": "spline"}, {"particles": 0}, {"latents": 0}):
        with pytest.raises(OptionError):
            GPStateSpace(**wrong)
    model.fit(y, **QUIET)
    with pytest.raises(DataError, match="fitted on"):
        model.log_likelihood(y[:, :1])
    with pytest.raises(DataError, match="controls must be"):
        model.forecast(y, 3, controls=np.ones(3))
