"""Streaming to a GPU: page-locked host copies, one copy stream, events at every hand-over.

The copy stream waits for the event behind the last use of a slot, the computing stream for the
event behind the copy; a blob is one transfer. All device memory comes from torch's allocator.

Blobs that host memory has no room for lie in a file and are read ahead into page-locked staging
buffers (disk.py). A transfer can be queued only when its blob has been read, so the host may
have to wait for that; with all host copies in memory it never waits within a pass.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bminf.checkpoint.stored import InFile
from bminf.cuda.pinned import PinnedMemory
from bminf.errors import BudgetError
from bminf.layout import Layout
from bminf.offload import memory
from bminf.offload.backends.base import NOT_POOLED, Copied, Counters, Pooled
from bminf.offload.disk import NUM_STAGES, FileStore, Outcome, ReadAhead, Reader
from bminf.offload.ring import NUM_SLOTS
from bminf.units import format_bytes

logger = logging.getLogger("bminf")

# Of torch's allocator, see allocated_bytes().
_MIN_SEGMENT = 10 * 2**20
_SEGMENT_MULTIPLE = 2 * 2**20
_MIN_SPLIT = 2**20

_Interval = tuple[torch.cuda.Event, torch.cuda.Event]


class _Copy(NamedTuple):
    """A copy that was asked for. is_queued: done when it stands in the copy stream, where that is
    not at once; only then `end` is recorded, and waiting for it means anything."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    is_queued: Outcome | None = None


class _Files(NamedTuple):
    """The blobs that lie in a file. places: block -> its place in the store."""

    places: dict[int, int]
    store: FileStore
    stages: dict[int, PinnedMemory]
    read_ahead: ReadAhead


class CudaBackend:
    """See Backend. Host copies are page-locked memory, or a file for blocks `on_disk`."""

    keeps_addresses = False

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.slots: list[torch.Tensor] = []
        self.pool: list[torch.Tensor] = []
        self._layouts: list[Layout] = []
        self._host_copies: dict[int, PinnedMemory] = {}
        self._files: _Files | None = None
        self._computing: set[torch.cuda.Stream] = set()  # that have used a slot
        self._counters = Counters()
        self.copy_log: list[Copied] | None = None
        self._copying: deque[Copied] = deque()  # not yet counted
        self._waiting: deque[_Interval] = deque()  # the same of waits

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"cannot allocate {format_bytes(nbytes)} of memory on {self.device}: other "
                "programs or tensors hold it; lower memory_limit, or free some"
            ) from error

    def open(
        self,
        layouts: Sequence[Layout],
        offload_dir: str | Path | None,
        on_disk: Sequence[int] = (),
        lying: Mapping[int, InFile] | None = None,
        pooled: Pooled | None = None,
    ) -> Collection[int]:
        pooled = pooled or NOT_POOLED
        self._layouts = [*layouts, *pooled.layouts]
        if on_disk:
            self._files = self._open_files(on_disk, offload_dir, lying or {})
        try:
            self._open_slots(max((layout.extent for layout in layouts), default=0), pooled)
        except BaseException:
            self.close()
            raise
        return {block for block in lying or () if block in on_disk}

    def _open_files(
        self,
        on_disk: Sequence[int],
        offload_dir: str | Path | None,
        lying: Mapping[int, InFile],
    ) -> _Files:
        extents = [self._layouts[block].extent for block in on_disk]
        there = {place: lying[block] for place, block in enumerate(on_disk) if block in lying}
        store = FileStore(extents, offload_dir, there)
        stages: dict[int, PinnedMemory] = {}
        try:
            for index in range(NUM_STAGES):
                stages[index] = self._pinned(max(extents))
            reader = Reader("bminf-reader")
        except BaseException:
            _close_all(stages)
            store.close()
            raise
        # A thread begins with the first GPU, and would take memory there.
        reader.submit(partial(torch.cuda.set_device, self.device))
        read_ahead = ReadAhead(store, extents, [stage.tensor for stage in stages.values()], reader)
        places = {block: index for index, block in enumerate(on_disk)}
        logger.warning(
            "%d of %d streamed blocks (%s) wait on disk, because host memory has no room for them; "
            "they are read anew in each pass",
            len(on_disk),
            len(self._layouts),
            format_bytes(sum(extents)),
        )
        return _Files(places, store, stages, read_ahead)

    def _open_slots(self, extent: int, pooled: Pooled) -> None:
        self._stream = torch.cuda.Stream(self.device)
        self.slots = [self.allocate(extent) for _ in range(NUM_SLOTS)]
        self.pool = pooled.slots(self.allocate)
        for slot in (*self.slots, *self.pool[:1]):  # the pool is one buffer
            slot.record_stream(self._stream)
        # The memory of the slots may still be read by work queued before they were allocated.
        self._stream.wait_stream(self._compute_stream())

    def put(self, block: int, fill: Callable[[torch.Tensor], object]) -> None:
        if self._files is not None and block in self._files.places:
            # Nothing is read ahead before the first copy, so a staging buffer is free.
            blob = self._files.stages[0].tensor[: self._layouts[block].extent]
            fill(blob)
            self._files.read_ahead.write(self._files.places[block], blob)
            return
        copy = self._pinned(self._layouts[block].extent)
        self._host_copies[block] = copy
        fill(copy.tensor)

    def hold(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        rows: Iterable[torch.Tensor],
        offload_dir: str | Path | None = None,
    ) -> torch.Tensor:
        """In pageable memory: a few rows of it are read at a time, and copied by the host."""
        table = memory.allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)
        first = 0
        for some in rows:
            table[first : first + len(some)].copy_(some)
            first += len(some)
        return table

    def gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.cpu()  # waits for them, as whoever samples them one by one does anyway
        shape = (ids.numel(), table.shape[1])
        # Page-locked, so that the host goes on while the rows are copied; torch takes it back then.
        rows = torch.empty(shape, dtype=table.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(table, 0, ids.reshape(-1), out=rows)
        return rows.view(*ids.shape, table.shape[1]).to(self.device, non_blocking=True)

    def host_copy(self, block: int) -> torch.Tensor:
        if self._files is not None and block in self._files.places:
            return self._files.store.map(self._files.places[block])
        return self._host_copies[block].tensor

    def write_back(self, block: int, slot: int) -> None:
        # Rare (a block that changes its own buffers), so waiting here is the simple right thing.
        if self._files is not None and block in self._files.places:
            blob = self._slot(block, slot).cpu()
            self._files.read_ahead.write(self._files.places[block], blob)
            return
        self._host_copies[block].tensor.copy_(self._slot(block, slot))

    def rewrite(self, block: int, name: str, tensor: torch.Tensor) -> None:
        # Behind this, no copy that a computation waits for is queued; those ahead are dropped.
        self._compute_stream().synchronize()
        layout, blob = self._layouts[block], self.host_copy(block)
        layout.fill(blob, [(name, tensor)])
        if self._files is not None and block in self._files.places:
            start, end = layout.span(name)  # the blob is a private copy of the file
            self._files.read_ahead.write(self._files.places[block], blob[start:end], start)

    def copy(self, block: int, slot: int, after: torch.cuda.Event | None) -> _Copy:
        copy, files = _Copy(self._event(), self._event()), self._files
        queue = partial(self._queue, copy, block, slot, after)
        # Behind those asked for before, at once or when its blob has been read.
        if files is None:
            queue(self._host_copies[block].tensor)
        elif block in files.places:
            copy = copy._replace(is_queued=files.read_ahead.fetch(files.places[block], queue))
        else:
            in_host = partial(queue, self._host_copies[block].tensor)
            copy = copy._replace(is_queued=files.read_ahead.do(in_host))
        self._count()
        return copy

    def _queue(
        self,
        copy: _Copy,
        block: int,
        slot: int,
        after: torch.cuda.Event | None,
        source: torch.Tensor,
    ) -> Callable[[], None]:
        """Queue a copy, in whichever thread; what is returned waits until `source` was read."""
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            copy.start.record(self._stream)
            self._slot(block, slot).copy_(source, non_blocking=True)
            copy.end.record(self._stream)
        self._counters.copies += 1
        self._counters.bytes_copied += self._layouts[block].nbytes
        self._copying.append(Copied(block, slot, copy.start, copy.end))
        return copy.end.synchronize

    def wait(self, copied: _Copy) -> None:
        start = self._event()
        start.record(self._compute_stream())
        if copied.is_queued is not None:
            copied.is_queued.result()
        self._compute_stream().wait_event(copied.end)
        self._waiting.append((start, copied.end))

    def has_ended(self, copied: _Copy) -> bool:
        is_queued = copied.is_queued is None or copied.is_queued.done()
        return is_queued and copied.end.query()

    def mark(self) -> torch.cuda.Event:
        stream, event = self._compute_stream(), torch.cuda.Event()
        event.record(stream)
        if stream not in self._computing:
            self._computing.add(stream)
            # Or, once freed, they could be reused while that stream reads them.
            for slot in (*self.slots, *self.pool[:1]):
                slot.record_stream(stream)
        return event

    def counters(self) -> Counters:
        self._count()
        return self._counters

    def now(self) -> torch.cuda.Event:
        event = self._event()
        event.record(self._compute_stream())
        return event

    def elapsed_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms / 1e3

    def close(self) -> None:
        if self._files is None:
            self._give_back()
        else:
            self._files.read_ahead.close(self._give_back)

    def release(self) -> None:
        if self._files is None:
            self._give_back()  # waits for the copy stream, never for a thread
        else:
            self._files.read_ahead.release(self._give_back)

    def _give_back(self) -> None:
        if self.slots:
            self._stream.synchronize()
        self.slots, self.pool = [], []
        _close_all(self._host_copies)
        if self._files is not None:
            _close_all(self._files.stages)

    def _count(self) -> None:
        """Add the times of what has ended; what is still in progress is counted later."""
        while self._copying and _ended(self._copying[0][2:]):
            copied = self._copying.popleft()
            self._counters.copied_s += copied.start.elapsed_time(copied.end) / 1e3
            if self.copy_log is not None:
                self.copy_log.append(copied)
        while self._waiting and _ended(self._waiting[0]):
            start, end = self._waiting.popleft()
            waited_s = start.elapsed_time(end) / 1e3
            if waited_s > 0:
                self._counters.waits += 1
                self._counters.waited_s += waited_s

    def _pinned(self, nbytes: int) -> PinnedMemory:
        # With no GPU in use CuPy would take the first one, and memory there.
        with torch.cuda.device(self.device):
            return PinnedMemory(nbytes)

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True, blocking=True)  # so that a wait does not spin

    def _compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _slot(self, block: int, slot: int) -> torch.Tensor:
        slots = self.slots[slot] if slot < NUM_SLOTS else self.pool[slot - NUM_SLOTS]
        return slots[: self._layouts[block].extent]


def _close_all(memories: dict[int, PinnedMemory]) -> None:
    while memories:  # one by one, so that none is closed twice, should this be repeated
        memories.popitem()[1].close()


def _ended(interval: _Interval) -> bool:
    return all(event.query() for event in interval)


def allocated_bytes(nbytes: int) -> int:
    """Bytes that torch's allocator takes for one buffer of `nbytes`, to within 512.

    Large ones get a segment of their own, a multiple of 2 MiB, whose end is given to nobody else
    unless it has more than 1 MiB. Source: c10/cuda/CUDACachingAllocator, the defaults of torch 2.4
    to 2.13.
    """
    rest = -nbytes % _SEGMENT_MULTIPLE
    return nbytes + rest if nbytes >= _MIN_SEGMENT and rest <= _MIN_SPLIT else nbytes


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on the GPU, torch's unused cache counted as free."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached
