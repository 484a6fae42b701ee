"""Concrete variables: exact argmax, densities that integrate to one, extremes in float32, and the hard bound."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch.distributions import Bernoulli
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.nn import functional as F

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import (
    BinaryConcrete,
    Concrete,
    Proposal,
    exponential_temperature,
    gumbel_max,
    iwae,
    linear_temperature,
    relaxed_log_weights,
    straight_through,
)

LOGITS = torch.tensor([[0.3, -1.2, 0.9, 0.0]], dtype=torch.float64)
N = 200_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_argmax_has_the_probabilities_of_softmax(temperature):
    """Whatever the temperature: chi-square test of 200,000 draws; the twin draws with other noise."""
    q = Concrete(LOGITS, temperature)
    expected = LOGITS.softmax(-1)[0] * N
    counts = q.hard(q.sample(N, seeded())).sum((0, 1))
    assert chisquare(counts, expected).pvalue > 1e-3
    assert chisquare(gumbel_max(LOGITS, N, seeded()).sum((0, 1)), expected).pvalue > 1e-3
    wrong = q.transform(torch.randn(N, 1, 4, generator=seeded(), dtype=torch.float64))
    assert chisquare(q.hard(wrong).sum((0, 1)), expected).pvalue < 1e-6
    b = BinaryConcrete(LOGITS, temperature)
    chance = LOGITS.sigmoid()
    error = (chance * (1 - chance) / N).sqrt()
    assert ((b.hard(b.sample(N, seeded())).mean(0) - chance) / error).abs().max() < 4
    u, v = (torch.rand(N, 1, 4, generator=seeded(s), dtype=torch.float64) for s in (1, 2))
    laplace = b.transform(
        u.log() - (1 - v).log()
    )  # two uniforms where one is meant, as a public snippet has it
    assert ((b.hard(laplace).mean(0) - chance) / error).abs().max() > 20


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_density_integrates_to_one_and_says_where_the_argmax_falls(temperature):
    """On a grid of log-ratios to the last category: over everything, and over the part where a category is greatest."""
    one = Concrete(torch.tensor([[0.4, -0.7]], dtype=torch.float64), temperature)
    reach, n = 60 / temperature, 20_001
    a = torch.linspace(-reach, reach, n, dtype=torch.float64)
    y = torch.stack([a, torch.zeros_like(a)], -1).log_softmax(-1)[:, None]
    p = one.log_prob(y)[:, 0].exp() * (a[1] - a[0])
    assert abs(p.sum().item() - 1) < 1e-6
    assert abs(p[a > 0].sum().item() - one.logits.softmax(-1)[0, 0].item()) < 2e-3

    three = Concrete(torch.tensor([[0.5, -0.4, 0.2]], dtype=torch.float64), temperature)
    reach, n = 30 / temperature, 901
    a = torch.linspace(-reach, reach, n, dtype=torch.float64)
    first, second = torch.meshgrid(a, a, indexing="ij")
    y = torch.stack([first, second, torch.zeros_like(first)], -1).log_softmax(-1).reshape(-1, 1, 3)
    p = three.log_prob(y)[:, 0].exp() * (a[1] - a[0]) ** 2
    assert abs(p.sum().item() - 1) < 1e-4
    chances = three.hard(y)[:, 0].mul(p[:, None]).sum(0)
    torch.testing.assert_close(chances, three.logits.softmax(-1)[0], atol=0.02, rtol=0)

    bit = BinaryConcrete(torch.tensor([[0.4]], dtype=torch.float64), temperature)
    z = torch.linspace(-60 / temperature, 60 / temperature, 20_001, dtype=torch.float64)
    p = bit.log_prob(z[:, None, None])[:, 0].exp() * (z[1] - z[0])
    assert abs(p.sum().item() - 1) < 1e-6
    assert abs(p[z > 0].sum().item() - bit.logits.sigmoid().item()) < 2e-3


def test_densities_equal_torch_distributions():
    q = Concrete(LOGITS, 0.7)
    y = q.sample(50, seeded())
    theirs = ExpRelaxedCategorical(torch.tensor(0.7, dtype=torch.float64), logits=LOGITS)
    torch.testing.assert_close(q.log_prob(y), theirs.log_prob(y))
    b = BinaryConcrete(LOGITS, 0.7)
    z = b.sample(50, seeded())
    bits = LogitRelaxedBernoulli(torch.tensor(0.7, dtype=torch.float64), logits=LOGITS)
    torch.testing.assert_close(b.log_prob(z), bits.log_prob(z).sum(-1))


def test_samples_follow_the_density():
    """E[p / q] = 1 under q for two relaxations of different logits and temperatures: 4 standard errors of 200,000."""
    for kind in (Concrete, BinaryConcrete):
        q, p = kind(LOGITS[:, :3], 0.7), kind(0.5 * LOGITS[:, 1:], 0.8)
        y = q.sample(N, seeded())
        ratio = (p.log_prob(y) - q.log_prob(y)).exp()[:, 0]
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(N)
        wrong = (p.log_prob(y) - kind(LOGITS[:, :3], 0.9).log_prob(y)).exp()[:, 0]
        assert abs(wrong.mean() - 1) > 10 * wrong.std() / math.sqrt(N)


@pytest.mark.parametrize("kind", [Concrete, BinaryConcrete])
def test_finite_at_the_extremes(kind, device):
    """Temperature 0.05 and logits of 20 in float32: values and gradients."""
    logits = torch.tensor([[20.0, -20.0, 0.0]] * 3, device=device, requires_grad=True)
    q = kind(logits, 0.05)
    y = q.sample(20_000, torch.Generator(device=device).manual_seed(0))
    assert y.isfinite().all() and y.dtype == torch.float32 and y.device.type == device.type
    density = q.log_prob(y)
    assert density.isfinite().all()
    (density.sum() + q.relaxed(y).sum()).backward()
    assert logits.grad.isfinite().all()
    reference = kind(logits.detach().cpu().double(), 0.05).log_prob(y.detach().cpu().double())
    assert (density.detach().cpu().double() - reference).abs().max() < 1e-3 * reference.abs().max()


@pytest.mark.parametrize("kind", [Concrete, BinaryConcrete])
def test_temperatures_so_low_that_samples_overflow_are_refused(kind):
    """Down to 1e-30 a float32 sample of logits of 20 is finite and its density that of float64; below it overflows."""
    q = kind(torch.tensor([[20.0, -20.0, 1.0]]), 1e-30)
    y = q.sample(100, seeded())
    reference = kind(q.logits.double(), 1e-30).log_prob(y.double())
    torch.testing.assert_close(q.log_prob(y).double(), reference, rtol=1e-5, atol=1e-3)
    cold = kind(q.logits, 1e-40)
    with pytest.raises(DataError, match="finite"):
        cold.log_prob(cold.sample(3, seeded()))


def prior_and_posterior(kind, temperature):
    """Two latents of a datum, q off the posterior; log p(x | b) smooth in b."""
    shape = (1, 2) if kind is BinaryConcrete else (1, 2, 3)
    p = kind(torch.zeros(shape, dtype=torch.float64), temperature)
    logits = torch.linspace(-0.8, 0.9, p.logits.numel(), dtype=torch.float64).reshape(shape).requires_grad_()

    def log_likelihood(b):
        return -0.5 * (b.flatten(2)[..., 0] * 2 + b.flatten(2)[..., -1] - 1.2).square() / 0.3

    return kind(logits, temperature), p, log_likelihood


@pytest.mark.parametrize("kind", [Concrete, BinaryConcrete])
def test_hard_bound_stands_beside_the_relaxed_one_which_tends_to_it(kind):
    q, p, log_likelihood = prior_and_posterior(kind, 0.5)
    assert isinstance(q, Proposal)
    both = relaxed_log_weights(q, p, log_likelihood, 4000, seeded())
    assert both.relaxed.requires_grad and not both.hard.requires_grad
    # The hard log-weights are those of the discrete model: their evidence is that by enumeration.
    d, e = q.discrete(), p.discrete()
    states = torch.cartesian_prod(*[torch.arange(2 if kind is BinaryConcrete else 3)] * 2)
    states = (states if kind is BinaryConcrete else F.one_hot(states, 3)).double()[:, None]
    evidence = (log_likelihood(states) + e.log_prob(states)).logsumexp(0)
    w = both.hard.exp()
    assert abs(w.mean() - evidence.exp()) < 4 * w.std() / math.sqrt(4000)
    assert (d.log_prob(states).exp().sum(0) - 1).abs() < 1e-12
    gaps = []
    for temperature in (1.0, 0.3, 0.1, 0.02):
        q, p, log_likelihood = prior_and_posterior(kind, temperature)
        relaxed, hard = relaxed_log_weights(q, p, log_likelihood, 20_000, seeded())
        torch.testing.assert_close(
            iwae(hard), iwae(relaxed_log_weights(q, p, log_likelihood, 20_000, seeded()).hard)
        )
        gaps.append((iwae(relaxed) - evidence).abs().item())
    assert gaps[0] > 0.2 and gaps[-1] < 0.02 and gaps == sorted(gaps, reverse=True)


def test_one_prior_serves_all_data():
    q, p, log_likelihood = prior_and_posterior(Concrete, 0.5)
    many = Concrete(q.logits.expand(5, 2, 3), 0.5)
    assert relaxed_log_weights(many, p, log_likelihood, 3, seeded()).hard.shape == (3, 5)


@pytest.mark.parametrize("kind", [Concrete, BinaryConcrete])
def test_same_distribution_has_no_divergence_and_stopped_no_gradient(kind):
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    q = kind(LOGITS.clone().requires_grad_(), temperature)
    y = q.sample(5, seeded())
    assert torch.equal(q.log_prob(y) - q.stopped().log_prob(y), torch.zeros(5, 1, dtype=torch.float64))
    assert not q.stopped().log_prob(y.detach()).requires_grad
    assert q.stopped().log_prob(y).requires_grad  # through y
    grads = torch.autograd.grad(q.log_prob(y.detach()).sum(), [q.logits, temperature])
    assert all(g.abs().sum() > 0 for g in grads)


def test_batch_of_two_is_two_singles():
    for kind in (Concrete, BinaryConcrete):
        logits = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64)
        whole = kind(logits, 0.5)
        y = whole.sample(6, seeded())
        assert y.shape == (6, 2, 3, 4) and whole.log_prob(y).shape == (6, 2)
        for b in range(2):
            alone = kind(logits[b : b + 1], 0.5).log_prob(y[:, b : b + 1])
            torch.testing.assert_close(alone, whole.log_prob(y)[:, b : b + 1])


def test_straight_through_is_hard_forward_and_relaxed_backward():
    q = Concrete(LOGITS.clone().requires_grad_(), 0.5)
    y = q.sample(7, seeded())
    relaxed = q.relaxed(y)
    out = straight_through(relaxed, q.hard(y))
    torch.testing.assert_close(out, q.hard(y))
    weights = torch.arange(4.0, dtype=torch.float64)
    pair = [torch.autograd.grad((o * weights).sum(), q.logits, retain_graph=True)[0] for o in (out, relaxed)]
    torch.testing.assert_close(*pair)
    with pytest.raises(DataError, match="hard has shape"):
        straight_through(relaxed, q.hard(y)[0])


def test_temperatures_fall_as_said():
    assert [exponential_temperature(s, 1.0, 0.5, 0.1) for s in (0, 1, 100)] == pytest.approx(
        [1.0, math.exp(-0.1), 0.5]
    )
    assert [linear_temperature(s, 10, 1.0, 0.5) for s in (0, 5, 10, 99)] == pytest.approx(
        [1.0, 0.75, 0.5, 0.5]
    )
    for call in (
        lambda: exponential_temperature(-1),
        lambda: exponential_temperature(1, 1.0, 0.0),
        lambda: exponential_temperature(1, 0.2, 0.5),
        lambda: exponential_temperature(1, 1.0, 0.5, -1.0),
        lambda: linear_temperature(1, 0),
        lambda: linear_temperature(1, 5, math.nan),
    ):
        with pytest.raises(OptionError):
            call()


@pytest.mark.parametrize("kind", [Concrete, BinaryConcrete])
def test_refusals(kind):
    for temperature in (0.0, -0.5, math.nan, math.inf, torch.tensor(0.0)):
        with pytest.raises(OptionError, match="temperature"):
            kind(LOGITS, temperature)
    with pytest.raises(OptionError, match="one number for all"):
        kind(LOGITS, torch.ones(4, 1))
    q = kind(LOGITS, 0.5)
    with pytest.raises(DataError, match=r"z has shape \[1, 4\]; it must be \[1, 1, 4\]"):
        q.log_prob(LOGITS)
    outside = torch.full((2, 1, 4), math.nan, dtype=torch.float64)
    with pytest.raises(DataError, match="outside the support"):
        q.log_prob(outside)
    with pytest.raises(DataError, match="outside the support"):
        q.log_prob(torch.tensor([[[-math.inf, -math.inf, -math.inf, 0.0]]], dtype=torch.float64))
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(DataError, match=r"logits\[0, 1\].*logits of a relaxation are finite"):
            kind(torch.tensor([[0.0, wrong]]), 0.5)
    with pytest.raises(DataError, match=r"logits of the prior has shape \[2, 4\]; it must be \[3, 4\]"):
        relaxed_log_weights(kind(LOGITS.expand(3, 4), 0.5), kind(LOGITS.expand(2, 4), 0.5), torch.sum, 2)
    with pytest.raises(DataError, match=r"one row of the prior's logits has shape \[3\]; it must be \[4\]"):
        relaxed_log_weights(kind(LOGITS.expand(3, 4), 0.5), kind(LOGITS[:, :3], 0.5), torch.sum, 2)
    with pytest.raises(DataError, match="log_likelihood of relaxed latents refused its values.*Bernoulli"):
        relaxed_log_weights(q, q, lambda b: Bernoulli(probs=b.sum(-1) + 2).log_prob(b.sum(-1)), 2)
    other = BinaryConcrete if kind is Concrete else Concrete
    with pytest.raises(OptionError, match="both densities are of one sample"):
        relaxed_log_weights(q, other(LOGITS, 0.5), lambda b: b.sum(-1), 2)
    with pytest.raises(OptionError, match="samples=0"):
        relaxed_log_weights(q, q, lambda b: b.sum(-1), 0)
    with pytest.raises(DataError, match="The value of log_likelihood"):
        relaxed_log_weights(q, q, lambda b: b, 2)


def test_points_off_the_simplex_are_outside_the_support():
    q = Concrete(LOGITS, 0.5)
    y = q.sample(3, seeded())
    with pytest.raises(DataError, match=r"z\[1, 0\].*logsumexp 0"):
        q.log_prob(torch.where(torch.arange(3)[:, None, None] == 1, y + 0.1, y))
    with pytest.raises(DataError, match="outside the support"):
        q.log_prob(y.exp())  # the simplex itself, not its logarithm
