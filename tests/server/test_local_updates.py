"""What workers make of their rows: closed forms of power EP, brute force, rounds that reach the pooled posterior."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from scipy import special

from fspace.errors import OptionError
from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.inference.likelihoods import BernoulliLikelihood, OffsetLikelihood
from fspace.inference.sites import converge, empty_site
from fspace.server import PosteriorServer, Update
from fspace.server.core import form_of
from fspace.server.local_updates import RowFactors, new_site, power_ep
from fspace.server.natural import divergence, log_normaliser, moments


def closed_form(problem, power, residual_in_noise=1.0):
    """Precision, shift and log evidence of Bui et al. (2017), eq. 21 and 22, for Gaussian noise, in numpy.

    The effective noise of a row is noise + power residual; the evidence is the density of y under Q + that noise, less
    (1 - power) / (2 power) sum log(1 + power residual / noise).
    """
    dense = lambda a, b: problem.basis.kernel(a, b).to_dense().detach().numpy()  # noqa: E731
    z, x, y = problem.basis.inducing_inputs, problem.x, problem.y.numpy()
    factor = np.linalg.cholesky(dense(z, z))
    a = np.linalg.solve(factor, dense(z, x))
    residual = residual_in_noise * (np.diag(dense(x, x)) - (a**2).sum(0))
    precision, shift, evidence = [], [], 0.0
    for output, noise in enumerate(problem.basis.noise.numpy()):
        spread = noise + power * residual
        precision.append((a / spread) @ a.T)
        shift.append(a @ (y[:, output] / spread))
        covariance = a.T @ a + np.diag(spread)
        _, logdet = np.linalg.slogdet(covariance)
        fit = y[:, output] @ np.linalg.solve(covariance, y[:, output])
        evidence -= 0.5 * (len(x) * math.log(2 * math.pi) + logdet + fit)
        evidence -= 0.5 * (1 - power) / power * np.log1p(power * residual / noise).sum()
    return np.stack(precision), np.stack(shift), evidence


def of_rows(problem, count):
    return replace(problem, x=problem.x[-count:], y=problem.y[-count:])


def ep(problem, power, damping=1.0, sweeps=3, cavity=None):
    start = RowFactors.empty(problem.basis, len(problem.x))
    cavity = form_of(problem.basis).empty(problem.basis.id, "none") if cavity is None else cavity
    return power_ep(problem.basis, problem.x, problem.y, start, cavity, power, damping, sweeps)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.1])
def test_gaussian_noise_has_the_closed_form_of_power_ep(gaussian, power):
    """Power 1 is FITC. The twin, FITC for every power, is not it."""
    few = of_rows(gaussian, 60)
    site, factors = ep(few, power)
    precision, shift, evidence = closed_form(few, power)
    np.testing.assert_allclose(site.precision, precision, rtol=1e-6, atol=1e-6 * np.abs(precision).max())
    np.testing.assert_allclose(site.shift, shift, rtol=1e-6, atol=1e-6 * np.abs(shift).max())
    assert log_normaliser(site) == pytest.approx(evidence, rel=1e-8)
    assert site.count == 60
    fitc = closed_form(few, 1.0)
    if power < 1:
        assert abs(log_normaliser(site) - fitc[2]) > 1e-2
    else:
        residual = few.basis.prior_variance(few.x) - few.basis.whiten(few.x).square().sum(0)
        expected = 1.0 / (few.basis.noise[:, None] + residual)
        torch.testing.assert_close(factors.precision, expected, rtol=1e-7, atol=0.0)


def test_power_towards_zero_is_titsias(gaussian):
    """The gap shrinks in proportion to the power once that is small; at power 1 it is large."""
    few = of_rows(gaussian, 60)
    exact = fit_site(few.basis, few.x, few.y)
    gaps = []
    for power in (1.0, 1e-3, 1e-5):
        site, _ = ep(few, power)
        gaps.append((divergence(site, exact), abs(log_normaliser(site) - log_evidence([exact]))))
    assert gaps[0][0] > 1e-2 and gaps[0][1] > 0.1
    assert gaps[2][0] < 1e-6 and gaps[2][1] < 0.02
    assert gaps[2][1] == pytest.approx(1e-2 * gaps[1][1], rel=0.02)  # of first order in the power
    tiny, _ = ep(few, 1e-6)
    torch.testing.assert_close(tiny.precision, exact.precision, rtol=1e-4, atol=1e-4)
    assert log_normaliser(tiny) == pytest.approx(log_evidence([exact]), rel=1e-4)


def test_against_a_cavity_gaussian_factors_are_the_same(gaussian):
    """Row factors of Gaussian noise do not depend on what the other workers say."""
    few = of_rows(gaussian, 40)
    others = fit_site(gaussian.basis, *gaussian.shard(0, 2))
    alone, with_others = ep(few, 0.5), ep(few, 0.5, cavity=others)
    torch.testing.assert_close(alone[0].precision, with_others[0].precision, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(alone[0].shift, with_others[0].shift, rtol=1e-7, atol=1e-7)


def three_classified(rows=3):
    kernel = ScaleKernel(MaternKernel(nu=2.5)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 2.0
    x = torch.tensor([[-0.7], [0.1], [1.3]], dtype=torch.float64)[:rows]
    y = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)[:rows]
    likelihood = OffsetLikelihood(BernoulliLikelihood(), torch.tensor([0.2]).double()).requires_grad_(False)
    return Basis(kernel.requires_grad_(False), x.clone(), likelihood), x, y


def brute_force(basis, x, y, points=60):
    """Log evidence, mean and covariance of v by Gauss-Hermite quadrature on a grid over all coordinates."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(nodes, repeat=len(x))))
    mass = np.prod(np.array(list(itertools.product(weights, repeat=len(x)))), axis=1)
    f = grid @ basis.whiten(x).numpy() + 0.2
    mass = mass * np.exp(special.log_ndtr(f * (2 * y.numpy()[:, 0] - 1)).sum(1))
    total = mass.sum()
    mean = mass @ grid / total
    covariance = (grid * mass[:, None]).T @ grid / total - np.outer(mean, mean)
    return math.log(total), mean, covariance


def test_one_row_is_exact():
    """One row about one value: moments and evidence of EP are those of the tilted distribution itself."""
    basis, x, y = three_classified(1)
    site, _ = power_ep(basis, x, y, RowFactors.empty(basis, 1), empty_site(basis, 1), 1.0, 1.0, 2)
    value, mean, covariance = brute_force(basis, x, y, 80)
    found_mean, found_covariance = moments(site)
    np.testing.assert_allclose(found_mean[0], mean, atol=1e-6)
    np.testing.assert_allclose(found_covariance[0], covariance, atol=1e-6)
    assert log_normaliser(site) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 3])
def test_expectation_propagation_against_brute_force(rows):
    """An inducing input at every row. EP is an approximation: known to be close for probit (Nickisch and Rasmussen
    2008), here to 2e-3 in the evidence and 1e-2 in the moments; the variational posterior is not so near."""
    basis, x, y = three_classified(rows)
    site, factors = power_ep(basis, x, y, RowFactors.empty(basis, rows), empty_site(basis, 1), 1.0, 0.7, 40)
    value, mean, covariance = brute_force(basis, x, y)
    found_mean, found_covariance = moments(site)
    np.testing.assert_allclose(found_mean[0], mean, atol=1e-2)
    np.testing.assert_allclose(found_covariance[0], covariance, atol=1e-2)
    assert log_normaliser(site) == pytest.approx(value, abs=2e-3)
    again, _ = power_ep(basis, x, y, factors, empty_site(basis, 1), 1.0, 0.7, 1)
    torch.testing.assert_close(again.precision, site.precision, rtol=1e-7, atol=1e-9)
    _, bound = converge(basis, x, y)
    assert value - bound > 2 * abs(value - log_normaliser(site))
    twin = power_ep(basis, x, y, RowFactors.empty(basis, rows), empty_site(basis, 1), 0.01, 0.7, 40)[0]
    assert abs(log_normaliser(twin) - bound) < 0.1 * (value - bound)  # power towards 0: the variational bound


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_damped_sweeps_converge(binary, power):
    """480 rows on 25 inducing inputs, and from there on nothing moves."""
    basis = binary.basis
    none = form_of(basis).empty(basis.id, "none")
    factors, moves = RowFactors.empty(basis, len(binary.x)), []
    previous = None
    for _ in range(12):
        site, factors = power_ep(basis, binary.x, binary.y, factors, none, power, 0.5, 3)
        if previous is not None:
            moves.append(divergence(site, previous))
        previous = site
    assert moves[-1] < 1e-9 < moves[0]
    assert math.isfinite(log_normaliser(site))


def test_the_sum_of_shards_has_the_fixed_point_of_pooled_power_ep(binary):
    """Workers that sweep in turn, each against what the others say, end where one worker with all rows ends."""
    basis, of = binary.basis, 3
    none = form_of(basis).empty(basis.id, "none")
    pooled, _ = ep(binary, 0.5, 0.5, 40)
    shards = [binary.shard(k, of) for k in range(of)]
    factors = [RowFactors.empty(basis, len(x)) for x, _ in shards]
    sites = [none] * of
    for _ in range(25):
        for k, (x, y) in enumerate(shards):
            cavity = none
            for j in range(of):
                cavity = cavity if j == k else cavity + sites[j]
            sites[k], factors[k] = power_ep(basis, x, y, factors[k], cavity, 0.5, 0.5, 2)
    assert divergence(sites[0] + sites[1] + sites[2], pooled) < 1e-8


def test_what_power_ep_refuses(binary, gaussian):
    from gpytorch.likelihoods import SoftmaxLikelihood

    for wrong in ({"power": 0.0}, {"power": 1.5}, {"damping": 0.0}, {"damping": 2.0}):
        with pytest.raises(OptionError):
            ep(binary, **{"power": 1.0, **wrong})
    inner = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    many = OffsetLikelihood(inner, torch.zeros(3).double()).requires_grad_(False)
    with pytest.raises(OptionError, match="one function"):
        ep(replace(binary, basis=replace(binary.basis, likelihood=many)), 1.0)
    for wrong in ({"steps": 0}, {"damping": 0.0}, {"damping": 1.1}):
        with pytest.raises(OptionError):
            Update(**wrong)


# -- natural-gradient steps ------------------------------------------------------------------------------------


def start_of(problem, name="s0"):
    return form_of(problem.basis).empty(problem.basis.id, name)


def test_gaussian_noise_has_its_site_at_once(gaussian):
    x, y = gaussian.shard(0, 4)
    others = fit_site(gaussian.basis, *gaussian.shard(1, 4))
    own = replace(start_of(gaussian), incarnation="i", version=4)
    found, exact = new_site(gaussian.basis, x, y, own, others, Update(1)), fit_site(gaussian.basis, x, y)
    assert torch.equal(found.precision, exact.precision) and torch.equal(found.shift, exact.shift)
    assert (found.site_id, found.incarnation, found.version, found.count) == ("s0", "i", 5, 100)


def test_weights_of_gaussian_rows_count(gaussian):
    """A row of weight 2 is two rows; it had been one, without a word."""
    x, y = gaussian.shard(0, 4)
    weight = torch.ones(len(x)).double()
    weight[:10] = 2.0
    found = new_site(gaussian.basis, x, y, start_of(gaussian), start_of(gaussian), Update(1), weight)
    exact = fit_site(gaussian.basis, torch.cat([x, x[:10]]), torch.cat([y, y[:10]]))
    torch.testing.assert_close(found.precision, exact.precision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.shift, exact.shift, rtol=1e-9, atol=1e-9)
    assert log_normaliser(found) == pytest.approx(log_normaliser(exact), rel=1e-9)


def test_one_shard_with_nothing_beside_it_reaches_the_pooled_fixed_point(binary):
    pooled, bound = converge(binary.basis, binary.x, binary.y, tolerance=1e-12)
    own = start_of(binary)
    for _ in range(20):
        own = new_site(binary.basis, binary.x, binary.y, own, start_of(binary, "none"), Update(3))
    assert divergence(own, pooled) < 1e-6
    assert log_normaliser(own) == pytest.approx(bound, rel=1e-8)


def rounds(problem, of, how, together, goal=1e-3, most=60, sort=False):
    """How many rounds through a real server until the posterior is within `goal` nats of the pooled one (`most` + 1:
    never), and the divergence after every round."""
    pooled, _ = converge(problem.basis, problem.x, problem.y, tolerance=1e-10)
    if sort:
        order = problem.x[:, 0].argsort()
        x, y = problem.x[order].tensor_split(of), problem.y[order].tensor_split(of)
        shards = list(zip(x, y))
    else:
        shards = [problem.shard(k, of) for k in range(of)]
    server = PosteriorServer()
    server.register_basis(problem.basis)
    names = [f"s{k}" for k in range(of)]
    gaps = []
    for _ in range(most):
        sites = []
        for name, (x, y) in zip(names, shards):
            own = server.get(name) or start_of(problem, name)
            site = new_site(problem.basis, x, y, own, server.cavity(name), how)
            if together:
                sites.append(site)
            else:
                server.put(site)
        for site in sites:
            server.put(site)
        gaps.append(divergence(server.total(), pooled))
        if gaps[-1] < goal or not math.isfinite(gaps[-1]):
            break
    return (len(gaps) if gaps[-1] < goal else most + 1), gaps


@pytest.mark.parametrize("of", [4, 8])
@pytest.mark.parametrize("together", [True, False], ids=["synchronous", "in turn"])
@pytest.mark.parametrize("steps, damping, most", [(1, 1.0, 5), (3, 1.0, 4), (1, 0.5, 13), (3, 0.5, 10)])
def test_rounds_reach_the_pooled_posterior(binary, of, together, steps, damping, most):
    """Measured to 1e-3 nats: (steps 1, damping 1) 3 to 4 rounds, (3, 1) 2 to 3, (1, 0.5) 8 to 11, (3, 0.5) 7 to 8."""
    assert rounds(binary, of, Update(steps, damping), together)[0] <= most


def test_one_synchronous_undamped_step_is_the_pooled_step_however_many_shards(binary):
    """The same cavity for all: posteriors after every round are those of one worker with all rows."""
    gaps = [rounds(binary, of, Update(1, 1.0), True, goal=0.0, most=4)[1] for of in (1, 4, 24)]
    for other in gaps[1:]:
        np.testing.assert_allclose(other, gaps[0], rtol=1e-6)


def test_sorted_shards_reach_the_pooled_posterior_too(binary):
    """Every worker sees one part of the inputs alone."""
    for together in (True, False):
        assert rounds(binary, 8, Update(3), together, sort=True)[0] <= 4
