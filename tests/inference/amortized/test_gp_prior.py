"""A VAE with a GP prior over its latents: the exact evidence where it is known, missing frames, files, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel
from torch.distributions import MultivariateNormal

from fspace.errors import DataError, ModelFileError, NotFittedError, OptionError
from fspace.inference.amortized.gp_prior import GPPriorVAE
from fspace.inference.amortized.model import load

QUIET = {"progress": False, "epochs": 2}


def ball(T=40, size=6, seed=0, noise=0.05):
    """A spot that moves along a smooth path: t [T], frames [T, size, size]."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, T)
    phase = rng.uniform(0, 6, 2)
    centre = size / 2 + size / 4 * np.sin(2 * np.pi * t[:, None] + phase)
    grid = np.arange(size)
    square = (grid[None, :, None] - centre[:, :1, None]) ** 2 + (
        grid[None, None, :] - centre[:, 1:, None]
    ) ** 2
    return t, np.exp(-0.5 * square) + noise * rng.standard_normal((T, size, size))


def linear_model(T=12, latents=2, size=4, noise=0.3):
    """A model whose decoder is linear with orthogonal columns, and whose encoder is therefore exact."""
    torch.manual_seed(3)
    model = GPPriorVAE(latents, inducing=T, widths=())
    t, x = torch.linspace(-2, 2, T).double(), torch.randn(T, size).double()
    rows = model.prepare((t.numpy(), x.numpy()))
    model._make(model.shape_of(rows))
    model.double().begin(rows)
    model.t_shift.zero_(), model.t_scale.fill_(1.0), model.x_shift.zero_(), model.x_scale.fill_(1.0)
    model.inducing_inputs.data = t[:, None].clone()
    w = torch.linalg.qr(torch.randn(size, latents).double()).Q * torch.tensor([1.5, 0.7]).double()
    squares = w.square().sum(0)
    model.log_noise.data = torch.tensor(noise).double().log()
    (decoder,), (encoder,) = model.decoder.layers, model.encoder.layers
    decoder.weight.data, decoder.bias.data = w, torch.zeros(size).double()
    encoder.weight.data.zero_()
    encoder.weight.data[:latents, :size] = (w / squares).T
    encoder.bias.data = torch.cat([torch.zeros(latents).double(), (squares / noise).log()])
    k = MaternKernel(nu=2.5).double()
    k.lengthscale = model.prior.lengthscale.detach()[0, 0]
    gram = k(t[:, None]).to_dense().detach()
    dense = torch.einsum("ts,pl,ql->tpsq", gram, w, w).reshape(T * size, T * size)
    dense = dense + noise * torch.eye(T * size)
    exact = MultivariateNormal(torch.zeros(T * size).double(), dense).log_prob(x.reshape(-1))
    return model, rows, exact, (t.numpy(), x.numpy())


def test_a_linear_decoder_gives_the_marginal_likelihood_of_a_multi_output_gp():
    """The bound in expectation, within four standard errors; every importance weight exactly. A wrong encoder: less."""
    model, rows, exact, data = linear_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bounds = torch.stack([model.step(rows, generator).bound[0] for _ in range(500)])
    error = bounds.std() / len(bounds) ** 0.5
    assert (bounds.mean() - exact).abs() < 4 * error
    assert (model.log_likelihood(data, samples=3)[0] - exact).abs() < 1e-6 * exact.abs()
    model.encoder.layers[0].bias.data[2:] += 0.5
    with torch.no_grad():
        wrong = torch.stack([model.step(rows, generator).bound[0] for _ in range(500)])
    assert wrong.mean() < exact - 4 * error
    assert (model.log_likelihood(data, samples=4000)[0] - exact).abs() < 0.3  # and weights make up for it


def test_what_encode_says_is_the_exact_posterior_there():
    model, _, _, (t, x) = linear_model()
    w, noise = model.decoder.layers[0].weight.data, model.log_noise.exp().item()
    k = MaternKernel(nu=2.5).double()
    k.lengthscale = model.prior.lengthscale.detach()[0, 0]
    times, new = torch.tensor(t)[:, None], torch.tensor([[0.3], [1.7], [5.0]]).double()
    gram, cross = k(times).to_dense().detach(), k(new, times).to_dense().detach()
    found = model.encode((t, x)).latent(new)
    for latent in range(2):
        square = w[:, latent].square().sum()
        target = torch.tensor(x) @ w[:, latent] / square
        inverse = torch.linalg.inv(gram + noise / square * torch.eye(len(t)))
        assert (found.mean[:, latent] - cross @ inverse @ target).abs().max() < 1e-5
        variance = 1.0 - torch.einsum("it,ts,is->i", cross, inverse, cross)
        assert (found.variance[:, latent] - variance).abs().max() < 1e-5


def test_a_batch_of_two_is_two_singles_and_padding_says_nothing():
    short, long = ball(10, 4, 1), ball(25, 4, 2)
    model = GPPriorVAE(inducing=8, widths=(8,)).fit([short, long, ball(12, 4, 3)], **QUIET)
    both = model.encode([short, long])
    for one, pair in zip(both, (short, long)):
        alone = model.encode(pair)
        assert torch.allclose(one.site.precision, alone.site.precision, rtol=1e-5)
        assert torch.allclose(one.latent(pair[0]).mean, alone.latent(pair[0]).mean, atol=1e-5)
    rows, single = model.prepare([short, long]), model.prepare(short)
    filled = [r.clone() for r in rows]
    filled[0][0, 10:], filled[1][0, 10:] = 7.0, 1e6  # behind the end of the short one
    seen = [model._whitened(r[0]) for r in (rows, filled, single)]
    assert torch.equal(seen[0][0][0, :, :10], seen[1][0][0, :, :10])
    steps = []
    for r in (rows, tuple(filled)):
        model.zero_grad()
        step = model.step(r, torch.Generator().manual_seed(0))
        step.ascents[0][0].backward()
        steps.append((step.bound, model.encoder.layers[0].weight.grad.clone()))
    assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][1], steps[1][1])


def test_some_frames_a_step_are_unbiased_for_all():
    """The mean bound over many steps of 6 frames is that of 30 frames, within four standard errors."""
    model = GPPriorVAE(inducing=8, widths=(8,)).fit(ball(30, 4), **QUIET)
    rows, generator = model.prepare(ball(30, 4)), torch.Generator().manual_seed(0)
    means, errors = [], []
    for frames in (30, 6):
        model.frames = frames
        with torch.no_grad():
            bounds = torch.cat([model.step(rows, generator).bound for _ in range(400)])
        means.append(bounds.mean()), errors.append(bounds.var() / len(bounds))
    assert (means[0] - means[1]).abs() < 4 * (errors[0] + errors[1]).sqrt()


def test_fills_missing_frames_better_than_the_mean_frame():
    t, x = ball(60, 6)
    gaps = x.copy()
    missing = np.arange(60) % 5 == 2
    gaps[missing] = np.nan
    gaps[3, 0, 0] = np.nan  # and a part of one
    model = GPPriorVAE(2, inducing=20, widths=(32,)).fit(
        (t, gaps), progress=False, epochs=300, learning_rate=1e-2, patience=300
    )
    filled = model.reconstruct((t, gaps)).reshape(60, 6, 6).numpy()
    error = np.square(filled - x)[missing].mean()
    mean_frame = np.square(np.nanmean(gaps, 0) - x)[missing].mean()
    assert error < 0.25 * mean_frame
    observed = model.posterior_.observed(t[missing])
    assert observed.mean.shape == (12, 36)
    (lower, upper), truth = observed.interval(0.9), torch.tensor(x[missing].reshape(12, 36))
    inside = (lower < truth) & (truth < upper)
    assert 0.6 < inside.double().mean() <= 1.0
    draws = model.posterior_.draw(3, seed=0)
    assert torch.equal(draws[1](t), draws[1](t)) and draws(t).shape == (3, 60, 2)


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param("rbf", id="rbf", marks=pytest.mark.slow),
        pytest.param("deep", id="deep", marks=pytest.mark.slow),
        pytest.param(MaternKernel(nu=1.5), id="own"),
    ],
)
def test_saved_and_loaded_in_a_new_process(tmp_path, kernel):
    data = ball(15, 4)
    frames = np.clip(data[1], 0, 1)
    model = GPPriorVAE(kernel=kernel, inducing=6, widths=(8,), likelihood="bernoulli", device="cpu")
    model.fit((data[0], frames), **QUIET)
    path = model.save(tmp_path / "series.amortized")
    code = (
        "import sys, numpy as np, torch; from fspace.inference.amortized.model import load;"
        f"t, x = np.load({str(tmp_path / 't.npy')!r}), np.load({str(tmp_path / 'x.npy')!r});"
        f"m = load({str(path)!r}, 'cpu'); print(repr(m.log_likelihood((t, x), 10).item()))"
    )
    np.save(tmp_path / "t.npy", data[0]), np.save(tmp_path / "x.npy", frames)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(model.log_likelihood((data[0], frames), 10).item(), rel=1e-10)
    assert torch.equal(load(path, "cpu").sample(2, seed=1), model.sample(2, seed=1))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelFileError, match="damaged"):
        load(path)


def test_bad_input_is_named():
    t, x = ball(10, 4)
    model = GPPriorVAE(inducing=5, widths=(4,))
    with pytest.raises(NotFittedError):
        model.encode((t, x))
    with pytest.raises(NotFittedError):
        model.save("nowhere")
    for bad, words in (
        ([], "no series"),
        ((t[:-1], x), "one for each"),
        ((t, np.full_like(x, np.nan)), "no frame with a value"),
        ((t, np.where(x > x.max() - 1e-9, np.inf, x)), "infinite"),
        ((np.where(t > 0.5, np.nan, t), x), "finite numbers"),
        ([(t, x), (t, x[:, :2])], "differ"),
        ([x], "pair"),
    ):
        with pytest.raises(DataError, match=words):
            model.fit(bad, **QUIET)
    with pytest.raises(DataError, match="from 0 to 1"):
        GPPriorVAE(likelihood="bernoulli").fit((t, x), **QUIET)
    model.fit((t, x), **QUIET)
    with pytest.raises(DataError, match="fitted on"):
        model.encode((t, x[:, :2]))
    for wrong in ({"latents": 0}, {"likelihood": "poisson"}, {"frames": 0}):
        with pytest.raises(OptionError):
            GPPriorVAE(**wrong)
    with pytest.raises(OptionError, match="does not exist"):
        GPPriorVAE(kernel="spline").fit((t, x), **QUIET)
    with pytest.raises(OptionError, match="fit` takes"):
        model.fit((t, x), epoch=3)
