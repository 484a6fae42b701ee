"""FIVO forward and backward against other particle filters, on one linear-Gaussian model.

    python benchmarks/amortised_particles.py                                      a plain PyTorch filter, Pyro
    python benchmarks/amortised_particles.py --particles-python ENV/bin/python    and `particles`, in its environment
    python benchmarks/amortised_particles.py --rounds 3 --compile 0               a short look

z_0 ~ N(0, q), z_t ~ N(a z_t-1, q), x_t ~ N(z_t, r) with a, q, r trained; transition as proposal ("bootstrap"), or a
linear proposal trained with them ("proposal", whose weights need three densities a step).

The plain filter is the algorithm of AESMC's public code, written anew: resampling after every step by numpy, series by
series; the whole history re-indexed each step; densities by torch.distributions with its checks, all three at every
step even where two cancel. `plain, formulas` is the same with the densities written out as on our side, so that what
is left of the ratio is the filter. Sides take turns within a round; the figures are medians of the processor time (the
machine has other work: wall-clock seconds are in the result beside it). Pyro and `particles` filter one series without
gradients: their time for a batch is that of one, times the batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def normal(value: Any, mean: Any, log_std: Tensor) -> Tensor:
    """Log density, written out."""
    return -0.5 * ((value - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * LOG_2PI


def data(steps: int, series: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Series from the model, and its parameters."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=series)
    x = np.empty((steps, series), dtype=np.float32)
    for t in range(steps):
        z = 0.9 * z + rng.normal(size=series) if t else z
        x[t] = z + 0.7 * rng.normal(size=series)
    values = {"a": 0.9, "log_q": 0.0, "log_r": math.log(0.7), "gain": 0.5, "log_s": -0.4}
    return torch.from_numpy(x), {
        name: torch.tensor(value, requires_grad=True) for name, value in values.items()
    }


def kalman(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """log p(x) of each series, in float64."""
    a, q, r = (
        float(p["a"].detach()),
        math.exp(2 * float(p["log_q"].detach())),
        math.exp(2 * float(p["log_r"].detach())),
    )
    mean, variance, total = torch.zeros(x.shape[1]).double(), q, torch.zeros(x.shape[1]).double()
    for t, value in enumerate(x.double()):
        if t:
            mean, variance = a * mean, a * a * variance + q
        total += -0.5 * ((value - mean).square() / (variance + r) + math.log(variance + r) + LOG_2PI)
        gain = variance / (variance + r)
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
    return total


# ---- fspace ----------------------------------------------------------------------------------------------


def model(p: dict[str, Tensor], proposal: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """init and step, [N, B]."""

    def move(mean: Any, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if not proposal:
            z = mean + p["log_q"].exp() * noise
            return z, normal(x, z, p["log_r"])
        centre = mean + p["gain"] * (x - mean)
        z = centre + p["log_s"].exp() * noise
        return z, normal(x, z, p["log_r"]) + normal(z, mean, p["log_q"]) - normal(z, centre, p["log_s"])

    def init(particles: int, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return move(torch.zeros_like(noise), x, noise)

    def step(z: Tensor, x: Tensor, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        return move(p["a"] * z, x, noise)

    return init, step


def ours(x: Tensor, particles: int, functions: Any, backward: bool = True, **options: Any) -> Tensor:
    """log evidence [B], after its gradient."""
    from fspace.inference.amortized import smc

    noise = torch.randn(len(x), particles, x.shape[1])
    init, step = functions
    found = smc.filter(init, step, x, None, particles, noise=noise, **options)
    if backward:
        found.surrogate.mean().backward()
    return found.log_evidence.detach()


# ---- the plain filter ------------------------------------------------------------------------------------


def ancestral_index(log_weight: Tensor, rng: np.random.Generator) -> Tensor:
    """Systematic resampling [B, N] in numpy, one series after the other."""
    if torch.isnan(log_weight).sum().item():
        raise FloatingPointError("log_weight holds NaN")
    batch, particles = log_weight.shape
    positions = (rng.uniform(size=(batch, 1)) + np.arange(particles)) / particles
    values = log_weight.detach().numpy()
    weights = np.exp(values - values.max(1, keepdims=True))
    cumulated = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    cumulated = cumulated / cumulated.max(1, keepdims=True)
    index = np.zeros((batch, particles))
    for b in range(batch):
        index[b] = np.digitize(positions[b], cumulated[b])
    return torch.from_numpy(index).long()


def plain(
    x: Tensor, p: dict[str, Tensor], particles: int, proposal: bool, rng: np.random.Generator, formulas: bool
) -> Tensor:
    """log evidence [B], after its gradient; tensors are [B, N] here."""
    batch = x.shape[1]

    def density(mean: Any, log_std: Tensor) -> Any:
        return (mean, log_std) if formulas else torch.distributions.Normal(mean, log_std.exp())

    def sample(d: Any) -> Tensor:
        if formulas:
            return d[0] + d[1].exp() * torch.randn(batch, particles)
        return d.rsample() if d.batch_shape == (batch, particles) else d.rsample((batch, particles))

    def log_prob(d: Any, value: Tensor) -> Tensor:
        if not formulas:
            d._validate_sample(value)  # as there: once here, and once more inside log_prob
        found = normal(value, *d) if formulas else d.log_prob(value)
        return found.reshape(batch, particles, -1).sum(2)

    history: list[Tensor] = []
    log_weights: list[Tensor] = []
    for t in range(len(x)):
        seen = x[t][:, None].expand(batch, particles)
        earlier: list[Tensor] = []
        if t:
            index = ancestral_index(log_weights[-1], rng)
            earlier = [latent.gather(1, index) for latent in history]
        mean = p["a"] * earlier[-1] if t else torch.zeros(())
        q = density(mean + p["gain"] * (seen - mean), p["log_s"]) if proposal else density(mean, p["log_q"])
        z = sample(q)
        history.append(z)
        log_q = log_prob(q, z)
        log_transition = log_prob(density(mean, p["log_q"]), z)
        log_emission = log_prob(density(z, p["log_r"]), seen)
        log_weights.append(log_transition + log_emission - log_q)
    value = (torch.logsumexp(torch.stack(log_weights), dim=2) - math.log(particles)).sum(0)
    value.mean().backward()
    return value.detach()


# ---- Pyro and particles: one series, no gradient ------------------------------------------------------------


def pyro_filter(x: Tensor, p: dict[str, Tensor], particles: int) -> float:
    """Seconds for one series; SMCFilter gives no evidence."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SMCFilter

    a, q, r = (float(v) for v in (p["a"].detach(), p["log_q"].detach().exp(), p["log_r"].detach().exp()))

    class Model:
        """The transition and the observation."""

        def init(self, state: Any, first: Tensor) -> None:
            self.t = 0
            state["z"] = pyro.sample("z_0", dist.Normal(torch.zeros(particles), q))
            pyro.sample("x_0", dist.Normal(state["z"], r), obs=first)

        def step(self, state: Any, value: Tensor) -> None:
            self.t += 1
            state["z"] = pyro.sample(f"z_{self.t}", dist.Normal(a * state["z"], q))
            pyro.sample(f"x_{self.t}", dist.Normal(state["z"], r), obs=value)

    class Guide:
        """The transition."""

        def init(self, state: Any, first: Tensor) -> None:
            self.t = 0
            pyro.sample("z_0", dist.Normal(torch.zeros(particles), q))

        def step(self, state: Any, value: Tensor) -> None:
            self.t += 1
            pyro.sample(f"z_{self.t}", dist.Normal(a * state["z"], q))

    smc = SMCFilter(Model(), Guide(), num_particles=particles, max_plate_nesting=1)
    start = time.process_time()
    smc.init(x[0, 0])
    for t in range(1, len(x)):
        smc.step(x[t, 0])
    return time.process_time() - start


def particles_filter(
    python: str, x: Tensor, p: dict[str, Tensor], particles: int, rounds: int
) -> dict[str, Any]:
    """The figures of particles_peer.py."""
    parameters = [
        float(p["a"].detach()),
        math.exp(float(p["log_q"].detach())),
        math.exp(float(p["log_r"].detach())),
    ]
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder) / "data.npz", Path(folder) / "out.json"
        np.savez(there, x=x[:, 0].numpy(), parameters=parameters, particles=particles, rounds=rounds)
        peer = Path(__file__).with_name("particles_peer.py")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, str(peer), str(there), str(back)], check=True, env=environment)
        return json.loads(back.read_text())


# ---- the race ----------------------------------------------------------------------------------------------


def race(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median processor and wall-clock seconds of each, taking turns; the first two rounds warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for k in range(rounds + 2):
        for name, side in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            if k > 1:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_s": statistics.median(c for c, _ in both),
            "wall_s": statistics.median(w for _, w in both),
        }
        for name, both in taken.items()
    }


def bound(side: Callable[[], Any], truth: Tensor, repeats: int) -> dict[str, float]:
    """Mean over series and repeats of log evidence less log p(x), and its standard error."""
    gaps = torch.stack([side() - truth for _ in range(repeats)]).mean(1)
    return {"gap": float(gaps.mean()), "standard_error": float(gaps.std() / math.sqrt(repeats))}


def fivo(
    x: Tensor, p: dict[str, Tensor], n: int, proposal: bool, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Forward and backward of one model at one size."""
    rng = np.random.default_rng(0)
    functions = model(p, proposal)
    sides: dict[str, Any] = {
        "fspace": lambda: ours(x, n, functions),
        "fspace, resampled after every step": lambda: ours(x, n, functions, criterion="always"),
        "plain filter": lambda: plain(x, p, n, proposal, rng, formulas=False),
        "plain, formulas": lambda: plain(x, p, n, proposal, rng, formulas=True),
    }
    steps, series = x.shape
    found: dict[str, Any] = {"proposal": proposal, "steps": steps, "series": series, "particles": n}
    if compiled:
        start = time.perf_counter()
        ours(x, n, functions, compiled=True)
        found["compile_s"] = time.perf_counter() - start
        sides["fspace, compiled"] = lambda: ours(x, n, functions, compiled=True)
    times = found["times"] = race(sides, rounds)
    truth = kalman(x, p)
    found["bound"] = {side: bound(sides[side], truth, 10) for side in list(sides)[:3]}
    found["faster"] = {
        f"{side}, against {peer}": times[peer]["cpu_s"] / times[side]["cpu_s"]
        for side in ("fspace", "fspace, compiled")
        if side in times
        for peer in ("plain filter", "plain, formulas")
    }
    return found


def show(found: dict[str, Any]) -> None:
    """Print one size."""
    from rich.console import Console
    from rich.table import Table

    name = "proposal" if found["proposal"] else "bootstrap"
    title = f"{name}: T={found['steps']}, B={found['series']}, N={found['particles']}, forward and backward"
    table = Table("", "ms", "wall ms", title=title)
    for side, taken in found["times"].items():
        table.add_row(side, f"{1e3 * taken['cpu_s']:.1f}", f"{1e3 * taken['wall_s']:.1f}")
    Console().print(table)
    for name, ratio in found["faster"].items():
        common.say(f"{name}: {ratio:.1f} times faster")
    for side, gap in found["bound"].items():
        common.say(f"{side}: log evidence less log p(x) {gap['gap']:.2f} +- {gap['standard_error']:.2f}")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        default="100x64x64,200x64x64,100x64x16",
        help="steps x series x particles, the first in full",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", type=int, default=1, help="0: leave out the compiled step")
    parser.add_argument("--particles-python", help="a Python that has the package particles")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    result: dict[str, Any] = {"rounds": args.rounds, "fivo": []}
    for k, (steps, series, n) in enumerate(sizes):
        x, p = data(steps, series)
        for proposal in (False, True) if k == 0 else (False,):
            result["fivo"].append(fivo(x, p, n, proposal, args.rounds, bool(args.compile) and k == 0))
            show(result["fivo"][-1])

    steps, series, n = sizes[0]
    x, p = data(steps, series)

    def without_gradient(columns: int) -> None:
        with torch.no_grad():
            ours(x[:, :columns], n, model(p, False), backward=False)

    single = {
        "fspace, one series": lambda: without_gradient(1),
        "fspace, the batch": lambda: without_gradient(series),
    }
    one: dict[str, Any] = {name: t["cpu_s"] for name, t in race(single, args.rounds).items()}
    one["Pyro SMCFilter, one series"] = statistics.median(pyro_filter(x, p, n) for _ in range(args.rounds))
    if args.particles_python:
        peer = particles_filter(args.particles_python, x, p, n, args.rounds)
        one["particles, one series"] = peer["seconds"]
        result["particles"] = peer | {"log_p": float(kalman(x, p)[0])}
    result["without_gradient_s"] = one
    for name, seconds in one.items():
        common.say(f"{name}, no gradient: {1e3 * seconds:.1f} ms")
    result["pyro"] = version("pyro-ppl")
    result["machine"] = common.machine()
    common.write("amortised_particles", result)


if __name__ == "__main__":
    main()
