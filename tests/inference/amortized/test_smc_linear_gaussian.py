"""Particle filter on linear-Gaussian series, where a Kalman filter knows the evidence, the filter and the smoother."""

import math

import pytest
import torch

from fspace.inference.amortized import smc
from fspace.inference.amortized.resampling import SCHEMES
from fspace.inference.amortized.smoothing import backward_simulation, trajectories

A, Q, R, P0 = 0.9, 0.7, 0.5, 1.3  # z_0 ~ N(0, P0), z_t ~ N(A z_t-1, Q), x_t ~ N(z_t, R)
SERIES = torch.tensor([0.4, 1.9, 2.2, 0.1, -1.7, -0.9, 0.6, 1.1], dtype=torch.float64)

ZERO = torch.zeros((), dtype=torch.float64)


def normal(value, mean, variance):
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return -0.5 * ((value - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def kalman(x, r=R):
    """log p(x), filtered means and variances, by the textbook recursions."""
    mean, variance, log_p, means, variances = ZERO, P0, ZERO, [], []
    for t, value in enumerate(x):
        if t:
            mean, variance = A * mean, A * A * variance + Q
        log_p = log_p + normal(value, mean, variance + r)
        gain = variance / (variance + r)
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        means.append(mean)
        variances.append(variance)
    return log_p, means, variances


def smoothed(x):
    """Means and variances given all of x (Rauch, Tung and Striebel)."""
    _, means, variances = kalman(x)
    m, v = means[-1], variances[-1]
    found = [(m, v)]
    for mean, variance in zip(means[-2::-1], variances[-2::-1]):
        ahead = A * A * variance + Q
        gain = A * variance / ahead
        m, v = mean + gain * (m - A * mean), variance + gain * gain * (v - ahead)
        found.append((m, v))
    return torch.tensor([m for m, _ in found[::-1]]), torch.tensor([v for _, v in found[::-1]])


def bootstrap(r=R):
    """The transition as proposal."""

    def init(particles, x, noise):
        z = math.sqrt(P0) * noise
        return z, normal(x, z, r)

    def step(z, x, t, noise):
        z = A * z + math.sqrt(Q) * noise
        return z, normal(x, z, r)

    return init, step


def optimal(weighted=True):
    """p(z_t | z_t-1, x_t) as proposal; unweighted (the wrong twin) it leaves out p / q."""

    def propose(mean, variance, x, noise):
        v = 1 / (1 / variance + 1 / R)
        centre = v * (mean / variance + x / R)
        z = centre + math.sqrt(v) * noise
        ratio = normal(z, mean, variance) - normal(z, centre, v) if weighted else 0.0
        return z, normal(x, z, R) + ratio

    def init(particles, x, noise):
        return propose(torch.zeros_like(noise), P0, x, noise)

    def step(z, x, t, noise):
        return propose(A * z, Q, x, noise)

    return init, step


def lookahead(x):
    """p(z_t | z_t-1, x_t:T) as proposal and p(x_t+1:T | z_t) as twist: log r_t(z) = c + b z - a z^2 / 2."""
    coefficients = [(ZERO, ZERO, ZERO)]
    for value in x.flip(0)[:-1]:
        a, b, c = coefficients[-1]
        a, b, c = a + 1 / R, b + value / R, c + normal(value, ZERO, R)
        s = 1 + Q * a
        coefficients.append((A * A * a / s, A * b / s, c - 0.5 * s.log() + 0.5 * Q * b * b / s))
    coefficients = coefficients[::-1]

    def propose(mean, variance, x, t, noise):
        a, b, _ = coefficients[t]
        v = 1 / (1 / variance + 1 / R + a)
        centre = v * (mean / variance + x / R + b)
        z = centre + v.sqrt() * noise
        return z, normal(x, z, R) + normal(z, mean, variance) - normal(z, centre, v)

    def init(particles, x, noise):
        return propose(torch.zeros_like(noise), P0, x, 0, noise)

    def step(z, x, t, noise):
        return propose(A * z, Q, x, t, noise)

    def twist(z, t):
        a, b, c = coefficients[t]
        return c + b * z - 0.5 * a * z.square()

    return init, step, twist


def run(model, particles, replicates, seed=0, x=SERIES, **options):
    """The same series in every column of the batch, with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(x), particles, replicates, generator=generator, dtype=torch.float64)
    columns = x[:, None].expand(-1, replicates)
    return smc.filter(*model, columns, None, particles, noise=noise, generator=generator, **options)


def z_score(values, expected):
    return (float(values.mean()) - float(expected)) / (float(values.std()) / math.sqrt(len(values)))


LOG_P = kalman(SERIES)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
def test_evidence_is_unbiased(scheme, criterion):
    model = (
        optimal() if criterion == "never" else bootstrap()
    )  # the latter's weights are wild when left alone
    found = run(model, 16, 6000, resampling=scheme, criterion=criterion)
    ratio = (found.log_evidence - LOG_P).exp()
    assert abs(z_score(ratio, 1.0)) < 4
    assert z_score(found.log_evidence, LOG_P) < -4  # FIVO is a lower bound, not an estimate of log p
    assert (
        abs(z_score((found.log_evidence - kalman(SERIES, 0.5 * R)[0]).exp(), 1.0)) > 4
    )  # another model's evidence
    if criterion == "ess":
        assert 0 < float(found.resampled.double().mean()) < 1


def test_a_resampler_that_prefers_some_particles_is_noticed():
    """Fed with fourth powers of uniforms it draws the first particles too often; sorted, these are the lower ones."""
    init, step = bootstrap()

    def in_order(z, x, t, noise):
        return step(z.sort(0).values, x, t, noise)

    u = torch.rand(8, 16, 24_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = run((init, step), 16, 24_000, resampling="multinomial", criterion="always", uniforms=u)
    wrong = run((init, step), 16, 24_000, resampling="multinomial", criterion="always", uniforms=u**4)
    assert abs(z_score((right.log_evidence - LOG_P).exp(), 1.0)) < 4
    assert abs(z_score((wrong.log_evidence - LOG_P).exp(), 1.0)) > 4


def test_evidence_is_unbiased_with_a_proposal_and_the_wrong_weights_are_noticed():
    found = run(optimal(), 16, 6000)
    plain = run(bootstrap(), 16, 6000)
    assert abs(z_score((found.log_evidence - LOG_P).exp(), 1.0)) < 4
    assert found.log_evidence.var() < 0.5 * plain.log_evidence.var()
    assert abs(z_score((run(optimal(weighted=False), 16, 6000).log_evidence - LOG_P).exp(), 1.0)) > 4


def test_evidence_is_unbiased_with_a_twist_that_is_not_exact():
    init, step, twist = lookahead(SERIES)
    found = run(bootstrap(), 16, 6000, twist=lambda z, t: 0.6 * twist(z, t))
    assert abs(z_score((found.log_evidence - LOG_P).exp(), 1.0)) < 4
    ends_late = run(bootstrap(), 16, 6000, twist=lambda z, t: 0.6 * twist(z, t), x=SERIES[:-1])
    assert abs(z_score((ends_late.log_evidence - LOG_P).exp(), 1.0)) > 4  # evidence of another series


def test_gap_shrinks_as_one_over_the_particles():
    counts = [16, 32, 64, 128]
    gaps = torch.tensor(
        [float(LOG_P - run(bootstrap(), n, 8000, criterion="always").log_evidence.mean()) for n in counts]
    )
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = gaps.double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-1, abs=0.12)  # the log gaps have standard errors of 0.01 to 0.03


@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
def test_exact_twist_and_proposal_leave_no_variance(criterion):
    init, step, twist = lookahead(SERIES)
    found = run((init, step), 8, 50, criterion=criterion, twist=twist)
    assert float((found.log_evidence - LOG_P).abs().max()) < 1e-10
    assert bool((found.ess > 8 - 1e-6).all())
    untwisted = run((init, step), 8, 50, criterion="always")  # weights without the twist are not constant
    assert float(untwisted.log_evidence.std()) > 0.01


def test_smoothing_proposal_without_resampling_leaves_no_variance():
    init, step, _ = lookahead(SERIES)
    found = run((init, step), 8, 50, criterion="never")
    assert float((found.log_evidence - LOG_P).abs().max()) < 1e-10


def test_gradients_without_resampling_are_those_of_the_bound_and_sum_to_the_score():
    """With exact weights the gradient of log Z by a constant in the increments is one a step, whoever is resampled."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 32, 4, generator=generator, dtype=torch.float64)
    shift = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    init, step = bootstrap()
    observations = {"x": SERIES[:, None].expand(-1, 4), "shift": shift}
    found = smc.filter(
        lambda n, o, e: (lambda z, w: (z, w + o["shift"]))(*init(n, o["x"], e)),
        lambda z, o, t, e: (lambda z, w: (z, w + o["shift"]))(*step(z, o["x"], t, e)),
        observations, None, 32, noise=noise, generator=generator,
    )  # fmt: skip
    found.log_evidence.sum().backward()
    assert torch.allclose(shift.grad, torch.ones_like(shift), atol=1e-12)


@pytest.mark.parametrize("criterion", ["always", "never"])
def test_gradient_is_a_finite_difference_where_ancestors_stay(criterion):
    """Ancestors are held by the same uniforms; a small change of a parameter does not move them here."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(8, 16, 5, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(8, 1, 5, generator=generator, dtype=torch.float64)
    x = SERIES[:, None].expand(-1, 5)

    def value(theta):
        def init(n, x, e):
            z = theta[0].exp() * e
            return z, normal(x, z, theta[1].exp())

        def step(z, x, t, e):
            z = theta[2] * z + theta[0].exp() * e
            return z, normal(x, z, theta[1].exp())

        return smc.filter(init, step, x, None, 16, noise=noise, criterion=criterion, uniforms=uniforms)

    theta = torch.tensor([-0.1, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    found = value(theta)
    (gradient,) = torch.autograd.grad(found.log_evidence.sum(), theta)
    for i in range(3):
        ends = []
        for sign in (1, -1):
            moved = theta.detach().clone()
            moved[i] += sign * 1e-6
            ends.append(value(moved))
        assert torch.equal(ends[0].ancestors, ends[1].ancestors)
        difference = (ends[0].log_evidence.sum() - ends[1].log_evidence.sum()) / 2e-6
        assert float(gradient[i]) == pytest.approx(float(difference), rel=1e-6, abs=1e-7)


def test_filtered_means_are_kalmans():
    found = run(bootstrap(), 200, 400)
    means = torch.stack([(w * z).sum(0) for w, z in zip(found.weights, found.states)])
    for t, expected in enumerate(kalman(SERIES)[1]):
        assert abs(z_score(means[t], expected)) < 4
    assert abs(z_score(found.states[3].mean(0), kalman(SERIES)[1][3])) > 4  # unweighted


def test_log_weights_with_a_twist_are_those_of_the_filter():
    init, step, twist = lookahead(SERIES)
    found = run(bootstrap(), 200, 400, twist=lambda z, t: 0.6 * twist(z, t))
    means = torch.stack([(w * z).sum(0) for w, z in zip(found.weights, found.states)])
    for t, expected in enumerate(kalman(SERIES)[1]):
        assert abs(z_score(means[t], expected)) < 4


@pytest.mark.parametrize("twisted", [False, True])
def test_smoothing_is_kalmans(twisted):
    """Backward simulation and unwound ancestors, first and second moments; the twin is the filter, not smoothed."""
    twist = lookahead(SERIES)[2] if twisted else None
    found = run(bootstrap(), 250, 240, twist=twist, criterion="ess")
    paths = backward_simulation(
        found, lambda z, following, t: normal(following, A * z, Q), 60, torch.Generator().manual_seed(5)
    )
    assert paths.shape == (8, 60, 240)
    lineages, weights = trajectories(found)
    means, variances = smoothed(SERIES)
    for t in range(8):
        assert abs(z_score(paths[t].mean(0), means[t])) < 4
        assert abs(z_score(paths[t].square().mean(0), variances[t] + means[t] ** 2)) < 4
        assert abs(z_score((weights * lineages[t]).sum(0), means[t])) < 4
    filtered = (found.weights[2] * found.states[2]).sum(0)
    assert abs(z_score(filtered, means[2])) > 4


def test_smoothing_of_a_ragged_batch_is_kalmans():
    """A short series beside a long one: its paths are those of its own observations, and stay where they ended."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([8, 5]).repeat_interleave(200)
    x = SERIES[:, None].repeat(1, 400)
    x[5:, 200:] = torch.nan
    noise = torch.randn(8, 250, 400, generator=generator, dtype=torch.float64)
    found = smc.filter(*bootstrap(), x, lengths, 250, noise=noise, generator=generator)
    paths = backward_simulation(found, lambda z, following, t: normal(following, A * z, Q), 40, generator)
    lineages, weights = trajectories(found)
    for columns, length in ((slice(0, 200), 8), (slice(200, 400), 5)):
        means, _ = smoothed(SERIES[:length])
        for t in range(length):
            assert abs(z_score(paths[t, :, columns].mean(0), means[t])) < 4
            assert abs(z_score((weights * lineages[t]).sum(0)[columns], means[t])) < 4
    assert torch.equal(paths[4, :, 200:], paths[7, :, 200:])
    assert torch.equal(lineages[4, :, 200:], lineages[7, :, 200:])
    assert abs(z_score(paths[4, :, 200:].mean(0), smoothed(SERIES)[0][4])) > 4  # the long series' answer
