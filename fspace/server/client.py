"""A posterior server somewhere else, with the methods and the errors of the one in the process."""

from __future__ import annotations

import json
import random
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import torch

from fspace.errors import AccessRefused, OptionError, ServerError, SiteRefused
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import Scaling
from fspace.inference.nongaussian import posterior_of
from fspace.server.core import Receipt, form_of, unit_scaling
from fspace.server.weights import WeightBasis
from fspace.server.wire import (
    basis_bytes,
    basis_from_bytes,
    basis_id_of,
    check_site,
    site_bytes,
    site_from_bytes,
)

try:
    import httpx
except ImportError as error:
    raise OptionError("A remote server needs httpx: pip install 'fspace[serve]'.") from error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OF_ACCESS = ("token", "expired", "revoked", "right", "site", "rate")
LONGEST = 10.0  # seconds between two tries, at most


class RemoteServer:
    """A `PosteriorServer` behind HTTP. A request is tried again, after longer and longer waits, where the server cannot
    be reached or is busy: to send a site twice changes nothing.

    verify: True, or a file of certificates to trust instead; tries, timeout: how often, and how many seconds each.
    modules: as in `fspace.load`. Raises OptionError for a token that would travel unencrypted to another machine
    (unless insecure), ServerError where the server cannot be reached, AccessRefused for what the token does not allow.
    """

    def __init__(
        self,
        url: str,
        token: str,
        verify: bool | str | Path = True,
        timeout: float = 30.0,
        tries: int = 6,
        insecure: bool = False,
        modules: Mapping[str, torch.nn.Module] | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"url={url!r} must begin with https:// (or http://) and name a machine.")
        local = parts.hostname in LOOPBACK
        if parts.scheme == "http" and not local and not insecure:
            raise OptionError(
                f"url={url!r}: the token would travel unencrypted; use https, or say insecure=True."
            )
        if not token.isascii() or not token.isprintable():
            raise OptionError("The token holds characters that no token has; copy it again.")
        if tries < 1:
            raise OptionError(f"tries={tries!r} must be at least 1.")
        self.url, self._tries, self._modules = url.rstrip("/"), tries, modules
        try:
            trust: Any = (
                verify if isinstance(verify, bool) else ssl.create_default_context(cafile=str(verify))
            )
        except OSError as error:
            raise OptionError(f"verify={str(verify)!r} is no file of certificates ({error}).") from error
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"}, verify=trust, timeout=timeout, trust_env=not local
        )
        self._bases: dict[str, tuple[Basis | WeightBasis, Scaling | None]] = {}

    # -- bases -------------------------------------------------------------------------------------------------

    def register_basis(self, basis: Basis | WeightBasis, scaling: Scaling | None = None) -> str:
        """As `PosteriorServer.register_basis`; the token needs the right admin."""
        if isinstance(basis, WeightBasis):
            content = basis.to_bytes()
        else:
            content = basis_bytes(basis, scaling if scaling is not None else unit_scaling(basis))
        return self._ask("POST", "/basis", content).json()["basis_id"]

    def basis(self, basis_id: str | None = None) -> tuple[Basis | WeightBasis, Scaling | None]:
        """A basis and its scaling, as `PosteriorServer.basis`; fetched once."""
        if basis_id is not None and basis_id in self._bases:
            return self._bases[basis_id]
        headers = {}
        if basis_id is None and self._bases:
            headers["If-None-Match"] = f'"{list(self._bases)[-1]}"'
        answer = self._ask(
            "GET", "/basis" if basis_id is None else f"/basis/{_part(basis_id)}", None, headers
        )
        if answer.status_code == 304:
            return self._bases[list(self._bases)[-1]]
        content = answer.content
        if WeightBasis.is_in(content):
            found: tuple[Basis | WeightBasis, Scaling | None] = WeightBasis.from_bytes(content), None
        else:
            found = basis_from_bytes(content, self._modules)
        self._bases.pop(found[0].id, None)
        self._bases[found[0].id] = found
        return found

    # -- sites -------------------------------------------------------------------------------------------------

    def join(self, site_id: str) -> str:
        """As `PosteriorServer.join`."""
        return self._ask("POST", f"/sites/{_part(site_id)}/join").json()["incarnation"]

    def put(self, site: Site) -> Receipt:
        """As `PosteriorServer.put`; when this returns, the site is durable there."""
        basis, _ = self.basis(site.basis_id)
        content = site_bytes(check_site(site, form_of(basis)))
        return Receipt(**self._ask("PUT", f"/sites/{_part(site.site_id)}", content).json())

    def get(self, site_id: str, basis_id: str | None = None) -> Site | None:
        """As `PosteriorServer.get`."""
        try:
            return self._site(f"/sites/{_part(site_id)}{_query(basis_id)}")
        except SiteRefused as error:
            if error.reason == "absent":
                return None
            raise

    def remove(self, site_id: str) -> None:
        """As `PosteriorServer.remove`; the token needs the right admin."""
        self._ask("DELETE", f"/sites/{_part(site_id)}")

    # -- what the sites say together ---------------------------------------------------------------------------

    def total(self, basis_id: str | None = None) -> Site:
        """As `PosteriorServer.total`."""
        return self._site(f"/total{_query(basis_id)}")

    def cavity(self, site_id: str, basis_id: str | None = None) -> Site:
        """As `PosteriorServer.cavity`."""
        return self._site(f"/cavity/{_part(site_id)}{_query(basis_id)}")

    def posterior(self, basis_id: str | None = None) -> Any:
        """As `PosteriorServer.posterior`, made here from basis and total."""
        total = self.total(basis_id)
        basis, scaling = self.basis(total.basis_id)
        if isinstance(basis, WeightBasis):
            return basis.posterior(total)
        assert scaling is not None
        return posterior_of(basis, total, scaling)

    def log_evidence(self, basis_id: str | None = None) -> float:
        """As `PosteriorServer.log_evidence`."""
        return float(self._ask("GET", f"/log_evidence{_query(basis_id)}").json()["log_evidence"])

    def status(self, contributions: bool = False) -> dict[str, Any]:
        """As `PosteriorServer.status`."""
        return self._ask("GET", f"/status?contributions={int(contributions)}").json()

    def attachment(self, name: str) -> bytes | None:
        """The model file that is attached there ("model"), or None."""
        if name != "model":
            return None
        try:
            return self._ask("GET", "/model").content
        except SiteRefused as error:
            if error.reason == "absent":
                return None
            raise

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _site(self, path: str) -> Site:
        content = self._ask("GET", path).content
        basis, _ = self.basis(basis_id_of(content))
        return site_from_bytes(content, form_of(basis))

    def _ask(
        self, method: str, path: str, content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Any:
        """The answer, after as many tries as it takes and is allowed."""
        trouble, wait = "", 0.2
        for left in reversed(range(self._tries)):
            asked_to_wait = 0.0
            try:
                answer = self._http.request(method, self.url + path, content=content, headers=headers)
            except httpx.TransportError as error:
                if isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE_VERIFY" in str(error):
                    raise ServerError(
                        f"{self.url} shows a certificate that is not trusted ({error}); pass verify=FILE with the one "
                        "it should show."
                    ) from error
                trouble = f"cannot be reached ({error or type(error).__name__})"
            else:
                if answer.status_code < 400:
                    return answer
                reason, message = _said(answer)
                if answer.status_code != 429 and answer.status_code < 500 or reason == "numerical":
                    raise _error(answer.status_code, reason, message, self.url)
                trouble = f"cannot answer ({message})"
                asked_to_wait = _seconds(answer.headers.get("retry-after"))
            if left:
                time.sleep(min(LONGEST, max(asked_to_wait, wait * (0.5 + random.random()))))
                wait *= 2
        raise ServerError(
            f"The server at {self.url} {trouble}, {self._tries} tries long. See that it runs and that the address is "
            "right; then send again: what has arrived is not counted twice."
        )


def _said(answer: httpx.Response) -> tuple[str, str]:
    """Reason and message of a refusal, also of one that a machine in between has made."""
    try:
        about = json.loads(answer.content)
        return str(about["reason"]), str(about["message"])
    except (ValueError, TypeError, LookupError):
        return "", f"status {answer.status_code}"


def _error(status: int, reason: str, message: str, url: str) -> Exception:
    if reason == "option":
        return OptionError(message)
    if status in (401, 403) or reason in OF_ACCESS:
        return AccessRefused(reason or "token", message, status)
    if reason and reason != "numerical":
        return SiteRefused(reason, message)
    return ServerError(f"The server at {url} refused: {message}")


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0.0)
    except ValueError:
        return 0.0


def _part(name: str) -> str:
    return quote(name, safe="")


def _query(basis_id: str | None) -> str:
    return "" if basis_id is None else f"?basis_id={_part(basis_id)}"
