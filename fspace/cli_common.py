"""What commands of the terminal share: options, and how results are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it

Task = Annotated[str, typer.Option(help="What to predict: regression or classification.")]
Categorical = Annotated[
    list[str] | None, typer.Option(help="Column to read as a category; several times for several.")
]
Drop = Annotated[list[str] | None, typer.Option(help="Column to leave out, such as an identifier.")]
Missing = Annotated[str, typer.Option(help="What to do with empty cells: error or impute.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same fit on the same machine.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Folder = Annotated[
    str | None, typer.Option(help="Folder for the results; fspace-out, or the next free number after it.")
]
ReplaceResults = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in --out.")]
ReplaceFile = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file.")]
ResultsAsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print a summary as JSON, nothing else.")]


def tell(results: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print results as JSON or the way `show` does; the exit status is 130 where Ctrl-C ended the run."""
    (print_json if as_json else show)(results)
    if results["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def print_json(results: dict[str, Any]) -> None:
    """Results as JSON, nothing else."""
    from fspace.runs import to_json

    typer.echo(to_json(results))
