"""Memory for kernels on the CPU: copies of the arguments between pages that nobody may touch."""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
# Buffers kept for the next launch: a fresh page costs more than copying into one that is there.
MAX_IDLE_BYTES = 256 * 2**20


class HostKernelError(Exception):
    """A kernel did what it must not; the message names kernel, block, thread and line."""


@dataclass(frozen=True)
class Memory:
    """Bytes in this process that a kernel may use: a tensor's, or several that overlap."""

    address: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.address + self.num_bytes


@dataclass(frozen=True)
class Pointer:
    """An argument: `offset` bytes into the launch's piece of memory number `memory`."""

    memory: int
    offset: int = 0


def merge(pieces: Sequence[Memory]) -> tuple[list[Memory], list[Pointer]]:
    """Memory that covers all `pieces`, one for those that overlap, and where each piece lies."""
    merged: list[Memory] = []
    for piece in sorted(set(pieces), key=lambda piece: piece.address):
        last = merged[-1] if merged else None
        if last and (piece.address < last.end or piece.address == last.address):
            merged[-1] = Memory(last.address, max(last.end, piece.end) - last.address)
        else:
            merged.append(piece)
    starts = [piece.address for piece in merged]
    places = [bisect.bisect_right(starts, piece.address) - 1 for piece in pieces]
    return merged, [
        Pointer(place, piece.address - starts[place])
        for place, piece in zip(places, pieces, strict=True)
    ]


class _Buffer(ctypes.Structure):  # ShimBuffer of host/shim_memory.cpp
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_size_t),
        ("begin", ctypes.c_void_p),
        ("num_bytes", ctypes.c_size_t),
    )


class Buffers:
    """The runtime's guarded buffers, some of them kept for later launches."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = ctypes.CDLL(str(runtime))
        create = self.runtime.shim_buffer_create
        create.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
        self.runtime.shim_buffer_damage.restype = ctypes.c_ssize_t
        self.idle: defaultdict[tuple[int, int], list[_Buffer]] = defaultdict(list)
        self.idle_bytes = 0

    def take(self, num_bytes: int, modulo_16: int) -> _Buffer:
        """A writable buffer that ends at a guard page, or up to 15 bytes before."""
        idle = self.idle[num_bytes, modulo_16]
        if idle:
            self.idle_bytes -= num_bytes
            return idle.pop()
        buffer = _Buffer()
        if self.runtime.shim_buffer_create(num_bytes, modulo_16, ctypes.byref(buffer)):
            raise MemoryError(f"{num_bytes} bytes between guard pages")
        return buffer

    def give_back(self, buffer: _Buffer) -> None:
        is_damaged = self.damage(buffer) != 0
        if is_damaged or self.idle_bytes + buffer.num_bytes > MAX_IDLE_BYTES:
            self.runtime.shim_buffer_destroy(ctypes.byref(buffer))
            return
        self.protect(buffer, is_read_only=False)
        self.idle[buffer.num_bytes, buffer.begin % 16].append(buffer)
        self.idle_bytes += buffer.num_bytes

    def protect(self, buffer: _Buffer, is_read_only: bool) -> None:
        self.runtime.shim_buffer_protect(ctypes.byref(buffer), int(is_read_only))

    def damage(self, buffer: _Buffer) -> int:
        """The offset of a byte outside of `buffer` that was written to, or 0."""
        offset: int = self.runtime.shim_buffer_damage(ctypes.byref(buffer))
        return offset


@functools.cache
def buffers_of(runtime: Path) -> Buffers:
    """The one pool of each runtime."""
    return Buffers(runtime)


class Guarded:
    """Copies of a launch's memory for as long as it runs; those not `written` are read-only."""

    def __init__(
        self,
        buffers: Buffers,
        memory: Sequence[Memory],
        written: set[int],
        name_of: Callable[[int], str],
    ) -> None:
        self.buffers, self.memory, self.written, self.name_of = buffers, memory, written, name_of
        self.copies = [buffers.take(piece.num_bytes, piece.address % 16) for piece in memory]

    def __enter__(self) -> Guarded:
        for i, (piece, copy) in enumerate(zip(self.memory, self.copies, strict=True)):
            ctypes.memmove(copy.begin, piece.address, piece.num_bytes)
            if i not in self.written:
                self.buffers.protect(copy, is_read_only=True)
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self.copies:
            self.buffers.give_back(copy)

    def begins(self) -> list[int]:
        """The address of each copy."""
        return [copy.begin for copy in self.copies]

    def finish(self) -> None:
        """Copies results back, after a look at what lies around them."""
        for i, copy in enumerate(self.copies):
            offset = self.buffers.damage(copy)
            if offset:
                place = f"{-offset} bytes before" if offset < 0 else f"at byte {offset} of"
                raise HostKernelError(
                    f"wrote {place} the {copy.num_bytes} bytes of {self.name_of(i)}"
                )
        for i in self.written:
            piece = self.memory[i]
            ctypes.memmove(piece.address, self.copies[i].begin, piece.num_bytes)

    def explain(self, address: int) -> str:
        """Which argument an address belongs to, or is near to; nothing where there is none."""
        for i, copy in enumerate(self.copies):
            end = copy.pages + copy.page_bytes
            if copy.pages - PAGE_BYTES <= address < end + PAGE_BYTES:
                kind = "" if i in self.written else ", which is only read"
                offset = address - copy.begin
                return f": byte {offset} of the {copy.num_bytes} of {self.name_of(i)}{kind}"
        return ""
