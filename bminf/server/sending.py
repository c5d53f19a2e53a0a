"""How replies leave: as events or as a whole, kept alive by the clock, and no longer than somebody
listens.

A client gives up, and asks once more, when no byte has come for some time, however slow the model
is: so a stream has comments, and a whole reply begins with blanks, which JSON allows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.responses import Response

from bminf.engine.request import Usage
from bminf.server.choice import Choice, Inbox, Piece
from bminf.server.errors import api_error
from bminf.server.replies import Shape
from bminf.server.worker import Worker

PING_S = 3.0
"""Between bytes, where nothing else has come: some clients wait no longer than five seconds."""

_LINE_ENDS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
"""Text to JSON, but ends of lines to Python's str.splitlines(), by which some clients read."""

_UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Without it nginx, where it speaks HTTP/1.0 to a server, holds bytes back until it has some
kilobytes."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Reply:
    """Answers that go to one client together.   usage: counts each of `num_prompt_tokens` once."""

    def __init__(
        self,
        worker: Worker,
        inbox: Inbox,
        choices: Sequence[Choice],
        num_prompt_tokens: int,
    ) -> None:
        self._worker, self._inbox, self._choices = worker, inbox, choices
        self._num_prompt_tokens = num_prompt_tokens

    @property
    def usage(self) -> Usage:
        drawn = sum(choice.usage.completion_tokens for choice in self._choices)
        return Usage(self._num_prompt_tokens, drawn)

    def submit(self) -> None:
        """Raises ApiError where there is no room to wait."""
        self._worker.submit(self._choices)

    def cancel(self) -> None:
        """What has not ended."""
        self._worker.cancel([one for one in self._choices if not one.request.is_done])

    async def pieces(self, ping_s: float) -> AsyncIterator[list[Piece]]:
        """As they come; none where there were none for so many seconds.   Raises ApiError."""
        num_left = len(self._choices)
        while num_left:
            pieces = await self._inbox.take(ping_s)
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                num_left -= piece.finish_reason is not None
            yield pieces

    async def whole(self, shape: Shape) -> dict[str, Any]:
        """All of it as JSON.   Raises ApiError."""
        found = {choice.index: Piece(choice.index) for choice in self._choices}
        async for pieces in self.pieces(PING_S):
            for piece in pieces:
                found[piece.index] += piece
        return shape.whole(found, self.usage)


class EventStream(Response):  # type: ignore[misc]
    """A reply in events. The headers leave at once."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, shape: Shape, has_usage: bool, ping_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", **_UNBUFFERED})
        del self.headers["content-length"]
        self._reply, self._shape = reply, shape
        self._has_usage, self._ping_s = has_usage, ping_s

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await while_heard(receive, self._send(send))
        finally:
            self._reply.cancel()

    async def _send(self, send: Send) -> None:
        await send(_start(self.status_code, self.raw_headers))
        await _send_part(send, b"".join(map(_event, self._shape.opening())))
        try:
            async for pieces in self._reply.pieces(self._ping_s):
                chunks = [chunk for piece in pieces for chunk in self._shape.chunks(piece)]
                await _send_part(send, b"".join(map(_event, chunks)) or b": ping\n\n")
        except Exception as error:
            await _send_end(send, _event(api_error(error).as_json()))
            return
        usage = _event(self._shape.usage_chunk(self._reply.usage)) if self._has_usage else b""
        await _send_end(send, usage + b"data: [DONE]\n\n")


class WholeReply(Response):  # type: ignore[misc]
    """JSON that takes its time. If that is longer than `ping_s`, blanks come before it: then the
    status is 200, and an error is known by its `error`.   cancel: called at the end."""

    media_type = "application/json"

    def __init__(
        self,
        work: Coroutine[Any, Any, dict[str, Any]],
        ping_s: float,
        cancel: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(headers=_UNBUFFERED)
        del self.headers["content-length"]
        self._work, self._ping_s, self._cancel = work, ping_s, cancel

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await while_heard(receive, self._send(scope, receive, send))
        finally:
            self._cancel()  # here, since work that was cancelled at once has not begun

    async def _send(self, scope: Any, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work)
        try:
            has_begun = False
            while not (await asyncio.wait({work}, timeout=self._ping_s))[0]:
                if not has_begun:
                    await send(_start(self.status_code, self.raw_headers))
                has_begun = True
                await _send_part(send, b" ")
            response = _response_of(work)
            if has_begun:
                await _send_end(send, response.body)
            else:
                await response(scope, receive, send)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _response_of(work: asyncio.Future[dict[str, Any]]) -> Any:
    try:
        return Response(_json(work.result()), media_type="application/json")
    except Exception as error:
        return api_error(error).response()


async def while_heard(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but stop once the client has left.

    The body has been read. A handler is not told of a client that leaves: it has to listen.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS).encode()


def _event(content: Any) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _start(status: int, headers: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


async def _send_end(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": False})
