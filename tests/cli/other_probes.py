"""Bandwidths measured in other ways than bminf/cli/machine.py has, to compare with it.

By numpy, mapped files and calls of the system, without torch.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

NUM_BYTES = 2**27
PIECE_BYTES = 2**22

Probe = Callable[[], float]


def memory() -> float:
    """Bytes a second of the processor's time, in finding the largest of many numbers."""
    numbers = np.ones(NUM_BYTES // 4, dtype=np.float32)
    return numbers.nbytes / seconds(numbers.max, time.thread_time)


@contextmanager
def written(folder: Path) -> Iterator[int]:
    """A file on the disk, open."""
    path = folder / "other probe"
    path.write_bytes(os.urandom(PIECE_BYTES) * (NUM_BYTES // PIECE_BYTES))
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    try:
        yield opened
    finally:
        os.close(opened)
        path.unlink()


def page_cache(file: int) -> float:
    """Bytes a second of the processor's time, in one call for all of a file that is cached."""
    buffer = bytearray(NUM_BYTES)
    return NUM_BYTES / seconds(lambda: os.preadv(file, [buffer], 0), time.thread_time)


def disk(file: int) -> float:
    """Bytes a second of a file of which nothing is cached, mapped, page by page."""

    def read() -> None:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            assert len(mapped[:: mmap.PAGESIZE]) == NUM_BYTES // mmap.PAGESIZE

    return NUM_BYTES / seconds(read, time.perf_counter, 3)


def seconds(work: Callable[[], object], clock: Callable[[], float], rounds: int = 5) -> float:
    """Median of some, after the first."""
    times = []
    for _ in range(rounds + 1):
        start_s = clock()
        work()
        times.append(clock() - start_s)
    return statistics.median(times[1:])


def alternating(first: Probe, second: Probe) -> float:
    """The one in units of the other, medians of five each: what changes on the machine meanwhile
    changes both."""
    pairs = [(first(), second()) for _ in range(5)]
    one, two = zip(*pairs, strict=True)
    return statistics.median(one) / statistics.median(two)
