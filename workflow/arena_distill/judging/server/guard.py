"""Stand before the application: who may ask, how much, how long; headers and figures of every answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arena_distill.errors import foreign
from arena_distill.judging.server.metrics import Metrics

log = logging.getLogger("uvicorn.error")

TOKEN = "ARENA_SERVER_TOKEN"
"""The variable with the bearer token that requests need, and that clients send."""

RETRY = {"retry-after": "1"}

GONE = "arena_distill.gone"
"""The key of a POST request's scope with a future that is done once its client has gone away."""

NOBODY = 499
"""The status of what nobody is there to read: nginx's number for it."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

OPEN = ("/health", "/page/")
"""Paths that need no token, and `/`: nothing there is of the judge but its name."""


@dataclass(frozen=True)
class Limits:
    """What a server bears.

    requests: at work at a time, and battles or sequences of one request.
    body_bytes, body_seconds: of a request's body.
    seconds: from the whole request to its answer.
    """

    requests: int = 128
    items: int = 256
    body_bytes: int = 4 << 20
    body_seconds: float = 10.0
    seconds: float = 120.0


class _Refused(NamedTuple):
    status: int
    why: str
    headers: dict[str, str] = {}


def refusal(status: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says in one line why there is no other."""
    return JSONResponse({"error": {"message": why, "code": status}}, status, headers)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        token: that requests need; None: none.
        paths: of the application; all others are one in the figures.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        token: str | None,
        metrics: Metrics,
        paths: frozenset[str],
    ) -> None:
        self._app, self._limits, self._metrics, self._paths = app, limits, metrics, paths
        self._token = token.encode() if token else None
        self._at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0  # no answer yet

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        self._at_work += 1
        try:
            await self._serve(scope, receive, sending)
        except ClientDisconnect:
            status = NOBODY
        except Exception as error:
            if status:
                raise
            log.exception("a request failed")
            why = foreign(error) or "a fault of the server; its log says more"
            await refusal(500, why)(scope, receive, sending)
        finally:
            self._at_work -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status, time.monotonic() - began)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope)
        if not refused and scope["method"] == "POST":
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    body = await self._body(receive)
            except TimeoutError:
                why = f"the body has not arrived in {self._limits.body_seconds:g} seconds"
                refused = _Refused(408, why, {"connection": "close"})
            else:
                if body is None:
                    refused = self._too_large()
                else:
                    async with _watching(receive) as scope[GONE]:
                        await self._app(scope, _replay(body, receive), send)
                    return
        if refused:
            await refusal(*refused)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> _Refused | None:
        """Why a request is refused before its body is read."""
        headers = Headers(scope=scope)
        if self._token and scope["path"] != "/" and not scope["path"].startswith(OPEN):
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
            if kind.lower() != "bearer" or not right:
                why = "a bearer token is needed: the header Authorization: Bearer TOKEN"
                return _Refused(401, why, {"www-authenticate": "Bearer"})
        if scope["method"] != "POST":
            return None
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A form of another site's page cannot send this type.
            return _Refused(415, "a body of the type application/json is needed")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            return self._too_large()
        if self._at_work > self._limits.requests:
            return _Refused(503, f"{self._limits.requests} requests are at work", RETRY)
        return None

    def _too_large(self) -> _Refused:
        return _Refused(413, f"the body has more than {self._limits.body_bytes:,} bytes")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if it is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limits.body_bytes:
                return None
        return bytes(body)


@asynccontextmanager
async def _watching(receive: Receive) -> AsyncIterator[Future[None]]:
    """A future that is done once the client of a request, whose body was read, has gone away."""
    gone = Future[None]()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set_result(None)

    watching = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        watching.cancel()


def _replay(body: bytes, receive: Receive) -> Receive:
    """The channel of a request whose body was read."""
    unread = [body]

    async def again() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return again
