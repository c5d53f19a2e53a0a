"""Which thread copies a blob on the CPU: the one that asks, or the reader."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from streaming import HANGS_S, make_stack, stream

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
        backend.put(block, [("weight", weight)])
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
