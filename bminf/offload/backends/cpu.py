"""Streaming on a machine without a GPU: the limit is RAM, the host copies lie in a file.

A reader thread fills the slots while the model computes. To wake it takes longer than to copy a
small blob from the page cache, which is done at once instead, where nothing is left to the reader:
of two copies into one slot, the later one must be the last. Computation is synchronous here, so a
slot is free as soon as its block has been left, and a mark is nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from bminf.checkpoint.stored import InFile
from bminf.layout import Layout
from bminf.offload import memory
from bminf.offload.backends.base import NOT_POOLED, Copied, Counters, Pooled
from bminf.offload.disk import AT_ONCE, FileStore, Outcome, Reader, bytes_of
from bminf.offload.ring import NUM_SLOTS

AT_ONCE_BYTES = 2**17
"""The largest blob that is copied at once. Handing a copy over took 30 to 60 us of CPU time, and
copying as much as this 12 (an x86 server with two cores)."""


class CpuBackend:
    """See Backend."""

    device = torch.device("cpu")
    keeps_addresses = True
    allocate = staticmethod(memory.allocate)

    def __init__(self) -> None:
        self.slots: list[torch.Tensor] = []
        self.pool: list[torch.Tensor] = []
        self.copy_log: list[Copied] | None = None
        self._num_unpooled = 0
        self._layouts: list[Layout] = []
        self._slot_bytes: list[memoryview] = []
        self._counters = Counters()
        self._store: FileStore | None = None
        self._reader: Reader | None = None

    def open(
        self,
        layouts: Sequence[Layout],
        offload_dir: str | Path | None,
        on_disk: Sequence[int] = (),
        lying: Mapping[int, InFile] | None = None,
        pooled: Pooled | None = None,
    ) -> Collection[int]:
        """All are in a file, whatever `on_disk` says."""
        pooled = pooled or NOT_POOLED
        self._layouts, self._num_unpooled = [*layouts, *pooled.layouts], len(layouts)
        self._store = FileStore([x.extent for x in self._layouts], offload_dir, lying)
        largest = max((layout.extent for layout in layouts), default=0)
        self.slots = [memory.allocate(largest) for _ in range(NUM_SLOTS)]
        self.pool = pooled.slots(memory.allocate)
        self._slot_bytes = [bytes_of(slot) for slot in (*self.slots, *self.pool)]
        self._reader = Reader("bminf-reader")
        return lying or ()

    def put(self, block: int, fill: Callable[[torch.Tensor], object]) -> None:
        # No slot is in use yet, so one can stage the blob.
        blob = self._slot(block, 0 if block < self._num_unpooled else NUM_SLOTS)
        fill(blob)
        self._opened_store().write(block, blob)

    def hold(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        rows: Iterable[torch.Tensor],
        offload_dir: str | Path | None = None,
    ) -> torch.Tensor:
        """Mapped from a file of its own, whose pages are the system's to take back."""
        store, start = FileStore([math.prod(shape) * dtype.itemsize], offload_dir), 0
        for some in rows:
            data = some.contiguous().view(-1).view(torch.uint8)
            store.write(0, data, start)
            start += len(data)
        table = store.map(0)
        store.close()
        return table.view(dtype).view(*shape)

    def gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.embedding(table, ids)

    def host_copy(self, block: int) -> torch.Tensor:
        return self._opened_store().map(block)

    def write_back(self, block: int, slot: int) -> None:
        self._opened_store().write(block, self._slot(block, slot))

    def rewrite(self, block: int, name: str, tensor: torch.Tensor) -> None:
        store, layout = self._opened_store(), self._layouts[block]
        blob = store.map(block)  # a private copy, of the pages that are touched
        layout.fill(blob, [(name, tensor)])
        start, end = layout.span(name)
        store.write(block, blob[start:end], start)

    def copy(self, block: int, slot: int, after: None) -> Outcome:
        assert self._reader is not None and self._store is not None
        self._counters.copies += 1
        self._counters.bytes_copied += self._layouts[block].nbytes
        # All that can be made ready is made here: the reader takes the interpreter from us.
        blob = self._slot_bytes[slot][: self._layouts[block].extent]
        if self._reader.is_idle() and len(blob) <= AT_ONCE_BYTES:
            if self._timed(self._store.read_cached, block, slot, blob):
                return AT_ONCE
        return self._reader.submit(partial(self._timed, self._store.read_into, block, slot, blob))

    def _timed(
        self, read: Callable[[int, memoryview], object], block: int, slot: int, blob: memoryview
    ) -> object:
        start_s = time.perf_counter()
        result = read(block, blob)
        end_s = time.perf_counter()
        self._counters.copied_s += end_s - start_s
        if self.copy_log is not None and result is not False:  # which is: not in the page cache
            self.copy_log.append(Copied(block, slot, start_s, end_s))
        return result

    def wait(self, copied: Outcome) -> None:
        if not copied.done():
            start_s = time.perf_counter()
            copied.wait()
            self._counters.waits += 1
            self._counters.waited_s += time.perf_counter() - start_s
        copied.result()

    def has_ended(self, copied: Outcome) -> bool:
        return copied.done()

    def mark(self) -> None:
        return None

    def counters(self) -> Counters:
        return self._counters

    def now(self) -> float:
        return time.perf_counter()

    def elapsed_s(self, start: float, end: float) -> float:
        return end - start

    def close(self) -> None:
        self.release()
        if self._reader is not None:
            self._reader.join()

    def release(self) -> None:
        store, self._store, self.slots, self.pool = self._store, None, [], []
        self._slot_bytes = []
        if self._reader is not None:  # or the file closes itself
            if store is not None:
                self._reader.submit(store.close)  # after the copies that were begun
            self._reader.stop()

    def _slot(self, block: int, slot: int) -> torch.Tensor:
        slots = self.slots[slot] if slot < NUM_SLOTS else self.pool[slot - NUM_SLOTS]
        return slots[: self._layouts[block].extent]

    def _opened_store(self) -> FileStore:
        assert self._store is not None, "open() comes first"
        return self._store
