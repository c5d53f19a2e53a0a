"""The JSON of replies, as OpenAI's: of completions and of chats, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bminf.engine.request import Usage
from bminf.server.choice import Piece, Token
from bminf.server.texts import token_text

LEAST_LOGPROB = -9999.0
"""In place of that of what is impossible: JSON has no infinity."""

TokenBytes = Callable[[int], bytes]


def usage_json(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {**vars(usage), "total_tokens": total}


@dataclass
class Head:
    """What all chunks of a reply have in common.   kind: "cmpl" or "chatcmpl"."""

    model: str
    kind: str
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.kind}-{uuid.uuid4().hex}", int(time.time())

    def as_json(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": list(choices)}  # fmt: skip


class Shape(Protocol):
    """One kind of reply."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before anything is generated."""
        ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]: ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]: ...

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        """pieces: all of each choice in one."""
        ...


class CompletionShape:
    """echoes: the prompt of each choice, if it is to stand before it.   has_logprobs: whether they
    were asked for.   num_top: how many others of each token."""

    def __init__(
        self,
        model: str,
        token_bytes: TokenBytes,
        echoes: Mapping[int, str],
        num_top: int | None,
    ) -> None:
        self._head, self._token_bytes = Head(model, "cmpl"), token_bytes
        self._echoes, self._num_top = echoes, num_top

    def opening(self) -> list[dict[str, Any]]:
        echoes = [Piece(index, text) for index, text in self._echoes.items()]
        return [chunk for piece in echoes for chunk in self.chunks(piece)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return [self._head.as_json("text_completion", [self._choice(piece)])]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head.as_json("text_completion", []), "usage": usage_json(usage)}

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(Piece(index, self._echoes.get(index, "")) + piece)
            for index, piece in sorted(pieces.items())
        ]
        return {
            **self._head.as_json("text_completion", choices), "usage": usage_json(usage)
        }  # fmt: skip

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if self._num_top is None else self._logprobs(piece.tokens)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs,
                "finish_reason": piece.finish_reason}  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        scores = [token.scores for token in tokens]
        return {
            "tokens": [self._text(token.token) for token in tokens],
            "token_logprobs": [None if one is None else _clipped(one.logprob) for one in scores],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most probable tokens, and the one that came, by their texts: of two that are spelled
        alike the more probable one."""
        if token.scores is None:
            return None
        top: dict[str, float] = {}
        for other, logprob in (*token.scores.top, (token.token, token.scores.logprob)):
            top.setdefault(self._text(other), _clipped(logprob))
        return top

    def _text(self, token: int) -> str:
        return token_text(self._token_bytes(token))


class ChatShape:
    """indices: of the choices.   has_logprobs: whether they were asked for."""

    def __init__(
        self, model: str, token_bytes: TokenBytes, indices: Sequence[int], has_logprobs: bool
    ) -> None:
        self._head, self._token_bytes = Head(model, "chatcmpl"), token_bytes
        self._indices, self._has_logprobs = indices, has_logprobs

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [self._chunk(index, role, None, None) for index in self._indices]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Why it has ended comes by itself, behind all text."""
        chunks = []
        if piece.text or piece.tokens:
            logprobs = self._logprobs(piece) if piece.tokens else None
            chunks.append(self._chunk(piece.index, {"content": piece.text}, logprobs, None))
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.index, {}, None, piece.finish_reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head.as_json("chat.completion.chunk", []), "usage": usage_json(usage)}

    def whole(self, pieces: Mapping[int, Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
            for index, piece in sorted(pieces.items())
        ]
        return {**self._head.as_json("chat.completion", choices), "usage": usage_json(usage)}

    def _chunk(
        self, index: int, delta: Mapping[str, str], logprobs: Any, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head.as_json("chat.completion.chunk", [choice])

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        return {"content": [self._scored(token) for token in piece.tokens], "refusal": None}

    def _scored(self, token: Token) -> dict[str, Any]:
        assert token.scores is not None, "messages are not echoed"
        top = [self._entry(other, logprob) for other, logprob in token.scores.top]
        return {**self._entry(token.token, token.scores.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        nbytes = self._token_bytes(token)
        text = nbytes.decode(errors="replace")
        return {"token": text, "logprob": _clipped(logprob), "bytes": list(nbytes)}


def _clipped(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
