"""The terminal: `fspace fit`, `predict`, `encode`, `compare`, `decide`, `serve`, `token`, `worker`, `forget`, `fetch`.
Heavy imports wait for a command, so help is quick."""

from __future__ import annotations

import io
import re
import sys
import warnings
from functools import cache
from typing import Annotated, Any

import typer

from fspace.cli_compare import compare
from fspace.cli_decide import decide
from fspace.cli_encode import encode
from fspace.cli_fit import fit, predict
from fspace.cli_serve import fetch, forget, serve, token, worker

# What messages call by its name in Python, and what it is called here.
WORDS = (
    (r"missing='impute' in the fit \(terminal: ([^)]*)\)", r"\1"),
    (r"(X\[[^]]*\]\.astype\('category'\), or )?categories=\[[^]]*\], or in the terminal (?=--)", ""),
    (r" or pass a gpytorch [a-z ]+(?=[.;])", ""),
    (r"\(Classes: GPClassifier\.\)", "(Classes: --task classification.)"),
    (r"\b(objective|latent|network)='([^' ]*)'", r"--\1 \2"),
    (
        r"\b(kernel|inference|likelihood|members|inducing|missing|seed|device|task|splits|jobs)='([^' ]*)'",
        r"--\1 \2",
    ),
    (r"\b(members|inducing|seed|splits|jobs)=(?=[-\d])", r"--\1 "),
    (r"\bseconds=(?=[-\dni])", "--budget "),
)

app = typer.Typer(
    name="fspace",
    help="Calibrated predictions from tables: Gaussian processes with deep or plain kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # so that a help text's lines are wrapped anew, not broken where the source is
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (fit, predict, encode, compare, serve, token, worker, forget, fetch):
    app.command()(command)
app.add_typer(decide, name="decide")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from fspace import __version__

        typer.echo(f"fspace {__version__}")
        raise typer.Exit


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
    for stream in (sys.stdout, sys.stderr):  # where there is no R² (ASCII only), results must be printed
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
