"""Pythae's side of amortised.py, run by Pythae's own interpreter: it imports nothing of fspace.

Reads one JSON line a turn: {"samples": K, "batch": B, "steps": n, "pixels": d, "latent": l, "seed": s}. Answers with
one: seconds (wall-clock) and cpu_s (processor time) of n training steps of its IWAE with its default networks, Adam
included.
"""

import json
import os
import sys
import time
from importlib.metadata import version

answers = os.fdopen(os.dup(1), "w")  # what Pythae prints must not get between
os.dup2(2, 1)

import torch  # noqa: E402
from pythae.models import IWAE, IWAEConfig  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def build(turn):
    """Model, optimiser and data, once for each setting."""
    torch.manual_seed(turn["seed"])
    config = IWAEConfig(
        input_dim=(turn["pixels"],),
        latent_dim=turn["latent"],
        reconstruction_loss="bce",
        number_samples=turn["samples"],
    )
    model = IWAE(config)
    x = torch.bernoulli(torch.full((turn["batch"], turn["pixels"]), 0.3))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), x


def main():
    """Answer turn by turn until the input ends."""
    built = {}
    for line in sys.stdin:
        turn = json.loads(line)
        if turn["samples"] not in built:
            built[turn["samples"]] = build(turn)
        model, optimiser, x = built[turn["samples"]]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(turn["steps"]):
            optimiser.zero_grad()
            loss = model({"data": x}).loss
            loss.backward()
            optimiser.step()
        found = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        versions = {name: version(name) for name in ("pythae", "torch")}
        print(json.dumps({**found, "versions": versions}), file=answers, flush=True)


if __name__ == "__main__":
    main()
