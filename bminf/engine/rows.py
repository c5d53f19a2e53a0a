"""What a model has to offer, so that an engine can decode several requests with it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from bminf.engine.request import Request
from bminf.offload.hooks import Stats

FIXED_TOKENS = 32
"""Of each pass of a deterministic engine, but for prompts that are read in a pass of their own."""

FIXED_CHUNK = 16
"""At the multiples of which it cuts prompts; so many tokens of a pass are left for them."""


def fixed_length(num_tokens: int) -> int:
    """How many rows a product gets for so many tokens of one prompt: of some numbers below 16, such
    as 5, torch's products give other last bits with 2 threads than with 1."""
    return -(-num_tokens // FIXED_CHUNK) * FIXED_CHUNK


class Row(Protocol):
    """What a model keeps for a request: its place in the cache.   length: tokens that are there."""

    length: int


class Feed(NamedTuple):  # which is made faster than a frozen dataclass, for each row of each pass
    """Tokens that a row is fed in a pass, behind those that it has.

    has_logits: whether those behind the last of them are asked for.   score: called with the
    logits (n, V) behind n of them, and which is the first, from the first one on, a few at a time;
    None where nobody asks.
    """

    row: Any
    ids: Sequence[int]
    has_logits: bool = True
    score: Callable[[int, torch.Tensor], object] | None = None


@runtime_checkable
class RowModel(Protocol):
    """A model, and the cache that its rows share.

    vocab_size: of the logits.   max_rows: that a pass may have.   can_chunk: whether a prompt may
    be fed in several passes.   can_resume: whether another request may go on from the first tokens
    of a row, see truncate() and widen().   can_score: whether it calls Feed.score, as it can where
    a prompt is read from its first token to its last.
    """

    vocab_size: int
    max_rows: int
    can_chunk: bool
    can_resume: bool
    can_score: bool

    def check(self, request: Request) -> None:
        """Raise ArgumentError for a request that could never have room."""
        ...

    def start_ids(self, request: Request) -> Sequence[int]:
        """The first tokens that its row is fed."""
        ...

    def sampler_device(self) -> torch.device:
        """Where logits are."""
        ...

    def open(self, request: Request) -> Row | None:
        """Room for a request until its end; None where there is none at the moment."""
        ...

    def close(self, row: Any) -> None:
        """Give that room back."""
        ...

    def truncate(self, row: Any, length: int) -> None:
        """Drop all but the first tokens of a row, and the room for more."""
        ...

    def widen(self, row: Any, request: Request) -> bool:
        """Make room for a request that goes on from what `row` holds; False where there is none."""
        ...

    def forward(self, feeds: Sequence[Feed], num_tokens: int | None = None) -> torch.Tensor:
        """The logits (R, V) behind the last token of each feed that has_logits.

        num_tokens: how many the network is given, so that a row gives the same bits whatever it
        shares the pass with: the missing ones are of no row, and no row's attention sees how others
        lie. None is as many as there are.
        The logits last until the next pass, which may write to their memory.
        Does not change row.length: the same pass may be asked for again.
        """
        ...

    def offload_stats(self) -> Stats:
        """What was copied for passes so far, and how long they waited for it."""
        ...
