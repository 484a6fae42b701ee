"""The variational recurrent network: its three bounds, ragged series, files, refusals."""

import itertools

import numpy as np
import pytest
import torch

from fspace.errors import DataError, OptionError
from fspace.inference.amortized.model import load
from fspace.inference.amortized.vrnn import VRNN

QUIET = {"progress": False}


def rolls(count=12, columns=5, seed=0):
    """Binary series of different lengths in which a column stays what it was with probability 0.9."""
    rng = np.random.default_rng(seed)
    series = []
    for length in rng.integers(5, 15, count):
        x = rng.random((length, columns)) < 0.5
        for t in range(1, length):
            stays = rng.random(columns) < 0.9
            x[t] = np.where(stays, x[t - 1], x[t])
        series.append(x.astype(float))
    return series


def made(**options):
    model = VRNN(**{"latents": 3, "hidden": 8, "device": "cpu"} | options)
    return model.fit(rolls(), epochs=2, **QUIET)


def test_bounds_are_in_order_and_more_particles_are_tighter():
    """ELBO <= IWAE on the same particles, always; IWAE and FIVO grow with the particles (four standard errors of means
    over 60 filters), the ELBO does not."""
    model, data = made(), rolls(4, seed=1)
    rows, same = model.prepare(data), torch.Generator()
    with torch.no_grad():
        pair = [model._bound(rows, name, 4, same.manual_seed(1)) for name in ("elbo", "iwae")]
    assert bool((pair[0] < pair[1]).all())
    few = [model.bounds(data, 2, seed=k) for k in range(60)]
    many = [model.bounds(data, 32, seed=k) for k in range(60)]
    for name in ("iwae", "fivo", "elbo"):
        low, high = (torch.stack([r[name].sum() for r in runs]).double() for runs in (few, many))
        error = (low.var() / 60 + high.var() / 60).sqrt()
        more = high.mean() - low.mean()
        assert abs(more) < 4 * error if name == "elbo" else more > 4 * error


def test_learns_what_one_step_says_of_the_next():
    """A fitted model beats independent columns of the true frequencies, which cost log 2 each."""
    model = VRNN(3, 16, "fivo", device="cpu").fit(rolls(150, 3), epochs=60, learning_rate=1e-2, **QUIET)
    test = rolls(100, 3, seed=9)
    steps = sum(len(x) for x in test)
    found = model.log_likelihood(test).sum() / steps / 3
    # entropy of a column: log 2 at the first step, then of staying with probability 0.95
    floor = -(100 * np.log(2) + (steps - 100) * 0.1985) / steps
    assert -np.log(2) + 0.2 < found < floor + 0.03


def enumerated(model, x):
    """log p(x) of one series: the sum over all values of all bits."""
    states = [torch.tensor(z, dtype=torch.float32) for z in itertools.product((0, 1), repeat=model.latents)]
    x = torch.tensor(x, dtype=torch.float32)
    told = model.read_x((x - model.x_shift) / model.x_scale)
    total = []
    for path in itertools.product(states, repeat=len(x)):
        h, log_p = model.start[None], torch.zeros(())
        for value, seen, z in zip(x, told, path):
            log_p = log_p + torch.distributions.Bernoulli(logits=model.prior(h)).log_prob(z[None]).sum()
            read = model.read_z(2 * z[None] - 1)
            logits = model.emission(torch.cat([h, read], -1))
            log_p = log_p + torch.distributions.Bernoulli(logits=logits).log_prob(value[None]).sum()
            h = model.cell(torch.cat([seen[None], read], -1), h)
        total.append(log_p)
    return torch.stack(total).logsumexp(0)


def test_evidence_of_bits_agrees_with_enumeration():
    """E exp(bound) = p(x) of hard bits, within four standard errors of 4,000 filters, with and without resampling; the
    relaxed bound is of another model, and misses by more."""
    model = made(latent="bits", latents=2, particles=3)
    with torch.no_grad():
        for parameter in (
            *model.prior.parameters(),
            *model.emission.parameters(),
            *model.read_z.parameters(),
        ):
            parameter.mul_(2.0)  # bits that matter
        x = rolls(1, seed=4)[0][:4]
        exact = enumerated(model, x)
        rows = tuple(r.repeat(4000, *[1] * (r.ndim - 1)) for r in model.prepare(x))
        for name in ("iwae", "fivo"):
            ratio = (model._bound(rows, name, 3, torch.Generator().manual_seed(0)) - exact).double().exp()
            error = ratio.std() / 4000**0.5
            assert abs(ratio.mean() - 1) < 4 * error < 0.1
        soft = (model._bound(rows, "iwae", 3, torch.Generator().manual_seed(0), True) - exact).double().exp()
        assert abs(soft.mean() - 1) > 4 * soft.std() / 4000**0.5


@pytest.mark.parametrize("objective", ["iwae", "fivo"])
def test_bits_learn_and_both_bounds_are_told(objective):
    """With Concrete latents too a model beats independent columns."""
    model = VRNN(4, 16, objective, latent="bits", device="cpu")
    model.fit(rolls(100, 3), epochs=30, learning_rate=1e-2, **QUIET)
    test = rolls(50, 3, seed=9)
    found = {
        name: value.sum() / sum(len(x) for x in test) / 3 for name, value in model.bounds(test, 32).items()
    }
    assert set(found) == {"elbo", "iwae", "fivo", "relaxed"}
    assert found[objective] > -np.log(2) + 0.2 and found["elbo"] < found["iwae"]
    assert bool(((model.encode(test[0]) >= 0) & (model.encode(test[0]) <= 1)).all())


def test_the_elbo_has_the_gradient_of_a_mean():
    """ELBO and IWAE of one particle are one, value and gradient; with four on the same noise they differ in both."""
    model = made()
    rows, found = model.prepare(rolls(3, seed=5)), {}
    for particles, name in itertools.product((1, 4), ("elbo", "iwae")):
        bound = model._bound(rows, name, particles, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(bound.sum(), model.read_x.layers[0].weight)
        found[particles, name] = (bound, gradient)
    for one, other in zip(found[1, "elbo"], found[1, "iwae"]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(found[4, "elbo"], found[4, "iwae"]):
        assert not torch.allclose(one, other, rtol=1e-3)


def test_series_do_not_see_each_other_or_what_is_behind_their_end():
    model, data = made(objective="iwae"), rolls(3, seed=2)
    rows = model.prepare(data)
    filled = rows[0].clone()
    for k, x in enumerate(data):
        filled[k, len(x) :] = float("nan")
    found = []
    for x in (rows[0], filled):
        model.zero_grad()
        step = model.step((x, rows[1]), torch.Generator().manual_seed(0))
        step.ascents[0][0].backward()
        found.append((step.bound, model.read_x.layers[0].weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][0].isfinite().all()


@pytest.mark.parametrize(
    ("likelihood", "latent"), [("bernoulli", "gaussian"), ("gaussian", "gaussian"), ("gaussian", "bits")]
)
def test_answers_have_the_shapes_of_the_data_and_files_hold_all(likelihood, latent, tmp_path):
    model, data = made(likelihood=likelihood, latent=latent), rolls(3, seed=3)
    for answer, columns in ((model.encode(data), 3), (model.reconstruct(data), 5)):
        assert [tuple(a.shape) for a in answer] == [(len(x), columns) for x in data]
    assert model.encode(data[0]).shape == (len(data[0]), 3)
    sizes = model.effective_sample_size(data, 16)
    assert all(
        len(s) == len(x) and bool(((s >= 1 - 1e-9) & (s <= 16 + 1e-9)).all()) for s, x in zip(sizes, data)
    )
    again = load(model.save(tmp_path / "v.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(data), model.log_likelihood(data))
    assert torch.equal(again.sample(2, seed=0, steps=6), model.sample(2, seed=0, steps=6))


def test_bad_input_is_named():
    for bad, words in (
        ([], "no series"),
        ([np.zeros((0, 3))], "at least one step"),
        ([np.zeros((4, 3)), np.zeros((4, 2))], "differ"),
        ([np.full((4, 3), 0.5)], "other than 0 and 1"),
        ([np.full((4, 3), np.nan)], "NaN"),
    ):
        with pytest.raises(DataError, match=words):
            VRNN().fit(bad, **QUIET)
    for wrong in (
        {"objective": "vimco"},
        {"likelihood": "poisson"},
        {"latent": "categories"},
        {"particles": 0},
    ):
        with pytest.raises(OptionError):
            VRNN(**wrong)
