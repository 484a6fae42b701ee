"""What a person at a terminal sees while something takes long, and nothing anywhere else."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 2.0  # seconds without a sign


@contextmanager
def progress(what: str, show: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on stderr from the third second on; yields `tell(stage, loss, held_out, done, total)`, each optional.

    Without `total` the bar pulses. It is silent where show is False, where stderr is no terminal, and in worker
    processes and threads, whose bars would run over each other.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    alone = (
        threading.current_thread() is threading.main_thread()
        and multiprocessing.current_process().name == "MainProcess"
    )
    if not (show and alone and console.is_terminal):
        yield lambda **_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[figure]}", markup=False),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None, figure="")

    def tell(**entry: Any) -> None:
        bar.update(
            task,
            description=f"{what}: {entry['stage']}" if entry.get("stage") else what,
            figure=_figure(entry),
            completed=entry.get("done"),
            total=entry.get("total"),
        )

    start = threading.Timer(PATIENCE, bar.start)
    start.daemon = True
    start.start()
    try:
        yield tell
    finally:
        start.cancel()
        start.join()  # it may be starting the bar just now
        bar.stop()


def _figure(entry: dict[str, Any]) -> str:
    """The latest figure of an entry: held-out score before loss before rows done."""
    for name, words in (("held_out", "held-out score"), ("loss", "loss")):
        if entry.get(name) is not None:
            return f"{words} {entry[name]:.4g}"
    return f"{entry['done']:,} rows" if entry.get("done") is not None else ""
