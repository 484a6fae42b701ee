"""The terminal's `fspace serve`, `token`, `worker`, `forget` and `fetch`: one posterior for several machines."""

from __future__ import annotations

from typing import Annotated

import typer

from fspace.cli_common import INTERRUPTED, ReplaceFile

Server = Annotated[str, typer.Option(help="Address of the server: https://...")]
Trusted = Annotated[str | None, typer.Option(help="Certificate to trust (PEM), where it is self-signed.")]
WithoutTls = Annotated[bool, typer.Option("--insecure", help="Send the token without TLS.")]


def serve(
    store: Annotated[str, typer.Option(help="SQLite file that keeps everything; made where there is none.")],
    tokens: Annotated[str, typer.Option(help="File of tokens, which `fspace token` makes.")] = "tokens.json",
    model: Annotated[
        str | None,
        typer.Option(
            help="Saved model, or the folder that `fspace fit` wrote: the basis (of its heaviest kernel) that workers "
            "put sites on."
        ),
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


def worker(
    data: Annotated[str, typer.Option(help="CSV or Parquet file with the columns of the model.")],
    site: Annotated[str, typer.Option(help="Name of this worker's site.")],
    server: Server,
    token_file: Annotated[str, typer.Option(help="File that holds the token.")],
    certificate: Trusted = None,
    rounds: Annotated[int, typer.Option(help="Rounds at most, where the noise is not Gaussian.")] = 30,
    insecure: WithoutTls = False,
) -> None:
    """Put what a table says on a server: its rows stay here, natural parameters go."""
    from fspace.server.serving import Address, work

    try:
        work(Address(server, token_file, certificate, insecure), data, site, rounds, typer.echo)
    except KeyboardInterrupt:
        typer.echo("Interrupted; what was put stays.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def forget(
    site: Annotated[str, typer.Option(help="Name of the site to take back.")],
    server: Server,
    token_file: Annotated[str, typer.Option(help="File that holds a token with the right admin.")],
    certificate: Trusted = None,
    insecure: WithoutTls = False,
) -> None:
    """Take a site off a server: the posterior is then that of the other sites."""
    from fspace.server.serving import Address

    with Address(server, token_file, certificate, insecure).connect() as remote:
        remote.remove(site)
        evidence = remote.log_evidence()
    typer.echo(f"Site {site!r} is gone. Log evidence of the others: {evidence:,.4f} nats")


def fetch(
    server: Server,
    token_file: Annotated[str, typer.Option(help="File that holds a token with the right to read.")],
    out: Annotated[str, typer.Option(help="Model file to write, for `fspace predict`.")],
    certificate: Trusted = None,
    insecure: WithoutTls = False,
    overwrite: ReplaceFile = False,
) -> None:
    """Write the server's posterior as a model."""
    from fspace.server.serving import Address, fetch_model

    typer.echo(fetch_model(Address(server, token_file, certificate, insecure), out, overwrite))
