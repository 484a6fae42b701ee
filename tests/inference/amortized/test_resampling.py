"""Resampling schemes: unbiased counts, floor or ceil, no index out of range, never a particle of weight 0."""

import math

import pytest
import torch

from fspace.inference.amortized.resampling import (
    BELOW_ONE,
    SCHEMES,
    inverse_cdf,
    multinomial,
    relaxed,
    systematic,
)

WEIGHTS = torch.tensor([0.05, 0.37, 0.0, 0.16, 0.25, 0.0, 0.17, 0.0], dtype=torch.float64)
N, DRAWS = len(WEIGHTS), 40_000


def uniforms(scheme, particles, draws, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if scheme == "systematic" else particles
    return torch.rand(rows, draws, generator=generator, dtype=torch.float64)


def counts(ancestors, particles):
    """Children of each particle [N, B]."""
    return torch.zeros(particles, ancestors.shape[1]).scatter_add_(0, ancestors, torch.ones(ancestors.shape))


def z_scores(found, expected):
    error = found.std(1) / math.sqrt(found.shape[1])
    return (found.mean(1) - expected).abs() / error.clamp(min=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_expected_children_are_n_times_the_weight(scheme):
    draws = SCHEMES[scheme](WEIGHTS[:, None].expand(N, DRAWS), uniforms(scheme, N, DRAWS))
    assert draws.shape == (N, DRAWS) and draws.dtype == torch.int64
    found = counts(draws, N)
    assert bool((z_scores(found, N * WEIGHTS) < 4).all())
    assert bool((found[WEIGHTS == 0] == 0).all())
    nearly = WEIGHTS + 0.01 * torch.tensor(
        [1, -1, 0, 0, 0, 0, 0, 0]
    )  # the twin: weights that are a little wrong
    assert bool((z_scores(found, N * nearly) > 4).any())


@pytest.mark.parametrize(
    ("scheme", "certain"), [("systematic", True), ("residual", False), ("stratified", False)]
)
def test_how_far_the_children_may_be_from_what_is_expected(scheme, certain):
    draws = SCHEMES[scheme](WEIGHTS[:, None].expand(N, DRAWS), uniforms(scheme, N, DRAWS))
    found, expected = counts(draws, N), (N * WEIGHTS)[:, None]
    between = (found >= expected.floor()) & (found <= expected.ceil())
    assert bool(between.all()) == certain
    if scheme == "residual":
        assert bool((found >= expected.floor()).all())
    if scheme == "stratified":
        assert bool(((found - expected).abs() < 2).all())
    independent = counts(multinomial(WEIGHTS[:, None].expand(N, DRAWS), uniforms("multinomial", N, DRAWS)), N)
    assert found.var(1).sum() < 0.7 * independent.var(1).sum()


@pytest.mark.parametrize("particles", [1, 2, 7, 64, 1000])
def test_systematic_by_its_formula_is_systematic_by_search(particles):
    generator = torch.Generator().manual_seed(particles)
    weights = torch.randn(particles, 500, generator=generator, dtype=torch.float64).mul(3).exp()
    weights[::3] = 0 if particles > 1 else 1
    u = torch.rand(1, 500, generator=generator, dtype=torch.float64)
    points = (torch.arange(particles)[:, None] + u) / particles
    assert torch.equal(systematic(weights, u), inverse_cdf(weights, points))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dead", ["first", "last", "none", "all but one"])
def test_float32_weights_that_do_not_sum_to_one(scheme, dead):
    """Sums of 1 - 1e-7 and uniforms next to 1: searching the plain cumulated sum would answer N."""
    particles = 1000
    weights = torch.rand(particles, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    if dead == "first":
        weights[:10] = 0
    elif dead == "last":
        weights[-10:] = 0
    elif dead == "all but one":
        weights[1:] = 0
    weights = weights / weights.sum(0) * (1 - 1e-7)
    assert weights.dtype == torch.float32
    rows = 1 if scheme == "systematic" else particles
    for value in (0.0, 0.5, 1 - 2.0**-24, 1 - 2.0**-40, BELOW_ONE):
        u = torch.full((rows, 3), value, dtype=torch.float64)
        index = SCHEMES[scheme](weights, u)
        assert int(index.min()) >= 0 and int(index.max()) < particles
        assert bool((weights.gather(0, index) > 0).all())
    naive = torch.searchsorted(
        weights.cumsum(0).mT.contiguous(), torch.full((3, 1), 1 - 2.0**-24), right=True
    )
    if dead == "last":
        assert bool((weights.gather(0, naive.mT.clamp(max=particles - 1)) == 0).any())  # what is avoided


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_and_one_particle(scheme):
    u = uniforms(scheme, 8, 50)
    index = SCHEMES[scheme](torch.full((8, 50), 3.0), u)
    if scheme != "multinomial":  # one child each
        assert torch.equal(index, torch.arange(8)[:, None].expand(8, 50))
    one = SCHEMES[scheme](torch.rand(1, 50) + 0.1, uniforms(scheme, 1, 50))
    assert torch.equal(one, torch.zeros(1, 50, dtype=torch.int64))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_of_two_is_two_singles(scheme):
    weights = torch.rand(N, 2, dtype=torch.float64)
    u = uniforms(scheme, N, 2)
    both = SCHEMES[scheme](weights, u)
    for b in range(2):
        assert torch.equal(both[:, [b]], SCHEMES[scheme](weights[:, [b]], u[:, [b]]))


def test_relaxed_ancestors_have_their_corners_with_the_weights_probabilities():
    draws = 20_000
    weights = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    u = torch.rand(3, 3, draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mix = relaxed(weights.log()[:, None].expand(3, draws), u, 0.5)
    assert torch.allclose(mix.sum(1), torch.ones(3, draws, dtype=torch.float64))
    found = counts(mix.argmax(1), 3)
    assert bool((z_scores(found, 3 * weights) < 4).all())
    assert bool(
        (z_scores(mix.sum(0), 3 * weights) > 4).any()
    )  # its mean is not the weights: it is a relaxation
    corner = relaxed(weights.log()[:, None].expand(3, draws), u, 1e-4)
    assert torch.equal(corner.argmax(1), mix.argmax(1))
    assert float((corner.amax(1) > 0.999).double().mean()) > 0.99
