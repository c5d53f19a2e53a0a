"""Streaming on a machine without a GPU: the limit is RAM, the homes lie in a file.

A reader thread fills the slots while the model computes. Computation is synchronous here, so a
slot is free as soon as its block has been left, and a mark is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from bminf.layout import Layout
from bminf.scheduler import memory
from bminf.scheduler.backends.base import Counters
from bminf.scheduler.ring import NUM_SLOTS
from bminf.scheduler.store import FileStore


class CpuBackend:
    """See Backend."""

    device = torch.device("cpu")
    keeps_addresses = True

    def __init__(self) -> None:
        self.slots: list[torch.Tensor] = []
        self._layouts: list[Layout] = []
        self._counters = Counters()
        self._store: FileStore | None = None
        self._reader: ThreadPoolExecutor | None = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        return memory.allocate(nbytes)

    def open(self, layouts: Sequence[Layout], offload_dir: str | Path | None) -> None:
        extents = [layout.extent for layout in layouts]
        self._store = FileStore(extents, offload_dir)
        self._layouts = list(layouts)
        self.slots = [memory.allocate(max(extents)) for _ in range(NUM_SLOTS)]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="bminf-reader")

    def put(self, block: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        blob = self._slot(block, 0)  # no slot is in use yet, so one can stage the blob
        self._layouts[block].fill(blob, tensors)
        self._opened_store().write(block, blob)

    def home(self, block: int) -> torch.Tensor:
        return self._opened_store().map(block)

    def write_back(self, block: int, slot: int) -> None:
        self._opened_store().write(block, self._slot(block, slot))

    def copy(self, block: int, slot: int, after: None) -> Future[None]:
        assert self._reader is not None
        self._counters.copies += 1
        self._counters.bytes_copied += self._layouts[block].nbytes
        return self._reader.submit(self._read, block, slot)

    def _read(self, block: int, slot: int) -> None:
        began = time.perf_counter()
        self._opened_store().read_into(block, self._slot(block, slot))
        self._counters.copied_s += time.perf_counter() - began

    def wait(self, copied: Future[None]) -> None:
        if not copied.done():
            began = time.perf_counter()
            copied.exception()
            self._counters.waits += 1
            self._counters.waited_s += time.perf_counter() - began
        copied.result()

    def mark(self) -> None:
        return None

    def counters(self) -> Counters:
        return self._counters

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown()
        if self._store is not None:
            self._store.close()
        self.slots = []

    def _slot(self, block: int, slot: int) -> torch.Tensor:
        return self.slots[slot][: self._layouts[block].extent]

    def _opened_store(self) -> FileStore:
        assert self._store is not None, "open() comes first"
        return self._store
