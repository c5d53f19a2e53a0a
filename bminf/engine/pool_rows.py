"""What row models have in common whose rows are ranges of one pool of tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bminf.engine.request import Request
from bminf.engine.rows import FIXED_TOKENS, Feed
from bminf.engine.token_pool import Range, TokenPool
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layers.packed_cache import Span
from bminf.offload.hooks import ATTRIBUTE, Scheduler, Stats

MAX_ROWS = 64
"""Of a pass, beside what the cache has room for."""

_NOTHING_COPIED = Stats()


@dataclass(eq=False)
class PoolRow:
    """cells: its place in the pool."""

    request: Request
    cells: Range
    _length: int = 0

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        self._length = self.cells.used = length


class PoolRows:
    """A RowModel, but for the pass itself.   model: whose blocks may be streamed.   max_length: the
    most tokens of a row."""

    can_chunk = can_resume = can_score = True

    def __init__(self, model: Any, vocab_size: int, num_tokens: int, max_length: int) -> None:
        self._model = model
        self.vocab_size, self.max_rows, self.max_length = vocab_size, MAX_ROWS, max_length
        self._pool = TokenPool(num_tokens, self.move_tokens)
        self._lock = threading.RLock()  # of the pool and the cache, for engines that share them

    # ---- what subclasses say --------------------------------------------------------------------

    def sampler_device(self) -> torch.device:
        raise NotImplementedError

    def move_tokens(self, start: int, target: int, count: int) -> None:
        """Copy cells of the cache, which may overlap."""
        raise NotImplementedError

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        """See RowModel.forward.   spans: where the feeds lie in the pool."""
        raise NotImplementedError

    # ---- a RowModel -----------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        needed = self._needed(request)
        if needed > self.max_length or not self._pool.could_take(needed):
            raise ArgumentError(
                f"{len(self.start_ids(request))} tokens to start with and max_new_tokens="
                f"{request.max_new_tokens} are more than max_length={self.max_length}; lower "
                "max_new_tokens, shorten the prompt, or take a larger max_length"
            )

    def start_ids(self, request: Request) -> Sequence[int]:
        return request.start_ids or request.input_ids

    def open(self, request: Request) -> Any:
        with self._lock:
            cells = self._pool.take(self._needed(request))
        return None if cells is None else PoolRow(request, cells)

    def close(self, row: Any) -> None:
        with self._lock:
            self._pool.give(row.cells)

    def truncate(self, row: Any, length: int) -> None:
        with self._lock:
            row.length = length
            self._pool.resize(row.cells, length)

    def widen(self, row: Any, request: Request) -> bool:
        with self._lock:
            has_room = self._pool.resize(row.cells, self._needed(request))
            row.request = request if has_room else row.request
            return has_room

    def forward(self, feeds: Sequence[Feed], num_tokens: int | None = None) -> torch.Tensor:
        with self._lock:
            spans = [Span(feed.row.cells.start, feed.row.length, len(feed.ids)) for feed in feeds]
            return self.compute(feeds, spans, num_tokens)

    def offload_stats(self) -> Stats:
        scheduler: Scheduler | None = self._model.__dict__.get(ATTRIBUTE)
        if scheduler is None or scheduler.ring is None:  # all stays on the device
            return _NOTHING_COPIED
        return scheduler.stats()

    def _needed(self, request: Request) -> int:
        # The last one is not fed.
        return len(self.start_ids(request)) + max(request.max_new_tokens, 1) - 1


@dataclass(eq=False)
class PromptedRow(PoolRow):
    """prompt_cells: its place in the pool of prompts.   is_read: whether they are filled."""

    prompt_cells: Range = field(default_factory=lambda: Range(0, 0))
    is_read: bool = False


class PromptedRows(PoolRows):
    """Rows whose prompts, which an encoder reads, lie in a pool of their own: `_prompts`."""

    can_chunk = can_resume = can_score = False  # another prompt is another text for the encoder
    _prompts: TokenPool

    def check(self, request: Request) -> None:
        super().check(request)
        if not self._prompts.could_take(len(request.input_ids)):
            raise ArgumentError(
                f"the prompt has {len(request.input_ids)} tokens, and there is room for "
                f"{self._prompts.num_tokens}; shorten it, or take a larger max_length"
            )

    def open(self, request: Request) -> Any:
        with self._lock:
            prompt_cells = self._prompts.take(len(request.input_ids))
            if prompt_cells is None:
                return None
            prompt_cells.used = prompt_cells.size
            row = super().open(request)
            if row is None:
                self._prompts.give(prompt_cells)
                return None
            return PromptedRow(request, row.cells, prompt_cells=prompt_cells)

    def close(self, row: Any) -> None:
        with self._lock:
            super().close(row)
            self._prompts.give(row.prompt_cells)


def ids_of(feeds: Sequence[Feed], num_tokens: int | None) -> list[int]:
    """The tokens of a pass, one row behind another, and as many more as are missing."""
    ids = [token for feed in feeds for token in feed.ids]
    return ids + [0] * ((num_tokens or 0) - len(ids))


def last_tokens(feeds: Sequence[Feed], num_tokens: int | None) -> list[int]:
    """Where the last token of each feed that has_logits is among those of the pass; always as many
    if num_tokens is given."""
    end, wanted = 0, []
    for feed in feeds:
        end += len(feed.ids)
        if feed.has_logits:
            wanted.append(end - 1)
    missing = min(num_tokens or 0, FIXED_TOKENS) - len(wanted)
    return wanted + [0] * missing if wanted else []


def decoder_start(model: Any) -> int:
    """What the decoder of a model of transformers begins with.   Raises UnsupportedModelError."""
    for config in (getattr(model, "generation_config", None), model.config):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise UnsupportedModelError(
        "the configuration does not say decoder_start_token_id; give start_ids"
    )
