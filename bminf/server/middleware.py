"""What every request passes before the app: pure ASGI, since anything else hides from a handler
that its client has left."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from bminf.server.errors import ApiError

Scope = Any
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = {"/", "/health", "/favicon.ico"}
"""That need no key: the page asks for it, and containers have none."""


class Key:
    """Refuses requests without `Authorization: Bearer key`."""

    def __init__(self, app: App, key: str) -> None:
        self._app, self._expected = app, b"bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            error = ApiError(
                401, "the API key is missing or wrong; give the one that the server was started "
                "with: Authorization: Bearer KEY", code="invalid_api_key",
            )  # fmt: skip
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, blank, key = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + blank + key.strip(), self._expected)


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, and those that take longer than `timeout_s`."""

    def __init__(self, app: App, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, _Bounded(self, receive), send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is too large; accepted: at most {self._max_bytes} bytes",
            code="body_too_large",
        )  # fmt: skip

    async def read(self, receive: Receive, end_s: float) -> dict[str, Any]:
        """A message, in time."""
        left_s = end_s - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(receive(), max(0.0, left_s))
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._timeout_s:g} s", code="body_too_slow"
            ) from None

    def bounded(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()

    def end_s(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


class _Bounded:
    """The `receive` of one request."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self._limit, self._receive = limit, receive
        self._end_s, self._num_bytes, self._is_read = limit.end_s(), 0, False

    async def __call__(self) -> dict[str, Any]:
        if self._is_read:  # from now on it waits until the client leaves
            return await self._receive()
        message = await self._limit.read(self._receive, self._end_s)
        self._num_bytes += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        self._limit.bounded(self._num_bytes)
        return message


class Counted:
    """Tells `count` the status of each reply."""

    def __init__(self, app: App, count: Callable[[int], object]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        await self._app(scope, receive, counted)
