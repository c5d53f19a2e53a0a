"""A model of an engine with no network behind: its logits are a function of what a row was fed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fake_decoder import History

from bminf.engine.request import Request
from bminf.engine.rows import Feed
from bminf.engine.token_pool import Range, TokenPool
from bminf.errors import ArgumentError
from bminf.offload.hooks import Stats


@dataclass(eq=False)
class FakeRow:
    """cells: whose `used` is the length."""

    cells: Range
    length: int = 0


class FakeRows:
    """A pool of token ids is its cache, so that a cell which is lost or overwritten is noticed.

    passes: of each pass, what each row was fed, for the tests.   before: called before each pass.
    Logits last until the next pass, as those of a CUDA graph do.
    """

    def __init__(
        self,
        logits_of: Callable[[History], Sequence[float]],
        num_tokens: int = 10_000,
        vocab_size: int = 10,
        max_rows: int = 64,
    ) -> None:
        self.logits_of, self.vocab_size, self.max_rows = logits_of, vocab_size, max_rows
        self.can_chunk = self.can_resume = self.can_score = True
        self.before, self.stats = lambda feeds: None, Stats()
        self.cells = [-1] * num_tokens
        self.pool = TokenPool(num_tokens, self._move)
        self.passes: list[list[list[int]]] = []
        self.logits = torch.empty(0)

    def _move(self, start: int, target: int, count: int) -> None:
        self.cells[target : target + count] = self.cells[start : start + count]

    def _needed(self, request: Request) -> int:
        return len(request.input_ids) + max(request.max_new_tokens, 1) - 1

    def check(self, request: Request) -> None:
        if not self.pool.could_take(self._needed(request)):
            raise ArgumentError("it could never fit")

    def start_ids(self, request: Request) -> Sequence[int]:
        return request.input_ids

    def sampler_device(self) -> torch.device:
        return torch.device("cpu")

    def open(self, request: Request) -> Any:
        cells = self.pool.take(self._needed(request))
        return None if cells is None else FakeRow(cells)

    def close(self, row: Any) -> None:
        self.pool.give(row.cells)

    def truncate(self, row: Any, length: int) -> None:
        row.length = row.cells.used = length
        self.pool.resize(row.cells, length)

    def widen(self, row: Any, request: Request) -> bool:
        return self.pool.resize(row.cells, self._needed(request))

    def forward(self, feeds: Sequence[Feed], num_tokens: int | None = None) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self.passes.append([list(feed.ids) for feed in feeds])
        self.logits.fill_(math.nan)
        self.before(feeds)
        histories = [self._fed(feed) for feed in feeds]
        for feed, history in zip(feeds, histories, strict=True):
            self._score(feed, history)
        asked = [one for feed, one in zip(feeds, histories, strict=True) if feed.has_logits]
        self.logits = torch.tensor([self.logits_of(history) for history in asked])
        return self.logits

    def _score(self, feed: Feed, history: History) -> None:
        """Two at a time."""
        if feed.score is None:
            return
        logits = [self.logits_of(history[: feed.row.length + n + 1]) for n in range(len(feed.ids))]
        for first in range(0, len(logits), 2):
            feed.score(first, torch.tensor(logits[first : first + 2]))

    def offload_stats(self) -> Stats:
        return self.stats

    def _fed(self, feed: Feed) -> History:
        """All that the row has been fed."""
        start, length = feed.row.cells.start, feed.row.length
        feed.row.cells.used = end = length + len(feed.ids)
        assert end <= feed.row.cells.size
        self.cells[start + length : start + end] = feed.ids
        return tuple(self.cells[start : start + end])
