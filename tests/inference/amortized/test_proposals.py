"""Proposals: densities against torch.distributions and enumeration; what lies outside their support."""

import math

import pytest
import torch
from torch import distributions as D

from fspace.errors import DataError
from fspace.inference.amortized import Bernoulli, Categorical, DiagonalGaussian, Proposal, gumbel, gumbel_max

GIVEN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("q", "theirs", "event"),
    [
        (DiagonalGaussian(GIVEN, GIVEN.exp()), D.Normal(GIVEN, GIVEN.exp()), (-1, -2)),
        (Bernoulli(GIVEN), D.Bernoulli(logits=GIVEN), (-1, -2)),
        (Categorical(GIVEN), D.OneHotCategorical(logits=GIVEN), (-1,)),
    ],
    ids=["gaussian", "bernoulli", "categorical"],
)
def test_densities_equal_torch_distributions_and_moments_agree(q, theirs, event):
    assert isinstance(q, Proposal)
    z = q.sample(50_000, seeded())
    assert z.shape == (50_000, *GIVEN.shape) and z.dtype == torch.float64
    torch.testing.assert_close(q.log_prob(z), theirs.log_prob(z).sum(event))
    error = (theirs.variance / 50_000).sqrt()
    assert ((z.mean(0) - theirs.mean) / error).abs().max() < 4.5
    for b in range(2):
        alone = type(q)(*(getattr(q, name)[b : b + 1] for name in q.__dataclass_fields__))
        torch.testing.assert_close(alone.log_prob(z[:, b : b + 1]), q.log_prob(z)[:, b : b + 1])
    assert torch.equal(q.sample(3, seeded(1)), q.sample(3, seeded(1)))


def test_latents_may_be_scalars_or_images():
    for shape in ((5,), (5, 2), (5, 3, 4, 4)):
        q = DiagonalGaussian(torch.zeros(shape), torch.ones(shape))
        assert q.log_prob(q.sample(7)).shape == (7, 5)


def test_gumbel_noise_has_its_moments_and_no_infinity():
    like = torch.zeros(1000, dtype=torch.float64)
    noise = gumbel(like, 1000, seeded())
    assert abs(noise.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6e6)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    assert gumbel(torch.zeros(1_000_000), 10, seeded()).isfinite().all()


def test_bits_have_no_gradient_and_extreme_logits_no_nan():
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    q = Bernoulli(logits)
    z = q.sample(9, seeded())
    assert not z.requires_grad and (z[..., 0] == 1).all() and (z[..., 1] == 0).all()
    q.log_prob(z).sum().backward()
    assert logits.grad.isfinite().all()
    far = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    Categorical(far).log_prob(gumbel_max(far, 4, seeded())).sum().backward()
    assert far.grad.isfinite().all()


def test_outside_the_support():
    q = Bernoulli(GIVEN)
    z = q.sample(2, seeded())
    z[1, 0, 2, 3] = 0.5
    with pytest.raises(DataError, match=r"z\[1, 0, 2, 3\] = 0.5 is outside the support: a bit is 0 or 1"):
        q.log_prob(z)
    c = Categorical(GIVEN)
    z = c.sample(2, seeded())
    z[0, 1, 1] = 0.25
    with pytest.raises(DataError, match=r"z\[0, 1, 1\].*one-hot"):
        c.log_prob(z)
    with pytest.raises(DataError, match=r"std\[1\] = 0.0 is outside"):
        DiagonalGaussian(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(DataError, match="std has shape"):
        DiagonalGaussian(torch.zeros(3, 2), torch.ones(3))
    for q in (Bernoulli(GIVEN), Categorical(GIVEN), DiagonalGaussian(GIVEN, GIVEN.exp())):
        with pytest.raises(DataError, match="z has shape"):
            q.log_prob(torch.zeros(2, 3, 4, dtype=torch.float64))


def test_logits_that_are_no_log_odds():
    for wrong in (math.nan, math.inf):
        logits = torch.tensor([[0.1, 0.2], [0.3, wrong]])
        with pytest.raises(DataError, match=r"logits\[1\].*none that is NaN or \+inf"):
            Categorical(logits)
    with pytest.raises(DataError, match=r"logits\[0\].*finite logit"):
        Categorical(torch.full((1, 2), -math.inf))
    with pytest.raises(DataError, match=r"logits\[0, 1\] = nan is outside the support: the logit of a bit"):
        Bernoulli(torch.tensor([[0.0, math.nan]]))
    for q in (Bernoulli(GIVEN), Categorical(GIVEN), DiagonalGaussian(GIVEN, GIVEN.exp())):
        with pytest.raises(DataError, match=r"z has shape \[\]"):
            q.log_prob(torch.tensor(1.0, dtype=torch.float64))


def test_infinite_logits_are_certain():
    """A category of -inf never comes, and costs nothing; a bit of plus or minus infinity is always the same."""
    never = torch.tensor([[-math.inf, 0.3, 1.0]], requires_grad=True)
    z = Categorical(never).sample(500, seeded())
    assert not z[..., 0].any() and z[..., 1].any()
    kept = Categorical(never[:, 1:]).log_prob(z[..., 1:])
    torch.testing.assert_close(Categorical(never).log_prob(z), kept)
    (slope,) = torch.autograd.grad(Categorical(never).log_prob(z).sum(), never)
    assert slope.isfinite().all() and slope[0, 0] == 0
    sure = Bernoulli(torch.tensor([[math.inf, -math.inf]]))
    assert torch.equal(sure.log_prob(sure.sample(3, seeded())), torch.zeros(3, 1))
    assert sure.log_prob(torch.tensor([[[1.0, 1.0]]])) == -math.inf
