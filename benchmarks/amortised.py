"""A training step of IWAE and of DReG against Pythae and Pyro.

    python benchmarks/amortised.py --pythae-python ENV/bin/python    ENV: pip install pythae torch
    python benchmarks/amortised.py                                   without Pythae

One network for all: Pythae's default, 784 - 512 - 16 Gaussian latents - 512 - 784, Bernoulli pixels, batches of 100, K
samples, float32, Adam included. Pixels are random bits: only time is measured. Pythae takes the log-likelihood from
probabilities; `fspace, its formula` does so too, the other rows take it from logits. Pyro's side is its SVI with
RenyiELBO(alpha=0, vectorize_particles=True), validation off. Sides take turns within a round; figures are medians over
rounds of the processor time of a step (wall-clock beside it in the result).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, HIDDEN, LATENT, BATCH = 784, 512, 16, 100
STEPS = {1: 40, 5: 20, 50: 3}  # a turn, by samples
Step = Callable[[], Any]


class Encoder(nn.Module):
    """Mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.mean = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, LATENT)
        self.log_var = nn.Linear(HIDDEN, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the rows of x."""
        h = self.hidden(x).relu()
        return self.mean(h), self.log_var(h)


def decoder() -> nn.Sequential:
    """Logits of pixels."""
    return nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))


class Vae:
    """What fspace asks of a model."""

    def __init__(self, from_logits: bool):
        self.encoder, self.decoder, self.from_logits = Encoder(), decoder(), from_logits

    def encode(self, x: Tensor) -> Any:
        """Diagonal Gaussian."""
        from fspace.inference.amortized import DiagonalGaussian

        mean, log_var = self.encoder(x)
        return DiagonalGaussian(mean, (0.5 * log_var).exp())

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Bernoulli pixels, standard normal latents."""
        logits = self.decoder(z)
        if self.from_logits:
            fit = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        else:
            fit = -F.binary_cross_entropy(logits.sigmoid(), x.expand_as(logits), reduction="none")
        return fit.sum(-1) - 0.5 * z.square().sum(-1)


def ours(samples: int, x: Tensor, estimator: str, from_logits: bool = True) -> Step:
    """A step of fspace."""
    from fspace.inference import amortized

    model = Vae(from_logits)
    theta, phi = list(model.decoder.parameters()), list(model.encoder.parameters())
    optimiser = torch.optim.Adam([*theta, *phi], lr=1e-3)

    def iwae() -> None:
        optimiser.zero_grad()
        (-amortized.iwae(amortized.log_weights(model, x, samples)).mean()).backward()
        optimiser.step()

    def dreg() -> None:
        optimiser.zero_grad()
        amortized.backward(amortized.dreg(amortized.log_terms(model, x, samples)), theta, phi)
        optimiser.step()

    return {"iwae": iwae, "dreg": dreg}[estimator]


def pyro_step(samples: int, x: Tensor) -> Step:
    """A step of Pyro's SVI."""
    import pyro
    from pyro import distributions as dist

    pyro.clear_param_store()
    pyro.enable_validation(False)
    encoder, decode = Encoder(), decoder()
    zero, one = torch.zeros(LATENT), torch.ones(LATENT)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decode)
        with pyro.plate("data", BATCH):
            z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        mean, log_var = encoder(x)
        with pyro.plate("data", BATCH):
            pyro.sample("z", dist.Normal(mean, (0.5 * log_var).exp()).to_event(1))

    loss = pyro.infer.RenyiELBO(
        alpha=0, num_particles=samples, vectorize_particles=True, max_plate_nesting=1,
        strict_enumeration_warning=False,
    )  # fmt: skip
    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]
    svi = pyro.infer.SVI(model, guide, adam, loss=loss)
    return lambda: svi.step(x)


class Pythae:
    """Pythae in a process of its own, asked turn by turn."""

    def __init__(self, python: str):
        script = Path(__file__).with_name("amortised_peer.py")
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, str] = {}

    def turn(self, samples: int, steps: int) -> tuple[float, float]:
        """Processor and wall-clock seconds of a step."""
        assert self.process.stdin and self.process.stdout
        asked = {
            "samples": samples,
            "batch": BATCH,
            "steps": steps,
            "pixels": PIXELS,
            "latent": LATENT,
            "seed": 0,
        }
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"Pythae's process ended with {self.process.wait()}.")
        found = json.loads(line)
        self.versions = found["versions"]
        return found["cpu_s"] / steps, found["seconds"] / steps


def timed(step: Step, steps: int) -> tuple[float, float]:
    """Processor and wall-clock seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def run(samples: int, rounds: int, pythae: Pythae | None) -> dict[str, Any]:
    """Medians of one number of samples."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((BATCH, PIXELS), 0.3))
    steps = STEPS[samples]
    here = {
        "fspace IWAE": ours(samples, x, "iwae"),
        "fspace IWAE, Pythae's formula": ours(samples, x, "iwae", from_logits=False),
        "fspace DReG": ours(samples, x, "dreg"),
        "pyro RenyiELBO": pyro_step(samples, x),
    }
    sides = {name: partial(timed, step) for name, step in here.items()}
    if pythae is not None:
        sides["pythae IWAE"] = partial(pythae.turn, samples)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in sides.values():
        turn(2)  # warm up
    for i in range(rounds):
        names = list(sides)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(sides[name](steps))
    rows = {}
    for name, turns in taken.items():
        cpu = sorted(c for c, _ in turns)
        rows[name] = {
            "cpu_s": statistics.median(cpu),
            "wall_s": statistics.median(w for _, w in turns),
            "least_cpu_s": cpu[0],
            "most_cpu_s": cpu[-1],
        }
    return {"steps_a_turn": steps, "rounds": rounds, "sides": rows}


def main() -> None:
    """Run, print, write."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythae-python", help="an interpreter that has pythae")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", default="1,5,50", help="of 1, 5 and 50")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    pythae = Pythae(args.pythae_python) if args.pythae_python else None
    cases = {}
    for samples in map(int, args.samples.split(",")):
        cases[str(samples)] = run(samples, args.rounds, pythae)
        common.say(
            f"K = {samples}",
            {n: f"{1e3 * r['cpu_s']:.1f} ms" for n, r in cases[str(samples)]["sides"].items()},
        )
    view = Table("side", *(f"K = {samples}, ms" for samples in cases))
    for name in next(iter(cases.values()))["sides"]:
        view.add_row(name, *(f"{1e3 * case['sides'][name]['cpu_s']:.1f}" for case in cases.values()))
    Console(width=max(100, Console().width)).print(view)
    peers = {"pyro-ppl": version("pyro-ppl"), **(pythae.versions if pythae else {})}
    setting = {"pixels": PIXELS, "hidden": HIDDEN, "latent": LATENT, "batch": BATCH}
    result = {
        "command": "python benchmarks/amortised.py --pythae-python ENV/bin/python",
        "machine": common.machine(),
    }
    common.write("amortised", {**result, "peers": peers, "setting": setting, "samples": cases})


if __name__ == "__main__":
    main()
