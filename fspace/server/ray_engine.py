"""Workers as actors of a Ray cluster (extra `ray`).

Each actor reads its own shard where Ray has placed it. Ray starts an actor that dies again and repeats what it was
asked; a step is a function of its arguments, and its answer is put by the process that drives, so that nothing is
counted twice. Arguments cross as cloudpickle, which runs code: whoever can reach the cluster can run code on it. Let it
ask for a token: Ray does so by itself and keeps it in ~/.ray/auth_token, which every machine of the cluster needs
(`ray get-auth-token`), unless RAY_AUTH_MODE=disabled is set. Keep parties that do not trust each other on HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fspace.errors import OptionError, ServerError
from fspace.server.engines import Engine


class RayEngine(Engine):
    """Actors of the Ray cluster that this process is connected to, or of one started here for the purpose.

    address: of a running cluster ("auto": the one of this machine); None starts one on this machine. options: for every
    actor (`num_cpus`, `num_gpus`, `resources`, `scheduling_strategy`); without them actors are spread over the
    machines, any number to a core. restarts: how often an actor that died starts again. patience: seconds within which
    all actors must have found a place.
    Raises OptionError where Ray is not installed, and for an option that Ray does not know.
    """

    def __init__(
        self,
        address: str | None = None,
        options: Mapping[str, Any] | None = None,
        restarts: int = 3,
        patience: float = 300.0,
    ):
        try:
            import ray
        except ImportError as error:
            raise OptionError('engine="ray" needs Ray: pip install "fspace[ray]".') from error
        self._ray = ray
        self.address, self.restarts, self.patience = address, restarts, patience
        self.options = {"scheduling_strategy": "SPREAD", **(options or {})}
        self._started_here = False

    def start(self, workers: Mapping[str, Any]) -> None:
        ray = self._ray
        if not ray.is_initialized():
            self._started_here = True
            ray.init(
                address=self.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
            )
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, str] = {}
        try:
            actor = ray.remote(_Actor).options(
                **self.options, max_restarts=self.restarts, max_task_retries=self.restarts
            )
        except (ValueError, TypeError) as error:
            self.stop()
            raise OptionError(f"Ray does not take options={self.options!r}: {error}") from error
        # held here, so that an actor that starts again still finds its worker
        self._kept = {name: ray.put(worker) for name, worker in workers.items()}
        self._actors = {name: actor.remote(worker) for name, worker in self._kept.items()}
        placed = [actor.ready.remote() for actor in self._actors.values()]
        _, waiting = ray.wait(placed, num_returns=len(placed), timeout=self.patience)
        if waiting:
            resources = ray.cluster_resources()
            self.stop()
            raise ServerError(
                f"{len(waiting)} of {len(placed)} actors found no place within {self.patience:g} s: each wants "
                f"{self.options!r}, the cluster has {resources!r}. Ask for less, or add machines."
            )

    def submit(self, name: str, method: str, *arguments: Any) -> None:
        self._pending[self._actors[name].ask.remote(method, *arguments)] = name

    def wait(self) -> tuple[str, Any]:
        (ready, *_), _ = self._ray.wait(list(self._pending), num_returns=1)
        name = self._pending.pop(ready)
        try:
            return name, self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            return name, cause if isinstance(cause, Exception) else ServerError(str(error))
        except self._ray.exceptions.RayError as error:
            return name, ServerError(f"The actor of {name!r} died more than {self.restarts} times: {error}")

    def stop(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._kept = {}
        if self._started_here:
            self._ray.shutdown()


class _Actor:
    """A worker in a process of its own, one thread."""

    def __init__(self, worker: Any):
        import torch

        torch.set_num_threads(1)
        self._worker = worker

    def ready(self) -> None:
        """Answers once the actor runs."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the worker answers."""
        return getattr(self._worker, method)(*arguments)
