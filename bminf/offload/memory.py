"""Host memory in exact sizes, and how much of it is free."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import torch

from bminf.errors import BudgetError
from bminf.offload.control_groups import free_below_limits
from bminf.pages import private_pages
from bminf.units import format_bytes


def allocate(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 zeros on the CPU, page-aligned, in anonymous memory of their own."""
    with torch.inference_mode(False):
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        try:
            region = private_pages(nbytes)
        except (OSError, OverflowError) as error:
            raise BudgetError(f"{format_bytes(nbytes)} of memory cannot be had: {error}") from error
        return torch.frombuffer(region, dtype=torch.uint8)


def trim() -> None:
    """Have malloc give free pages back to the system, where it can (glibc)."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def mapped_files() -> Callable[[int], bool]:
    """A test whether an address lies in a mapped file, as things are now (Linux; else: never)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return lambda address: False
    spans = []
    for line in maps.read_bytes().decode(errors="replace").split("\n"):
        if not line:
            continue
        span, _, _, _, inode, *_ = line.split()
        if inode != "0":
            begin, end = span.split("-")
            spans.append((int(begin, 16), int(end, 16)))
    starts = [begin for begin, _ in spans]  # the system lists them in order

    def is_mapped(address: int) -> bool:
        number = bisect_right(starts, address) - 1
        return number >= 0 and address < spans[number][1]

    return is_mapped


def free_bytes() -> int:
    """Bytes of memory that can still be had, by this process and the groups that it is in."""
    return min([_system_free_bytes(), *_container_free_bytes(Path("/sys/fs/cgroup"))])


def _system_free_bytes() -> int:
    if sys.platform == "win32":
        return _windows_free_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return _sysctl_free_bytes()


def _sysctl_free_bytes() -> int:
    import os

    # macOS counts no "available" pages here; half of the memory is a guess on the safe side.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _windows_free_bytes() -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "available", "c", "d", "e", "f", "g")
            ),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.available)


def _container_free_bytes(root: Path) -> list[int]:
    """Free bytes under each limit of the process's control groups (version 2, then 1)."""
    return free_below_limits(root, Path("/proc/self"))
