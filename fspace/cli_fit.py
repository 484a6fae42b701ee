"""The terminal's `fspace fit` and `fspace predict`: a table in, a model, or predictions, out."""

from __future__ import annotations

from textwrap import wrap
from typing import Annotated, Any

import typer

from fspace.cli_common import (
    Categorical,
    Device,
    Drop,
    Folder,
    Missing,
    ReplaceFile,
    ReplaceResults,
    ResultsAsJson,
    Seed,
    SummaryAsJson,
    Task,
    print_json,
    tell,
)


def fit(
    data: Annotated[
        str | None, typer.Argument(help="CSV or Parquet file; without it, scikit-learn's diabetes table.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Column to predict; several times for several outputs.")
    ] = None,
    task: Task = "regression",
    kernel: Annotated[str, typer.Option(help="auto, deep, matern, rbf, neural or additive.")] = "auto",
    inference: Annotated[str, typer.Option(help="auto, exact, collapsed or sites.")] = "auto",
    likelihood: Annotated[
        str,
        typer.Option(
            help="Noise: auto, gaussian (constant), heteroscedastic (varies), student_t, laplace; counts: poisson, "
            "negative_binomial; positive: gamma; shares: beta."
        ),
    ] = "auto",
    outputs: Annotated[
        str,
        typer.Option(
            help="Several targets: independent, or coregionalised (correlations between them are learned)."
        ),
    ] = "independent",
    members: Annotated[int | None, typer.Option(help="Deep kernels in the ensemble.")] = None,
    inducing: Annotated[
        float | None,
        typer.Option(
            help="Most inducing inputs of a sparse posterior; below 1, the variance they may leave unexplained."
        ),
    ] = None,
    categorical: Categorical = None,
    drop: Drop = None,
    missing: Missing = "error",
    test_fraction: Annotated[float, typer.Option(help="Share of the rows held out to measure on.")] = 0.2,
    seed: Seed = 0,
    device: Device = "auto",
    out: Folder = None,
    overwrite: ReplaceResults = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Fit a table, measure on rows held out, and write model, metrics, predictions and a report.

    A folder that holds earlier results is never written over unless --overwrite is given. Ctrl-C ends the fit early:
    everything is written about its best state so far, and the exit status is 130.
    """
    from fspace.runs import FitRun, fit_table

    options: dict[str, Any] = {"kernel": kernel, "inference": inference, "missing": missing, "device": device}
    whole = inducing is not None and inducing.is_integer()
    options |= {"seed": seed, "members": members, "inducing": int(inducing or 0) if whole else inducing}
    options |= {"likelihood": likelihood, "outputs": outputs}
    run = FitRun(
        data=data,
        targets=target or [],
        task=task,
        categorical=categorical or [],
        drop=drop or [],
        test_fraction=test_fraction,
        out=out,
        overwrite=overwrite,
        options={name: value for name, value in options.items() if value is not None},
    )
    results = fit_table(run, quiet=as_json)
    tell(results, as_json, _print_results)


def predict(
    model: Annotated[str, typer.Argument(help="A saved model, or the folder that `fspace fit` wrote.")],
    data: Annotated[str, typer.Argument(help="CSV or Parquet file with the columns of the fit.")],
    out: Annotated[str, typer.Option(help="CSV or Parquet file to write, by its ending.")],
    overwrite: ReplaceFile = False,
    as_json: SummaryAsJson = False,
) -> None:
    """Predict every row of a table.

    Numbers: mean, standard deviation and the central 90% interval. Classes: the likeliest, the probability of each, the
    entropy of these, and of that what knowing the function would remove (mutual information; both in nats).
    """
    from fspace.runs import predict_table

    summary = predict_table(model, data, out, overwrite=overwrite, quiet=as_json)
    if as_json:
        print_json(summary)
        return
    for note in summary["notes"]:
        typer.echo(note, err=True)
    typer.echo(f"{summary['rows']:,} predictions ({summary['columns']}) are in {summary['out']}")


def _print_results(results: dict[str, Any]) -> None:
    """The metrics table, the kernel that was chosen, and last the one line that says what to open."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fspace.runs import describe_choice, describe_likelihood
    from fspace.scores import CLASS_SCORES, SCORES, shown

    console = Console()
    rows, targets = results["rows"], results["targets"]
    of_classes = results["task"] == "classification"
    kinds, simple = (CLASS_SCORES, "frequencies only") if of_classes else (SCORES, "mean only")
    if rows["test"]:
        table = Table(title=f"{rows['test']:,} rows held out, {rows['train']:,} fitted", title_justify="left")
        table.add_column("", no_wrap=True)
        pairs = [(name, results["metrics"][name], results["baseline"][name]) for name in targets]
        if len(targets) == 1:
            table.add_column("this model", justify="right")
            table.add_column(simple, justify="right", style="dim")
            for key, words, _ in kinds:
                table.add_row(words, *(shown(key, scores[key]) for scores in pairs[0][1:]))
        else:  # one target below another, so that the table is no wider for many
            table.box, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, False, True
            for _, words, _ in SCORES:
                words = words.replace(" ", "\n").replace("-", "-\n")
                table.add_column(words, justify="right", no_wrap=True)
            for name, ours, base in pairs:
                table.add_row(
                    Text("\n".join(wrap(name, 16))), *(shown(key, ours[key]) for key, _, _ in SCORES)
                )
                table.add_row("  mean only", *(shown(key, base[key]) for key, _, _ in SCORES), style="dim")
        # a number that is cut at the terminal's edge reads as another number
        width = Console(width=1000).measure(table).maximum
        (console if width <= console.width else Console(width=width)).print(table)
    kernel = f"Kernel: {describe_choice(results['weights'])}{describe_likelihood(results)}"
    console.print(kernel, highlight=False, soft_wrap=True, markup=False)
    line = f"Saved model, metrics and predictions; open {results['files']['report']}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
