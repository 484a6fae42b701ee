"""Sparse latents: exact bounds over the categories that have mass."""

import builtins
import math

import pytest
import torch
from torch.distributions import Poisson

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import reinforce_loo, sparse_elbo, sparse_probabilities
from fspace.inference.amortized.latent import LogTerms

pytest.importorskip("entmax", reason="the package entmax: pip install 'fspace[amortized]'")


@pytest.fixture
def table():
    """log p(x, z) of 4 data and 5 categories."""
    return 2.0 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def projection(v):
    """Euclidean projection on the simplex, by bisection on the threshold."""
    low, high = v.amax(-1) - 1, v.amax(-1)
    for _ in range(80):
        middle = (low + high) / 2
        over = (v - middle[..., None]).clamp_min(0).sum(-1) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (v - middle[..., None]).clamp_min(0)


def test_sparsemax_is_the_projection_and_softmax_the_other_end(table):
    torch.testing.assert_close(sparse_probabilities(table, 2.0), projection(table))
    torch.testing.assert_close(sparse_probabilities(table, 1.0), table.softmax(-1))
    torch.testing.assert_close(sparse_probabilities(table, 1.0 + 1e-6), table.softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        sparse_probabilities(table, 1.5), sparse_probabilities(table, 1.5 + 1e-9), atol=1e-5, rtol=0
    )
    support = [(sparse_probabilities(table, alpha) > 0).sum().item() for alpha in (1.0, 1.5, 2.0)]
    assert support[0] == 20 and support[0] > support[1] > support[2]


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_bound_and_gradient_are_the_full_sum(table, alpha):
    """By the sum over all categories; only those with mass are asked for."""
    asked = []
    logits = (0.5 * table.flip(0)).requires_grad_()

    def log_joint(rows, categories):
        asked.append(len(rows))
        return table[rows, categories]

    q = sparse_probabilities(logits, alpha)
    found = sparse_elbo(log_joint, q)
    direct = (q * table - torch.special.xlogy(q, q.detach()) - 0 * q).sum(-1)
    torch.testing.assert_close(found, direct)
    assert asked == [int((q > 0).sum())]
    assert (found < table.logsumexp(-1)).all()
    mass = q.detach() > 0
    full = torch.where(mass, q * (table - torch.where(mass, q, 1.0).log()), 0.0).sum()
    pair = [torch.autograd.grad(s, logits, retain_graph=True)[0] for s in (found.sum(), full)]
    torch.testing.assert_close(*pair)
    step = torch.zeros_like(logits)
    step[1, 2] = 1e-6
    moved = [
        sparse_elbo(log_joint, sparse_probabilities(logits.detach() + s * step, alpha)).sum() for s in (1, -1)
    ]
    torch.testing.assert_close(pair[0][1, 2], (moved[0] - moved[1]) / 2e-6, atol=1e-5, rtol=1e-4)


def test_exact_gradient_is_what_sampling_estimates(table):
    """alpha = 1 against REINFORCE with leave-one-out of the same q: 4 standard errors of 20,000 draws of four."""
    logits = (0.5 * table[:1]).expand(20_000, 5).clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    z = torch.multinomial(
        log_q.detach().exp(), 4, replacement=True, generator=torch.Generator().manual_seed(0)
    ).T
    score = log_q.gather(1, z.T).T
    terms = LogTerms(table[0][z], score, score.detach())
    drawn = torch.autograd.grad(reinforce_loo(terms).encoder.sum(), logits)[0]
    one = (0.5 * table[:1]).requires_grad_()
    exact = sparse_elbo(lambda rows, c: table[rows, c], sparse_probabilities(one, 1.0)).sum()
    gap = (drawn.mean(0) - torch.autograd.grad(exact, one)[0][0]) / (drawn.std(0) / math.sqrt(20_000))
    assert gap.abs().max() < 4


def test_refusals(table, monkeypatch):
    for alpha in (0.5, math.nan, math.inf):
        with pytest.raises(OptionError, match="alpha"):
            sparse_probabilities(table, alpha)
    q = sparse_probabilities(table)
    with pytest.raises(DataError, match=r"probabilities\[0\].*sums to one"):
        sparse_elbo(lambda r, c: table[r, c], 2 * q)
    with pytest.raises(DataError, match="The value of log_joint"):
        sparse_elbo(lambda r, c: table, q)
    bad = table.clone()
    bad[2] = math.nan
    with pytest.raises(DataError, match="datum 2 and category"):
        sparse_elbo(lambda r, c: bad[r, c], q)
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"logits\[2, 0\]"):
            sparse_probabilities(torch.where(torch.arange(len(table))[:, None] == 2, wrong, table))
    with pytest.raises(DataError, match="log_joint refused its values"):
        sparse_elbo(lambda r, c: Poisson(1.0).log_prob(-1.0 - c), q)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "entmax":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r"pip install 'fspace\[amortized\]'"):
        sparse_probabilities(table)
