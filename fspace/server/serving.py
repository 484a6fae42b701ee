"""What `fspace serve`, `worker` and `fetch` do: a store to a server, a table to a site, a posterior to a model."""

from __future__ import annotations

import ipaddress
import math
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, ModelFileError, OptionError, ServerError, SiteRefused
from fspace.estimators import GPClassifier
from fspace.folders import model_file
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.likelihoods import REAL, OffsetLikelihood
from fspace.inference.nongaussian import posterior_of
from fspace.posterior import MixturePosterior
from fspace.saving import load
from fspace.server.client import LOOPBACK, RemoteServer
from fspace.server.core import PosteriorServer, form_of
from fspace.server.http import KEEP_ALIVE, MODEL, create_app
from fspace.server.local_updates import Update, new_site
from fspace.server.tokens import Limits, Tokens
from fspace.server.weights import WeightBasis
from fspace.targets import check_labels, check_support

Say = Callable[[str], Any]
SETTLED = 1e-6  # relative change of a site in a round at which a worker is done
CHUNK = 20_000  # rows read at once


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and how."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: str | None = None
    key: str | None = None
    insecure: bool = False
    rate: float = 50.0

    def check(self) -> None:
        """Raises OptionError for half a certificate, no TLS where other machines reach it, and a rate of none."""
        if not 0 < self.rate < math.inf:
            raise OptionError(
                f"--rate {self.rate:g} must be above 0: how many requests a second one token has."
            )
        if (self.certificate is None) != (self.key is None):
            raise OptionError("--certificate and --key go together; give both.")
        for option, file in (("--certificate", self.certificate), ("--key", self.key)):
            if file is not None and not Path(file).is_file():
                raise OptionError(f"{option} {file}: no such file.")
        if self.certificate is None and not self.insecure and not _is_loopback(self.host):
            raise OptionError(
                f"--host {self.host}: other machines reach it, and tokens would travel unencrypted. Give --certificate "
                "and --key, or --insecure where something in front of it does TLS."
            )


@dataclass(frozen=True)
class Address:
    """Where a server is, and the token for it."""

    url: str
    token_file: str
    certificate: str | None = None
    insecure: bool = False

    def connect(self) -> RemoteServer:
        """The server. Raises OptionError for a token file that cannot be read."""
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--token-file {self.token_file}: cannot be read ({error}).") from error
        verify: bool | str = True if self.certificate is None else self.certificate
        return RemoteServer(self.url, token, verify, insecure=self.insecure)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


def heaviest(model: Any) -> GPPosterior:
    """The member of a fitted estimator's posterior that weighs most."""
    posterior = model.posterior_
    if isinstance(posterior, MixturePosterior):
        posterior = posterior.members[int(posterior.weights.argmax())]
    assert isinstance(posterior, GPPosterior)
    return posterior


def register_model(server: PosteriorServer, file: str) -> str:
    """Register the basis of a saved model (or of the folder that `fspace fit` wrote) and keep the file beside it; the
    basis' id. Raises ModelFileError."""
    saved = model_file(file)
    member = heaviest(load(saved, device="cpu"))
    basis_id = server.register_basis(member.basis, member.scaling)
    server.attach(MODEL, saved.read_bytes())
    return basis_id


def serve_store(store: str, tokens: str, model: str | None, where: Listening, say: Say) -> None:
    """Serve until Ctrl-C. Raises a FspaceError for what can be known to be wrong before."""
    import uvicorn

    where.check()
    if model is not None:
        model_file(model)
    elif not Path(store).exists():  # opening would make an empty one
        raise OptionError(f"{store} has no basis; give --model, a model that `fspace fit` saved.")
    known = Tokens(tokens)
    with PosteriorServer(store) as server:
        if model is not None:
            register_model(server, model)
        if not server.forms():
            raise OptionError(f"{store} has no basis; give --model, a model that `fspace fit` saved.")
        app = create_app(server, known, Limits(rate=where.rate))
        try:
            family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
            listener = socket.create_server((where.host, where.port), family=family, backlog=1024)
            # inherited by connections: without it, the body of an answer waits 40 ms for word of its headers
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"Cannot listen on {where.host}, port {where.port} ({error}); take another --port or --host."
            ) from error
        try:
            config = uvicorn.Config(
                app,
                log_level="warning",
                ssl_certfile=where.certificate,
                ssl_keyfile=where.key,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=KEEP_ALIVE,
            )
            config.load()
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            listener.close()
            raise OptionError(f"--certificate and --key cannot be used ({error}).") from error
        name = f"[{where.host}]" if ":" in where.host else where.host
        kind = "http" if where.certificate is None else "https"
        say(f"Serving {store} at {kind}://{name}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        if not known.grants():
            say(f"There is no token yet: fspace token --tokens {tokens} --site NAME")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # which uvicorn passes on when it has ended
            pass
        finally:
            listener.close()
    say("Ended; everything that was acknowledged is in the store.")


def model_of(server: RemoteServer) -> Any:
    """The estimator that is attached to a server. Raises ServerError where there is none."""
    content = server.attachment(MODEL)
    if content is None:
        raise ServerError("The server has no model attached; start it with `fspace serve --model`.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.fspace"
        file.write_bytes(content)
        return load(file, device="cpu")


def table_rows(
    model: Any, basis: Basis, scaling: Scaling, data: str
) -> tuple[Float[Tensor, "n *row"], Float[Tensor, "n t"]]:
    """The rows of a file in units of the basis. Raises DataError for columns or values that the model cannot take."""
    import pandas as pd

    from fspace.data import check_target
    from fspace.streams import read_parts

    encoder, names = model.encoder_, list(model.target_names_)
    text = [
        name
        for name, levels in zip(encoder.feature_names, encoder.levels, strict=False)
        if levels and all(isinstance(level, str) for level in levels)
    ]
    frame = pd.concat(list(read_parts(data, CHUNK, text)), ignore_index=True)
    absent = [name for name in names if name not in frame.columns]
    if absent:
        raise DataError(
            f"{data} has no column {absent[0]!r}, which the model predicts; it has "
            f"{', '.join(map(str, frame.columns))}."
        )
    target, inputs = frame[names], frame.drop(columns=names)
    if hasattr(encoder, "feature_names_in_"):
        inputs = inputs[[name for name in encoder.feature_names if name in inputs.columns]]
    x = scaling.inputs(torch.tensor(np.asarray(encoder.transform(inputs)), dtype=torch.float64))
    likelihood = basis.likelihood
    if isinstance(model, GPClassifier):
        labels = check_labels(target.iloc[:, 0], len(frame), model.classes_)[1]
        return x, torch.from_numpy(labels.astype(np.float64)[:, None])
    values = np.asarray(check_target(target), dtype=np.float64).reshape(len(frame), -1)
    y = scaling.modelled(torch.from_numpy(values))
    if isinstance(likelihood, OffsetLikelihood):
        if not isinstance(likelihood.inner, REAL):
            check_support(values, likelihood.inner, values.shape[1] == 1)
        y = y + likelihood.offset.detach()
    return x, y


def work(address: Address, data: str, site_id: str, rounds: int, say: Say) -> Site:
    """Make the site of a table and put it: once for Gaussian noise, else in rounds against what the others say, until
    it settles. On the basis of the open epoch, if there is one; where an epoch opens or ends meanwhile, anew."""
    if rounds < 1:
        raise OptionError(f"--rounds {rounds} must be at least 1.")
    with address.connect() as server:
        made = None
        while made is None:
            made = _work_on(server, *server.basis(), data, site_id, rounds, say)
        say(f"Log evidence of all sites: {server.log_evidence():,.4f} nats")
        return made


def _work_on(
    server: RemoteServer,
    basis: Basis | WeightBasis,
    scaling: Scaling | None,
    data: str,
    site_id: str,
    rounds: int,
    say: Say,
) -> Site | None:
    """The site on one basis, put; None where another basis is to have sites by now."""
    if not isinstance(basis, Basis) or scaling is None:
        raise ServerError("The server's basis is of weights; a table has a site on a basis of functions.")
    x, y = table_rows(model_of(server), basis, scaling, data)
    try:
        before = server.get(site_id, basis.id)
        start = before if before is not None else form_of(basis).empty(basis.id, site_id)
        own = replace(start, incarnation=server.join(site_id), version=-1)
        gaussian = isinstance(basis.likelihood, GaussianLikelihood)
        moved = math.inf
        for _ in range(1 if gaussian else rounds):
            cavity = own if gaussian else server.cavity(site_id, basis.id)
            made = scaling.with_jacobian(new_site(basis, x, y, own, cavity, Update()))
            receipt = server.put(made)
            if receipt.step < 1:  # it is kept with a smaller step than was sent
                kept = server.get(site_id, basis.id)
                assert kept is not None
                made = kept
            moved = (made.shift - own.shift).norm().item() / max(made.shift.norm().item(), 1e-300)
            own = made
            say(
                f"Site {site_id!r} version {receipt.version}: {receipt.status}, {own.count:,} rows, step "
                f"{receipt.step:g}" + ("" if gaussian else f", moved by {moved:.1e}")
            )
            if moved < SETTLED or server.basis()[0].id != basis.id:
                break
    except SiteRefused as error:
        if error.reason != "basis" or server.basis()[0].id == basis.id:
            raise
    if server.basis()[0].id != basis.id:
        say("The server has a new basis: making the site anew on that.")
        return None
    if not gaussian and moved >= SETTLED:
        say(f"Not settled after {rounds} rounds; other workers may be moving. Run it again to go on.")
    return own


def fetch_model(address: Address, out: str, overwrite: bool = False) -> str:
    """Write the attached model with the server's posterior; what to tell. Raises OptionError, ModelFileError."""
    if Path(out).exists() and not overwrite:
        raise OptionError(f"{out!r} exists; give another name, or --overwrite to replace it.")
    with address.connect() as server:
        model, total = model_of(server), server.total()
        if total.count == 0:
            raise ServerError("No site has been put yet: the posterior would be the prior.")
        basis, scaling = server.basis(total.basis_id)
        if not isinstance(basis, Basis) or scaling is None:
            raise ModelFileError("The server's basis is of weights; a model file has a basis of functions.")
        member = heaviest(model)
        site = replace(total, site_id="server")
        model.log_evidence_ = server.log_evidence(total.basis_id)
    model.posterior_ = posterior_of(basis, site, scaling, member.vector)
    name = max(model.choice_["weights"], key=model.choice_["weights"].get)
    model.choice_ = {**model.choice_, "weights": {name: 1.0}}
    model.save(out)
    return f"The posterior of {site.count:,} rows is in {out}; use it: fspace predict {out} DATA --out FILE"
