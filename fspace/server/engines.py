"""Where workers run: threads of this process, or actors of a Ray cluster; and the rounds that are the same on both.

An engine is told `submit(worker, method, arguments)` and asked `wait()` for whichever answer comes next. The server is
in the process that drives; what an answer changes is written there, once, so that an answer that a restarted worker
gives again does no harm.
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from gpytorch.likelihoods import GaussianLikelihood

from fspace.errors import OptionError, ServerError, SiteRefused
from fspace.inference.basis import Basis
from fspace.inference.gp import Scaling
from fspace.server.core import PosteriorServer, unit_scaling
from fspace.server.local_updates import Update
from fspace.server.natural import divergence
from fspace.server.workers import Shard, Worker


class Engine(ABC):
    """Runs methods of workers somewhere, several at a time."""

    @abstractmethod
    def start(self, workers: Mapping[str, Any]) -> None:
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

    def start(self, workers: Mapping[str, Any]) -> None:
        self._workers = dict(workers)
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._pool = ThreadPoolExecutor(self.threads)

    def submit(self, name: str, method: str, *arguments: Any) -> None:
        def ask() -> None:
            try:
                answer = getattr(self._workers[name], method)(*arguments)
            except Exception as error:  # a shard may raise anything; `fit` says whose it was
                answer = error
            except (
                BaseException
            ) as error:  # sys.exit in a shard: without an answer, `wait` would wait for ever
                answer = ServerError(f"The worker ended ({type(error).__name__}: {error}).")
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
    where the worker runs. engine: "local" (threads), "ray", or an engine. scaling: as in `register_basis`; None takes
    the one that a server knows for the basis. server: where sites are kept (None: in memory); a worker whose site is
    there already goes on from it. Gaussian observations take one round. Otherwise nobody waits for anybody: each worker
    steps against the newest cavity until no step moves the posterior by `tolerance` nats, at most `rounds` times.
    Raises OptionError; ServerError where no worker could do its part (one that fails leaves its last site, and its
    words in `failures`).
    """
    named = by_name(shards)
    if rounds < 1 or not tolerance > 0:
        raise OptionError(f"rounds={rounds!r} must be at least 1 and tolerance={tolerance!r} above 0.")
    server = require_server(server)
    if scaling is None:
        scaling = server.basis(basis.id)[1] if basis.id in server.forms() else unit_scaling(basis)
        assert scaling is not None
    server.register_basis(basis, scaling)
    how = Update() if update is None else update
    runs = start(engine, {name: Worker(name, shard, basis, scaling, how) for name, shard in named.items()})
    try:
        most = 1 if isinstance(basis.likelihood, GaussianLikelihood) else rounds
        return asynchronous(runs, server, basis.id, join(server, named), most, tolerance)
    finally:
        runs.stop()


def require_server(server: Any) -> PosteriorServer:
    """The server that is given, or one in memory. Raises OptionError for what is none."""
    if server is None:
        return PosteriorServer()
    if not isinstance(server, PosteriorServer):
        raise OptionError(
            f"server={server!r} is no server; pass PosteriorServer('FILE.db') for one in a file."
        )
    return server


def by_name(shards: Sequence[Any] | Mapping[str, Any]) -> dict[str, Shard]:
    """Shards by their names. Raises OptionError where there is none, or one is neither rows nor what returns them."""
    named = dict(shards) if isinstance(shards, Mapping) else {f"shard {k}": s for k, s in enumerate(shards)}
    if not named:
        raise OptionError("There is no shard to fit.")
    for name, shard in named.items():
        if not callable(shard) and not (isinstance(shard, tuple | list) and len(shard) == 2):
            raise OptionError(
                f"Shard {name!r} is a {type(shard).__name__}; give a pair (x, y), a TableShard, or a function that "
                "returns such a pair where the worker runs."
            )
    return named


def start(engine: str | Engine, workers: Mapping[str, Any]) -> Engine:
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


def join(server: PosteriorServer, names: Iterable[str]) -> dict[str, str]:
    """A new incarnation of every contributor."""
    return {name: server.join(name) for name in names}


def _ask(
    engine: Engine,
    server: PosteriorServer,
    basis_id: str,
    name: str,
    incarnation: str,
    sent: Sequence[Any] = (),
) -> None:
    """Ask a worker for its next site, given what is at the server now and what else is sent."""
    own = server.get(name, basis_id) or server.forms()[basis_id].empty(basis_id, name)
    if own.incarnation != incarnation:
        own = replace(own, incarnation=incarnation, version=-1)  # the next is version 0
    engine.submit(name, "step", own, server.cavity(name, basis_id), *sent)


def _take(found: ServerFit, basis_id: str, name: str, answer: Any) -> float | None:
    """Put what a worker answered; by how many nats that moved the posterior (None: the worker failed, or its site was
    refused)."""
    before = found.server.total(basis_id)
    if not isinstance(answer, Exception):
        try:
            found.server.put(answer)
        except SiteRefused as refused:
            answer = refused
    if isinstance(answer, Exception):
        found.failures[name] = f"{type(answer).__name__}: {answer}"
        return None
    found.rounds[name] += 1
    found.moved.append(divergence(found.server.total(basis_id), before))
    return found.moved[-1]


def asynchronous(
    engine: Engine,
    server: PosteriorServer,
    basis_id: str,
    incarnations: Mapping[str, str],
    most: int,
    tolerance: float,
    sent: Sequence[Any] = (),
) -> ServerFit:
    """Rounds in which nobody waits for anybody, until no worker's step moves the posterior by `tolerance` nats, at most
    `most` of each. sent: what else a step is told, such as a basis other than the one that workers hold. Raises
    ServerError where all workers failed."""
    found = ServerFit(server, dict.fromkeys(incarnations, 0))
    settled: set[str] = set()
    pending: set[str] = set()

    def ask_those_who_wait() -> None:
        for name, incarnation in incarnations.items():
            done = name in settled or name in pending or name in found.failures
            if not done and found.rounds[name] < most:
                _ask(engine, server, basis_id, name, incarnation, sent)
                pending.add(name)

    ask_those_who_wait()
    while pending:
        name, answer = engine.wait()
        pending.discard(name)
        moved = _take(found, basis_id, name, answer)
        if moved is not None:
            settled = settled | {name} if moved < tolerance else set()
        ask_those_who_wait()
    _require_one(found)
    return found


def synchronous(
    engine: Engine, server: PosteriorServer, basis_id: str, incarnations: Mapping[str, str], rounds: int
) -> ServerFit:
    """Rounds in which all workers step against what the last round left: the same result on every engine. Raises
    ServerError where all workers failed."""
    found = ServerFit(server, dict.fromkeys(incarnations, 0))
    for _ in range(rounds):
        able = [name for name in incarnations if name not in found.failures]
        for name in able:
            _ask(engine, server, basis_id, name, incarnations[name])
        answers = dict(engine.wait() for _ in able)
        for name in able:
            _take(found, basis_id, name, answers[name])
    _require_one(found)
    return found


def _require_one(found: ServerFit) -> None:
    if len(found.failures) == len(found.rounds):
        raise ServerError("No worker could make its site. " + _words(found.failures))


def _words(failures: Mapping[str, str]) -> str:
    return " ".join(f"{name!r}: {words}" for name, words in list(failures.items())[:3])
