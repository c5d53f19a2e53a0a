"""Reading ahead, on real files and threads; what a device would do with a buffer is played here."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.errors import OffloadError
from bminf.offload import memory
from bminf.offload.disk import NUM_STAGES, FileStore, Outcome, ReadAhead, Reader, Staging

SIZES = [700, 4096, 1, 5000, 333]
SOON_S = 120.0  # far more than anything here takes, also where all cores are busy


def blob(number: int, version: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * version + number)
    return torch.randint(0, 256, (SIZES[number],), dtype=torch.uint8, generator=generator)


class Store(FileStore):
    """A file whose reads are logged, and can be held back or made to fail."""

    def __init__(self) -> None:
        super().__init__(SIZES)
        self.reads: list[int] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.has_begun = threading.Event()
        self.broken: set[int] = set()

    def read_into(self, block: int, blob: torch.Tensor) -> None:
        self.reads.append(block)
        super().read_into(block, blob)  # before the pause, so that it misses a write meanwhile
        self.has_begun.set()
        assert self.may_read.wait(SOON_S)
        if block in self.broken:
            blob.zero_()
            raise OffloadError("the disk is gone")


class Bench:
    """A ReadAhead over a Store, and what was done with its buffers."""

    def __init__(self) -> None:
        self.store, self.reader = Store(), Reader("bminf-reader")
        self.buffers = [memory.allocate(max(SIZES)) for _ in range(NUM_STAGES)]
        self.ahead = ReadAhead(self.store, SIZES, self.buffers, self.reader)
        self.version = dict.fromkeys(range(len(SIZES)), 0)
        for number in self.version:
            self.ahead.write(number, blob(number))
        self.faults: list[str] = []
        self.used: list[int] = []

    def fetch(self, number: int, wait: Callable[[], object] = lambda: None) -> Outcome:
        """Fetch a blob, look at it, and look again when the buffer is about to be overwritten."""
        expected = blob(number, self.version[number])

        def use(buffer: torch.Tensor) -> Callable[[], None]:
            self.used.append(number)
            self._compare(buffer, expected, f"blob {number} as it came")
            return lambda: (wait(), self._compare(buffer, expected, f"blob {number} in use"))

        return self.ahead.fetch(number, use)

    def _compare(self, buffer: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        if not torch.equal(buffer, expected):
            self.faults.append(what)

    def settle(self) -> None:
        """Wait until nothing more is read."""
        self.reader.submit(lambda: None).result(SOON_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.store.may_read.set()
    bench.ahead.close(lambda: None)
    assert not bench.reader._thread.is_alive()
    assert bench.faults == []


def test_the_next_blobs_are_read_before_they_are_asked_for(bench: Bench) -> None:
    bench.fetch(0).result(SOON_S)
    bench.settle()
    assert bench.store.reads == [0, 1, 2]  # 2 in the place of 0
    assert bench.fetch(1).done() and bench.fetch(2).done()
    bench.settle()
    assert bench.store.reads == [0, 1, 2, 3, 4]


def test_the_order_is_learned(bench: Bench) -> None:
    order = [3, 0, 4, 1, 2]
    for number in 2 * order:
        bench.fetch(number).result(SOON_S)
    bench.settle()
    del bench.store.reads[:]
    for number in 3 * order:
        assert bench.fetch(number).done()  # it was there
        bench.settle()
    assert len(bench.store.reads) == 3 * len(order)  # and each was read once a pass
    assert bench.used == 5 * order


def test_a_wrong_guess_costs_one_read_that_is_waited_for(bench: Bench) -> None:
    bench.fetch(0).result(SOON_S)
    bench.settle()
    bench.store.has_begun.clear()
    bench.store.may_read.clear()
    bench.fetch(1)  # there already; its buffer is filled with 3 from now on
    assert bench.store.has_begun.wait(SOON_S)
    waiting = bench.fetch(0)
    bench.store.may_read.set()
    waiting.result(SOON_S)
    assert bench.store.reads[:5] == [0, 1, 2, 3, 0]


def test_what_the_buffers_hold_is_not_read_again(bench: Bench) -> None:
    for number in [0, 1] * 6:
        bench.fetch(number).result(SOON_S)
        bench.settle()
    assert bench.store.reads.count(0) <= 2 and bench.store.reads.count(1) <= 2


def test_a_buffer_in_use_is_not_overwritten(bench: Bench) -> None:
    is_copied = threading.Event()
    bench.fetch(0, lambda: is_copied.wait(SOON_S)).result(SOON_S)
    assert bench.fetch(1).result(SOON_S) is None
    waiting = bench.fetch(2)
    assert not waiting.done() and 2 not in bench.store.reads
    assert torch.equal(bench.buffers[0][: SIZES[0]], blob(0))
    is_copied.set()
    waiting.result(SOON_S)


def test_jobs_are_done_in_the_order_they_were_given(bench: Bench) -> None:
    """Two transfers into one slot: the later one must be the last, also if it had not to wait."""
    done: list[str] = []
    threads: list[int] = []

    def job(name: str) -> Callable[[], None]:
        return lambda: (done.append(name), threads.append(threading.get_ident()))

    assert bench.ahead.do(job("first")).done()  # nothing to wait for: at once, in this thread
    bench.store.may_read.clear()
    futures = [bench.fetch(4), bench.ahead.do(job("second")), bench.fetch(2)]
    futures.append(bench.ahead.do(job("third")))
    assert bench.store.has_begun.wait(SOON_S)
    assert done == ["first"] and not any(future.done() for future in futures)
    bench.store.may_read.set()
    for future in futures:
        future.result(SOON_S)
    assert done == ["first", "second", "third"] and bench.used == [4, 2]
    assert threads[0] == threading.get_ident() != threads[1]


def test_a_read_that_fails_is_told_and_tried_again(bench: Bench) -> None:
    bench.store.broken = {1}
    failing, job, other = bench.fetch(1), bench.ahead.do(lambda: None), bench.fetch(3)
    with pytest.raises(OffloadError, match="the disk is gone"):
        failing.result(SOON_S)
    job.result(SOON_S)
    other.result(SOON_S)
    bench.settle()  # it may have been read ahead, in vain
    bench.store.broken = set()
    bench.fetch(1).result(SOON_S)
    assert bench.used == [3, 1]


def test_a_guess_that_fails_is_not_repeated_and_harms_nobody(bench: Bench) -> None:
    bench.store.broken = {1}
    bench.fetch(0).result(SOON_S)
    bench.settle()
    assert bench.store.reads == [0, 1]
    bench.fetch(2).result(SOON_S)
    bench.store.broken = set()
    bench.settle()
    bench.fetch(1).result(SOON_S)


def test_an_error_in_a_job_is_in_its_future_alone(bench: Bench) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no stream")

    for future in (bench.ahead.do(fail), bench.ahead.fetch(1, fail)):
        with pytest.raises(ValueError, match="no stream"):
            future.result(SOON_S)
    bench.fetch(1).result(SOON_S)


def test_an_interrupt_goes_to_the_thread_it_meets_and_blocks_nobody(bench: Bench) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.ahead.do(interrupted)
    bench.settle()
    bench.fetch(0).result(SOON_S)
    bench.settle()
    with pytest.raises(KeyboardInterrupt):
        bench.ahead.fetch(1, interrupted)  # it is there: the job is done here and now
    bench.fetch(1).result(SOON_S)


def test_a_blob_that_is_written_while_it_is_read_is_read_anew(bench: Bench) -> None:
    bench.store.may_read.clear()
    bench.version[0] = 1  # what is expected from here on
    waiting = bench.fetch(0)
    assert bench.store.has_begun.wait(SOON_S)
    assert torch.equal(bench.buffers[0][: SIZES[0]], blob(0))  # the old bytes are there by now
    assert not torch.equal(blob(0), blob(0, 1))
    bench.ahead.write(0, blob(0, 1))
    bench.store.may_read.set()
    waiting.result(SOON_S)
    assert bench.store.reads[:2] == [0, 0]


def test_closing_in_the_middle_leaves_nobody_waiting() -> None:
    bench, finished = Bench(), list[int]()
    bench.store.may_read.clear()
    futures = [bench.fetch(2), bench.ahead.do(lambda: None), bench.fetch(3)]
    assert bench.store.has_begun.wait(SOON_S)
    bench.ahead.release(lambda: finished.append(threading.get_ident()))  # waits for nothing
    assert finished == []
    bench.store.may_read.set()
    for future in futures:
        with pytest.raises(OffloadError, match="streaming ended"):
            future.result(SOON_S)
    bench.reader._thread.join(SOON_S)
    assert len(finished) == 1 and finished[0] != threading.get_ident()
    assert bench.used == [] and bench.store.reads == [2]
    with pytest.raises(OffloadError, match="closed"):
        bench.store.read_into(0, memory.allocate(SIZES[0]))
    bench.ahead.close(lambda: None)  # once more is no error
    for late in (bench.fetch(1), bench.ahead.do(lambda: None)):
        with pytest.raises(OffloadError, match="streaming ended"):
            late.result(SOON_S)


def test_a_finalizer_may_come_at_any_point(bench: Bench) -> None:
    """The collector may run in the middle of a job, with the lock held, and find this very one."""
    finished = threading.Event()
    job = bench.ahead.do(lambda: bench.ahead.release(finished.set))
    assert finished.wait(SOON_S) and job.done()


def test_an_error_while_closing_is_raised() -> None:
    def fail() -> None:
        raise ValueError("the device is gone")

    bench = Bench()
    with pytest.raises(ValueError, match="the device is gone"):
        bench.ahead.close(fail)
    assert not bench.reader._thread.is_alive()


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_order_gets_the_right_bytes(data: st.DataObject) -> None:
    """Blobs asked for in any order, several at once, buffers freed late, blobs written between."""
    bench, gates = Bench(), list[threading.Event]()
    numbers = st.integers(0, len(SIZES) - 1)
    futures: list[Outcome] = []
    asked: list[int] = []
    try:
        for number in data.draw(st.lists(numbers, max_size=25)):
            gates.append(threading.Event())
            futures.append(bench.fetch(number, gates[-1].wait))
            asked.append(number)
            for gate in gates[: -data.draw(st.integers(1, 4))]:  # the last few are still in use
                gate.set()
            if data.draw(st.integers(0, 4)) == 0:
                for gate in gates:
                    gate.set()
                for future in futures:
                    future.result(SOON_S)
                changed = data.draw(numbers)
                bench.version[changed] += 1
                bench.ahead.write(changed, blob(changed, bench.version[changed]))
        for gate in gates:
            gate.set()
        for future in futures:
            future.result(SOON_S)
    finally:
        for gate in gates:
            gate.set()
        bench.ahead.close(lambda: None)
    assert bench.used == asked and bench.faults == []


@given(
    num_blobs=st.integers(1, 6),
    asked=st.lists(st.integers(0, 5), max_size=12),
    waiting=st.integers(0, 4),
)
def test_the_first_that_is_waited_for_is_there_or_read_next(
    num_blobs: int, asked: list[int], waiting: int
) -> None:
    staging = Staging(num_blobs)
    for at, number in enumerate(asked):
        staging.ask(number % num_blobs)
        waited_for = [one % num_blobs for one in asked[max(0, at - waiting) : at + 1]]
        num_reads = 0
        while (task := staging.next_read(waited_for)) is not None:
            stage, read = task
            assert staging.held[stage] == read and waited_for[0] in staging.held
            assert staging.held.count(read) == 1
            num_reads += 1
        assert waited_for[0] in staging.held and num_reads <= NUM_STAGES


def test_the_thread_ends_before_the_interpreter() -> None:
    """In the middle of a read that nobody waits for; what runs at exit later finds no thread."""
    program = f"""
import atexit, sys, threading, time
sys.path.insert(0, sys.argv[1])
names = lambda: [t.name for t in threading.enumerate()]
atexit.register(lambda: print("bminf-reader" in names()))
from {Path(__file__).stem} import Bench
bench = Bench()
bench.store.may_read.clear()
waiting = bench.fetch(0)
assert bench.store.has_begun.wait(120) and "bminf-reader" in names()
threading.Timer(0.2, bench.store.may_read.set).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_what_is_closed_is_not_kept_for_the_exit() -> None:
    bench = Bench()
    bench.fetch(0).result(SOON_S)
    kept = [weakref.ref(bench.ahead), weakref.ref(bench.ahead._at_exit)]
    bench.ahead.close(lambda: None)
    del bench
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
