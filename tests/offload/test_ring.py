"""The ring on the simulated backend: right bytes always, and a link that does not rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.errors import UnsupportedModelError
from bminf.offload.predict import (
    Access,
    SimulatedBackend,
    SimulatedDisk,
    Step,
    run_pass,
)
from bminf.offload.ring import Ring

LINK = 1e9


class SimulationError(AssertionError):
    """The scheduler would have computed with wrong bytes."""


def check(backend: SimulatedBackend) -> None:
    """Raise SimulationError if any read so far met other bytes than its block's."""
    for read in backend.reads:
        _check_read(read, backend.copies, "slot")
    for use in backend.disk.uses:
        _check_read(use, backend.disk.fills, "staging buffer")


def _check_read(read: Access, copies: Sequence[Access], what: str) -> None:
    """what: `copies` fill, a slot or a staging buffer."""
    # Copies into one slot follow one another, so the last one that began counts.
    begun = [c for c in copies if c.slot == read.slot and c.start_s < read.end_s]
    if not begun:
        raise SimulationError(
            f"block {read.block} is read from {what} {read.slot}: nothing is there"
        )
    last = begun[-1]
    if last.start_s > read.start_s and any(c.block == read.block for c in begun):
        raise SimulationError(
            f"{what} {read.slot} is overwritten by block {last.block} from {last.start_s:.6f} s, "
            f"while block {read.block} is read until {read.end_s:.6f} s"
        )
    if last.block != read.block:
        raise SimulationError(
            f"block {read.block} is read from {what} {read.slot}, which holds block {last.block}"
        )
    if last.end_s > read.start_s:
        raise SimulationError(
            f"block {read.block} is read at {read.start_s:.6f} s, "
            f"but its copy ends at {last.end_s:.6f} s"
        )


def run(
    sizes: list[int], steps: list[Step], num_passes: int, ring_class: type[Ring] = Ring
) -> tuple[SimulatedBackend, float]:
    """The backend after `num_passes`, and the time at which the first one ended."""
    backend = SimulatedBackend(sizes, LINK)
    ring = ring_class(len(sizes), backend)
    ring.start()
    run_pass(backend, ring, steps)
    first_s = backend.now_s
    for _ in range(num_passes - 1):
        run_pass(backend, ring, steps)
    check(backend)
    return backend, first_s


def optimum_s(copy_s: list[float], steps: list[Step], num_passes: int) -> float:
    """The least time for two slots: each copy and each read as early as its reasons allow.

    A copy needs the link and the end of the last read but one; a read needs its copy and the end
    of all computation before it. Nothing can be earlier, for that order of copies.
    """
    now_s, link_s = 0.0, 0.0
    read_ends: list[float] = []
    for _ in range(num_passes):
        for step in steps:
            if step.streamed is not None:
                slot_free_s = read_ends[-2] if len(read_ends) >= 2 else 0.0
                link_s = max(link_s, slot_free_s) + copy_s[step.streamed]
                now_s = max(now_s, link_s) + step.compute_s
                read_ends.append(now_s)
            else:
                now_s += step.compute_s
    return now_s


def test_a_copy_starts_as_soon_as_a_slot_is_free() -> None:
    backend = SimulatedBackend([1] * 5, 1.0)
    ring = Ring(5, backend)
    ring.start()
    assert [copy.block for copy in backend.copies] == [0, 1]
    for block, after in enumerate([[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0]]):
        ring.enter(block)
        assert [copy.block for copy in backend.copies] == after[:-1]
        ring.leave(block)
        assert [copy.block for copy in backend.copies] == after


@pytest.mark.parametrize("num_streamed", [1, 2, 3, 4, 7, 12, 15])
@pytest.mark.parametrize("num_resident_between", [0, 1, 3])
def test_the_link_is_busy_when_copies_take_three_times_the_computation(
    num_streamed: int, num_resident_between: int
) -> None:
    """Equal blocks, a head at the end; odd and even numbers of streamed blocks."""
    size = 10**6
    num_steps = num_streamed * (1 + num_resident_between) + 1
    compute_s = num_streamed * size / LINK / 3 / num_steps
    steps = [
        Step(compute_s, number if between == 0 else None)
        for number in range(num_streamed)
        for between in range(1 + num_resident_between)
    ] + [Step(compute_s)]
    backend, first_s = run([size] * num_streamed, steps, num_passes=8)
    assert backend.busy(backend.copies, first_s) >= 0.99


@pytest.mark.parametrize("num_streamed", [2, 3, 4, 5, 9, 10])
@pytest.mark.parametrize("ratio", [0.8, 0.95, 1.0, 1.05, 1.25])
def test_near_balance_the_time_is_that_of_the_optimum(num_streamed: int, ratio: float) -> None:
    size = 10**6
    compute_s = ratio * size / LINK / 2
    steps = [
        step
        for number in range(num_streamed)
        for step in (Step(compute_s, number), Step(compute_s))
    ]
    backend, _ = run([size] * num_streamed, steps, num_passes=9)
    assert backend.now_s <= 1.01 * optimum_s([size / LINK] * num_streamed, steps, 9)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_order_of_blocks_reads_the_right_bytes(data: st.DataObject) -> None:
    """Unequal blocks, asked for in any order, a different one each pass, now and then cut short."""
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    on_disk = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    backend = SimulatedBackend(sizes, 10.0, on_disk, data.draw(st.sampled_from([1.0, 10.0, 99.0])))
    ring = Ring(len(sizes), backend)
    if data.draw(st.booleans()):
        ring.start()
    requests = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=30))
    for block in requests:
        slot = ring.enter(block)
        backend.read(block, slot, data.draw(st.integers(0, 9)))
        if data.draw(st.integers(0, 5)) == 0:
            ring.clear()  # the pass ended here without leave()
        else:
            ring.leave(block)
    check(backend)
    for before, after in itertools.pairwise(backend.disk.fills):
        assert before.end_s <= after.start_s  # one read at a time
    assert {fill.block for fill in backend.disk.fills} <= set(on_disk)
    assert len(backend.disk.uses) == sum(copy.block in on_disk for copy in backend.copies)


def test_a_known_order_is_waited_for_only_once_when_it_changes() -> None:
    """Three blocks of an encoder once, then three of a decoder again and again."""
    backend = SimulatedBackend([10**6] * 6, LINK)
    ring = Ring(6, backend)
    encoder = [Step(0.0, number) for number in range(3)]
    decoder = [Step(0.0, number) for number in range(3, 6)]
    for _ in range(2):
        run_pass(backend, ring, encoder)
        for _ in range(5):
            run_pass(backend, ring, decoder)
    check(backend)
    needed = 2 * (3 + 5 * 3)
    wasted = len(backend.copies) - needed
    assert wasted <= 2 + 2 * 2 * 2  # two ahead at the end, two a wrong guess, two guesses a request


def test_a_block_that_has_changed_is_copied_anew_where_it_was_copied_ahead() -> None:
    backend = SimulatedBackend([10] * 4, LINK)
    ring = Ring(4, backend)
    ring.start()
    ring.enter(0)
    ring.leave(0)
    assert [copy.block for copy in backend.copies] == [0, 1, 2]
    ring.changed(3)  # it is on its way to nowhere
    assert ring.enter(1) == 1 and len(backend.copies) == 3
    ring.changed(2)
    ring.leave(1)
    ring.enter(2)
    assert [copy.block for copy in backend.copies].count(2) == 2


def test_a_block_may_call_another_but_not_a_third() -> None:
    ring = Ring(4, SimulatedBackend([1] * 4, LINK))
    assert ring.enter(0) != ring.enter(2)
    with pytest.raises(UnsupportedModelError, match="third"):
        ring.enter(3)
    ring.leave(2)
    ring.leave(0)
    assert ring.enter(3) in (0, 1)


def test_a_failed_copy_is_tried_again() -> None:
    class Failing(SimulatedBackend):
        fails = True

        def wait(self, copied: Any) -> None:
            if self.fails and copied.block == 1:
                self.fails = False
                raise OSError("the disk is gone")
            super().wait(copied)

    backend = Failing([1] * 3, LINK)
    ring = Ring(3, backend)
    steps = [Step(1.0, number) for number in range(3)]
    with pytest.raises(OSError, match="disk"):
        run_pass(backend, ring, steps)
    ring.clear()
    run_pass(backend, ring, steps)
    check(backend)


# The check itself: each of three faults, put in by hand, is found.


class SlotByIndex(Ring):
    """The fault of a ring that takes slot index % 2: wrong when an odd number streams."""

    def _copy(self, block: int) -> None:
        super()._copy(block)
        self._ahead[-1].slot = block % 2
        log = self._transfers.copies
        log[-1] = replace(log[-1], slot=block % 2)


class NoWait(Ring):
    def __init__(self, num_blocks: int, transfers: SimulatedBackend) -> None:
        transfers.wait = lambda copied: None
        super().__init__(num_blocks, transfers)


class EarlyOverwrite(Ring):
    """The fault of a copy that does not wait for the last use of its slot."""

    def _copy(self, block: int) -> None:
        self._last_use = [None, None]
        super()._copy(block)


SLOW, FAST = ([Step(seconds, number) for number in range(5)] for seconds in (0.01, 0.0001))


@pytest.mark.parametrize(
    ("fault", "steps", "said"),
    [
        (SlotByIndex, SLOW, "which holds block"),
        (SlotByIndex, FAST, "which holds block"),
        (NoWait, SLOW, "its copy ends at"),
        (NoWait, FAST, "its copy ends at"),
        (EarlyOverwrite, SLOW, "overwritten"),
    ],
)
def test_a_seeded_fault_is_caught(fault: type[Ring], steps: list[Step], said: str) -> None:
    run([10**6] * 5, steps, 3)
    with pytest.raises(SimulationError, match=said):
        run([10**6] * 5, steps, 3, fault)


class StageInUse(SimulatedDisk):
    """The fault of a read that does not wait for the last copy out of its staging buffer."""

    def use(self, fill: Access, copy: Access) -> None:
        super().use(fill, copy)
        self._stage_free_s[fill.slot] = 0.0


class NotYetRead(SimulatedDisk):
    """The fault of a copy that does not wait for the read of its blob."""

    def fetch(self, block: int, now_s: float) -> Access:
        fill = super().fetch(block, now_s)
        return replace(fill, end_s=fill.start_s)


class OneStage(SimulatedDisk):
    """The fault of one staging buffer that is taken for two."""

    def _read_next(self, waited_for: Any, now_s: float) -> bool:
        is_read = super()._read_next(waited_for, now_s)
        if is_read:
            self.fills[-1] = replace(self.fills[-1], slot=0)
        return is_read

    def use(self, fill: Access, copy: Access) -> None:
        super().use(fill, copy)
        self.uses[-1] = replace(self.uses[-1], slot=0)


def run_from_disk(disk_bytes_per_s: float, disk: type[SimulatedDisk]) -> SimulatedBackend:
    size, on_disk = 10**6, range(0, 8, 2)
    backend = SimulatedBackend([size] * 8, LINK, on_disk, disk_bytes_per_s)
    backend.disk = disk({block: size / disk_bytes_per_s for block in on_disk})
    ring = Ring(8, backend)
    for _ in range(4):
        run_pass(backend, ring, [Step(0.0001, number) for number in range(8)])
    return backend


@pytest.mark.parametrize("disk_bytes_per_s", [LINK / 5, LINK, 5 * LINK])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (StageInUse, "staging buffer"),
        (NotYetRead, "but its copy ends at"),
        (OneStage, "staging buffer 0"),
    ],
)
def test_a_seeded_fault_of_the_read_ahead_is_caught(
    fault: type[SimulatedDisk], said: str, disk_bytes_per_s: float
) -> None:
    check(run_from_disk(disk_bytes_per_s, SimulatedDisk))
    if fault is StageInUse and disk_bytes_per_s < LINK:
        disk_bytes_per_s = 2 * LINK  # a slow disk fills no buffer that is still in use
    with pytest.raises(SimulationError, match=said):
        check(run_from_disk(disk_bytes_per_s, fault))
