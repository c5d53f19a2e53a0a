"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

from bminf.engine.request import FinishReason
from bminf.models.options import Options
from bminf.tokenizers.base import TextStream, Tokenizer
from bminf.tokenizers.stop_strings import StopStrings


class StopWatch:
    """Request.on_token of an answer that ends at stop strings."""

    def __init__(self, tokenizer: Tokenizer, settings: Options) -> None:
        self._stream, self._stops = TextStream(tokenizer), StopStrings(settings.stop)
        self._num_left = settings.max_tokens

    def __call__(self, token: int) -> bool:
        self._num_left -= 1
        self._stops.feed(self._stream.feed(token))
        if self._num_left == 0:  # no later token can change the rest
            self._stops.feed(self._stream.finish())
        return self._stops.is_found


class Finishing(Protocol):
    """A request, or what knows how one has ended."""

    @property
    def finish_reason(self) -> FinishReason | None: ...


class TextIterator(Iterator[str]):
    """The pieces of a text as it comes."""

    def __init__(self, request: Finishing, pieces: Generator[str, None, None]) -> None:
        self._request, self._pieces = request, pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Generate no more."""
        self._pieces.close()

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it is under way; "stop" where a stop string or a token ended it, "length"
        where max_tokens did, "cancelled" where the loop was left, and "error"."""
        return self._request.finish_reason
