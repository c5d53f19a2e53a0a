"""The ring: streamed blocks come through two slots, in the order in which the model asks for them.

Slots are taken in copy order, never by block index: with an odd number of streamed blocks,
index % 2 would overwrite a block in use. As soon as a slot is free the next copy starts, also from
the end of one pass into the beginning of the next. The order is learned: each block is expected
after the one it followed last time. A wrong guess costs one copy that is waited for.

The ring knows neither torch nor threads; a backend (cuda, cpu, simulated) does the copies.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from bminf.errors import UnsupportedModelError

NUM_SLOTS = 2

_SLOTS = frozenset(range(NUM_SLOTS))


class Transfers(Protocol):
    """What the ring asks of a backend. Marks and copies are opaque to the ring."""

    def copy(self, block: int, slot: int, after: Any) -> Any:
        """Start to copy a block from the host into a slot, once the mark `after` is reached."""

    def wait(self, copied: Any) -> None:
        """Let no computation from here on begin before that copy has ended."""

    def has_ended(self, copied: Any) -> bool:
        """Whether wait() would wait for nothing now."""

    def mark(self) -> Any:
        """A mark behind all computation so far."""


@dataclass
class _Copy:
    block: int
    slot: int
    copied: Any


class Ring:
    """Which block is in which slot. Blocks are numbered 0 .. num_blocks - 1 in module order."""

    def __init__(self, num_blocks: int, transfers: Transfers) -> None:
        self._transfers = transfers
        self._follows = {block: (block + 1) % num_blocks for block in range(num_blocks)}
        self._ahead: deque[_Copy] = deque()  # started and not yet entered, in copy order
        self._in_use: dict[int, int] = {}  # block -> slot
        self._last_use: list[Any] = [None] * NUM_SLOTS  # mark behind the last use of each slot
        self._last_copied = num_blocks - 1
        self._last_entered: int | None = None

    def start(self) -> None:
        """Begin with the first copies, before anything is asked for."""
        self._copy_ahead()

    def enter(self, block: int) -> int:
        """The slot that holds `block`, ready for computation; it is held until leave(block)."""
        ahead = self._ahead
        while ahead and ahead[0].block != block:
            ahead.popleft()
        if not ahead:
            self._restart_at(block)
        slot = ahead[0].slot
        try:
            self._transfers.wait(ahead[0].copied)
        except Exception:
            ahead.clear()  # a failed copy is not kept; the next try makes a new one
            raise
        self._in_use[block] = slot
        ahead.popleft()
        if self._last_entered is not None:
            self._follows[self._last_entered] = block
        self._last_entered = block
        self._copy_ahead()
        return slot

    def leave(self, block: int) -> None:
        """Give back the slot of `block`; the next copy goes there."""
        self._last_use[self._in_use[block]] = self._transfers.mark()
        del self._in_use[block]
        self._copy_ahead()

    def changed(self, block: int) -> None:
        """The host copy of `block` has new bytes: what was copied ahead of that is out of date."""
        if any(copy.block == block for copy in self._ahead):
            self._ahead.clear()

    def clear(self) -> None:
        """Nothing is in use: for a new pass after one that was cut short anywhere."""
        for block in list(self._in_use):
            self.leave(block)

    def _restart_at(self, block: int) -> None:
        if not self._has_room():
            raise UnsupportedModelError(
                f"{NUM_SLOTS} streamed blocks are running and call a third one from inside, "
                "but there is no third slot; name the blocks so that they do not call each other "
                "(blocks=...)"
            )
        self._copy(block)

    def _copy_ahead(self) -> None:
        while self._has_room():
            self._copy(self._follows[self._last_copied])

    def _copy(self, block: int) -> None:
        slot = min(_SLOTS.difference(self._in_use.values(), [copy.slot for copy in self._ahead]))
        copied = self._transfers.copy(block, slot, self._last_use[slot])
        self._ahead.append(_Copy(block, slot, copied))
        self._last_copied = block

    def _has_room(self) -> bool:
        # By their number: this is asked several times a block, and the slots all differ.
        return len(self._ahead) + len(self._in_use) < NUM_SLOTS
