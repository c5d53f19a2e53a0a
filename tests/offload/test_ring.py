"""The ring on the simulated backend: right bytes always, and a link that does not rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.offload.plan import Block, plan
from bminf.offload.predict import (
    Access,
    SimulatedBackend,
    SimulatedDisk,
    Step,
    predict,
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


@pytest.mark.parametrize(
    ("link", "memory", "disk", "bound"),
    [
        (10e9, 1e15, 1e9, "disk"),  # 10 of 30 blobs at a tenth of the rate: 10/3 of the time
        (10e9, 1e15, 2e9, "disk"),
        (10e9, 1e15, 5e9, "link"),  # 2/3 of the time, hidden behind the copies between
        (10e9, 1e9, 5e9, "compute"),
        (1e15, 1e15, 5e9, "disk"),
    ],
)
def test_a_prediction_names_what_binds_and_takes_as_long(
    link: float, memory: float, disk: float, bound: str
) -> None:
    blocks = [Block(f"layers.{at}", 10**7, "layers") for at in range(30)]
    the_plan = plan(blocks, 2 * 10**7, host_bytes=22 * 10**7)
    assert len(the_plan.streamed) == 30 and len(the_plan.on_disk) == 10
    prediction = predict(the_plan, link, memory, disk_bytes_per_s=disk)
    assert prediction.disk_s == pytest.approx(10 * 10**7 / disk)
    assert prediction.copy_s == pytest.approx(30 * 10**7 / link)
    assert prediction.bound == bound
    needs = {
        "disk": prediction.disk_s,
        "link": prediction.copy_s,
        "compute": prediction.compute_s,
    }
    assert prediction.pass_s == pytest.approx(needs[bound], rel=0.04)
    assert (prediction.disk_busy > 0.95) == (bound == "disk")
    without = predict(plan(blocks, 2 * 10**7), link, memory)
    assert without.disk_s == without.disk_busy == 0 and without.pass_s <= prediction.pass_s


def test_a_prediction_with_blocks_on_disk_needs_its_rate() -> None:
    blocks = [Block(f"layers.{at}", 100, "layers") for at in range(9)]
    the_plan = plan(blocks, 200, host_bytes=500)
    with pytest.raises(ArgumentError, match="disk_bytes_per_s is None, but 6 blocks"):
        predict(the_plan, 1.0, 1.0)
    slow = predict(the_plan, 1e9, 1e9, disk_bytes_per_s=1.0)
    assert slow.bound == "disk" and slow.pass_s == pytest.approx(600)


def test_what_binds_is_named_without_a_disk_too() -> None:
    blocks = [Block(f"layers.{at}", 100, "layers") for at in range(9)]
    assert predict(plan(blocks, 900), 1.0, 1.0).bound == "compute"
    assert predict(plan(blocks, 400), 1.0, 100.0).bound == "link"
    assert predict(plan(blocks, 400), 100.0, 1.0).bound == "compute"


def test_a_prediction_is_that_of_the_larger_of_copying_and_computing() -> None:
    blocks = [Block(f"layers.{i}", 10**7, "layers") for i in range(20)]
    streaming = plan(blocks, 10 * 10**7, outside_bytes=10**7)
    prediction = predict(streaming, link_bytes_per_s=10e9, memory_bytes_per_s=100e9)
    num_streamed = len(streaming.streamed)
    assert prediction.copy_s == pytest.approx(num_streamed * 1e-3)
    assert prediction.compute_s == pytest.approx(21e-4)
    assert prediction.pass_s == pytest.approx(prediction.copy_s, rel=0.02)
    assert prediction.link_busy > 0.98
    slow_memory = predict(streaming, link_bytes_per_s=100e9, memory_bytes_per_s=1e9)
    assert slow_memory.pass_s == pytest.approx(slow_memory.compute_s, rel=0.02)
    resident = predict(plan(blocks, 10**9), 10e9, 100e9)
    assert resident.pass_s == pytest.approx(2e-3) and resident.link_busy == 0


def test_a_prediction_leaves_an_encoder_out_of_the_decode_pass() -> None:
    blocks = [Block(f"e.{i}", 100, "e") for i in range(6)] + [
        Block(f"d.{i}", 100, "d") for i in range(6)
    ]
    the_plan = plan(blocks, 800, {"e": 1})
    assert set(the_plan.streamed) <= {f"e.{i}" for i in range(6)}
    prediction = predict(the_plan, 1.0, 100.0)
    assert prediction.copy_s == 0 and prediction.pass_s == pytest.approx(6.0)


def test_a_prediction_of_some_lists_is_of_their_blocks_alone() -> None:
    blocks = [Block(f"{name}.{i}", 100, name) for name in "epd" for i in range(6)]
    the_plan = plan(blocks, 1000 + 50, {"e": 1, "p": 1}, outside_bytes=50)
    streamed = {name: sum(block[0] == name for block in the_plan.streamed) for name in "epd"}
    assert sum(streamed.values()) == 10 and streamed["d"] == 0  # 8 blocks and two slots fit
    for lists in ("d", "pd", "dp", "ep"):
        prediction = predict(the_plan, 50.0, 100.0, lists)
        copy_s = sum(streamed[name] for name in lists) * 100 / 50
        assert prediction.copy_s == pytest.approx(copy_s)
        assert prediction.compute_s == pytest.approx(6.0 * len(lists))  # nothing of the 50 bytes
        assert prediction.pass_s >= max(copy_s, prediction.compute_s) * (1 - 1e-9)
    whole = predict(the_plan, 50.0, 100.0)
    assert whole.compute_s == pytest.approx(6.5)


def test_a_list_that_a_plan_does_not_have_is_named() -> None:
    the_plan = plan([Block("d.0", 100, "d")], 1000)
    with pytest.raises(ArgumentError, match="'e'; the plan has 'd'"):
        predict(the_plan, 1.0, 1.0, ["d", "e"])
