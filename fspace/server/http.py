"""The posterior server for workers that are not in the cluster: HTTP, safetensors, bearer tokens.

Bodies are bytes of `fspace.server.wire`; a refusal is JSON {reason, message}.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from fspace.errors import AccessRefused, FspaceError, ModelFileError, OptionError, ServerError, SiteRefused
from fspace.server.core import PosteriorServer
from fspace.server.page import page
from fspace.server.tokens import Buckets, Grant, Limits, Tokens
from fspace.server.weights import WeightBasis
from fspace.server.wire import (
    basis_bytes,
    basis_from_bytes,
    basis_id_of,
    most_bytes,
    site_bytes,
    site_from_bytes,
)

try:
    from fastapi import FastAPI, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise OptionError("The network front needs FastAPI and uvicorn: pip install 'fspace[serve]'.") from error

BYTES = "application/octet-stream"
KEEP_ALIVE = (
    60  # seconds a silent connection stays open: longer than clients keep theirs (httpx: 5), or one is closed
)
# under a request that is just being sent
MODEL = "model"  # the attachment that holds the model file
STATUS = {
    "format": 400,
    "size": 413,
    "length": 400,
    "absent": 404,
    "removed": 410,
    "timeout": 408,
} | dict.fromkeys(("stale", "conflict", "incarnation", "basis"), 409)


def create_app(server: PosteriorServer, tokens: Tokens, limits: Limits | None = None) -> FastAPI:
    """The application that answers for a server; what blocks runs in threads.

    PUT, GET, DELETE /sites/{site_id}, POST /sites/{site_id}/join, GET /cavity/{site_id}, /total, /basis,
    /basis/{basis_id}, /log_evidence, /status, /model, /, and POST /basis (of at most `limits.basis_bytes`). A body is
    read up to the largest size that what it claims to be can have, never beyond.
    """
    front = _Front(server, tokens, limits or Limits())
    app = FastAPI(title="fspace posterior server", docs_url=None, redoc_url=None, openapi_url=None)
    for method, path, call in (
        ("GET", "/", front.page),
        ("PUT", "/sites/{site_id:path}", front.put),
        ("GET", "/sites/{site_id:path}", front.get),
        ("DELETE", "/sites/{site_id:path}", front.remove),
        ("POST", "/sites/{site_id:path}/join", front.join),
        ("GET", "/cavity/{site_id:path}", front.cavity),
        ("GET", "/total", front.total),
        ("GET", "/basis", front.basis),
        ("GET", "/basis/{basis_id}", front.basis),
        ("POST", "/basis", front.register_basis),
        ("GET", "/log_evidence", front.log_evidence),
        ("GET", "/status", front.status),
        ("GET", "/model", front.model),
    ):
        app.router.add_route(path, front.guarded(call), methods=[method])

    async def astray(request: Any, error: Any) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; see `create_app` for what there is."
        return _refusal("address", message, error.status_code)

    app.add_exception_handler(HTTPException, astray)
    return app


class _Front:
    """The endpoints."""

    def __init__(self, server: PosteriorServer, tokens: Tokens, limits: Limits):
        self._server, self._tokens, self._limits = server, tokens, limits
        self._buckets = Buckets(limits.rate, limits.burst)
        self._active = 0
        self._arriving: Counter[str] = Counter()  # bodies of each token that are on their way
        self._basis_content: dict[str, bytes] = {}

    def guarded(self, call: Callable[[Request], Awaitable[Response]]) -> Callable[[Any], Awaitable[Response]]:
        """The endpoint, not more than so many at once, its refusals as JSON."""

        async def answer(request: Any) -> Response:
            if self._active >= self._limits.concurrent:
                return _refusal("busy", "Too many requests at once; try again.", 503, 0.5)
            self._active += 1
            try:
                return await call(request)
            except AccessRefused as error:
                return _refusal(error.reason, str(error), error.status, error.retry_after)
            except SiteRefused as error:
                return _refusal(error.reason, str(error), STATUS.get(error.reason, 422))
            except ModelFileError as error:
                return _refusal("format", str(error), 400)
            except OptionError as error:
                return _refusal("option", str(error), 400)
            except ServerError as error:
                return _refusal("server", str(error), 503, 1.0)
            except FspaceError as error:
                return _refusal("numerical", str(error), 500)
            except ClientDisconnect:  # nobody is there to read it
                return _refusal("length", "The body was cut off.", 400)
            finally:
                self._active -= 1

        return answer

    def _allow(self, request: Request, right: str, site_id: str | None = None) -> Grant:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        grant = self._tokens.check(token.strip() if kind.lower() == "bearer" else None)
        self._buckets.take(grant.id)
        grant.require(right, site_id)
        return grant

    async def _body(self, request: Request, grant: Grant, most: int, what: str) -> bytes:
        """The body, of at most so many bytes: what says that it is longer is not read, what is longer is cut off. Slow
        bodies of one token leave half of the places to others."""
        if self._arriving[grant.id] >= max(1, self._limits.concurrent // 2):
            raise AccessRefused(
                "busy",
                "Too many bodies of this token are on their way; send them one after another.",
                status=429,
                retry_after=1.0,
            )
        self._arriving[grant.id] += 1
        try:
            return await self._arrived(request, most, what)
        finally:
            self._arriving[grant.id] -= 1

    async def _arrived(self, request: Request, most: int, what: str) -> bytes:
        too_large = SiteRefused("size", f"The body is larger than {what} can be ({most:,} bytes).")
        told = request.headers.get("content-length")
        if told is not None and (not told.isdecimal() or int(told) > most):
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    if len(content) + len(chunk) > most:
                        raise too_large
                    content += chunk
        except TimeoutError as error:
            raise SiteRefused(
                "timeout", f"The body did not arrive within {self._limits.body_seconds:g} seconds."
            ) from error
        if told is not None and len(content) != int(told):
            raise SiteRefused("length", f"Content-Length is {told}, but {len(content)} bytes came.")
        return bytes(content)

    async def put(self, request: Request) -> Response:
        site_id = request.path_params["site_id"]
        grant = self._allow(request, "put", site_id)
        forms = await run_in_threadpool(self._server.forms)
        most = max((most_bytes(form) for form in forms.values()), default=0)
        if not most:
            raise ServerError("The server has no basis yet; register one.")
        content = await self._body(request, grant, most, "a site of this basis")

        def put() -> Any:
            name = basis_id_of(content)
            forms = self._server.forms()
            if name not in forms:
                raise SiteRefused("basis", f"Basis {name[:8]!r} is not served here; fetch the basis anew.")
            try:
                site = site_from_bytes(content, forms[name])
            except FspaceError:
                raise
            except Exception as error:  # safetensors raises kinds of its own
                raise SiteRefused("format", f"The bytes are no site of fspace: {error}.") from error
            if site.site_id != site_id:
                raise SiteRefused(
                    "name", f"The body is of site {site.site_id!r}, the address of {site_id!r}."
                )
            return self._server.put(site)

        return _json((await run_in_threadpool(put))._asdict())

    async def get(self, request: Request) -> Response:
        site_id, basis_id = request.path_params["site_id"], request.query_params.get("basis_id")
        self._allow(request, "read")
        site = await run_in_threadpool(self._server.get, site_id, basis_id)
        if site is None:
            raise SiteRefused("absent", f"There is no site {site_id!r}.")
        return _bytes(site_bytes(site))

    async def remove(self, request: Request) -> Response:
        self._allow(request, "admin")
        await run_in_threadpool(self._server.remove, request.path_params["site_id"])
        return _json({"removed": request.path_params["site_id"]})

    async def join(self, request: Request) -> Response:
        site_id = request.path_params["site_id"]
        self._allow(request, "put", site_id)
        return _json({"incarnation": await run_in_threadpool(self._server.join, site_id)})

    async def cavity(self, request: Request) -> Response:
        self._allow(request, "read")
        basis_id = request.query_params.get("basis_id")
        site = await run_in_threadpool(self._server.cavity, request.path_params["site_id"], basis_id)
        return _bytes(site_bytes(site))

    async def total(self, request: Request) -> Response:
        self._allow(request, "read")
        site = await run_in_threadpool(self._server.total, request.query_params.get("basis_id"))
        return _bytes(site_bytes(site))

    async def basis(self, request: Request) -> Response:
        self._allow(request, "read")
        asked = request.path_params.get("basis_id")

        def find() -> tuple[str, bytes]:
            basis, scaling = self._server.basis(asked)
            if basis.id not in self._basis_content:
                if isinstance(basis, WeightBasis):
                    content = basis.to_bytes()
                else:
                    assert scaling is not None
                    content = basis_bytes(basis, scaling)
                kept = self._server.forms()
                self._basis_content = {k: v for k, v in self._basis_content.items() if k in kept}
                self._basis_content[basis.id] = content
                return basis.id, content
            return basis.id, self._basis_content[basis.id]

        name, content = await run_in_threadpool(find)
        tag = {"ETag": f'"{name}"'}
        if request.headers.get("if-none-match") == tag["ETag"]:
            return Response(status_code=304, headers=tag)
        return _bytes(content, tag)

    async def register_basis(self, request: Request) -> Response:
        grant = self._allow(request, "admin")
        content = await self._body(request, grant, self._limits.basis_bytes, "a basis here")

        def register() -> str:
            if WeightBasis.is_in(content):
                return self._server.register_basis(WeightBasis.from_bytes(content))
            return self._server.register_basis(*basis_from_bytes(content))

        return _json({"basis_id": await run_in_threadpool(register)})

    async def log_evidence(self, request: Request) -> Response:
        self._allow(request, "read")
        basis_id = request.query_params.get("basis_id")
        return _json({"log_evidence": await run_in_threadpool(self._server.log_evidence, basis_id)})

    async def status(self, request: Request) -> Response:
        self._allow(request, "read")
        contributions = request.query_params.get("contributions", "") in ("1", "true")
        return _json(await run_in_threadpool(self._server.status, contributions))

    async def model(self, request: Request) -> Response:
        self._allow(request, "read")
        content = await run_in_threadpool(self._server.attachment, MODEL)
        if content is None:
            raise SiteRefused("absent", "No model is attached here; start the server with --model.")
        return _bytes(content)

    async def page(self, request: Request) -> Response:
        html, policy = page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", **_SAFE}
        return Response(html, media_type="text/html", headers=headers)


_SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def _bytes(content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, media_type=BYTES, headers={**_SAFE, **(headers or {})})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(_finite(content), allow_nan=False)
    return Response(text, status, media_type="application/json", headers={**_SAFE, **(headers or {})})


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refusal(reason: str, message: str, status: int, retry_after: float | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json({"reason": reason, "message": message, "at": time.time()}, status, headers)
