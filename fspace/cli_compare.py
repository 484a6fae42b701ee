"""The terminal's `fspace compare`: methods side by side."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any

import typer

from fspace.cli_common import INTERRUPTED, Categorical, Drop, Missing, SummaryAsJson, Task, tell


def compare(
    data: Annotated[
        str | None,
        typer.Argument(
            help="CSV or Parquet file; without it a problem in one dimension, scikit-learn's diabetes and its digits."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    task: Task = "regression",
    methods: Annotated[
        str | None, typer.Option(help="Methods by name, with commas; a name that does not exist lists them.")
    ] = None,
    splits: Annotated[int, typer.Option(help="Random splits of each data set.")] = 3,
    budget: Annotated[float, typer.Option(help="Seconds of wall time that every fit may take.")] = 30.0,
    categorical: Categorical = None,
    drop: Drop = None,
    missing: Missing = "error",
    seed: Annotated[int, typer.Option(help="The same seed gives the same splits and fits.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Fits at a time; one for each core by itself.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the report; by itself fspace-compare.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Fit anew what the folder already has.")
    ] = False,
    as_json: SummaryAsJson = False,
) -> None:
    """Compare methods on the same splits within the same budget, and write a report.

    A folder that holds an earlier comparison is gone on with: what was fitted with the same data, options and budget is
    taken over. Ctrl-C ends the run; the report is then about what was done, and the same command goes on.
    """
    from fspace.compare.command import CompareRun, compare_table

    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else []
    run = CompareRun(
        data,
        target,
        task,
        names,
        splits,
        budget,
        categorical or [],
        drop or [],
        missing,
        out,
        overwrite,
        jobs,
        seed,
    )
    goes_on = f"the same command{' without --overwrite' if overwrite else ''} goes on"
    try:
        summary = compare_table(run, quiet=as_json)
    except KeyboardInterrupt:  # a second one, while the page was being written, or one before the first fit
        typer.echo(f"Interrupted, without a page; finished fits are kept: {goes_on}.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    tell(summary, as_json, partial(_print_comparison, goes_on))


def _print_comparison(goes_on: str, summary: dict[str, Any]) -> None:
    """A table for each data set, what was found, what went wrong, and last the line that says what to open."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for dataset, methods in summary["scores"].items():
        table = Table(title=dataset, title_justify="left")
        for words in ("", "log-likelihood per point", "standard error", "seconds to fit"):
            table.add_column(words, justify="right" if words else "left")
        for name, row in sorted(methods.items(), key=lambda item: -item[1]["log_likelihood"]):
            figures = [row[key] for key in ("log_likelihood", "standard_error", "fit_seconds")]
            table.add_row(name, *(f"{figure:.3g}" if math.isfinite(figure) else "-" for figure in figures))
        console.print(table)
    lines = [f"- {sentence}" for sentence in summary["findings"]]
    lines += [
        f"- {dataset}, split {k}, {name} {status}: {why}"
        for dataset, k, name, status, why in summary["troubles"]
    ]
    if summary["interrupted"]:
        lines.append(f"Interrupted after {summary['fits']} of {summary['of']} fits; {goes_on}.")
    lines.append(f"Budget: {summary['budget']}. Open {summary['report']}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
