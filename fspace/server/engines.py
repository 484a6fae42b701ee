"""Where workers run: threads of this process, or actors of a Ray cluster; and the rounds that are the same on both.

An engine is told `submit(worker, method, arguments)` and asked `wait()` for whichever answer comes next. The server is
in the process that drives; what an answer changes is written there, once, so that an answer that a restarted worker
gives again does no harm.
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from gpytorch.likelihoods import GaussianLikelihood

from fspace.errors import OptionError, ServerError
from fspace.inference.basis import Basis
from fspace.inference.gp import Scaling
from fspace.server.core import PosteriorServer, form_of, unit_scaling
from fspace.server.local_updates import Update
from fspace.server.natural import divergence
from fspace.server.workers import Shard, Worker


class Engine(ABC):
    """Runs methods of workers somewhere, several at a time."""

    @abstractmethod
    def start(self, workers: Mapping[str, Worker]) -> None:
        """Bring the workers to where they run."""

    @abstractmethod
    def submit(self, name: str, method: str, *arguments: Any) -> None:
        """Ask a worker; the answer comes from `wait`."""

    @abstractmethod
    def wait(self) -> tuple[str, Any]:
        """The next answer, of whichever worker: its name, and what it answered or the exception it raised."""

    @abstractmethod
    def stop(self) -> None:
        """Let the workers go."""


class LocalEngine(Engine):
    """Threads of this process. threads: how many work at a time."""

    def __init__(self, threads: int = 2):
        if threads < 1:
            raise OptionError(f"threads={threads!r} must be at least 1.")
        self.threads = threads

    def start(self, workers: Mapping[str, Worker]) -> None:
        self._workers = dict(workers)
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._pool = ThreadPoolExecutor(self.threads)

    def submit(self, name: str, method: str, *arguments: Any) -> None:
        def ask() -> None:
            try:
                answer = getattr(self._workers[name], method)(*arguments)
            except Exception as error:  # a shard may raise anything; `fit` says whose it was
                answer = error
            self._answers.put((name, answer))

        self._pool.submit(ask)

    def wait(self) -> tuple[str, Any]:
        return self._answers.get()

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class ServerFit:
    """What `fit` found. rounds: how often each worker's site was put; failures: what workers that could not go on
    said; moved: by how many nats (KL divergence) each put moved the posterior, in their order."""

    server: PosteriorServer
    rounds: dict[str, int]
    failures: dict[str, str] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)

    @property
    def posterior(self) -> Any:
        """The posterior over functions that all sites give."""
        return self.server.posterior()

    @property
    def log_evidence(self) -> float:
        """Log evidence (nats)."""
        return self.server.log_evidence()


def fit(
    shards: Sequence[Shard] | Mapping[str, Shard],
    basis: Basis,
    engine: str | Engine = "local",
    *,
    scaling: Scaling | None = None,
    server: PosteriorServer | None = None,
    update: Update | None = None,
    rounds: int = 50,
    tolerance: float = 1e-5,
) -> ServerFit:
    """One posterior from the rows of many workers, none of which sees another's rows.

    shards: by name, or in order (then named "shard 0", ...): (x, y), a `TableShard`, or a function that returns (x, y)
    where the worker runs. engine: "local" (threads), "ray", or an engine. server: where sites are kept (None: in
    memory); a worker whose site is there already goes on from it. Gaussian observations take one round. Otherwise
    nobody waits for anybody: each worker steps against the newest cavity until no step moves the posterior by
    `tolerance` nats, at most `rounds` times.
    Raises OptionError; ServerError where no worker could do its part (one that fails leaves its last site, and its
    words in `failures`).
    """
    named = dict(shards) if isinstance(shards, Mapping) else {f"shard {k}": s for k, s in enumerate(shards)}
    if not named:
        raise OptionError("There is no shard to fit.")
    if rounds < 1 or not tolerance > 0:
        raise OptionError(f"rounds={rounds!r} must be at least 1 and tolerance={tolerance!r} above 0.")
    server = PosteriorServer() if server is None else server
    server.register_basis(basis, scaling)
    scaling = unit_scaling(basis) if scaling is None else scaling
    how = Update() if update is None else update
    runs = start(engine, {name: Worker(name, shard, basis, scaling, how) for name, shard in named.items()})
    try:
        most = 1 if isinstance(basis.likelihood, GaussianLikelihood) else rounds
        return _asynchronous(runs, server, basis, list(named), most, tolerance)
    finally:
        runs.stop()


def start(engine: str | Engine, workers: Mapping[str, Worker]) -> Engine:
    """An engine with its workers. Raises OptionError for a name that does not exist."""
    if isinstance(engine, str):
        if engine == "ray":
            from fspace.server.ray_engine import RayEngine

            engine = RayEngine()
        elif engine == "local":
            engine = LocalEngine()
        else:
            raise OptionError(f"engine={engine!r} does not exist; choose 'local', 'ray' or pass an engine.")
    engine.start(workers)
    return engine


def _asynchronous(
    engine: Engine, server: PosteriorServer, basis: Basis, names: list[str], most: int, tolerance: float
) -> ServerFit:
    found = ServerFit(server, dict.fromkeys(names, 0))
    incarnations = {name: server.join(name) for name in names}
    settled: set[str] = set()
    pending: set[str] = set()

    def ask(name: str) -> None:
        own = server.get(name, basis.id) or form_of(basis).empty(basis.id, name)
        if own.incarnation != incarnations[name]:
            own = replace(own, incarnation=incarnations[name], version=-1)  # the next is version 0
        engine.submit(name, "step", own, server.cavity(name, basis.id))
        pending.add(name)

    for name in names:
        ask(name)
    while pending:
        name, site = engine.wait()
        pending.discard(name)
        if isinstance(site, Exception):
            found.failures[name] = f"{type(site).__name__}: {site}"
        else:
            before = server.total(basis.id)
            server.put(site)
            found.rounds[name] += 1
            moved = divergence(server.total(basis.id), before)
            found.moved.append(moved)
            settled = settled | {name} if moved < tolerance else set()
        for other in names:
            done = other in settled or other in pending or other in found.failures
            if not done and found.rounds[other] < most:
                ask(other)
    if len(found.failures) == len(names):
        raise ServerError("No worker could make its site. " + _words(found.failures))
    return found


def _words(failures: Mapping[str, str]) -> str:
    return " ".join(f"{name!r}: {words}" for name, words in list(failures.items())[:3])
