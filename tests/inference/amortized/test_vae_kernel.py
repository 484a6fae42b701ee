"""A GP on a VAE's encoder: the evidence and posterior against dense algebra, what rows without targets are worth, the
contract, files, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import fspace
from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized.vae_kernel import VAEKernelGP

QUIET = {"progress": False}


def bumps(n, seed, columns=24, width=0.06):
    """A narrow bump somewhere on a line, a curve that winds through all columns; the target is a wave along it."""
    rng = np.random.default_rng(seed)
    place = rng.random(n)
    x = np.exp(-0.5 * ((np.linspace(-0.05, 1.05, columns) - place[:, None]) / width) ** 2)
    return x + 0.05 * rng.standard_normal(x.shape), np.sin(2 * np.pi * place) + 0.05 * rng.standard_normal(n)


def some_known(y, count):
    return np.where(np.arange(len(y)) < count, y, np.nan)


def small(outputs=0, **options):
    x, y = bumps(60, 0, 8, 0.1)
    y = some_known(y, 20)
    y = np.stack([y, 5 - y**2], axis=1) if outputs else y
    model = VAEKernelGP(**{"widths": (16,), "device": "cpu"} | options)
    return model.fit(x, y, epochs=5, batch_size=20, learning_rate=1e-2, **QUIET), x, y


def dense(model, x, y, new):
    """Kernel matrices at the encoder's means, and the noise."""
    with torch.no_grad():
        z, at = (model.latent_means(values).double() for values in (x[:20], new))
        base = model.kernel.base
        k, cross, own = base(z).to_dense(), base(at, z).to_dense(), base(at).to_dense()
    return k, cross, own, model.noise.noise.detach()[0, 0]


def test_evidence_and_posterior_are_those_of_dense_algebra():
    model, x, y = small()
    new = bumps(7, 5, 8, 0.1)[0]
    k, cross, own, noise = dense(model, x, y, new)
    noisy = k + noise * torch.eye(20)
    target = torch.tensor((y[:20] - y[:20].mean()) / y[:20].std())
    exact = MultivariateNormal(torch.zeros(20).double(), noisy).log_prob(target)
    with torch.no_grad():
        assert model.evidence().item() == pytest.approx(exact.item(), rel=1e-5)
        model.inducing = 4
        assert model.evidence() < exact - 1e-3  # fewer inducing inputs: a lower bound
    weights = torch.linalg.solve(noisy, cross.mT)
    mean = weights.mT @ target * y[:20].std() + y[:20].mean()
    covariance = (own - cross @ weights) * y[:20].std() ** 2
    found = model.posterior_.latent(torch.tensor(new))
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.variance, covariance.diagonal(), rtol=0, atol=1e-4)
    wrong = covariance.diagonal() + noise * y[:20].std() ** 2
    torch.testing.assert_close(
        model.posterior_.observed(torch.tensor(new)).variance, wrong, rtol=0, atol=1e-4
    )


@pytest.mark.slow
def test_rows_without_targets_are_worth_something():
    """Eight targets along a narrow bump's winding curve, 392 more rows without: on each of three seeds a smaller error
    than a deep kernel on the eight, and than the same model without the 392; so is, over the seeds, the log loss."""
    logs = []
    for seed in (4, 5, 6):
        (x, y), (new, truth) = bumps(400, seed), bumps(300, 100 + seed)
        plan = {"epochs": 60, "learning_rate": 1e-2, "batch_size": 50, "seed": seed, **QUIET}
        ours = VAEKernelGP(2, (32,), device="cpu").fit(x, some_known(y, 8), **plan)
        alone = VAEKernelGP(2, (32,), device="cpu").fit(x[:8], y[:8], **plan | {"epochs": 200})
        peer = fspace.GPRegressor(kernel="deep", members=1, seed=seed).fit(x[:8], y[:8])
        said = [model.posterior_.observed(torch.tensor(new)) for model in (ours, alone, peer)]
        error = [((p.mean.detach().numpy() - truth) ** 2).mean() ** 0.5 for p in said]
        logs.append([p.log_prob(torch.tensor(truth)).mean().item() for p in said])
        assert error[0] < min(error[1:]), (seed, error)
    mean = np.mean(logs, axis=0)
    assert mean[0] > max(mean[1:]), logs


@pytest.mark.parametrize("outputs", [0, 2])
def test_the_contract(outputs):
    model, x, _ = small(outputs)
    new = torch.tensor(x[:6])
    posterior, shape = model.posterior_, (6, 2) if outputs else (6,)
    latent, observed = posterior.latent(new), posterior.observed(new)
    assert latent.mean.shape == shape and bool((observed.variance > latent.variance).all())
    draws = posterior.draw(400, seed=0)
    values = draws(new)
    torch.testing.assert_close(values[0], draws[0](new))
    error = (values.mean(0) - latent.mean) / (latent.variance / 400).sqrt()
    assert error.abs().max() < 4.5
    torch.testing.assert_close(values.var(0), latent.variance, rtol=0.35, atol=1e-6)
    at = new.clone().requires_grad_()
    botorch = posterior.as_botorch().posterior(at)
    torch.testing.assert_close(botorch.mean.reshape(shape), latent.mean)
    botorch.mean.sum().backward()
    assert at.grad is not None and bool((at.grad != 0).any())
    more = posterior.condition(new[:2], latent.mean[:2] + 1.0)
    assert bool((more.latent(new[:2]).mean > latent.mean[:2]).all())


def test_images_and_a_file_in_a_new_process(tmp_path):
    x, y = bumps(40, 0, 64, 0.1)
    images = x.reshape(40, 1, 8, 8)
    model = VAEKernelGP(2, (16,), "conv", device="cpu")
    model.fit(images, some_known(y, 15), epochs=2, batch_size=20, **QUIET)
    assert model.reconstruct(images).shape == images.shape and model.sample(3, seed=0).shape == (3, 1, 8, 8)
    assert model.encode(images).mean.shape == (40, 2)
    path = model.save(tmp_path / "m.amortized")
    np.save(tmp_path / "x.npy", images)
    code = (
        "import numpy as np, torch; from fspace.inference.amortized.model import load;"
        f"m = load({str(path)!r}, 'cpu'); x = np.load({str(tmp_path / 'x.npy')!r});"
        "print(repr(m.log_likelihood(x, 20).sum().item()), repr(m.posterior().observed(x).mean.sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = model.log_likelihood(images, 20).sum().item(), model.posterior_.observed(images).mean.sum().item()
    assert done.stdout.split() == [repr(here[0]), repr(here[1])]


def test_refusals():
    x, y = bumps(30, 0, 8, 0.1)
    with pytest.raises(NotFittedError):
        VAEKernelGP().posterior()
    with pytest.raises(DataError, match="y is missing"):
        VAEKernelGP().fit(x)
    with pytest.raises(DataError, match=r"y must be \[30\]"):
        VAEKernelGP().fit(x, y[:29])
    with pytest.raises(DataError, match="Fewer than two"):
        VAEKernelGP().fit(x, some_known(y, 1))
    with pytest.raises(DataError, match="Row 2 has an infinite"):
        VAEKernelGP().fit(x, np.where(np.arange(30) == 2, np.inf, y))
    with pytest.raises(DataError, match="Row 4 has some targets"):
        VAEKernelGP().fit(x, np.stack([y, np.where(np.arange(30) == 4, np.nan, y)], axis=1))
    with pytest.raises(DataError, match="Row 3 holds NaN"):
        VAEKernelGP().fit(np.where(np.arange(30)[:, None] == 3, np.nan, x), y)
    for options in ({"weight": -1.0}, {"inducing": 0}, {"latents": 0}, {"network": "cubic"}):
        with pytest.raises(OptionError):
            VAEKernelGP(**options)
    model, _, _ = small()
    with pytest.raises(DataError, match="fitted on"):
        model.reconstruct(x[:, :4])
    with pytest.raises(DataError, match="shape"):
        model.posterior_.latent(x[:, :4])
