"""The VAE: against probabilistic PCA, every objective, several layers, images, files, refusals."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from fspace.errors import DataError, ModelFileError, NotFittedError, OptionError
from fspace.inference.amortized.model import load
from fspace.inference.amortized.vae import CONTINUOUS, DISCRETE, VAE

QUIET = {"progress": False}


def plane(n=2000, seed=0):
    """Rows of a linear-Gaussian model with two latents and six columns, standardised."""
    rng = np.random.default_rng(seed)
    w = np.random.default_rng(9).standard_normal((2, 6)) * [[1.5], [1.0]]
    x = rng.standard_normal((n, 2)) @ w + 0.5 * rng.standard_normal((n, 6))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def patterns(n=400, seed=0):
    """Rows of twelve bits: one of four patterns, each bit flipped with probability 0.05."""
    rng = np.random.default_rng(seed)
    shapes = np.random.default_rng(5).random((4, 12)) < 0.5
    return (shapes[rng.integers(0, 4, n)] ^ (rng.random((n, 12)) < 0.05)).astype(np.float32)


def test_a_linear_vae_reaches_the_optimum_of_probabilistic_pca():
    """Within 1% of the analytic optimum; one latent too few does not."""
    x = plane()
    optimum = PCA(2).fit(x).score(x)
    options = {"widths": (), "likelihood": "gaussian", "device": "cpu"}
    plan = {"epochs": 80, "learning_rate": 2e-2, "patience": 30, **QUIET}
    model = VAE(2, **options).fit(x, **plan)
    found = model.log_likelihood(x, 50).mean().item()
    assert abs(found - optimum) < 0.01 * abs(optimum)
    few = VAE(1, **options).fit(x, **plan).log_likelihood(x, 50).mean().item()
    assert optimum - few > 0.05 * abs(optimum)
    exact = PCA(2).fit(x).score_samples(x[:200])  # and row by row
    assert np.abs(model.log_likelihood(x[:200], 500).numpy() - exact).mean() < 0.1


@pytest.mark.parametrize("objective", CONTINUOUS)
def test_objectives_of_gaussian_latents_learn(objective):
    """Each comes within 0.2 nats of the optimum (where a constant Gaussian is 1.7 below it)."""
    x = plane()
    model = VAE(2, widths=(), likelihood="gaussian", objective=objective, samples=5, device="cpu")
    model.fit(x, epochs=30, learning_rate=2e-2, **QUIET)
    assert model.log_likelihood(x, 50).mean() > PCA(2).fit(x).score(x) - 0.2


@pytest.mark.parametrize("latent", ["bits", pytest.param("categories", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", DISCRETE)
def test_objectives_of_discrete_latents_learn(objective, latent):
    """Each finds that there are patterns: better by 1.5 nats a row than columns by themselves."""
    x, test = patterns(), patterns(200, 1)
    model = VAE(
        4 if latent == "bits" else 1,
        latent,
        (16,),
        objective=objective,
        samples=4,
        categories=6,
        device="cpu",
    )
    model.fit(x, epochs=60, learning_rate=2e-2, batch_size=100, **QUIET)
    chance = np.clip(x.mean(0), 0.01, 0.99)
    alone = (test * np.log(chance) + (1 - test) * np.log(1 - chance)).sum(1).mean()
    assert model.log_likelihood(test, 200).mean() > alone + 1.5
    assert set(model.bounds(test, 4)) == {"iwae", "relaxed"}
    assert model.sample(3, seed=0).shape == (3, 12)


def test_the_bound_of_discrete_latents_equals_enumeration():
    """Two bits: the importance estimate of log p(x) within four standard errors of the sum over all four values."""
    x = patterns(60)
    model = VAE(2, "bits", (8,), objective="vimco", samples=2, device="cpu").fit(x, epochs=3, **QUIET)
    z = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])[:, None].expand(-1, 60, -1)
    with torch.no_grad():
        exact = model.log_joint(torch.tensor(x), z).logsumexp(0)
    found = model.evaluate(x, 4000)
    assert bool(((found.log_likelihood - exact).abs() < 4 * found.standard_error + 1e-5).all())


def test_several_stochastic_layers():
    x = plane(800)
    for objective in ("elbo", "dreg"):
        model = VAE([3, 2], widths=(8,), likelihood="gaussian", objective=objective, samples=5, device="cpu")
        model.fit(x, epochs=40, learning_rate=2e-2, **QUIET)
        assert model.log_likelihood(x, 100).mean() > PCA(2).fit(x).score(x) - 0.5
        assert model.sample(4, seed=1).shape == (4, 6) and model.reconstruct(x).shape == x.shape


def test_images_by_convolutions_and_beta():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(1, 6, 300), rng.integers(1, 6, 300)
    x = np.zeros((300, 1, 8, 8), np.float32)
    for k, (r, c) in enumerate(zip(rows, columns)):
        x[k, 0, r : r + 2, c : c + 2] = 1.0
    model = VAE(4, widths=(32,), network="conv", device="cpu")
    model.fit(x, epochs=40, learning_rate=3e-3, batch_size=50, **QUIET)
    assert model.reconstruct(x).shape == x.shape and model.sample(2).shape == (2, 1, 8, 8)
    assert (model.reconstruct(x) - torch.tensor(x)).square().mean() < 0.5 * x.var()
    strict = VAE(4, widths=(32,), network="conv", beta=50.0, device="cpu")
    strict.fit(x, epochs=40, learning_rate=3e-3, batch_size=50, **QUIET)
    assert strict.active_units(x) < model.active_units(x) <= 4


def test_categories_as_data():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 300)
    x = np.where(rng.random((300, 5)) < 0.9, kind[:, None] * 2, rng.integers(0, 3, (300, 5)))
    model = VAE(1, widths=(8,), likelihood="categorical", device="cpu").fit(
        x, epochs=80, learning_rate=1e-2, **QUIET
    )
    shares = np.stack([(x == c).mean(0) for c in range(3)])
    alone = sum(np.log(shares[x[:, j], j]) for j in range(5)).mean()
    assert model.log_likelihood(x, 100).mean() > alone + 1.0
    assert model.reconstruct(x).shape == (300, 5, 3) and set(model.sample(50).unique().tolist()) <= {0, 1, 2}
    assert model.log_likelihood(x[x.max(1) < 2][:5], 10).isfinite().all()  # rows that lack a category


def test_saved_loaded_in_a_new_process_and_resumed(tmp_path):
    x = patterns(100)
    model = VAE(3, widths=(8,), device="cpu").fit(x, epochs=4, **QUIET)
    path = model.save(tmp_path / "v.amortized")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy as np; from fspace.inference.amortized.model import load;"
        f"print(repr(load({str(path)!r}, 'cpu').log_likelihood(np.load({str(tmp_path / 'x.npy')!r}), 20).sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == model.log_likelihood(x, 20).sum().item()
    run = str(tmp_path / "run.zip")
    VAE(3, widths=(8,), device="cpu").fit(x, epochs=2, checkpoint=run, **QUIET)
    again = VAE(3, widths=(8,), device="cpu").fit(x, epochs=4, checkpoint=run, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    path.write_bytes(b"x" + path.read_bytes()[1:-100])
    with pytest.raises(ModelFileError):
        load(path)
    with pytest.raises(ModelFileError, match="no such file"):
        load(tmp_path / "other")


def test_bad_input_is_named():
    x = patterns(20)
    model = VAE(2, widths=(4,))
    with pytest.raises(NotFittedError):
        model.reconstruct(x)
    for bad, words in (
        (x[:0], "at least one"),
        (x[0], "rows"),
        (np.where(x > 0, np.nan, x), "NaN"),
        (x + 0.5, "from 0 to 1"),
        (x[:1], "at least 2 rows"),
    ):
        with pytest.raises(DataError, match=words):
            model.fit(bad, epochs=1, **QUIET)
    with pytest.raises(DataError, match="whole numbers"):
        VAE(likelihood="categorical").fit(x + 0.25, **QUIET)
    with pytest.raises(DataError, match="images"):
        VAE(network="conv").fit(x, **QUIET)
    with pytest.raises(OptionError, match="halved twice"):
        VAE(network="conv").fit(np.zeros((4, 1, 6, 6)), **QUIET)
    model.fit(x, epochs=1, **QUIET)
    with pytest.raises(DataError, match="fitted on"):
        model.encode(x[:, :3])
    for wrong in (
        {"latent": "integers"}, {"network": "cnn"}, {"likelihood": "poisson", "latents": 2}, {"objective": "fivo"},
        {"latent": "bits", "objective": "dreg"}, {"latent": "bits", "objective": "vimco"}, {"latents": [2, 0]},
        {"latent": "bits", "latents": [2, 2]}, {"beta": 2.0, "objective": "iwae"}, {"samples": 0},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            VAE(**wrong).fit(x, epochs=1, **QUIET)
    assert math.isfinite(model.history_.held_out[0])
