"""Log-likelihood by importance sampling: against known evidence, in chunks, with honest diagnostics."""

import math

import pytest
import torch
from scipy.stats import genpareto

from fspace.errors import NumericalError, OptionError
from fspace.inference.amortized import log_likelihood, log_weights, pareto_k


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_known_evidence_within_its_own_standard_error(ppca):
    """500 data, each with 400 samples of its own: z-scores by the reported standard errors have variance one."""
    model = ppca(off=0.1)
    x = model.data(500)
    found = log_likelihood(model, x, samples=400, generator=seeded())
    z = (found.log_likelihood - model.evidence(x)) / found.standard_error
    assert abs(z.mean()) < 4 / math.sqrt(500)
    assert 0.8 < z.std() < 1.2
    assert found.log_likelihood.dtype == torch.float64 and not found.log_likelihood.requires_grad
    twin = log_likelihood(ppca(off=0.1, noise=0.6), x, samples=400, generator=seeded())  # another model
    assert ((twin.log_likelihood - model.evidence(x)) / twin.standard_error).abs().mean() > 10


def test_exact_encoder_is_exact(ppca):
    model = ppca()
    x = model.data(5)
    found = log_likelihood(model, x, samples=50)
    torch.testing.assert_close(found.log_likelihood, model.evidence(x).detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.ess, torch.full((5,), 50.0, dtype=torch.float64))
    assert (found.standard_error < 1e-5).all() and (found.pareto_k == -math.inf).all()


def test_chunks_are_the_whole(ppca):
    """Weights handed out in order, whatever the chunks: the sums are those of all at once."""
    whole = 3.0 * torch.randn(1000, 3, generator=seeded(), dtype=torch.float64)

    class Listed(ppca):
        """Its log-weights come from a list; it notes how many it was asked for at once."""

        def __init__(self):
            super().__init__()
            self.at, self.largest = 0, 0

        def log_joint(self, x, z):
            k, b = z.shape[:2]
            rows = x[:, 0].long()
            if self.at == 1000:
                self.at = 0
            out = whole[self.at : self.at + k][:, rows]
            self.at, self.largest = self.at + k, max(self.largest, k * b)
            return out + self.encode(x).log_prob(z)

    x = torch.arange(3.0, dtype=torch.float64)[:, None].expand(3, 5)
    ess = whole.exp().sum(0).square() / whole.exp().square().sum(0)
    for chunk in (1, 7, 100, 2999, 10_000):
        model = Listed()
        found = log_likelihood(model, x, samples=1000, chunk=chunk)
        assert model.largest <= chunk
        torch.testing.assert_close(
            found.log_likelihood, whole.logsumexp(0) - math.log(1000), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(found.ess, ess)
        torch.testing.assert_close(found.pareto_k, pareto_k(whole, 1000), rtol=1e-6, atol=1e-6)


def test_fewer_samples_than_data_and_ragged_chunks(ppca):
    model = ppca(off=0.1)
    x = model.data(11)
    for samples, chunk in ((1, 10_000), (3, 5), (26, 40)):
        found = log_likelihood(model, x, samples=samples, chunk=chunk)
        assert found.log_likelihood.shape == (11,) and found.log_likelihood.isfinite().all()
        assert bool(found.pareto_k.isnan().all()) == (samples < 25)
    again = [log_likelihood(model, x, 30, 100, generator=seeded(3)).log_likelihood for _ in range(2)]
    assert torch.equal(*again)


def test_ess_falls_with_the_encoder(ppca):
    x = ppca().data(50)
    ess = [log_likelihood(ppca(off=off), x, 500).ess.mean() for off in (0.0, 0.1, 0.3, 0.6)]
    assert ess == sorted(ess, reverse=True) and ess[-1] < 0.3 * ess[0]


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.7, 1.2])
def test_pareto_k_finds_the_shape_of_the_tail(shape):
    """Weights with a generalised Pareto tail of known shape; pulled to 1/2 as by ten observations in 213."""
    w = genpareto.rvs(shape, size=(5000, 60), random_state=0)
    lw = torch.as_tensor(w + 1.0).log()  # a bounded tail must not end below 0
    found = pareto_k(lw, 5000)
    assert abs(found.mean().item() - (213 * shape + 5) / 223) < 0.05
    assert found.std() < 0.15


def test_pareto_k_near_a_maximum_likelihood_fit():
    g = torch.Generator().manual_seed(1)
    lw = 1.5 * torch.randn(5000, 5, generator=g, dtype=torch.float64)
    for b, k in enumerate(pareto_k(lw, 5000)):
        top = lw[:, b].exp().topk(214).values
        fit = genpareto.fit((top[:-1] - top[-1]).numpy(), floc=0)[0]
        assert abs(k.item() - (213 * fit + 5) / 223) < 0.05
    torch.testing.assert_close(pareto_k(lw + 700.0, 5000), pareto_k(lw, 5000))  # scale is no matter
    with pytest.raises(OptionError, match="needs the 214 greatest"):
        pareto_k(lw[:100], 5000)


def test_refusals_name_the_datum(ppca):
    model = ppca(off=0.1)
    x = model.data(130)
    x[120, 0] = math.nan
    with pytest.raises(NumericalError, match="datum 120, sample 0 is nan"):
        log_likelihood(model, x, 50)

    class Outside(ppca):
        def log_joint(self, x, z):
            return torch.where(x[:, 0] > 90, -math.inf, super().log_joint(x, z))

    x = model.data(130)
    x[101, 0] = 99.0
    with pytest.raises(NumericalError, match="All 50 log-weights of datum 101 are -inf"):
        log_likelihood(Outside(), x, 50)
    for options in ({"samples": 0}, {"chunk": 0}):
        with pytest.raises(OptionError, match="at least 1"):
            log_likelihood(model, x, **options)
    with pytest.raises(OptionError, match="no rows"):
        log_likelihood(model, x[:0], 50)


def test_agrees_with_log_weights(ppca, device):
    model = ppca(off=0.1, dtype=torch.float32, device=device)
    x = model.data(4)
    found = log_likelihood(model, x, 2000, generator=torch.Generator(device=device).manual_seed(0))
    direct = log_weights(model, x, 2000, torch.Generator(device=device).manual_seed(1)).logsumexp(
        0
    ) - math.log(2000)
    assert (found.log_likelihood - direct).abs().max() < 6 * found.standard_error.max()


def test_one_sample_says_nothing_of_its_error(ppca):
    found = log_likelihood(ppca(off=0.1), ppca().data(3), 1)
    assert found.log_likelihood.isfinite().all() and (found.ess == 1).all()
    assert found.standard_error.isnan().all() and found.pareto_k.isnan().all()
