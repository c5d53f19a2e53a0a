"""Streaming to a GPU: homes in page-locked host memory, one copy stream, events at every hand-over.

The host never waits within a pass. The copy stream waits for the event behind the last use of a
slot, the computing stream for the event behind the copy; a blob is one transfer. All device memory
comes from torch's allocator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bminf.cuda.pinned import PinnedMemory
from bminf.errors import BudgetError
from bminf.layout import Layout
from bminf.scheduler.backends.base import Counters
from bminf.scheduler.ring import NUM_SLOTS
from bminf.units import format_bytes

_Interval = tuple[torch.cuda.Event, torch.cuda.Event]


class CudaBackend:
    """See Backend. Homes are page-locked memory; `offload_dir` is not used."""

    keeps_addresses = False

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.slots: list[torch.Tensor] = []
        self._layouts: list[Layout] = []
        self._homes: dict[int, PinnedMemory] = {}
        self._counters = Counters()
        self._copying: deque[_Interval] = deque()  # begin and end of copies not yet counted
        self._waiting: deque[_Interval] = deque()  # asked for, and there

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"{format_bytes(nbytes)} of memory cannot be had on {self.device}: other programs "
                "or tensors hold it; lower memory_limit, or free some"
            ) from error

    def open(self, layouts: Sequence[Layout], offload_dir: str | Path | None) -> None:
        self._layouts = list(layouts)
        self._stream = torch.cuda.Stream(self.device)
        extent = max(layout.extent for layout in layouts)
        self.slots = [self.allocate(extent) for _ in range(NUM_SLOTS)]
        for slot in self.slots:
            slot.record_stream(self._stream)
        # The memory of the slots may still be read by work queued before they were allocated.
        self._stream.wait_stream(self._compute_stream())

    def put(self, block: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        home = PinnedMemory(self._layouts[block].extent)
        self._homes[block] = home
        self._layouts[block].fill(home.tensor, tensors)

    def home(self, block: int) -> torch.Tensor:
        return self._homes[block].tensor

    def write_back(self, block: int, slot: int) -> None:
        # Rare (a block that changes its own buffers), so waiting here is the simple right thing.
        self._homes[block].tensor.copy_(self._slot(block, slot))

    def copy(self, block: int, slot: int, after: torch.cuda.Event | None) -> torch.cuda.Event:
        began, ended = self._event(), self._event()
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            began.record(self._stream)
            self._slot(block, slot).copy_(self._homes[block].tensor, non_blocking=True)
            ended.record(self._stream)
        self._counters.copies += 1
        self._counters.bytes_copied += self._layouts[block].nbytes
        self._copying.append((began, ended))
        self._count()
        return ended

    def wait(self, copied: torch.cuda.Event) -> None:
        asked = self._event()
        asked.record(self._compute_stream())
        self._compute_stream().wait_event(copied)
        self._waiting.append((asked, copied))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._compute_stream())
        return event

    def counters(self) -> Counters:
        self._count()
        return self._counters

    def close(self) -> None:
        if self.slots:
            self._stream.synchronize()
        for home in self._homes.values():
            home.close()
        self._homes, self.slots = {}, []

    def release(self) -> None:
        self.close()  # waits for the copy stream, never for a thread

    def _count(self) -> None:
        """Add the times of what has ended; what is still under way is counted later."""
        while self._copying and _ended(self._copying[0]):
            began, ended = self._copying.popleft()
            self._counters.copied_s += began.elapsed_time(ended) / 1e3
        while self._waiting and _ended(self._waiting[0]):
            asked, there = self._waiting.popleft()
            waited_s = asked.elapsed_time(there) / 1e3
            if waited_s > 0:
                self._counters.waits += 1
                self._counters.waited_s += waited_s

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def _compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _slot(self, block: int, slot: int) -> torch.Tensor:
        return self.slots[slot][: self._layouts[block].extent]


def _ended(interval: _Interval) -> bool:
    return all(event.query() for event in interval)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on the GPU, torch's unused cache counted as free."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached
