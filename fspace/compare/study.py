"""A study: every method on every split of every data set, within one budget; resumed where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from fspace.compare.cells import Budget, Cell, Method, run_cell
from fspace.compare.problems import Dataset
from fspace.compare.results import Results
from fspace.errors import DataError, OptionError
from fspace.predictive_base import check_seed, check_whole

ENGINES = ("process", "ray")
JOURNAL = "cells.jsonl"
FORMAT = 1  # of a cell's row; results in another are not taken over
DIED = "the process that fitted it died (out of memory, or a crash in a library)"


class Study:
    """Every method on every split of every data set.

    datasets: `Uci`, `Table`, `InBetween`, or anything with their interface. methods: `Method`s, or a mapping from names
    to estimators. splits: how many of each data set, from the first (None: all). budget: what every fit gets. folder:
    where finished cells are kept, so that an interrupted run goes on (None: nowhere). The same seed gives the same
    scores on the same machine with the same jobs, unless the budget's seconds end a fit.
    Raises OptionError for what does not fit together.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        methods: Sequence[Method] | Mapping[str, Any],
        splits: int | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
    ):
        self.datasets, self.seed = (
            _all_of(Dataset, datasets, "datasets", "Table('mine', X, y)"),
            check_seed(seed),
        )
        self.methods = as_methods(methods)
        if not isinstance(budget, Budget | None):
            raise OptionError(f"budget={budget!r} is none; pass Budget(seconds=...).")
        self.budget = budget or Budget()
        self.folder = None if folder is None else Path(folder)
        if splits is not None:
            check_whole("splits", splits)
        self.splits = splits
        for what, names in (
            ("data set", [d.name for d in self.datasets]),
            ("method", [m.name for m in self.methods]),
        ):
            if not names:
                raise OptionError(f"A study needs at least one {what}.")
            if len(set(names)) < len(names):
                raise OptionError(
                    f"Two {what}s have one name: {sorted(n for n in set(names) if names.count(n) > 1)}."
                )
        self.cells = [
            Cell(dataset, split, method, self.budget, self.seed)
            for dataset in self.datasets
            for split in range(min(self.splits or dataset.splits, dataset.splits))
            for method in self.methods
            if method.estimator(dataset.task) is not None
        ]
        if not self.cells:
            raise OptionError(
                "No method fits any data set: regressors for regressions, classifiers for classes."
            )

    def run(
        self,
        resume: bool = True,
        jobs: int = 1,
        engine: str = "process",
        tell: Callable[..., None] = lambda **_: None,
    ) -> Results:
        """Fit what is not done yet and return all results.

        resume: take over finished cells from `folder` (failed ones are tried again); False forgets them. jobs: fits at
        a time, each in a process of its own (a script then needs `if __name__ == "__main__":`). engine: "process" or
        "ray" (the cluster this process is connected to, else one started here). tell: called after every cell.
        Ctrl-C ends the run; what is done stays, and the results say that they are not all.
        """
        if engine not in ENGINES:
            raise OptionError(f"engine={engine!r} does not exist; choose one of {', '.join(ENGINES)}.")
        check_whole("jobs", jobs)
        journal = None if self.folder is None else Journal(self.folder / JOURNAL, resume)
        keys = [cell_key(cell) for cell in self.cells]
        done = {
            key: row for key, row in (journal.rows if journal else {}).items() if row["status"] != "failed"
        }
        todo = [(key, cell) for key, cell in zip(keys, self.cells) if key not in done]
        interrupted = False
        tell(done=len(keys) - len(todo), total=len(keys))
        try:
            for key, row in _engine(engine, jobs)(todo, jobs):
                done[key] = row
                if journal:
                    journal.add(key, row)
                tell(
                    stage=f"{row['dataset']} {row['split']}, {row['method']}",
                    done=sum(k in done for k in keys),
                    total=len(keys),
                )
        except KeyboardInterrupt:
            interrupted = True
        sources = {d.name: d.source for d in self.datasets} | {
            m.name: m.source for m in self.methods if m.source
        }
        rows = [done[key] for key in keys if key in done]
        spaces = {method.name: method.space for method in self.methods}
        return Results(rows, str(self.budget), sources, spaces, interrupted)


def as_methods(methods: Sequence[Method] | Mapping[str, Any]) -> list[Method]:
    """Methods from a sequence of them, or from names and estimators. Raises OptionError for what is neither."""
    if not isinstance(methods, Mapping):
        return _all_of(Method, methods, "methods", "a dict of names and estimators, or named_methods([...])")
    from sklearn.base import is_classifier

    made = []
    for name, one in methods.items():
        if not isinstance(one, Method):
            if isinstance(one, type) or not (hasattr(one, "fit") and hasattr(one, "get_params")):
                raise OptionError(
                    f"The method {name!r} is {one!r}, no estimator: one has fit and get_params (BaseEstimator of "
                    "scikit-learn gives that), and is an instance, not a class."
                )
            one = Method(name, classifier=one) if is_classifier(one) else Method(name, regressor=one)
        made.append(replace(one, name=name))
    return made


def _all_of(kind: type[Any], items: Any, option: str, example: str) -> list[Any]:
    """A sequence whose items are all of a kind, as a list. Raises OptionError where it is not."""
    listed = list(items) if isinstance(items, Sequence) and not isinstance(items, str) else None
    if listed is None or not all(isinstance(item, kind) for item in listed):
        what = items if listed is None else next(item for item in listed if not isinstance(item, kind))
        raise OptionError(
            f"{option} must be a sequence of {kind.__name__}s; got a {type(what).__name__}. Pass {example}."
        )
    return listed


def cell_key(cell: Cell) -> str:
    """What a result belongs to: data, split, method with its options, budget and seed."""
    parts = (
        FORMAT, cell.dataset.name, cell.dataset.fingerprint, cell.split, cell.method.name,
        cell.method.fingerprint(cell.dataset.task), repr(cell.budget), cell.seed,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class Journal:
    """Finished cells in a file, one a line; a last line that was cut off is dropped when the file is next opened.

    Raises DataError for a file that is no journal, and for a folder that cannot be written to.
    """

    def __init__(self, path: Path, resume: bool = True):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8", errors="replace") if resume and path.exists() else ""
            whole = self._read([line for line in text.split("\n") if line.strip()])
            part = path.with_suffix(".part")
            part.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise DataError(
                f"Results cannot be kept in {str(path.parent)!r} ({error.strerror or error}); name a folder that can "
                "be written to."
            ) from error

    def _read(self, lines: list[str]) -> list[str]:
        """Take rows from lines, and return those lines that are whole."""
        whole = []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                entry["row"]["status"]
                self.rows[entry["key"]] = entry["row"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number < len(lines) - 1:
                    raise DataError(
                        f"{str(self.path)!r}, line {number + 1}, is no result of a study; move the file away, or name "
                        "another folder."
                    ) from error
                continue
            whole.append(line)
        return whole

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Write one line, to the disk, before anything else happens."""
        self.rows[key] = dict(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


# ---- where cells run -------------------------------------------------------------------------------

Todo = list[tuple[str, Cell]]
Answers = Iterator[tuple[str, dict[str, Any]]]


def _engine(name: str, jobs: int) -> Callable[[Todo, int], Answers]:
    if name == "ray":
        return _on_ray
    return _here if jobs == 1 else _in_processes


def _here(todo: Todo, jobs: int) -> Answers:
    for key, cell in todo:
        yield key, run_cell(cell)


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _in_processes(todo: Todo, jobs: int) -> Answers:
    """No more cells are under way than processes, so that when one dies it is known which cells it can have been; these
    are then tried one by one, each in a process of its own."""
    waiting = [(key, replace(cell, threads=_threads(jobs))) for key, cell in reversed(todo)]
    while waiting:
        suspects: Todo = []
        with _pool(jobs) as pool:
            running: dict[Future[dict[str, Any]], tuple[str, Cell]] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running[pool.submit(run_cell, waiting[-1][1])] = waiting[-1]
                        waiting.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        row = future.result()
                        yield running.pop(future)[0], row
            except BrokenProcessPool:
                suspects = list(running.values())
        for key, cell in suspects:
            with _pool(1) as pool:
                try:
                    yield key, pool.submit(run_cell, cell).result()
                except BrokenProcessPool:
                    yield key, _dead(cell)


def _end_with_study() -> None:
    """A worker ends when the study's process does, even when that is killed: nobody would take its result."""
    study = parent_process()

    def watch() -> None:
        if study is not None:
            study.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _pool:
    """Fresh processes (torch's threads do not survive a fork); where the block is left by an error they end with it."""

    def __init__(self, jobs: int):
        self.pool = ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_study)

    def __enter__(self) -> ProcessPoolExecutor:
        return self.pool

    def __exit__(self, kind: Any, *_: Any) -> None:
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in processes:
                process.terminate()


def _dead(cell: Cell) -> dict[str, Any]:
    return {
        "dataset": cell.dataset.name, "task": cell.dataset.task, "split": cell.split, "method": cell.method.name,
        "status": "failed", "reason": DIED, "fresh": False, "scores": {},
    }  # fmt: skip


def _on_ray(todo: Todo, jobs: int) -> Answers:
    """Tasks of one core each; Ray repeats those whose worker dies, three times."""
    try:
        import ray
    except ImportError as error:
        raise OptionError('engine="ray" needs Ray: pip install "fspace[ray]".') from error
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(run_cell)
        running = {remote.remote(replace(cell, threads=1)): (key, cell) for key, cell in todo}
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            key, cell = running.pop(ready)
            try:
                yield key, ray.get(ready)
            except ray.exceptions.RayError:
                yield key, _dead(cell)
    finally:
        if started_here:
            ray.shutdown()
