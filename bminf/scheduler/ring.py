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


class Transfers(Protocol):
    """What the ring asks of a backend. Marks and copies are opaque to the ring."""

    def copy(self, block: int, slot: int, after: Any) -> Any:
        """Start to copy a block from its home into a slot, once the mark `after` is reached."""

    def wait(self, copied: Any) -> None:
        """Let no computation from here on begin before that copy has ended."""

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
        if not any(copy.block == block for copy in self._ahead):
            self._restart_at(block)
        while self._ahead[0].block != block:
            self._ahead.popleft()
        slot = self._ahead[0].slot
        try:
            self._transfers.wait(self._ahead[0].copied)
        except Exception:
            self._ahead.clear()  # a failed copy is not kept; the next try makes a new one
            raise
        self._in_use[block] = slot
        self._ahead.popleft()
        self._learn(block)
        self._copy_ahead()
        return slot

    def leave(self, block: int) -> None:
        """Give back the slot of `block`; the next copy goes there."""
        self._last_use[self._in_use[block]] = self._transfers.mark()
        del self._in_use[block]
        self._copy_ahead()

    def changed(self, block: int) -> None:
        """The home of `block` has new bytes: what was copied ahead of that is out of date."""
        if any(copy.block == block for copy in self._ahead):
            self._ahead.clear()

    def settle(self) -> None:
        """Nothing is in use: for a new pass after one that was cut short anywhere."""
        for block in list(self._in_use):
            self.leave(block)

    def _restart_at(self, block: int) -> None:
        self._ahead.clear()
        if not self._free_slots():
            raise UnsupportedModelError(
                f"{NUM_SLOTS} streamed blocks are running and call a third one from inside, "
                "but there is no third slot; name the blocks so that they do not call each other "
                "(blocks=...)"
            )
        self._copy(block)

    def _copy_ahead(self) -> None:
        while self._free_slots():
            self._copy(self._follows[self._last_copied])

    def _copy(self, block: int) -> None:
        slot = self._free_slots()[0]
        copied = self._transfers.copy(block, slot, self._last_use[slot])
        self._ahead.append(_Copy(block, slot, copied))
        self._last_copied = block

    def _free_slots(self) -> list[int]:
        taken = {copy.slot for copy in self._ahead} | set(self._in_use.values())
        return [slot for slot in range(NUM_SLOTS) if slot not in taken]

    def _learn(self, block: int) -> None:
        if self._last_entered is not None:
            self._follows[self._last_entered] = block
        self._last_entered = block
