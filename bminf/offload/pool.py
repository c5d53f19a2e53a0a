"""The pool: slots for experts of all layers, of which those wanted least recently make room.

A layer says at once which experts it wants. Those that are in the pool stay there until it has used
them; the copies of the others begin before anything is computed, as far as there is room, and go on
as experts are left. So no layer is too large for the pool, if two experts fit: what has no room
comes in turns. A layer that fits hits what a cache hits that sees its experts one by one, or more.

What a layer will want can be said before it wants it, when its router has chosen or when that is
guessed. Copies then begin earlier; a wrong guess takes the link's time, and makes room first.

Like the ring this knows neither torch nor threads; a backend does the copies.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bminf.offload.ring import Transfers

LEAST_SLOTS = 2
"""One expert is computed with while another is copied."""


@dataclass
class _Held:
    """An expert in a slot. copied: its copy, until that has been waited for."""

    slot: int
    copied: Any


class ExpertPool:
    """Which expert is in which slot. Experts of all layers are numbered from 0 on.

    first_block, first_slot: those of the backend that the first expert and the first slot are.
    """

    def __init__(
        self, expert_bytes: Sequence[int], num_slots: int, transfers: Transfers, first_block: int,
        first_slot: int,
    ) -> None:  # fmt: skip
        self._expert_bytes, self._transfers = expert_bytes, transfers
        self._first_block, self._first_slot = first_block, first_slot
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._marks: list[Any] = [None] * num_slots  # behind the last use of each slot
        # Least recently wanted first; None is one that was wanted, and is not copied yet.
        self._held: OrderedDict[int, _Held | None] = OrderedDict()
        self._wanted: set[int] = set()  # of the layer that runs, and not left yet
        self._in_use: set[int] = set()
        self._to_copy: deque[int] = deque()
        self._expected: set[int] = set()  # of a layer that has not begun: they make room last
        self._ahead: set[int] = set()  # those of them that were copied before it did
        self.hits = self.misses = self.bytes_copied = 0
        self.bytes_guessed = self.bytes_unused = 0  # of those copied: by a guess; and not wanted

    def expect(self, experts: Iterable[int], layer: range, is_guess: bool = False) -> None:
        """Begin what a layer will want, as far as there is room that nothing else wants.

        layer: the numbers of its experts; what was expected of it before is not any more.
        is_guess: whether it may want others. What it wants of these is a miss, or a hit, as it
        would be without.
        """
        experts = list(experts)
        self.settle(layer, experts)
        self._expected.update(experts)
        for expert in experts:
            if expert in self._held:
                continue
            if self._to_copy or not (self._free or self._least_recent() is not None):
                return
            self._copy(expert)
            self._ahead.add(expert)
            self.bytes_guessed += self._expert_bytes[expert] if is_guess else 0

    def settle(self, layer: range, wanted: Iterable[int] = ()) -> None:
        """Expect no experts of a layer any more, but those that are wanted."""
        wanted = set(wanted)
        self._expected = {e for e in self._expected if e not in layer or e in wanted}
        for expert in [e for e in self._ahead if e in layer and e not in wanted]:
            self._held.move_to_end(expert, last=False)
            self._forsake(expert)

    def want(self, experts: Iterable[int]) -> list[int]:
        """Begin a layer that needs these; returns them in the order in which they will be there."""
        self._end_layer()
        experts = list(experts)
        hits = [expert for expert in experts if expert in self._held and expert not in self._ahead]
        misses = [expert for expert in experts if expert not in self._held or expert in self._ahead]
        self.hits, self.misses = self.hits + len(hits), self.misses + len(misses)
        for expert in experts:
            self._held.setdefault(expert, None)
            self._held.move_to_end(expert)
        self._wanted.update(experts)
        self._ahead.difference_update(experts)
        self._to_copy.extend(misses)  # those that were copied ahead are passed over
        self._copy_ahead()
        return hits + misses

    def enter(self, expert: int) -> int:
        """The slot that holds `expert`, ready for computation; it is held until leave(expert)."""
        if expert not in self._wanted:
            self.want([expert])
        held = self._held[expert] or self._copy(expert)
        try:
            if held.copied is not None:
                self._transfers.wait(held.copied)
                held.copied = None
        except Exception:
            self.forget(expert)  # a failed copy is not kept; the next try makes a new one
            raise
        self._in_use.add(expert)
        return held.slot

    def arrived(self, experts: Sequence[int]) -> list[int]:
        """The first of these, which is waited for, and those right behind it that need no wait."""
        first, *others = experts
        self.enter(first)
        found = [first]
        for expert in others:
            held = self._held.get(expert)
            if held is None or not self._has_come(held):
                break
            found.append(expert)
        return found

    def _has_come(self, held: _Held) -> bool:
        return held.copied is None or self._transfers.has_ended(held.copied)

    def leave(self, expert: int) -> None:
        """`expert` stays where it is, until its slot is needed."""
        held = self._held[expert]
        assert held is not None
        self._marks[held.slot] = self._transfers.mark()
        self._in_use.discard(expert)
        self._wanted.discard(expert)
        self._copy_ahead()

    def forget(self, expert: int) -> None:
        """The bytes of `expert` are not what they were."""
        held = self._held.pop(expert, None)
        self._forsake(expert)
        self._wanted.discard(expert)
        self._in_use.discard(expert)
        if held is not None:
            self._marks[held.slot] = self._transfers.mark()
            self._free.append(held.slot)

    def clear(self) -> None:
        """Nothing is in use, nor expected: for a new pass after one that was cut short anywhere."""
        self._end_layer()
        self.settle(range(len(self._expert_bytes)))

    def _end_layer(self) -> None:
        self._to_copy.clear()
        for expert in list(self._in_use):
            self.leave(expert)
        for expert in self._wanted:
            if self._held[expert] is None:
                del self._held[expert]
        self._wanted.clear()

    def _copy_ahead(self) -> None:
        while self._to_copy and (self._free or self._least_recent(also_expected=True) is not None):
            expert = self._to_copy.popleft()
            if expert in self._wanted and self._held[expert] is None:
                self._copy(expert)

    def _copy(self, expert: int) -> _Held:
        slot = self._room()
        copied = self._transfers.copy(
            self._first_block + expert, self._first_slot + slot, self._marks[slot]
        )
        self.bytes_copied += self._expert_bytes[expert]
        self._held[expert] = held = _Held(slot, copied)
        return held

    def _room(self) -> int:
        if self._free:
            return self._free.pop()
        expert = self._least_recent(also_expected=True)
        if expert is not None:
            return self._evicted(expert)
        # All hold what is wanted, and the caller keeps to an order of its own: one comes later.
        others = [one for one in self._wanted - self._in_use if self._held[one] is not None]
        last = max(others)
        slot = self._evicted(last)
        self._held[last] = None
        self._to_copy.append(last)
        return slot

    def _evicted(self, expert: int) -> int:
        held = self._held.pop(expert)
        assert held is not None
        self._forsake(expert)
        return held.slot

    def _forsake(self, expert: int) -> None:
        """If it was copied ahead, that was for nothing."""
        if expert in self._ahead:
            self._ahead.discard(expert)
            self.bytes_unused += self._expert_bytes[expert]

    def _least_recent(self, also_expected: bool = False) -> int | None:
        """That which makes room; None where all that is held is wanted, or expected."""
        expected = None
        for expert, held in self._held.items():
            if held is not None and expert not in self._wanted:
                if expert not in self._expected:
                    return expert
                expected = expert if expected is None else expected
        return expected if also_expected else None
