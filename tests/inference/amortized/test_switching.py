"""Switching linear dynamics: against enumeration of all state paths, the Kalman filter, states that are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from fspace.errors import DataError, OptionError
from fspace.inference.amortized.model import load
from fspace.inference.amortized.switching import SwitchingLinear

QUIET = {"progress": False}
PAIRS = 2000  # filters run side by side


def kalman(model, y, path):
    """log p(y | states), a moment at a time. Plain float64, without a Cholesky factor in common with the model."""
    c, d = model.emission.weight, model.emission.bias
    r = torch.diag(model.log_r.exp() + 1e-6)
    mean, cov, total = model.z_mean, torch.diag(model.z_log_variance.exp()), 0.0
    for t, value in enumerate((y - model.y_shift) / model.y_scale):
        if t:
            a = model.a[path[t]]
            mean, cov = a @ mean + model.b[path[t]], a @ cov @ a.T + torch.diag(model.log_q[path[t]].exp())
        spread = c @ cov @ c.T + r
        error = value - c @ mean - d
        total = total + torch.distributions.MultivariateNormal(torch.zeros_like(error), spread).log_prob(
            error
        )
        gain = cov @ c.T @ torch.linalg.inv(spread)
        mean, cov = mean + gain @ error, cov - gain @ c @ cov
    return total - len(y) * model.y_scale.log().sum()


def enumerated(model, y):
    """log p(y, path) of every path of states."""
    first, move = model.initial_logits.log_softmax(0), model.transition_logits.log_softmax(1)
    paths = list(itertools.product(range(model.components), repeat=len(y)))
    logs = []
    for path in paths:
        chain = first[path[0]] + sum(move[i, j] for i, j in itertools.pairwise(path))
        logs.append(chain + kalman(model, y, path))
    return torch.tensor(paths), torch.stack(logs)


def made(components=2, steps=5, columns=2, latents=2, seed=0, **options):
    """A model with parameters at random, and a series."""
    torch.manual_seed(seed)
    model = SwitchingLinear(components, latents, device="cpu", **options)
    y = np.cumsum(np.random.default_rng(seed).standard_normal((steps, columns)), 0)
    rows = model.prepare(y)
    model._make(model.shape_of(rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if name == "a" else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape).double())
        model.log_q.sub_(1.0)
        model.y_shift.copy_(torch.randn(columns)), model.y_scale.copy_(torch.rand(columns) + 0.5)
    return model, rows


def many(rows):
    return tuple(r.expand(PAIRS, *r.shape[1:]) for r in rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_evidence_equals_enumeration(seed):
    """The mean of exp(log Z - log p) over 2,000 filters is 1 within four standard errors, log Z is below; of a model
    with other transitions it is not."""
    model, rows = made(seed=seed)
    with torch.no_grad():
        exact = enumerated(model, rows[0][0])[1].logsumexp(0)
        found = model._filtered(many(rows), 4, torch.Generator().manual_seed(0)).log_evidence
        ratio = (found - exact).exp()
        error = ratio.std() / PAIRS**0.5
        assert abs(ratio.mean() - 1) < 4 * error and error < 0.02
        assert found.mean() < exact
        model.transition_logits.copy_(model.transition_logits.flip(1))
        ratio = (model._filtered(many(rows), 4, torch.Generator().manual_seed(0)).log_evidence - exact).exp()
        assert abs(ratio.mean() - 1) > 4 * ratio.std() / PAIRS**0.5


def test_the_relaxed_evidence_is_that_of_one_model_whatever_the_proposal():
    """Twice as cold a proposal changes the relaxed filter, not the mean of its evidence (four standard errors); with
    the density of the prior left at the other temperature it does."""
    from fspace.inference.amortized import switching

    model, rows = made(objective="concrete", steps=4)
    found = []
    for pair in ((2 / 3, 1 / 2), (1.0, 1 / 2), (1.0, 1.0)):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(switching, "TEMPERATURES", pair)
            logs = model._relaxed(many(rows), 20, torch.Generator().manual_seed(1)).log_evidence
        found.append(logs.exp())
    means, errors = [e.mean() for e in found], [e.std() / PAIRS**0.5 for e in found]
    apart = lambda i, j: abs(means[i] - means[j]) / (errors[i] ** 2 + errors[j] ** 2).sqrt()  # noqa: E731
    assert apart(0, 1) < 4 < apart(0, 2)


@pytest.mark.parametrize("objective", ["marginal", "concrete"])
def test_one_system_is_the_kalman_filter(objective):
    model, rows = made(1, 12, 3, objective=objective)
    with torch.no_grad():
        exact = kalman(model, rows[0][0], [0] * 12)
        for particles in (1, 7):
            found = model._filtered(rows, particles, torch.Generator())
            assert abs(found.log_evidence.item() - exact) < 1e-8
            assert abs(model._relaxed(rows, particles, torch.Generator()).log_evidence.item() - exact) < 1e-8


def test_the_gradient_is_that_of_the_evidence():
    """The mean of 2,000 gradients with 50 particles against that of the enumerated log p, in four standard errors (and
    1% of the largest, for the bias of so many particles); that of the log evidence, states held fixed, fails."""
    model, rows = made()
    parameters = [model.transition_logits, model.a, model.log_q, model.emission.weight]

    def gradient(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    exact = gradient(enumerated(model, rows[0][0])[1].logsumexp(0))
    generator, ours, held = torch.Generator().manual_seed(0), [], []
    part = tuple(r.expand(100, *r.shape[1:]) for r in rows)
    for _ in range(20):
        found = model._filtered(part, 50, generator)
        held.append(gradient(found.log_evidence.mean()))
        ours.append(gradient(model._fisher(found).mean()))

    def agrees(grads):
        grads = torch.stack(grads)
        error = grads.std(0) / len(grads) ** 0.5
        return bool(((grads.mean(0) - exact).abs() < 4 * error + 0.01 * exact.abs().max()).all())

    assert agrees(ours) and not agrees(held)


def test_smoothing_equals_enumeration():
    """p(s_t | y) by 1,000 paths against all paths, within 0.05 (three standard errors); filtered ones fail."""
    model, rows = made(seed=2)
    with torch.no_grad():
        paths, logs = enumerated(model, rows[0][0])
        share = logs.softmax(0)
        exact = torch.stack([torch.bincount(paths[:, t], share, minlength=2) for t in range(5)])
        model.shape_ = model.shape_of(rows)
        found = model.state_probabilities(rows[0][0], 1000, 1000)
        assert (found - exact).abs().max() < 0.05
        filtered = model._filtered(rows, 1000, torch.Generator().manual_seed(0), history=True)
        s = torch.stack([state["s"][:, 0] for state in filtered.states])
        now = (filtered.weights[..., 0, None] * torch.nn.functional.one_hot(s, 2)).sum(1)
        assert (now - exact).abs().max() > 0.05


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def switching(count=8, steps=100, seed=0, noise=0.1):
    """Series of four columns from two latents that turn fast, turn slowly the other way, or fall to a point; and the
    states."""
    rng = np.random.default_rng(seed)
    a, b = [0.98 * rotation(0.6), 0.98 * rotation(-0.25), 0.7 * np.eye(2)], [(0, 0), (0, 0), (0.9, 0.9)]
    c = np.random.default_rng(7).standard_normal((4, 2))
    move = 0.94 * np.eye(3) + 0.02
    series, states = [], []
    for _ in range(count):
        s, z, rows = rng.integers(3), rng.standard_normal(2), []
        for t in range(steps):
            if t:
                s = rng.choice(3, p=move[s])
                z = a[s] @ z + b[s] + 0.2 * rng.standard_normal(2)
            rows.append((s, c @ z + noise * rng.standard_normal(4)))
        states.append(np.array([r[0] for r in rows]))
        series.append(np.stack([r[1] for r in rows]))
    return series, states


@pytest.mark.parametrize("objective", ["marginal", pytest.param("concrete", marks=pytest.mark.slow)])
def test_states_are_recovered(objective):
    """The states of series that were not trained on; one system alone says much less of them."""
    series, _ = switching()
    test, truth = switching(4, seed=1)
    plan = {"epochs": 12, "learning_rate": 3e-2, "batch_size": 8, **QUIET}
    model = SwitchingLinear(3, 2, objective, 8, device="cpu").fit(series, **plan)
    score = adjusted_rand_score(np.concatenate(truth), torch.cat(model.states(test, 50, 50)))
    worth = model.log_likelihood(test, 50).sum() / 400
    single = SwitchingLinear(1, 2, particles=1, device="cpu").fit(series, **plan)
    one = single.log_likelihood(test, 1).sum() / 400
    print(f"{objective}: adjusted Rand index {score:.3f}, {worth:.3f} nats a step, one system {one:.3f}")
    assert score > 0.8 and worth > one + 0.1


@pytest.mark.parametrize("objective", ["marginal", "concrete"])
def test_padding_says_nothing_and_files_hold_all(objective, tmp_path):
    rng = np.random.default_rng(0)
    series = [rng.standard_normal((n, 2)) for n in (9, 14, 12)]
    model = SwitchingLinear(2, 3, objective, 4, device="cpu").fit(series, epochs=2, **QUIET)
    rows = model.prepare(series)
    filled = rows[0].clone()
    filled[0, 9:], filled[2, 12:] = float("nan"), float("nan")
    found = []
    for y in (rows[0], filled):
        step = model.step((y, rows[1]), torch.Generator().manual_seed(0))
        found.append(
            (step.bound, *torch.autograd.grad(step.ascents[0][0], [model.a, model.transition_logits]))
        )
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found))
    again = load(model.save(tmp_path / "s.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(series), model.log_likelihood(series))
    assert all(torch.equal(a, b) for a, b in zip(again.states(series), model.states(series)))
    for answer, columns in (
        (model.encode(series), 3),
        (model.reconstruct(series), 2),
        (model.state_probabilities(series), 2),
    ):
        assert [tuple(a.shape) for a in answer] == [(len(y), columns) for y in series]
    assert set(model.bounds(series, 4)) == {"fivo", "relaxed"}
    assert model.sample(2, seed=0, steps=6).shape == (2, 6, 2)


def test_forecasts_have_the_moments_of_the_kalman_filter():
    """One system: means and variances of 200 paths within five standard errors of the exact ones; one column, so that
    the two latents are a value and the one before it."""
    y = np.sin(0.4 * np.arange(60)) + 0.05 * np.random.default_rng(0).standard_normal(60)
    model = SwitchingLinear(1, 2, particles=1, device="cpu").fit(y, epochs=10, learning_rate=2e-2, **QUIET)
    found = model.forecast(y, 8)
    with torch.no_grad():
        rows = model.prepare(y)
        state = model._filtered(rows, 1, torch.Generator()).states[-1]
        mean, cov, c = state["mean"][0, 0], state["covariance"][0, 0], model.emission.weight
        for h in range(8):
            mean, cov = (
                model.a[0] @ mean + model.b[0],
                model.a[0] @ cov @ model.a[0].T + model.log_q[0].exp().diag(),
            )
            centre = (model.emission(mean) * model.y_scale + model.y_shift).item()
            spread = ((c @ cov @ c.T)[0, 0] * model.y_scale**2).item()
            assert abs(found.mean[h, 0] - centre) < 5 * (spread / 200) ** 0.5
            assert abs(found.epistemic[h, 0] / spread - 1) < 5 * (2 / 200) ** 0.5
    ahead = np.sin(0.4 * np.arange(60, 68))
    assert np.abs(found.mean[:, 0].numpy() - ahead).mean() < 0.25  # it goes on turning


def test_bad_input_is_named():
    for bad, words in (
        ([], "no series"),
        ([np.zeros((1, 3))], "two steps"),
        ([np.zeros((4, 3)), np.zeros((4, 2))], "differ"),
        ([np.zeros((4, 2)), np.full((4, 2), np.inf)], "Series 1: step 0"),
    ):
        with pytest.raises(DataError, match=words):
            SwitchingLinear().fit(bad, **QUIET)
    for wrong in ({"components": 0}, {"latents": 0}, {"particles": 0}, {"objective": "fivo"}):
        with pytest.raises(OptionError):
            SwitchingLinear(**wrong)
    model = SwitchingLinear(2, 2, particles=2, device="cpu")
    model.fit([np.random.default_rng(0).standard_normal((6, 2)), np.zeros((5, 2))], epochs=1, **QUIET)
    with pytest.raises(DataError, match="one series"):
        model.forecast([np.zeros((4, 2))] * 2, 3)
