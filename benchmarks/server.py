"""The posterior server: equality with the pooled posterior, bytes, puts a second, time, recovery, memory.

    python benchmarks/server.py [--parts equality,bytes,puts,time,recovery,memory,rounds]

Rows are simulated. Everything runs on this machine; HTTP goes over loopback, without TLS.
"""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from torch import Tensor

from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.inference.likelihoods import BernoulliLikelihood, with_offset
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.sites import converge
from fspace.server import (
    Limits,
    LocalEngine,
    PosteriorServer,
    RayEngine,
    RemoteServer,
    Tokens,
    create_app,
    fit,
)
from fspace.server.natural import divergence
from fspace.server.wire import site_bytes

SECONDS = 5.0  # of puts that are counted


def problem(rows: int, inducing: int, binary: bool = False) -> tuple[Basis, Tensor, Tensor]:
    """Four inputs, a smooth function, a Matern kernel at fixed parameters; seed 0."""
    torch.manual_seed(0)
    x = torch.randn(rows, 4, dtype=torch.float64)
    f = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2].tanh()
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=4)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.5, 1.0
    if binary:
        y = (torch.rand(rows).double() < torch.special.ndtr(2 * f)).double()[:, None]
        return (
            Basis(kernel.requires_grad_(False), x[:inducing].clone(), with_offset(BernoulliLikelihood(), y)),
            x,
            y,
        )
    y = (f + 0.2 * torch.randn(rows).double())[:, None]
    likelihood = gaussian_likelihood(1, 0.04, torch.device("cpu")).requires_grad_(False)
    return Basis(kernel.requires_grad_(False), x[:inducing].clone(), likelihood), x, y


@contextmanager
def front(server: PosteriorServer) -> Iterator[tuple[str, Tokens]]:
    """A real HTTP server on loopback, in a thread."""
    import uvicorn

    tokens = Tokens()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as `fspace serve` does
    app = create_app(server, tokens, Limits(rate=1e9, burst=10**9))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", tokens
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


def equality() -> dict[str, Any]:
    """Largest error of natural parameters, relative to the largest entry, and of the log evidence (nats)."""
    basis, x, y = problem(20_000, 200)
    pooled = fit_site(basis, x, y)
    shards = [(x[k::8], y[k::8]) for k in range(8)]

    def against(total: Site, evidence: float) -> dict[str, float]:
        error = max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in ((total.precision, pooled.precision), (total.shift, pooled.shift))
        )
        exact = log_evidence([pooled])
        return {"natural_parameters": error, "log_evidence": abs(evidence - exact), "of": exact}

    found = {}
    for name, engine in (("threads", LocalEngine(2)), ("Ray", RayEngine())):
        made = fit(shards, basis, engine)
        found[name] = against(made.server.total(), made.log_evidence)
    with PosteriorServer() as server, front(server) as (url, tokens):
        server.register_basis(basis)
        for k in reversed(range(8)):
            with RemoteServer(url, tokens.issue(["put", "read"], f"w{k}")) as client:
                own = fit_site(client.basis()[0], *shards[k], site_id=f"w{k}")
                client.put(replace(own, incarnation=client.join(f"w{k}"), version=0))
        found["HTTP"] = against(client_total(url, tokens), server.log_evidence())
    return found


def client_total(url: str, tokens: Tokens) -> Site:
    """The product of all sites, as another machine gets it."""
    with RemoteServer(url, tokens.issue(["read"])) as client:
        return client.total()


def message_bytes() -> list[dict[str, int]]:
    """Bytes of a site of one output beside those of a full matrix and a vector."""
    rows = []
    for m in (64, 256, 1024):
        basis, x, y = problem(4 * m, m)
        rows.append({"m": m, "bytes": len(site_bytes(fit_site(basis, x, y))), "full": 8 * (m * m + m)})
    return rows


def puts() -> list[dict[str, Any]]:
    """Acknowledged puts a second: to memory, to a file (each on the disk when answered), and to that over HTTP."""
    rows = []
    for m in (256, 1024):
        basis, x, y = problem(4 * m, m)
        site = fit_site(basis, x, y, site_id="w")
        with tempfile.TemporaryDirectory() as folder:
            for how, path in (
                ("memory", None),
                ("file", Path(folder) / "a.db"),
                ("file, HTTP", Path(folder) / "b.db"),
            ):
                with PosteriorServer(path) as server:
                    server.register_basis(basis)
                    if "HTTP" in how:
                        with (
                            front(server) as (url, tokens),
                            RemoteServer(url, tokens.issue(["put", "read"], "w")) as client,
                        ):
                            rate = put_rate(client, site)
                    else:
                        rate = put_rate(server, site)
                rows.append({"m": m, "where": how, "per_second": rate})
                common.say(f"puts, M = {m}, {how}: {rate:.1f}/s")
    return rows


def put_rate(server: Any, site: Site) -> float:
    """Puts of one contributor after the other, with new content each."""
    incarnation, count = server.join(site.site_id), 0
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        server.put(
            replace(site, shift=site.shift * (1 + 1e-9 * count), incarnation=incarnation, version=count)
        )
        count += 1
    return count / (time.perf_counter() - start)


def times() -> dict[str, Any]:
    """Seconds for one posterior of 400,000 rows, M = 256: one process with one and two threads, four workers."""
    rows, m = 400_000, 256
    basis, x, y = problem(rows, m)
    shards = [(x[k::4], y[k::4]) for k in range(4)]

    def pooled(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        fit_site(basis, x, y)
        return time.perf_counter() - start

    def split(engine: Any) -> float:
        torch.set_num_threads(1)
        start = time.perf_counter()
        fit(shards, basis, engine)
        return time.perf_counter() - start

    import ray

    ray.init(include_dashboard=False, log_to_driver=False)
    ways: dict[str, Callable[[], float]] = {
        "one process, 1 thread": lambda: pooled(1),
        "one process, 2 threads": lambda: pooled(2),
        "4 workers on 2 threads": lambda: split(LocalEngine(2)),
        "4 Ray actors, with their start": lambda: split(RayEngine()),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):  # in turns, so that what else the machine does falls on all
        for name, way in ways.items():
            took[name].append(way())
            common.say(f"{name}: {took[name][-1]:.2f} s")
    ray.shutdown()
    return {"rows": rows, "m": m, "seconds": {name: statistics.median(each) for name, each in took.items()}}


def recovery() -> dict[str, Any]:
    """Seconds from the start of a server after SIGKILL until it answers, with 1,000 sites on disk."""
    m, sites = 256, 1000
    basis, x, y = problem(4 * m, m)
    site = fit_site(basis, x, y)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = Tokens(folder / "tokens.json")
        token = tokens.issue(["read"])
        with PosteriorServer(folder / "s.db") as server:
            server.register_basis(basis)
            for k in range(sites):
                server.put(replace(site, site_id=f"w{k}", incarnation=server.join(f"w{k}")))
            before = server.total()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            sys.executable, "-c", "from fspace.cli import main; main()", "serve", "--store", str(folder / "s.db"),
            "--tokens", str(folder / "tokens.json"), "--port", str(port),
        ]  # fmt: skip
        took = []
        for _ in range(3):
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                with RemoteServer(f"http://127.0.0.1:{port}", token, tries=12) as client:
                    after = client.total()
                took.append(time.perf_counter() - start)
                same = torch.equal(after.precision, before.precision) and torch.equal(
                    after.shift, before.shift
                )
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        start = time.perf_counter()
        with PosteriorServer(folder / "s.db") as server:
            opening = time.perf_counter() - start
            files = sum(file.stat().st_size for file in folder.glob("s.db*"))
    return {"m": m, "sites": sites, "seconds": statistics.median(took), "of_which_reading": opening, "same": same,
            "file_mib": files / 2**20}  # fmt: skip


def memory() -> dict[str, Any]:
    """Peak memory above the imports with 10,000 sites, and seconds to open them again, in processes of their own."""
    m, sites = 128, 10_000
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "s.db")
        wrote = in_process(f"fill({path!r}, {m}, {sites})")
        opened = in_process(f"reopen({path!r})")
        size = Path(path).stat().st_size / 2**20
    return {"m": m, "sites": sites, "file_mib": size, "fill": wrote, "reopen": opened}


def in_process(call: str) -> dict[str, float]:
    """A function of this file in a new process."""
    code = f"import server; print(server.{call})"
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    peak, seconds = done.stdout.strip().splitlines()[-1].strip("()").split(", ")
    return {"peak_mib": float(peak), "seconds": float(seconds)}


def fill(path: str, m: int, sites: int) -> tuple[float, float]:
    """Put many sites; peak MiB above what was there before, and seconds."""
    basis, x, y = problem(4 * m, m)
    site = fit_site(basis, x, y)
    base, start = peak(), time.perf_counter()
    with PosteriorServer(path) as server:
        server.register_basis(basis)
        for k in range(sites):
            server.put(replace(site, site_id=f"w{k}", incarnation=server.join(f"w{k}")))
    return peak() - base, time.perf_counter() - start


def reopen(path: str) -> tuple[float, float]:
    """Open a file; peak MiB above what was there before, and seconds."""
    gc.collect()
    base, start = peak(), time.perf_counter()
    with PosteriorServer(path) as server:
        server.total()
    return peak() - base, time.perf_counter() - start


def peak() -> float:
    """Peak resident memory of this process, MiB (getrusage's also counts what it was started from)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def rounds() -> dict[str, Any]:
    """Rounds until the product of 8 Bernoulli sites is within 1e-3 nats (KL) of the pooled `sites` posterior, for good:
    all at once against the last round's cavities, in turn, and with cavities that are three rounds old."""
    from fspace.server.core import form_of
    from fspace.server.local_updates import Update, new_site

    basis, x, y = problem(4000, 100, binary=True)
    pooled, _ = converge(basis, x, y, tolerance=1e-10)
    found = {}
    for order, split in (("random", torch.arange(4000)), ("sorted", x[:, 0].argsort())):
        shards = [(x[part], y[part]) for part in split.chunk(8)]
        for name, stale, turns in (
            ("together", 0, False),
            ("in turn", 0, True),
            ("three rounds late", 3, False),
        ):
            with PosteriorServer() as server:
                server.register_basis(basis)
                own = [
                    replace(
                        form_of(basis).empty(basis.id, f"w{k}"), incarnation=server.join(f"w{k}"), version=-1
                    )
                    for k in range(8)
                ]
                past: list[list[Site]] = []
                gaps = []
                for _ in range(60):
                    past.append([server.cavity(f"w{k}") for k in range(8)])
                    for k, (rows, targets) in enumerate(shards):
                        cavity = server.cavity(f"w{k}") if turns else past[max(0, len(past) - 1 - stale)][k]
                        server.put(new_site(basis, rows, targets, own[k], cavity, Update()))
                        kept = server.get(f"w{k}")
                        assert kept is not None
                        own[k] = kept
                    gaps.append(divergence(server.total(), pooled))
                above = [k for k, gap in enumerate(gaps) if not gap < 1e-3]
            found[f"{order}, {name}"] = {
                "rounds": (above[-1] + 2 if above else 1),
                "of": 60,
                "last": gaps[-1],
            }
            common.say(f"rounds, {order}, {name}: {found[f'{order}, {name}']}")
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "equality": equality,
    "bytes": message_bytes,
    "puts": puts,
    "time": times,
    "recovery": recovery,
    "memory": memory,
    "rounds": rounds,
}


def main() -> None:
    """Run the parts asked for and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parts = parser.parse_args().parts.split(",")
    result: dict[str, Any] = {"machine": common.machine()}
    for name in parts:
        common.say(name)
        result[name] = PARTS[name]()
        common.say(result[name])
    common.write("server", result)


if __name__ == "__main__":
    main()
