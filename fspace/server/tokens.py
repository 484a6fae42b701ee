"""Who may do what: bearer tokens of which only the hash is kept, and how much each may ask for."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fspace.errors import AccessRefused, OptionError, ServerError
from fspace.server.names import name_trouble

RIGHTS = ("put", "read", "admin")


@dataclass(frozen=True)
class Limits:
    """What the network front takes: requests a second and at once of one token, requests in hand of all, bytes of a
    basis, seconds that a body may take to arrive. Of the requests in hand, one token may have half."""

    rate: float = 50.0
    burst: int = 100
    concurrent: int = 64
    basis_bytes: int = 256 * 2**20
    body_seconds: float = 60.0


@dataclass(frozen=True)
class Grant:
    """What one token allows: `put` and joining for its own site alone, `read`, `admin`. expires: seconds since 1970."""

    id: str
    hash: str
    site: str | None
    rights: tuple[str, ...]
    expires: float
    revoked: bool = False

    def require(self, right: str, site_id: str | None = None) -> None:
        """Raises AccessRefused (403) where the right is missing, or the site is another's."""
        if right not in self.rights:
            raise AccessRefused(
                "right", f"Token {self.id} has no right {right!r}; ask for one that has.", status=403
            )
        if right == "put" and site_id != self.site:
            raise AccessRefused(
                "site", f"Token {self.id} is for site {self.site!r}, not {site_id!r}.", status=403
            )


class Tokens:
    """The tokens of a server. path: a JSON file of hashes, readable by its owner alone (None: memory only).

    A file that another process changes is read again, so that tokens are made and revoked while a server runs.
    Raises ServerError for a file that is damaged.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._grants: dict[str, Grant] = {}
        self._seen: tuple[int, ...] | None = None
        self._refresh()

    def issue(self, rights: Iterable[str], site: str | None = None, days: float | int = 30) -> str:
        """A new token, which is shown only here. Raises OptionError for unknown rights, `put` without a site, a
        site of no allowed name, and a life that is not positive."""
        wanted = tuple(dict.fromkeys(rights))
        if not wanted or not set(wanted) <= set(RIGHTS):
            raise OptionError(f"rights={', '.join(wanted)!r}: choose among {', '.join(RIGHTS)}.")
        if "put" in wanted and not site:
            raise OptionError("The right 'put' is for one site; name the site of this token.")
        trouble = None if site is None else name_trouble("site", site)
        if trouble is not None:
            raise OptionError(trouble)
        if not (math.isfinite(days) and days > 0):
            raise OptionError(f"days={days!r} must be a positive number.")
        name, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        token = f"fspace-{name}-{secret}"
        grant = Grant(name, _hash(token), site, wanted, time.time() + 86400.0 * days)
        with self._changing():
            self._grants[name] = grant
        return token

    def revoke(self, token: str) -> None:
        """Refuse a token, or the token of this id, from now on. Raises OptionError where there is none."""
        name = token.split("-")[1] if token.startswith("fspace-") and token.count("-") >= 2 else token
        with self._changing():
            if name not in self._grants:
                raise OptionError(
                    f"There is no token {name!r}; there are {', '.join(self._grants) or 'none'}."
                )
            self._grants[name] = Grant(**{**asdict(self._grants[name]), "revoked": True})

    def grants(self) -> list[Grant]:
        """All grants, revoked ones too."""
        with self._lock:
            self._refresh()
            return list(self._grants.values())

    def check(self, token: str | None) -> Grant:
        """What a token allows. Raises AccessRefused (401) for one that is missing, unknown, revoked or expired."""
        if not token:
            raise AccessRefused("token", "A bearer token is needed; ask the server's owner for one.")
        hashed, found = _hash(token), None
        for grant in self.grants():  # all of them, each in constant time: how long it takes tells nothing
            if hmac.compare_digest(grant.hash, hashed):
                found = grant
        if found is None:
            raise AccessRefused("token", "The token is not known here; ask the server's owner for one.")
        if found.revoked:
            raise AccessRefused("revoked", f"Token {found.id} was revoked; ask for another.")
        if found.expires <= time.time():
            raise AccessRefused("expired", f"Token {found.id} has expired; ask for another.")
        return found

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Read, let change, write; one process at a time."""
        with self._lock, self._alone():
            self._refresh()
            yield
            self._write()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        try:
            import fcntl
        except ImportError:  # Windows: writes are whole there too, but two at once may lose one
            yield
            return
        try:
            held = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServerError(f"{self.path} cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)

    def _refresh(self) -> None:
        if self.path is None:
            return
        try:
            about = self.path.stat()
        except FileNotFoundError:
            if self._seen is not None:
                self._grants, self._seen = {}, None
            return
        stamp = about.st_mtime_ns, about.st_ino, about.st_size
        if stamp == self._seen:
            return
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["tokens"]
            grants = [_grant(row) for row in rows]
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ServerError(
                f"{self.path} is no file of tokens, or damaged ({error}); restore it, or make new tokens in another."
            ) from error
        self._grants, self._seen = {grant.id: grant for grant in grants}, stamp

    def _write(self) -> None:
        if self.path is None:
            return
        content = json.dumps({"tokens": [asdict(grant) for grant in self._grants.values()]}, indent=1)
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise ServerError(f"{self.path} cannot be written ({error.strerror}).") from error


class Buckets:
    """One bucket of requests for every token: `burst` deep, filled at `rate` a second."""

    def __init__(self, rate: float, burst: int):
        if not rate > 0 or burst < 1:
            raise OptionError(f"rate={rate!r} must be positive and burst={burst!r} at least 1.")
        self.rate, self.burst = rate, burst
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> None:
        """One request. Raises AccessRefused (429), with the seconds to wait, where the bucket is empty."""
        now = time.monotonic()
        level, at = self._levels.get(name, (float(self.burst), now))
        level = min(float(self.burst), level + self.rate * (now - at))
        if level < 1:
            self._levels[name] = (level, now)
            raise AccessRefused(
                "rate",
                "Too many requests with this token; wait.",
                status=429,
                retry_after=(1 - level) / self.rate,
            )
        self._levels[name] = (level - 1, now)


def _grant(row: Mapping[str, Any]) -> Grant:
    """A row of the file. Raises ValueError, TypeError or LookupError for what is none."""
    grant = Grant(**{**row, "rights": tuple(row["rights"])})
    kinds = {"id": str, "hash": str, "site": str | None, "expires": int | float, "revoked": bool}
    for name, kind in kinds.items():
        if not isinstance(getattr(grant, name), kind):
            raise TypeError(f"{name} of token {grant.id!r} is {getattr(grant, name)!r}")
    if not grant.hash.isascii():
        raise ValueError(f"hash of token {grant.id!r} is none")
    return grant


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
