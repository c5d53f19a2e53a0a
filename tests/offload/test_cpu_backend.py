"""Streaming from a file (bminf/offload/backends/cpu.py), by a reader thread or at once.

It is all that bminf/offload/backends/base.py asks for.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import thread as executors
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import HANGS_S, make_stack, num_readers, settled_readers, stream, until

import bminf
from bminf.errors import OffloadError
from bminf.layout import Layout, TensorSpec
from bminf.offload.backends import cpu
from bminf.offload.backends.cpu import CpuBackend
from bminf.offload.disk import AT_ONCE

WEIGHTS = [torch.arange(1000) + block for block in range(3)]
READER = "bminf-reader"


class Disk:
    """os.preadv. The answer to a read that must not wait is given; all others are real."""

    def __init__(self, answer: Callable[..., int]) -> None:
        self.answer, self._read = answer, os.preadv
        self.waiting: list[str] = []  # the threads of all other reads

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            assert flags == os.RWF_NOWAIT
            return self.answer(self._read, descriptor, buffers, offset)
        self.waiting.append(threading.current_thread().name)
        return self._read(descriptor, buffers, offset)


def all_cached(read: Callable[..., int], *arguments: Any) -> int:
    return read(*arguments)


def half_cached(read: Callable[..., int], descriptor: int, buffers: Any, offset: int) -> int:
    return read(descriptor, [buffers[0][: len(buffers[0]) // 2]], offset)


def failing(error: Exception) -> Callable[..., int]:
    def answer(*_: Any) -> int:
        raise error

    return answer


@pytest.fixture
def backend() -> Iterator[CpuBackend]:
    backend = CpuBackend()
    layouts = [Layout.of({"weight": TensorSpec.of(weight)}) for weight in WEIGHTS]
    backend.open(layouts, None)
    for block, weight in enumerate(WEIGHTS):
        backend.put(block, partial(layouts[block].fill, tensors=[("weight", weight)]))
    yield backend
    backend.close()


def disk(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., int] = all_cached) -> Disk:
    disk = Disk(answer)
    monkeypatch.setattr(os, "preadv", disk)
    return disk


def holds(backend: CpuBackend, slot: int, block: int) -> bool:
    weight = backend._layouts[block].view(backend.slots[slot], "weight")
    return torch.equal(weight, WEIGHTS[block])


def test_a_small_cached_blob_is_copied_at_once(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = disk(monkeypatch)
    for block, slot in ((2, 1), (0, 0), (1, 1)):
        copied = backend.copy(block, slot, None)
        assert holds(backend, slot, block) and copied.done()
        backend.wait(copied)
    counters = backend.counters()
    assert reads.waiting == [] and counters.copied_s > 0
    assert (counters.copies, counters.bytes_copied) == (3, 3 * WEIGHTS[0].nbytes)
    assert (counters.waits, counters.waited_s) == (0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        failing(BlockingIOError(errno.EAGAIN, "not in memory")),
        failing(OSError(errno.EOPNOTSUPP, "not this file system")),
        failing(NotImplementedError("not this C library")),
        half_cached,
    ],
)
def test_what_is_not_cached_is_left_to_the_reader(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., int]
) -> None:
    reads = disk(monkeypatch, answer)
    copied = backend.copy(2, 1, None)
    assert copied is not AT_ONCE
    backend.wait(copied)
    assert holds(backend, 1, 2) and reads.waiting == [READER]
    assert backend.counters().copies == 1
    assert backend.counters().bytes_copied == WEIGHTS[2].nbytes


@pytest.mark.parametrize(("more_bytes", "expected"), [(0, []), (-1, [READER])])
def test_a_large_blob_is_left_to_the_reader(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch, more_bytes: int, expected: list[str]
) -> None:
    reads = disk(monkeypatch)
    monkeypatch.setattr(cpu, "AT_ONCE_BYTES", backend._layouts[1].extent + more_bytes)
    backend.wait(backend.copy(1, 0, None))
    assert holds(backend, 0, 1) and reads.waiting == expected


def test_a_copy_behind_one_of_the_reader_is_left_to_it(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two copies into one slot, the later one must be the last."""
    reads, may_read = disk(monkeypatch), threading.Event()
    assert backend._reader is not None
    backend._reader.submit(lambda: may_read.wait(HANGS_S))
    with monkeypatch.context() as context:
        context.setattr(cpu, "AT_ONCE_BYTES", 0)
        backend.copy(0, 1, None)  # not waited for: the ring asked for another block
    later = backend.copy(2, 1, None)
    assert not later.done()
    may_read.set()
    backend.wait(later)
    assert holds(backend, 1, 2) and reads.waiting == [READER] * 2
    assert backend.copy(1, 0, None) is AT_ONCE  # and nothing is left to the reader


def test_a_failed_read_is_raised_where_it_is_waited_for(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = failing(OSError(errno.EIO, "the disk is gone"))
    with monkeypatch.context() as context:
        context.setattr(os, "preadv", broken)
        copied = backend.copy(2, 1, None)
        with pytest.raises(OffloadError, match="the disk is gone"):
            backend.wait(copied)
    backend.wait(backend.copy(2, 1, None))
    assert holds(backend, 1, 2)


def test_a_model_does_not_see_which_thread_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, counts = disk(monkeypatch), []
    for at_once_bytes in (cpu.AT_ONCE_BYTES, 0):
        assert reads.waiting == []  # of the first round
        monkeypatch.setattr(cpu, "AT_ONCE_BYTES", at_once_bytes)
        model, x = make_stack(), torch.randn(3, 16)
        expected, alone = model(x), model.layers[5](x)
        stream(model)
        for _ in range(3):
            assert torch.equal(model(x), expected)
            assert torch.equal(model.layers[5](x), alone)  # out of order, which drops copies
        stats = bminf.stats_of(model)
        counts.append((stats.passes, stats.copies, stats.bytes_copied))
        bminf.unwrap(model)
    assert len(reads.waiting) == stats.copies  # of the second
    assert counts[0] == counts[1]


def test_unwrapping_closes_the_file_and_ends_the_reader() -> None:
    threads = settled_readers()
    open_files = len(os.listdir("/proc/self/fd"))
    model = stream(make_stack())
    assert num_readers() == threads + 1
    bminf.unwrap(model)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert num_readers() == threads


def test_a_model_may_die_while_a_thread_is_being_started(tmp_path: Path) -> None:
    """The collector may run inside Thread.start, whose locks a finalizer must not ask for."""

    def collect() -> None:
        with executors._global_shutdown_lock, threading._active_limbo_lock:
            gc.collect()

    threads = settled_readers()
    open_files = len(os.listdir("/proc/self/fd"))
    model = stream(make_stack(), offload_dir=tmp_path)
    model.itself = [model]  # only the collector can free it
    del model
    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    collector.join(HANGS_S)
    assert not collector.is_alive()
    until(lambda: num_readers() == threads)  # the reader ends by itself
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert list(tmp_path.iterdir()) == []


def test_a_copy_under_way_ends_before_its_model_is_given_back() -> None:
    model, may_end = make_stack(), threading.Event()
    backend = stream(model)._bminf_scheduler.backend
    store = backend._store
    backend._reader.submit(may_end.wait)
    copied = backend.copy(0, 0, None)
    backend.release()
    assert not copied.done() and not store._file.closed
    may_end.set()
    copied.result(HANGS_S)
    backend._reader.join()
    assert store._file.closed


def test_a_read_that_failed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, failed = make_stack(), torch.randn(3, 16), []
    expected = model.layers[5](x)
    monkeypatch.setattr(cpu, "AT_ONCE_BYTES", 0)
    stream(model)
    number = bminf.plan_of(model).streamed.index("layers.5")
    store = model._bminf_scheduler.backend._store
    original = store.read_into

    def read_into(block: int, blob: torch.Tensor) -> None:
        if block == number and not failed:
            failed.append(block)
            raise OffloadError("the disk is gone")
        original(block, blob)

    monkeypatch.setattr(store, "read_into", read_into)
    with pytest.raises(OffloadError, match="gone"):
        model(x)
    assert torch.equal(model.layers[5](x), expected)


def test_a_slow_read_that_is_not_wanted_any_more_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model.layers[1](x)
    monkeypatch.setattr(cpu, "AT_ONCE_BYTES", 0)
    stream(model)
    streamed = bminf.plan_of(model).streamed
    slow = {streamed.index("layers.4"), streamed.index("layers.5")}
    store = model._bminf_scheduler.backend._store
    original = store.read_into

    def read_into(block: int, blob: torch.Tensor) -> None:
        if block in slow:
            time.sleep(0.1)
        original(block, blob)

    monkeypatch.setattr(store, "read_into", read_into)
    model.layers[1].up.register_forward_pre_hook(lambda *_: time.sleep(0.4))
    model.layers[3](x)  # now 4 and 5 are read ahead
    assert torch.equal(model.layers[1](x), expected)
