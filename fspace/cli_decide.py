"""The terminal's `fspace decide`: rank a pool for labelling, pick actions, propose experiments."""

from __future__ import annotations

from typing import Annotated

import typer

decide = typer.Typer(
    help="Act on a model: rank rows to label, pick actions, propose experiments.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier files.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same choice.")]
Model = Annotated[str, typer.Argument(help="A saved model, or the folder that `fspace fit` wrote.")]
Out = Annotated[
    str, typer.Option(help="CSV or Parquet file to write; a picture of the same name goes beside it.")
]


@decide.command()
def rank(
    model: Model,
    pool: Annotated[
        str, typer.Argument(help="CSV or Parquet file of candidates, with the columns of the fit.")
    ],
    out: Out,
    k: Annotated[int, typer.Option("--k", help="Rows to choose.")] = 20,
    criterion: Annotated[
        str,
        typer.Option(
            help="bald: the best rows one by one; variance, eig, batchbald: a batch whose rows do not repeat each "
            "other; nipv: what lowers the variance of the whole pool (numbers only)."
        ),
    ] = "bald",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Choose the rows of a pool whose labels tell most about the function. The pool is streamed."""
    from fspace.decisions import terminal

    typer.echo(terminal.rank(model, pool, k, criterion, out, seed, overwrite))


@decide.command()
def act(
    model: Model,
    data: Annotated[str, typer.Argument(help="CSV or Parquet file with the columns of the fit.")],
    utility: Annotated[
        str, typer.Option(help='JSON file: {"newsvendor": ...}, {"costs": ...} or {"payoff": ...}.')
    ],
    out: Out,
    samples: Annotated[int, typer.Option(help="Monte Carlo samples, where there is no closed form.")] = 1024,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Pick for every row the action of highest expected utility."""
    from fspace.decisions import terminal

    typer.echo(terminal.act(model, data, utility, out, samples, seed, overwrite))


@decide.command("next")
def propose(
    experiments: Annotated[
        str,
        typer.Argument(help="CSV of experiments made; where it does not exist, the first ones are proposed."),
    ],
    space: Annotated[
        str,
        typer.Option(
            help='JSON file: {"settings": {"x": {"between": [0, 1]}, "n": {"whole": [1, 10]}, '
            '"kind": {"choices": ["a", "b"]}}, "constraints": ["x <= 0.9"]}.'
        ),
    ],
    out: Out,
    goal: Annotated[
        list[str] | None, typer.Option(help="COLUMN=minimize or COLUMN=maximize; several for a front.")
    ] = None,
    count: Annotated[int, typer.Option(help="Experiments to propose.")] = 1,
    model: Annotated[
        str, typer.Option(help="matern, rbf, neural or deep (GPs); ensemble, laplace, hmc, ... (networks).")
    ] = "matern",
    acquisition: Annotated[
        str, typer.Option(help="auto, qLogNEI, qLogEI, qUCB, qLogNEHVI or thompson.")
    ] = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Propose the next experiments: ask and tell through a CSV. Rows without results are pending."""
    from fspace.decisions import terminal

    typer.echo(
        terminal.propose(experiments, space, goal or [], count, out, model, acquisition, seed, overwrite)
    )
