"""Optimisation in the latent space of a VAE: weights, the surrogate against dense algebra, searches, refusals."""

import math

import numpy as np
import pytest
import torch

from fspace.decisions import LatentOptimizer, optimize_latent
from fspace.decisions.acquisitions import acquisition
from fspace.decisions.latent import _OfDecoded, rank_weights
from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized import VAEKernelGP

QUICK = {"epochs": 15, "batch_size": 40, "learning_rate": 1e-2}


def bumps(n=160, seed=0, columns=16):
    """Narrow bumps on a line: two numbers (place and height) say all there is about a row."""
    rng = np.random.default_rng(seed)
    place, height = rng.random(n), 0.5 + 0.5 * rng.random(n)
    grid = np.linspace(-0.05, 1.05, columns)
    return (height[:, None] * np.exp(-0.5 * ((grid - place[:, None]) / 0.12) ** 2)).astype(np.float32)


def worth(x):
    """Likeness to a bump of height 0.9 at 0.7; 0 at best."""
    grid = torch.linspace(-0.05, 1.05, 16)
    wanted = 0.9 * torch.exp(-0.5 * ((grid - 0.7) / 0.12) ** 2)
    return -(torch.as_tensor(x) - wanted).square().sum(-1)


def small(**options):
    settings = {"model": VAEKernelGP(2, (24,), device="cpu"), "initial": 8, **QUICK}
    return LatentOptimizer(bumps(), **settings | options)


@pytest.fixture(scope="module")
def told():
    """An optimiser that was trained on 8 values and told 3 more, one of an object that it decoded."""
    optimizer = small(retrain=10.0)
    first = optimizer.ask(8)
    optimizer.tell(first, worth(first))
    new = torch.cat([optimizer.ask(), optimizer.pool[:2]])
    optimizer.tell(new, worth(new))
    return optimizer


def test_weights_are_tripps():
    found = rank_weights(torch.tensor([0.3, 2.0, -1.0]), 0.1)
    want = 1 / (0.3 + torch.tensor([1.0, 0.0, 2.0]).double())
    assert torch.allclose(found, want / want.sum())
    assert torch.allclose(rank_weights(torch.arange(4.0), 1e9), torch.full((4,), 0.25).double(), atol=1e-6)


def test_the_surrogate_is_dense_algebra_on_the_latents(told):
    """It has taken in what was told after the training, at the parameters of the training."""
    model, at = told.model, torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    z = told.latents(told.objects)
    kernel, noise = model.kernel.base, model.noise.noise[0, 0]
    k, cross = kernel(z).to_dense(), kernel(at, z).to_dense()
    y = (told.values - model.y_shift) / model.y_scale
    weights = torch.linalg.solve(k + noise * torch.eye(len(z)), cross.mT)
    got = told.posterior.latent(at)
    assert torch.allclose(got.mean, weights.mT @ y * model.y_scale + model.y_shift, atol=1e-6)
    covariance = (kernel(at).to_dense() - cross @ weights) * model.y_scale**2
    assert torch.allclose(got.covariance, covariance, atol=1e-6)
    fewer = torch.linalg.solve(
        k[:8, :8] + noise * torch.eye(8), cross[:, :8].mT
    )  # the twin: without what came later
    assert not torch.allclose(got.mean, fewer.mT @ y[:8] * model.y_scale + model.y_shift, atol=1e-3)


def test_the_surrogate_is_the_encoder_s_gp_on_objects():
    optimizer = small()
    first = optimizer.ask(8)
    optimizer.tell(first, worth(first))
    optimizer.train()
    rows = torch.from_numpy(bumps(5, 3))
    want = optimizer.model.posterior_.latent(rows.double())
    got = optimizer.posterior.latent(optimizer.latents(rows))
    assert torch.allclose(got.mean, want.mean, atol=1e-5) and torch.allclose(
        got.variance, want.variance, atol=1e-5
    )


def test_an_acquisition_is_of_what_is_decoded(told):
    x, y = told.latents(told.objects), told.values[:, None]
    inner = acquisition("qLogNEI", [told.posterior], x, y, 1, seed=1)
    function, z = _OfDecoded(inner, told.decoded_latents), told.latents(told.pool[:6])[:, None]
    encoded = told.latents(told.decode(z[:, 0]))[:, None]
    with torch.no_grad():
        assert torch.allclose(function(z), inner(encoded), atol=1e-4)
        assert not torch.allclose(function(z), inner(z), atol=1e-2)  # encoding what is decoded does move it
    point = z[:1].clone().requires_grad_()
    function(point).sum().backward()
    step = torch.tensor([[[1e-2, 0.0]]]).double()  # the networks are in float32
    with torch.no_grad():
        slope = ((function(z[:1] + step) - function(z[:1] - step)) / 2e-2).item()
    assert point.grad[0, 0, 0].item() == pytest.approx(slope, rel=0.1, abs=1e-3) and slope != 0


def test_what_is_asked_is_decoded_from_the_box(told):
    box = told.box()
    z = told.latents(torch.cat([told.pool, told.objects]))
    assert (z >= box[0]).all() and (z <= box[1]).all()
    starts = told._starts(box, told.latents(told.objects), 0)
    assert (starts >= box[0]).all() and (starts <= box[1]).all()
    before = len(told.pending)
    asked = told.ask(2)
    assert asked.shape == (2, 16) and len(told.pending) == before + 2
    assert not torch.equal(asked[0], asked[1])


def test_it_beats_random_objects():
    """20 evaluations against as many of the pool, whose median of 50 draws is the bar; random ones alone fail it."""
    model = VAEKernelGP(2, (24,), device="cpu")
    options = {"model": model, "initial": 8, "retrain": 2.0, "learning_rate": 1e-2, "batch_size": 40}
    found = optimize_latent(worth, bumps(), 20, 3, epochs=80, **options)
    assert len(found.values) == 20 and len(found.pending) == 0
    assert found.best[1] == pytest.approx(worth(found.best[0]).item())
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randperm(160, generator=generator)[:20] for _ in range(50)]
    bar = torch.stack([worth(found.pool[pick]).max() for pick in picks]).median()
    assert found.best[1] > bar
    assert found.values[:8].max() < bar  # it was not there already
    assert found._trained_on == 12  # the encoder was trained at 6 values, and anew at 12


def test_to_minimise_is_to_maximise_the_negative():
    asked = []
    for objective, sign in (("maximize", 1.0), ("minimize", -1.0)):
        optimizer = small(objective=objective)
        first = optimizer.ask(8)
        optimizer.tell(first, sign * worth(first))
        asked.append(optimizer.ask())
        assert optimizer.best[1] == sign * worth(first).max()
    assert torch.equal(*asked)


def test_images_and_a_default_model():
    images = bumps().reshape(-1, 1, 4, 4)
    optimizer = LatentOptimizer(images, initial=3, epochs=2)
    assert optimizer.model.likelihood == "bernoulli"
    first = optimizer.ask(3)
    assert first.shape == (3, 1, 4, 4) and len(optimizer.pending) == 3
    optimizer.tell(first, worth(first.flatten(1)))
    assert len(optimizer.pending) == 0 and optimizer.ask().shape == (1, 1, 4, 4)
    assert LatentOptimizer(bumps() - 5).model.likelihood == "gaussian"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: small(objective="best"), OptionError, "no goal"),
        (lambda: small(retrain=1.0), OptionError, "retrain"),
        (lambda: small(weighting=0.0), OptionError, "weighting"),
        (lambda: LatentOptimizer(bumps(5)), DataError, "at least 10"),
        (lambda: LatentOptimizer(np.full((20, 3), np.nan)), DataError, "without NaN"),
        (lambda: small().tell(bumps(2), [1.0, math.nan]), DataError, "NaN was told"),
        (lambda: small().tell(bumps(2), [1.0]), DataError, "1 values for objects"),
        (lambda: small().tell(bumps(2, columns=9), [1.0, 2.0]), DataError, "like the pool"),
        (lambda: small().best, DataError, "Nothing was told"),
        (lambda: small().box(), NotFittedError, "not fitted"),
        (lambda: small().train(), DataError, "Fewer than two"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
