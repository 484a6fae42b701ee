"""The terminal: `fspace fit`, `predict`, `serve`, `token`, `worker`, `forget`, `fetch`. Heavy imports wait for a
command, so help is quick."""

from __future__ import annotations

import io
import re
import sys
import warnings
from functools import cache
from textwrap import wrap
from typing import Annotated, Any

import typer

# What messages call by its name in Python, and what it is called here.
WORDS = (
    (r"missing='impute' in the fit \(terminal: ([^)]*)\)", r"\1"),
    (r"(X\[[^]]*\]\.astype\('category'\), or )?categories=\[[^]]*\], or in the terminal (?=--)", ""),
    (r" or pass a gpytorch [a-z ]+(?=[.;])", ""),
    (r"\(Classes: GPClassifier\.\)", "(Classes: --task classification.)"),
    (r"\b(kernel|inference|likelihood|members|inducing|missing|seed|device|task)='([^' ]*)'", r"--\1 \2"),
    (r"\b(members|inducing|seed)=(?=[-\d])", r"--\1 "),
)
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it

app = typer.Typer(
    name="fspace",
    help="Calibrated predictions from tables: Gaussian processes with deep or plain kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # so that a help text's lines are wrapped anew, not broken where the source is
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from fspace import __version__

        typer.echo(f"fspace {__version__}")
        raise typer.Exit


@app.command()
def fit(
    data: Annotated[
        str | None, typer.Argument(help="CSV or Parquet file; without it, scikit-learn's diabetes table.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Column to predict; several times for several outputs.")
    ] = None,
    task: Annotated[str, typer.Option(help="What to predict: regression or classification.")] = "regression",
    kernel: Annotated[str, typer.Option(help="auto, deep, matern, rbf, neural or additive.")] = "auto",
    inference: Annotated[str, typer.Option(help="auto, exact, collapsed or sites.")] = "auto",
    likelihood: Annotated[
        str,
        typer.Option(
            help="Noise: auto, gaussian (constant), heteroscedastic (varies), student_t, laplace; counts: poisson, "
            "negative_binomial; positive: gamma; shares: beta."
        ),
    ] = "auto",
    members: Annotated[int | None, typer.Option(help="Deep kernels in the ensemble.")] = None,
    inducing: Annotated[
        float | None,
        typer.Option(
            help="Most inducing inputs of a sparse posterior; below 1, the variance they may leave unexplained."
        ),
    ] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(help="Column to read as a category; several times for several.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Column to leave out, such as an identifier.")
    ] = None,
    missing: Annotated[str, typer.Option(help="What to do with empty cells: error or impute.")] = "error",
    test_fraction: Annotated[float, typer.Option(help="Share of the rows held out to measure on.")] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same fit on the same machine.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        str | None, typer.Option(help="Folder for the results; fspace-out, or the next free number after it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
) -> None:
    """Fit a table, measure on rows held out, and write model, metrics, predictions and a report.

    A folder that holds earlier results is never written over unless --overwrite is given. Ctrl-C ends the fit early:
    everything is written about its best state so far, and the exit status is 130.
    """
    from fspace.runs import FitRun, fit_table

    options: dict[str, Any] = {"kernel": kernel, "inference": inference, "missing": missing, "device": device}
    whole = inducing is not None and inducing.is_integer()
    options |= {"seed": seed, "members": members, "inducing": int(inducing or 0) if whole else inducing}
    options["likelihood"] = likelihood
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
    if as_json:
        _print_json(results)
    else:
        _print_results(results)
    if results["interrupted"]:
        raise typer.Exit(INTERRUPTED)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A saved model, or the folder that `fspace fit` wrote.")],
    data: Annotated[str, typer.Argument(help="CSV or Parquet file with the columns of the fit.")],
    out: Annotated[str, typer.Option(help="CSV or Parquet file to write, by its ending.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON, nothing else.")] = False,
) -> None:
    """Predict every row of a table.

    Numbers: mean, standard deviation and the central 90% interval. Classes: the likeliest, the probability of each, the
    entropy of these, and of that what knowing the function would remove (mutual information; both in nats).
    """
    from fspace.runs import predict_table

    summary = predict_table(model, data, out, overwrite=overwrite, quiet=as_json)
    if as_json:
        _print_json(summary)
        return
    for note in summary["notes"]:
        typer.echo(note, err=True)
    typer.echo(f"{summary['rows']:,} predictions ({summary['columns']}) are in {summary['out']}")


@app.command()
def serve(
    store: Annotated[str, typer.Option(help="SQLite file that keeps everything; made where there is none.")],
    tokens: Annotated[str, typer.Option(help="File of tokens, which `fspace token` makes.")] = "tokens.json",
    model: Annotated[
        str | None,
        typer.Option(help="Saved model: the basis (of its heaviest kernel) that workers put sites on."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.")] = 8000,
    certificate: Annotated[str | None, typer.Option(help="TLS certificate (PEM).")] = None,
    key: Annotated[str | None, typer.Option(help="Key of the certificate (PEM).")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen without TLS on an address that other machines reach.")
    ] = False,
    rate: Annotated[float, typer.Option(help="Requests a second that one token may make.")] = 50.0,
) -> None:
    """Serve a posterior to workers elsewhere; its status page is at the address that is printed.

    The posterior starts from the prior of the model: what the model was fitted on counts where it is sent as a site.
    Ctrl-C ends it; what workers were told is kept is in the store.
    """
    from fspace.server.serving import Listening, serve_store

    where = Listening(host, port, certificate, key, insecure, rate)
    serve_store(store, tokens, model, where, typer.echo)


@app.command()
def token(
    tokens: Annotated[str, typer.Option(help="File of tokens; made where there is none.")] = "tokens.json",
    site: Annotated[str | None, typer.Option(help="The site that the token may put.")] = None,
    rights: Annotated[str, typer.Option(help="put, read, admin; several with commas.")] = "put,read",
    days: Annotated[float, typer.Option(help="Days until it expires.")] = 30.0,
    revoke: Annotated[
        str | None, typer.Option(help="Revoke this token (or the token of this id) instead.")
    ] = None,
) -> None:
    """Make a token and print it, once; only its hash is kept. A running server takes it at once."""
    from fspace.server.tokens import Tokens

    kept = Tokens(tokens)
    if revoke is not None:
        kept.revoke(revoke)
        typer.echo("Revoked.", err=True)
        return
    typer.echo(kept.issue([right.strip() for right in rights.split(",")], site, days))


@app.command()
def worker(
    data: Annotated[str, typer.Option(help="CSV or Parquet file with the columns of the model.")],
    site: Annotated[str, typer.Option(help="Name of this worker's site.")],
    server: Annotated[str, typer.Option(help="Address of the server: https://...")],
    token_file: Annotated[str, typer.Option(help="File that holds the token.")],
    certificate: Annotated[
        str | None, typer.Option(help="Certificate to trust (PEM), where it is self-signed.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds at most, where the noise is not Gaussian.")] = 30,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the token without TLS.")] = False,
) -> None:
    """Put what a table says on a server: its rows stay here, natural parameters go."""
    from fspace.server.serving import Address, work

    try:
        work(Address(server, token_file, certificate, insecure), data, site, rounds, typer.echo)
    except KeyboardInterrupt:
        typer.echo("Interrupted; what was put stays.", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def forget(
    site: Annotated[str, typer.Option(help="Name of the site to take back.")],
    server: Annotated[str, typer.Option(help="Address of the server: https://...")],
    token_file: Annotated[str, typer.Option(help="File that holds a token with the right admin.")],
    certificate: Annotated[
        str | None, typer.Option(help="Certificate to trust (PEM), where it is self-signed.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the token without TLS.")] = False,
) -> None:
    """Take a site off a server: the posterior is then that of the other sites."""
    from fspace.server.serving import Address

    with Address(server, token_file, certificate, insecure).connect() as remote:
        remote.remove(site)
        evidence = remote.log_evidence()
    typer.echo(f"Site {site!r} is gone. Log evidence of the others: {evidence:,.4f} nats")


@app.command()
def fetch(
    server: Annotated[str, typer.Option(help="Address of the server: https://...")],
    token_file: Annotated[str, typer.Option(help="File that holds a token with the right to read.")],
    out: Annotated[str, typer.Option(help="Model file to write, for `fspace predict`.")],
    certificate: Annotated[
        str | None, typer.Option(help="Certificate to trust (PEM), where it is self-signed.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the token without TLS.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file.")] = False,
) -> None:
    """Write the server's posterior as a model."""
    from fspace.server.serving import Address, fetch_model

    typer.echo(fetch_model(Address(server, token_file, certificate, insecure), out, overwrite))


def _print_json(results: dict[str, Any]) -> None:
    from fspace.runs import to_json

    typer.echo(to_json(results))


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


def _show_warning(message: Warning | str, *_: Any) -> None:
    """A warning is for the person at the terminal: its words, once, without file and line."""
    _note(_said(message))


def _said(message: Any) -> str:
    """A message in one line, with the options of the terminal in place of Python's."""
    text = " ".join(str(message).split())
    for pattern, words in WORDS:
        text = re.sub(pattern, words, text)
    return text


@cache
def _note(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"Note: {text}", style="yellow"), soft_wrap=True)


def main() -> None:
    """The console script: a FspaceError becomes one red line on stderr and exit status 2."""
    _note.cache_clear()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # where there is no R² (ASCII only), results must still be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        from fspace.errors import FspaceError

        if not isinstance(error, FspaceError):
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text(f"Error: {_said(error)}", style="red"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
