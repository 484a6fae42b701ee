"""The VAE with a mixture prior: against the closed form of a linear decoder, clusters that are there, files."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from fspace.errors import DataError, OptionError
from fspace.inference.amortized.mixture_vae import MixtureVAE
from fspace.inference.amortized.model import load

QUIET = {"progress": False}


def groups(n=900, seed=0):
    """Rows of six columns from three groups on a plane, and which group each is of."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(3)
    w, centres = fixed.standard_normal((2, 6)), np.array([[2.0, 0], [-2, 1], [0, -2.5]])
    c = rng.integers(0, 3, n)
    z = centres[c] + 0.4 * rng.standard_normal((n, 2))
    return (z @ w + 0.3 * rng.standard_normal((n, 6))).astype(np.float32), c


def linear(**options):
    plan = {"epochs": options.pop("epochs", 30), "learning_rate": 1e-2, **QUIET}
    made = {"components": 3, "widths": (), "likelihood": "gaussian", "device": "cpu"} | options
    return MixtureVAE(2, **made).fit(groups()[0], **plan)


def exact(model, x):
    """log p(x, c) [n, c] of a linear decoder: every component is a Gaussian of x."""
    x = torch.as_tensor(x).double()
    seen, layer = model.observations, model.decoder.layers[0]
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    scaled = (x - seen.shift) / seen.scale
    noise = seen.log_noise.detach().double().exp() * torch.eye(x.shape[1])
    found = []
    for mean, log_std in zip(model.mixture_means.detach().double(), model.mixture_log_stds.detach().double()):
        spread = w @ (2 * log_std).exp().diag() @ w.T + noise
        found.append(torch.distributions.MultivariateNormal(w @ mean + b, spread).log_prob(scaled))
    return (
        torch.stack(found, 1) + model.mixture_logits.detach().double().log_softmax(0) - seen.scale.log().sum()
    )


def test_likelihood_and_clusters_of_a_linear_decoder_equal_the_closed_form():
    """log p(x) and p(c | x) within 4.5 standard errors (the most of 200 and of 600), the latter beside a bias of 2e-3,
    where a third of the samples are effective; a mixture with one mean moved has neither."""
    model, (x, _) = linear(epochs=15), groups(200, 1)
    found = model.evaluate(x, 3000)
    trusted = found.ess > 1000
    assert trusted.float().mean() > 0.9
    runs = torch.stack([model.clusters(x, 1000, seed) for seed in range(10)]).double()
    told, error = runs.mean(0), runs.std(0) / 10**0.5

    def agree() -> tuple[bool, bool]:
        joint = exact(model, x)
        off = (found.log_likelihood - joint.logsumexp(1)).abs()
        apart = (told - joint.softmax(1)).abs() < 4.5 * error + 2e-3
        return bool((off < 4.5 * found.standard_error + 1e-4).all()), bool(apart[trusted].all())

    assert agree() == (True, True)
    with torch.no_grad():
        model.mixture_means[0] += 0.3
    assert agree() == (False, False)


@pytest.mark.parametrize(("objective", "samples"), [("iwae", 1), ("stl", 1), ("dreg", 5)])
def test_groups_are_found(objective, samples):
    """Clusters are the groups, and the mixture is worth more than a single Gaussian."""
    model, (x, c) = linear(objective=objective, samples=samples), groups(400, 1)
    score = adjusted_rand_score(c, model.clusters(x).argmax(1))
    print(f"{objective}: adjusted Rand index {score:.3f}")
    assert score > 0.95
    one = linear(objective=objective, samples=samples, components=1)
    assert model.log_likelihood(x, 100).mean() > one.log_likelihood(x, 100).mean() + 0.5
    new = model.sample(2000, seed=0)
    assert (new.mean(0) - torch.tensor(groups()[0].mean(0))).abs().max() < 0.35


def test_files_hold_all_and_bad_input_is_named(tmp_path):
    model, (x, _) = linear(epochs=2), groups(30, 1)
    again = load(model.save(tmp_path / "m.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(x, 20), model.log_likelihood(x, 20))
    assert torch.equal(again.clusters(x), model.clusters(x))
    assert model.reconstruct(x).shape == x.shape and model.encode(x).mean.shape == (30, 2)
    images = np.random.default_rng(0).random((8, 1, 8, 8)).round()
    small = MixtureVAE(2, 12, (8,), network="conv", device="cpu").fit(images, epochs=1, **QUIET)
    assert small.clusters(images).sum(1).allclose(torch.ones(8))  # more components than rows
    for wrong in ({"components": 0}, {"objective": "elbo"}, {"latents": 0}):
        with pytest.raises(OptionError):
            MixtureVAE(**wrong)
    with pytest.raises(DataError, match="NaN"):
        model.clusters(np.full((2, 6), np.nan))
