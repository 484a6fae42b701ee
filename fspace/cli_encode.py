"""The terminal's `fspace encode`: models with latents."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fspace.cli_common import Device, Folder, ReplaceResults, ResultsAsJson, Seed, tell


def encode(
    data: Annotated[
        str | None,
        typer.Argument(
            help="CSV or Parquet table, or a .npy array of images [n, h, w] or [n, c, h, w]; without it, "
            "scikit-learn's digits."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="vae, mixture, draw; of series vrnn, causal, switching, gp-states, gp-prior; without it vae, of "
            "series vrnn, of one series gp-prior."
        ),
    ] = None,
    latents: Annotated[int | None, typer.Option(help="How many latents (of draw: at every step).")] = None,
    latent: Annotated[
        str | None, typer.Option(help="Of vae: gaussian, bits or categories; of vrnn: gaussian or bits.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="Of vae: dense or conv (images).")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="vae: elbo, iwae, stl, dreg, wake_wake; bits and categories: concrete, reinforce_loo, vimco, rebar, "
            "relax, wake_wake; mixture: iwae, stl, dreg; vrnn: fivo, iwae, elbo; switching: marginal, concrete."
        ),
    ] = None,
    components: Annotated[
        int | None, typer.Option(help="Clusters of mixture, linear systems of switching.")
    ] = None,
    likelihood: Annotated[
        str | None, typer.Option(help="gaussian, bernoulli or categorical; without it, by the data.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples (of a filter: particles) of each row in training.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="Column that tells series apart.")] = None,
    time: Annotated[str | None, typer.Option(help="Column with the time of a step.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column that colours the latent map; it is not encoded.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Column to leave out; several times for several.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Most passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size of Adam.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Share of the data held out to measure on.")] = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
    out: Folder = None,
    overwrite: ReplaceResults = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Fit a model with latents, and write latents, log-likelihoods, reconstructions, the model and a report.

    Rows and images: a variational autoencoder, with clusters (mixture) or not, or DRAW. Series (--series, --time): a
    variational recurrent network, an autoencoder of causal convolutions, linear systems that switch, states that a
    Gaussian process moves, or an autoencoder with a Gaussian process prior along time, which may have gaps. Ctrl-C ends
    the fit early: everything is written about its best state so far, and the exit status is 130.
    """
    from fspace.encoding import EncodeRun, encode_data

    options = {"latents": latents, "latent": latent, "network": network, "objective": objective}
    options |= {"components": components}
    plan = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    run = EncodeRun(
        data=data,
        model=model,
        series=series,
        time=time,
        label=label,
        drop=drop or [],
        test_fraction=test_fraction,
        out=out,
        overwrite=overwrite,
        options=options | {"likelihood": likelihood, "samples": samples, "device": device},
        plan=plan,
    )
    results = encode_data(run, quiet=as_json)
    tell(results, as_json, _print_encoded)


def _print_encoded(results: dict[str, Any]) -> None:
    """Scores of what was fitted and held out, and last the one line that says what to open."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{results['model']}: {results['active_units']} of {results['latents']} latents are active"
    )
    table.title_justify = "left"
    table.add_column("", no_wrap=True)
    rows = {"log-likelihood": "log_likelihood", "columns by themselves": "columns_alone", "RMS error": "rmse"}
    for part in results["scores"]:
        table.add_column(f"{part} ({results['units'][part]:,})", justify="right")
    for words, key in rows.items():
        table.add_row(words, *(f"{scores[key]:.5g}" for scores in results["scores"].values()))
    console = Console()
    console.print(table)
    for note in results["notes"]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    line = f"Saved model, latents, log-likelihoods and reconstructions; open {results['files']['report']}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
