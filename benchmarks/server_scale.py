"""A simulation of the posterior server with 1,000 workers and 1e9 rows: where time and bytes go, what stops it first.

    python benchmarks/server_scale.py

Measured here: rows a second that one core turns into a site, seconds of a durable put, of a cavity, and of a total at
the server. Assumed, not measured: every worker has one core and its own line of 1 Gbit/s, the server one line of
10 Gbit/s, one lock. Messages then go through an event simulation: a worker computes, waits for the server's line, then
for the server, and (where the noise is not Gaussian) fetches a cavity and goes on, for a stated number of rounds.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import server as one
import torch

from fspace.inference.collapsed import fit_site
from fspace.server import PosteriorServer
from fspace.server.core import form_of
from fspace.server.local_updates import Update, new_site
from fspace.server.wire import site_bytes

WORKERS, ROWS = 1000, 1_000_000_000
WORKER_LINE, SERVER_LINE = 1e9 / 8, 10e9 / 8  # bytes a second
ROUNDS = {
    "gaussian": 1,
    "bernoulli": 10,
}  # puts of each worker; what eight late workers needed in benchmarks/server.py
REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """What was measured, of one output and m inducing inputs: seconds, and the bytes of a message."""

    m: int
    per_row: float
    put: float
    cavity: float
    message: int


def measure(m: int, kind: str) -> Costs:
    """The costs of one worker's step and of the server's answers."""
    basis, x, y = one.problem(100_000 if kind == "gaussian" else 50_000, m, kind == "bernoulli")
    own = cavity = replace(form_of(basis).empty(basis.id, "w"), version=-1)
    start = time.perf_counter()
    site = new_site(basis, x, y, own, cavity, Update())
    per_row = (time.perf_counter() - start) / len(x)
    put, get = [], []
    with tempfile.TemporaryDirectory() as folder, PosteriorServer(Path(folder) / "s.db") as kept:
        kept.register_basis(basis)
        other = fit_site(basis, x[: 2 * m], y[: 2 * m]) if kind == "gaussian" else site
        kept.put(replace(other, site_id="other", incarnation=kept.join("other"), version=0))
        incarnation = kept.join("w")
        for k in range(REPEATS):
            start = time.perf_counter()
            kept.put(
                replace(
                    site, site_id="w", incarnation=incarnation, version=k, shift=site.shift * (1 + 1e-9 * k)
                )
            )
            put.append(time.perf_counter() - start)
            start = time.perf_counter()
            site_bytes(kept.cavity("w"))
            get.append(time.perf_counter() - start)
    return Costs(m, per_row, float(np.median(put)), float(np.median(get)), len(site_bytes(site)))


def simulate(costs: Costs, rounds: int, seed: int = 0) -> dict[str, float]:
    """Hours of wall-clock and where they go. Workers differ in speed (log-normal, sd 0.3); the server takes messages in
    the order in which they have arrived."""
    speeds = np.random.default_rng(seed).lognormal(0.0, 0.3, WORKERS)
    compute = ROWS / WORKERS * costs.per_row * speeds
    waiting = [
        (float(compute[k]), k, 0) for k in range(WORKERS)
    ]  # when a worker has its site, which, in which round
    heapq.heapify(waiting)
    line = busy = queued = end = 0.0
    messages = 0
    while waiting:
        ready, k, done = heapq.heappop(waiting)
        arrived = max(ready + costs.message / WORKER_LINE, line + costs.message / SERVER_LINE)
        line = arrived
        begun = max(arrived, end)
        last = done + 1 == rounds
        served = costs.put + (0.0 if last else costs.cavity)
        end = begun + served
        queued += begun - ready
        busy += served
        messages += 1 if last else 2
        if not last:
            back = end + costs.message / WORKER_LINE
            heapq.heappush(waiting, (back + float(compute[k]), k, done + 1))
    return {
        "hours": end / 3600,
        "compute_hours_slowest": float(compute.max()) * rounds / 3600,
        "server_busy_hours": busy / 3600,
        "waited_hours_per_worker": queued / WORKERS / 3600,
        "server_share": busy / end,
        "gigabytes": messages * costs.message / 1e9,
        "workers_at_full_server": WORKERS * end / busy,
    }


def main() -> None:
    """Measure, simulate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": common.machine(), "workers": WORKERS, "rows": ROWS, "cases": []}
    for kind, rounds in ROUNDS.items():
        for m in (256, 1024):
            costs = measure(m, kind)
            row = {"kind": kind, "rounds": rounds, "costs": asdict(costs), **simulate(costs, rounds)}
            result["cases"].append(row)
            common.say(row)
    common.write("server_scale", result)


if __name__ == "__main__":
    main()
