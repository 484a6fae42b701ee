"""What `fspace compare` does: data and methods to a folder with a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fspace.compare.cells import Budget
from fspace.compare.methods import ACTIVATION, HIDDEN, REFERENCE, WIDE, named_methods
from fspace.compare.problems import Dataset, InBetween, Table, diabetes, digits
from fspace.compare.report import write_report
from fspace.compare.results import Results
from fspace.compare.sentences import findings
from fspace.compare.study import JOURNAL, Study
from fspace.compare.wide import LIMIT, prior_panels
from fspace.errors import OptionError
from fspace.predictive_base import check_seed
from fspace.progress import progress
from fspace.runs import TASKS, FitRun, load_columns, target_numbers

AGREED = 1.05  # R-hat below which chains of the reference agree
DEFAULT_OUT = "fspace-compare"


@dataclass
class CompareRun:
    """One `fspace compare`: what is compared on what, within which budget, and where it goes."""

    data: str | None = None
    target: str | None = None
    task: str = "regression"
    methods: Sequence[str] = ()
    splits: int = 3
    budget: float = 30.0
    categorical: Sequence[str] = ()
    drop: Sequence[str] = ()
    missing: str = "error"
    out: str | None = None
    overwrite: bool = False
    jobs: int | None = None
    seed: int = 0


def compare_table(run: CompareRun, quiet: bool = False) -> dict[str, Any]:
    """Compare and write report.html, pictures and results; returns a summary.

    A folder that holds an earlier comparison is gone on with: what was fitted with the same data, options and budget is
    taken over. Raises a FspaceError before the first fit for whatever can be known to be wrong by then. After Ctrl-C
    the report is about what was done by then, and "interrupted" is true.
    """
    seed = check_seed(run.seed)
    jobs = run.jobs if run.jobs is not None else max(1, os.cpu_count() or 1)
    study = Study(
        _datasets(run, seed),
        named_methods(run.methods or None),
        run.splits,
        Budget(run.budget),
        seed,
        _folder(run),
    )
    assert study.folder is not None
    with progress("comparing", not quiet) as tell:

        def told(stage: str = "", done: int = 0, total: int = 0) -> None:
            tell(stage=f"{done} of {total} fits" + (f", last {stage}" if stage else ""))

        results = study.run(resume=not run.overwrite, jobs=jobs, tell=told)
        tell(stage="the report")
        reference = _reference(results)
        grid = np.linspace(-2.5, 2.5, 81)
        page = write_report(
            study.folder,
            results,
            reference=reference,
            priors=prior_panels(HIDDEN, ACTIVATION, grid[:, None]),
            prior_grid=grid,
            limits=[LIMIT],
        )
    return {
        "report": str(page),
        "budget": results.budget,
        "fits": len(results.rows),
        "of": len(study.cells),
        "troubles": [
            [row["dataset"], row["split"], row["method"], row["status"], row["reason"]]
            for row in results.troubles()
        ],
        "findings": findings(results, reference),
        "scores": scores(results),
        "interrupted": results.interrupted,
    }


def _reference(results: Results) -> str | None:
    """The method that others are compared with as functions: HMC where it came to its end and its chains agree, else
    the exact Gaussian process of the same prior."""
    known = [row for row in results.rows if "probe_mean" in row.get("functions", {})]
    for name in (REFERENCE, WIDE):
        rows = [row for row in known if row["method"] == name]
        agree = all(row["chains"]["rhat"] < AGREED for row in rows if "chains" in row)  # NaN is no agreement
        if {row["status"] for row in rows} == {"ok"} and agree:
            return name
    return None


def scores(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Mean log-likelihood, its standard error, and mean seconds to fit, of every data set and method that have one."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dataset in results.datasets:
        if not any(row["dataset"] == dataset and "log_likelihood" in row["scores"] for row in results.rows):
            continue  # all failed: the troubles say why
        likelihood = results.means("log_likelihood", dataset)
        seconds = results.means("fit_seconds", dataset)
        found[dataset] = {
            name: {"log_likelihood": mean, "standard_error": error, "fit_seconds": seconds[name][0]}
            for name, (mean, error) in likelihood.items()
        }
    return found


def _datasets(run: CompareRun, seed: int) -> list[Dataset]:
    if run.task not in TASKS:
        raise OptionError(f"task={run.task!r} does not exist; choose one of {', '.join(TASKS)}.")
    if run.data is None:
        if run.target or run.categorical or run.drop:
            raise OptionError(
                "--target, --categorical and --drop are about columns of DATA, a file; none was given."
            )
        return [InBetween(run.splits, seed=seed), diabetes(run.splits, seed), digits(run.splits, seed)]
    given = FitRun(run.data, [run.target] if run.target else [], run.task, run.categorical, run.drop)
    inputs, target, source = load_columns(given)
    y = target.iloc[:, 0] if run.task == "classification" else target_numbers(target).ravel()
    name = Path(run.data).name.split(".")[0]
    return [Table(name, inputs, y, run.task, run.splits, seed=seed, missing=run.missing, source=source)]


def _folder(run: CompareRun) -> Path:
    """Where results go: a new folder, or one that holds a comparison."""
    folder = Path(run.out if run.out is not None else DEFAULT_OUT)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out {folder}: that is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).exists() and not run.overwrite:
        raise OptionError(
            f"--out {folder}: there is something in it that is no comparison. Name another folder, or give --overwrite."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    return folder
