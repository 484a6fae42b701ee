"""Topics over time on a corpus with known shares, against quadrature and mixtures without time; files, refusals."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized.model import load
from fspace.inference.amortized.topics import TopicsOverTime

QUIET = {"progress": False}
SIMULATED = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "topics.py"))  # functions only
corpus, matched, true_shares, YEARS = (
    SIMULATED[name] for name in ("corpus", "matched", "true_shares", "YEARS")
)


def unigrams(counts, test, k=5, sweeps=60):
    """log p of test documents under a mixture of k word distributions, one for each document, the best of 4 fits."""
    best, found = -np.inf, None
    for seed in range(4):
        share = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), len(counts))
        for _ in range(sweeps):
            words = np.log(share.T @ counts + 0.1)
            words -= np.log(np.exp(words).sum(1, keepdims=True))
            logs = counts @ words.T + np.log(share.mean(0))
            total = np.logaddexp.reduce(logs, axis=1)
            share = np.exp(logs - total[:, None])
        if total.sum() > best:
            best, found = total.sum(), np.logaddexp.reduce(test @ words.T + np.log(share.mean(0)), axis=1)
    return found


@pytest.fixture(scope="module")
def fitted():
    counts, t, topics = corpus(1000, 200)
    plan = {"epochs": 25, "learning_rate": 1e-2, **QUIET}
    shuffled = np.random.default_rng(0).permutation(t)
    make = lambda when: TopicsOverTime(5, device="cpu").fit((counts, when), **plan)  # noqa: E731
    return make(t), make(shuffled), counts, topics


def test_shares_are_found_within_their_bands(fitted):
    """Every topic's share correlates with the truth by more than 0.9, and the 90% bands hold at least 75% of it (145
    values that go together); of a model that is told shuffled years neither holds."""
    model, lost, _, topics = fitted
    truth = true_shares(YEARS)

    def agreement(model):
        order = matched(model, topics)
        found = model.shares(YEARS)
        low, high = (end[:, order].numpy() for end in found.interval(0.9))
        pairs = [np.corrcoef(found.mean[:, order[k]], truth[:, k])[0, 1] for k in range(5)]
        return min(pairs), ((low <= truth) & (truth <= high)).mean()

    (least, inside), (least_lost, inside_lost) = agreement(model), agreement(lost)
    print(
        f"least correlation {least:.3f} (shuffled {least_lost:.3f}), in bands {inside:.2f} ({inside_lost:.2f})"
    )
    assert least > 0.9 and inside > 0.75
    assert least_lost < 0.9 and inside_lost < 0.5


def test_new_documents_are_more_probable_than_without_time(fitted):
    """By document, paired, in four standard errors: better than the same model with shuffled years, and than a mixture
    of word distributions."""
    model, lost, counts, _ = fitted
    test = corpus(400, 200, seed=1)[:2]
    logs = model.log_likelihood(test, 300).numpy()
    lost_logs = lost.log_likelihood(test, 300).numpy()
    gains = {"shuffled years": logs - lost_logs, "unigrams": logs - unigrams(counts, test[0])}
    for name, gain in gains.items():
        print(f"{name}: {gain.mean():.2f} nats a document ({gain.std() / 20:.2f})")
        assert gain.mean() > 4 * gain.std() / 20
    words = test[0].sum()
    assert abs(np.log(model.perplexity(test, 300)) + logs.sum() / words) < 1e-9


def test_likelihood_equals_quadrature_and_functions_their_moments():
    """Two topics: log p(words | t) within five standard errors of Gauss-Hermite quadrature in both log-shares."""
    counts, t, _ = corpus(60, 30, words=20)
    model = TopicsOverTime(2, 6, (8,), device="cpu").fit((counts, t), epochs=5, **QUIET)
    c, when = model.prepare((counts, t))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    with torch.no_grad():
        eta = model._eta(when)
        grid = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2))
        mass = torch.tensor(np.outer(weights, weights).reshape(-1, 1) / (2 * np.pi)).log()
        x = eta.mean + (eta.spread + eta.variance).sqrt() * grid
        exact = (model.log_density(c, x) + mass).logsumexp(0)
    found = model.evaluate((counts, t), 3000)
    assert bool(((found.log_likelihood - exact).abs() < 5 * found.standard_error + 1e-6).all())
    latent = model.posterior_.latent(when[:, None])
    left = eta.spread - model.log_spread.detach().exp()  # what the inducing values leave of eta
    assert torch.allclose(latent.mean, eta.mean, atol=1e-6)
    assert torch.allclose(latent.variance, eta.variance + left, atol=1e-6)
    one = model.shares([2000.0, 2001.0]).values
    assert one.shape == (200, 2, 2) and torch.allclose(one.sum(-1), torch.ones(200, 2).double())


def test_the_bound_is_below_the_likelihood_and_grows_with_the_samples():
    """Of 200 bounds of every document, in four standard errors of their means."""
    counts, t, _ = corpus(60, 30, words=20)
    model = TopicsOverTime(3, 6, (8,), device="cpu").fit((counts, t), epochs=5, **QUIET)
    rows, means = model.prepare((counts, t)), []
    for model.samples in (1, 10):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            sums = torch.stack([model._bound(rows, generator).sum() for _ in range(200)])
        means.append((sums.mean(), sums.std() / 200**0.5))
    (low, a), (high, b) = means
    assert high - low > 4 * (a**2 + b**2).sqrt()
    assert model.log_likelihood((counts, t), 3000).sum() - high > 4 * b


def test_files_hold_all_and_bad_input_is_named(tmp_path):
    counts, t, _ = corpus(60, 30, words=20)
    data = (counts, t)
    model = TopicsOverTime(3, 6, (8,), device="cpu")
    with pytest.raises(NotFittedError):
        model.encode(data)
    model.fit(data, epochs=2, **QUIET)
    again = load(model.save(tmp_path / "t.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(data, 20), model.log_likelihood(data, 20))
    assert torch.equal(again.shares(YEARS, 5).values, model.shares(YEARS, 5).values)
    assert model.encode(data).mean.shape == (60, 3) and model.proportions(data).sum(1).allclose(
        torch.ones(60).double()
    )
    assert torch.allclose(model.reconstruct(data).sum(1), torch.tensor(counts.sum(1)).double())
    new = model.sample(4, seed=0, words=50)
    assert new.shape == (4, 30) and new.sum(1).tolist() == [50.0] * 4
    assert model.top_words(5).shape == (3, 5)
    late = np.where(np.arange(60) == 7, np.nan, t)
    for bad, words in (
        (counts, "pair"),
        ((counts, t[:-1]), r"\[n, v\]"),
        ((counts + 0.5, t), "Document 0 has counts that are no whole"),
        ((counts * (np.arange(60) != 5)[:, None], t), "Document 5 has no word"),
        ((counts, late), "Document 7 has a time"),
        ((counts[:0], t[:0]), "at least one"),
    ):
        with pytest.raises(DataError, match=words):
            TopicsOverTime(3).fit(bad, **QUIET)
    with pytest.raises(DataError, match="fitted on"):
        model.encode((counts[:, :-1], t))
    for wrong in ({"topics": 0}, {"inducing": 0}, {"samples": 0}):
        with pytest.raises(OptionError):
            TopicsOverTime(**wrong)
