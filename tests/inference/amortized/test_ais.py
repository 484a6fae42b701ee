"""Annealed importance sampling: unbiased, against known evidence and a density that is not Gaussian."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, Poisson

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference.amortized import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    ais,
    annealed_importance,
    log_likelihood,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Prior:
    """pPCA whose encoder is the prior, so that annealing has all the work."""

    def __init__(self, model):
        self.model = model

    def encode(self, x):
        zero = torch.zeros(len(x), self.model.W.shape[1], dtype=x.dtype, device=x.device)
        return DiagonalGaussian(zero, zero + 1)

    def log_joint(self, x, z):
        return self.model.log_joint(x, z)


def test_unbiased_against_known_evidence_with_few_temperatures(ppca, monkeypatch):
    """Mean of exp(log weight - log p) is 1 within 4 standard errors of 12,000 chains; the twin accepts every move."""
    model = Prior(ppca())
    x = model.model.data(1, seed=5).expand(6, -1)
    evidence = model.model.evidence(x)

    def score():
        run = annealed_importance(
            model, x, chains=2000, temperatures=8, leapfrog=3, step_size=0.3, generator=seeded()
        )
        ratio = (run.log_weights - evidence).exp().detach().flatten()
        return (ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio))), run

    z, run = score()
    assert abs(z) < 4
    assert (0.4 < run.acceptance).all() and (run.acceptance < 0.95).all()
    monkeypatch.setattr(ais, "_accept", lambda log_ratio, chance: torch.ones_like(chance, dtype=torch.bool))
    monkeypatch.setattr(ais, "ACCEPTANCE", 0.0)  # the step size grows, as nothing is refused
    assert abs(score()[0]) > 8


def test_more_temperatures_tighten_what_plain_samples_cannot_find(ppca):
    """From the prior, 20,000 plain samples are worth fewer than 32 annealed chains, and Pareto k says so."""
    model = Prior(ppca(d=7, big=12, noise=0.15))
    x = model.model.data(3)
    evidence = model.model.evidence(x).detach()
    plain = log_likelihood(model, x, 20_000, generator=seeded())
    assert (plain.pareto_k > 0.7).all()
    spreads = []
    for temperatures in (10, 40, 160):
        run = annealed_importance(model, x, 32, temperatures, leapfrog=5, generator=seeded())
        spreads.append(run.log_weights.var(0).mean().item())
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.1 * spreads[0]
    assert run.ess.min() > plain.ess.max() and (run.ess <= 32).all()
    assert ((run.log_evidence - evidence).abs() < 4 * (1 / run.ess - 1 / 32).sqrt()).all()


def test_evidence_of_a_model_that_is_not_gaussian():
    """Two modes in z, by quadrature."""

    class Squared:
        def encode(self, x):
            return DiagonalGaussian(torch.zeros_like(x), torch.ones_like(x))

        def log_joint(self, x, z):
            return (Normal(torch.zeros_like(z), 1.0).log_prob(z) + Normal(z.square(), 0.4).log_prob(x)).sum(
                -1
            )

    x = torch.tensor([[1.5], [0.2]], dtype=torch.float64)
    z = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    truth = Squared().log_joint(x, z[:, None, None].expand(-1, 2, 1)).logsumexp(0) + math.log(z[1] - z[0])
    run = annealed_importance(Squared(), x, chains=400, temperatures=60, leapfrog=5, generator=seeded())
    error = (1 / run.ess - 1 / 400).sqrt()
    assert ((run.log_evidence - truth).abs() < 4 * error).all()


def test_exact_encoder_needs_no_annealing(ppca):
    model = ppca()
    x = model.data(3)
    run = annealed_importance(model, x, chains=4, temperatures=5)
    torch.testing.assert_close(run.log_weights, model.evidence(x).detach().expand(4, -1), atol=1e-9, rtol=0)
    assert not run.log_evidence.requires_grad and model.A.grad is None


def test_schedule_runs_from_zero_to_one():
    for n in (1, 2, 7, 100):
        ladder = ais.schedule(n)
        assert len(ladder) == n + 1 and ladder[0] == 0 and ladder[-1] == 1
        assert all(a < b for a, b in zip(ladder, ladder[1:]))


def test_refusals(ppca):
    model = ppca(off=0.1)
    x = model.data(3)
    for options in (
        {"chains": 0},
        {"temperatures": 0},
        {"leapfrog": 0},
        {"step_size": 0.0},
        {"step_size": math.nan},
    ):
        with pytest.raises(OptionError, match=next(iter(options))):
            annealed_importance(model, x, **options)
    bad = x.clone()
    bad[1, 0] = math.nan
    with pytest.raises(NumericalError, match="datum 1"):
        annealed_importance(model, bad, 4, 3)

    class Bits:
        def encode(self, x):
            from fspace.inference.amortized import Chain, DiagonalGaussian

            return Chain(DiagonalGaussian(torch.zeros_like(x), torch.ones_like(x)), [])

        def log_joint(self, x, z):
            return z[0].sum(-1)

    with pytest.raises(DataError, match="one real latent"):
        annealed_importance(Bits(), x, 4, 3)
    for kind in (Bernoulli, Categorical):
        bits = SimpleNamespace(
            encode=lambda x, kind=kind: kind(torch.zeros(3, 2, requires_grad=True)),
            log_joint=lambda x, z: -(z.sum(-1) - x[:, 0]).square(),
        )
        with pytest.raises(DataError, match=r"log q\(z \| x\) has no gradient in z"):
            annealed_importance(bits, x, 4, 3)


def test_float32_and_devices(ppca, device):
    model = Prior(ppca(dtype=torch.float32, device=device))
    x = model.model.data(2)
    run = annealed_importance(model, x, 64, 40, generator=torch.Generator(device=device).manual_seed(0))
    assert run.log_evidence.dtype == torch.float32 and run.log_evidence.device.type == device.type
    assert (run.log_evidence - model.model.evidence(x)).abs().max() < 0.5


def test_data_that_are_whole_numbers(ppca):
    """Counts as int64: chains move as they do for the same numbers as floats."""

    class Counts(Prior):
        def encode(self, x):
            return super().encode(x.double())

        def log_joint(self, x, z):
            return Poisson((z[..., 0] + 1).exp()).log_prob(x[:, 0].to(z)) + Normal(0.0, 1.0).log_prob(z).sum(
                -1
            )

    model = Counts(ppca())
    x = torch.tensor([[2], [9], [0]])
    whole, real = (annealed_importance(model, given, 8, 20, generator=seeded()) for given in (x, x.double()))
    assert torch.equal(whole.log_weights, real.log_weights)
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None, None].expand(-1, 3, 2)
    exact = (model.log_joint(x, z) - Normal(0.0, 1.0).log_prob(z[..., 1])).logsumexp(0) + math.log(20 / 4000)
    assert (whole.log_evidence - exact).abs().max() < 0.5
