"""One answer under way, between the thread of the engine and the event loop of the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bminf.engine.request import Request, TokenLogprob, Usage
from bminf.server.errors import ApiError, api_error
from bminf.server.texts import Pieces
from bminf.tokenizers.stop_strings import StopStrings

Offset = int
"""Where the text of a token begins, in characters of the whole text."""


@dataclass(frozen=True)
class Token:
    """scores: None of the first token of a prompt, which nothing stands before."""

    token: int
    scores: TokenLogprob | None
    offset: Offset


@dataclass(frozen=True)
class Piece:
    """What has come of a choice.   finish_reason: of the last piece.   error: in place of one."""

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: ApiError | None = None

    def __add__(self, later: Piece) -> Piece:
        return Piece(
            self.index, self.text + later.text, self.tokens + later.tokens,
            later.finish_reason, later.error,
        )  # fmt: skip


class Inbox:
    """Pieces of all choices of a reply: put by the engine's thread, which never waits, and taken by
    the event loop, which takes all at once. A slow reader gets few large pieces."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[Piece] = deque()
        self._arrived = asyncio.Event()

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:
            pass  # the server has ended, and nobody reads any more

    async def take(self, timeout_s: float) -> list[Piece]:
        """One piece a choice, in the order of their arrival; none where none came in time."""
        while not self._pieces:  # it may have been told of one that was taken with others
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except asyncio.TimeoutError:
                return []
        merged: dict[int, Piece] = {}
        while self._pieces:
            piece = self._pieces.popleft()
            known = merged.get(piece.index)
            merged[piece.index] = piece if known is None else known + piece
        return list(merged.values())


class Choice:
    """One answer.   index: of it in its reply.   echoed: the tokens of the prompt, with where each
    begins, if they come before it with their scores.   offset: characters of the reply before it.
    is_empty: whether nothing is computed.
    """

    def __init__(
        self,
        index: int,
        inbox: Inbox,
        request_of: Callable[[Callable[[int], bool]], Request],
        pieces: Pieces,
        stops: Sequence[str] = (),
        echoed: Sequence[tuple[int, Offset]] = (),
        offset: Offset = 0,
        is_empty: bool = False,
    ) -> None:
        self.index, self._echoed, self.is_empty = index, echoed, is_empty
        self._inbox, self._pieces, self._stops = inbox, pieces, StopStrings(stops)
        self._offset = offset
        self.request = request_of(self._take)

    @property
    def usage(self) -> Usage:
        return self.request.usage

    # ---- in the thread of the engine ------------------------------------------------------------

    def end(self) -> None:
        """Give what was held back, and why it has ended."""
        request = self.request
        if request.error is not None or request.finish_reason == "cancelled":
            error = request.error or ApiError(503, "the request was cancelled", code="cancelled")
            self._inbox.put(Piece(self.index, error=api_error(error)))
            return
        text = self._stops.feed(self._pieces.finish())
        is_stopped = self._stops.is_found or request.finish_reason == "stop"
        text += "" if self._stops.is_found else self._stops.finish()
        reason = "stop" if is_stopped else "length"
        self._inbox.put(Piece(self.index, text, self._prompt(), reason))

    def fail(self, error: BaseException) -> None:
        self.request.finish("error", error)

    def _take(self, token: int) -> bool:
        """Of Request.on_token: whether a stop string has come."""
        offset, request = self._offset, self.request
        piece = "" if token in request.stop_ids else self._pieces.feed(token)
        self._offset += len(piece)
        text = self._stops.feed(piece)
        scores = request.logprobs[-1:]
        tokens = (*self._prompt(), *(Token(token, score, offset) for score in scores))
        if text or tokens:
            self._inbox.put(Piece(self.index, text, tokens))
        return self._stops.is_found

    def _prompt(self) -> tuple[Token, ...]:
        """Its tokens, once."""
        echoed, self._echoed = self._echoed, ()
        scores = [None, *self.request.prompt_logprobs] if echoed else []
        pairs = zip(echoed, scores, strict=True)
        return tuple(Token(token, score, offset) for (token, offset), score in pairs)
