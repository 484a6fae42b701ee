"""The causal VAE of series: nothing leaks from the future, bounds by hand, what it learns, files, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from fspace.errors import DataError, OptionError
from fspace.inference.amortized.causal import CausalVAE

QUIET = {"progress": False}


def waves(count=12, seed=0, columns=2):
    """Noisy oscillations of different lengths."""
    rng = np.random.default_rng(seed)
    series = []
    for length in rng.integers(12, 20, count):
        phase = rng.uniform(0, 6) + 0.7 * np.arange(length)[:, None] + np.arange(columns)
        series.append(np.sin(phase) + 0.1 * rng.standard_normal((length, columns)))
    return series


def made(**options):
    given = {"latents": 2, "channels": 8, "dilations": (1, 2), "likelihood": "gaussian", "device": "cpu"}
    return CausalVAE(**given | options).fit(waves(), epochs=2, **QUIET)


def test_nothing_leaks_from_the_future():
    """Gradients of what is said at step t: zero to x after t; of prior and emission also to x at t, of q not. They go
    back as far as the convolutions look, no further."""
    model, t = made(), 7
    x = torch.randn(1, 14, 2, requires_grad=True)
    told = model.inferred(x)
    z = torch.randn(1, 1, 14, 2, requires_grad=True)
    out = model.emitted(told.past, z)
    for said, last in ((told.prior[0], t - 1), (told.posterior[0], t), (out[0], t - 1)):
        (grad,) = torch.autograd.grad(said[0, t].sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1).nonzero()[:, 0]
        assert reached.max() == last and reached.min() == t - model.past.receptive_field
    (grad,) = torch.autograd.grad(out[0, 0, t].sum(), z)
    reached = grad[0, 0].abs().sum(-1).nonzero()[:, 0]
    assert reached.max() == t and reached.min() == t - model.past.receptive_field + 1


def test_bounds_are_those_by_hand_and_in_order():
    """The ELBO against torch's own divergences, step by step, on the same noise; IWAE above it."""
    model, data = made(), waves(3, 5)
    rows = model.prepare(data)
    with torch.no_grad():
        found = model._drawn(rows, 3, torch.Generator().manual_seed(0))
        told = model.inferred(rows[0])
        q, p = (Normal(m, v.sqrt()) for m, v in (told.posterior, told.prior))
        white = torch.randn((3, *q.mean.shape), generator=torch.Generator().manual_seed(0))
        z = q.mean + q.stddev * white
        mean, log_variance = model.emitted(told.past, z).chunk(2, -1)
        seen = Normal(mean * model.x_scale + model.x_shift, (0.5 * log_variance).exp() * model.x_scale)
        for k, length in enumerate(rows[1].tolist()):
            fits = seen.log_prob(rows[0].expand(3, -1, -1, -1))[:, k, :length].sum((-1, -2))
            kl = kl_divergence(Independent(q, 1), Independent(p, 1))[k, :length].sum()
            weights = fits + (p.log_prob(z) - q.log_prob(z))[:, k, :length].sum((-1, -2))
            for mine, other in zip(found, (fits, weights, kl)):
                torch.testing.assert_close(mine[..., k], other, rtol=1e-4, atol=1e-3)
    few, many = model.bounds(data, 2), model.bounds(data, 200)
    assert bool((many["iwae"] > few["elbo"]).all())
    one = torch.cat([model.bounds([x], 200)["elbo"] for x in data])  # a series alone, without padding
    assert (one - many["elbo"]).abs().max() < 2.0


def test_series_do_not_see_what_is_behind_their_end():
    model, (x, lengths) = made(), made().prepare(waves(4, 3))
    spoiled = x.clone()
    for k, length in enumerate(lengths.tolist()):
        spoiled[k, length:] = 50.0
    same = torch.Generator()
    clean, dirty = (model.score((v, lengths), same.manual_seed(1)) for v in (x, spoiled))
    torch.testing.assert_close(clean, dirty)


def test_learns_what_the_past_says_of_the_next_step():
    """Far better than independent steps, on series it has not seen; and new series swing as they do."""
    model = CausalVAE(2, 16, (1, 2), likelihood="gaussian", device="cpu")
    model.fit(waves(120), epochs=40, learning_rate=1e-2, batch_size=20, **QUIET)
    test = waves(60, 9)
    values = np.concatenate(test)
    independent = Normal(torch.tensor(values.mean(0)), torch.tensor(values.std(0)))
    alone = independent.log_prob(torch.tensor(values)).sum() / len(values)
    bounds = model.bounds(test, 16)
    assert bounds["elbo"].sum() / len(values) > alone + 1.0  # nats a step
    drawn = model.sample(50, seed=0, steps=30).numpy()
    lag = np.mean(drawn[:, 9:] * drawn[:, :-9])  # nine steps of 0.7: once around
    assert drawn.shape == (50, 30, 2) and lag > 0.5 * np.mean(drawn**2)
    made_up = np.concatenate([x.numpy() for x in model.reconstruct(test)])
    assert np.mean((made_up - values) ** 2) < 0.1 * values.var()


def test_samples_step_by_step_are_those_of_the_whole_convolution():
    """A window as long as the convolutions look back says what the whole series says."""
    model = made()
    x = torch.randn(2, 20, 2)
    whole = model.past.steps(x)[:, -1]
    back = model.past.receptive_field
    torch.testing.assert_close(model.past.steps(x[:, -back:])[:, -1], whole)
    assert not torch.allclose(model.past.steps(x[:, 1 - back :])[:, -1], whole, atol=1e-4)
    torch.testing.assert_close(model.sample(3, seed=1, steps=9), model.sample(3, seed=1, steps=12)[:, :9])


def test_bits_and_a_file_in_a_new_process(tmp_path):
    data = [(x > 0).astype(float) for x in waves(6)]
    model = CausalVAE(2, 8, (1, 2), samples=3, device="cpu").fit(data, epochs=2, **QUIET)
    assert set(model.sample(4, seed=0, steps=5).unique().tolist()) <= {0.0, 1.0}
    q = model.encode(data)
    assert len(q) == 6 and q[0].mean.shape == (len(data[0]), 2) and model.encode(data[0]).mean.ndim == 2
    torch.testing.assert_close(model.encode(data[0]).mean, q[0].mean)
    path = model.save(tmp_path / "m.amortized")
    np.save(tmp_path / "x.npy", data[0])
    code = (
        "import numpy as np; from fspace.inference.amortized.model import load;"
        f"m = load({str(path)!r}, 'cpu'); x = np.load({str(tmp_path / 'x.npy')!r});"
        "print(repr(m.log_likelihood(x, 20).sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == model.log_likelihood(data[0], 20).sum().item()


def test_refusals():
    for options in (
        {"latents": 0},
        {"channels": 0},
        {"samples": 0},
        {"dilations": ()},
        {"likelihood": "poisson"},
    ):
        with pytest.raises(OptionError):
            CausalVAE(**options)
    with pytest.raises(DataError, match="Series 1: step 2"):
        made().bounds([waves(1)[0], np.where(np.arange(12)[:, None] == 2, np.nan, np.zeros((12, 2)))])
    with pytest.raises(DataError, match="gaussian"):
        CausalVAE().fit(waves())
    with pytest.raises(DataError, match="fitted on"):
        made().encode(np.zeros((5, 3)))
