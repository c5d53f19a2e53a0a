"""Host memory in exact sizes, and how much of it is free to this process.

A container, a service or a user's session may have less than the machine. Every control group, from
the process's own up to the outermost that can be seen, has limits of its own, and counts what all
processes below it use; the least of what they leave is what can be allocated.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc(5).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from bminf.errors import BudgetError
from bminf.pages import private_pages
from bminf.units import format_bytes

_NO_LIMIT = 2**60  # above it stands what version 1 says where there is none
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes spaces


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups.

    limits: each of them bounds `usage`. memory.high does not kill, but a process above it is slowed
    down until it is below: such memory is not available either.
    reclaimable: in memory.stat, bytes of cached files that count as used and are given up first.
    """

    file_system: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_VERSIONS = (
    _Version("cgroup2", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    _Version(
        "cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
    ),
)  # fmt: skip


def free_below_limits(root: Path, process: Path = Path("/proc/self")) -> list[int]:
    """Free bytes under each limit of the process's control groups (version 2, then 1).

    root: where control groups are mounted, usually /sys/fs/cgroup.   process: /proc/self.
    """
    return [
        free
        for version in _VERSIONS
        for folder in dict.fromkeys(_folders(version, root, process))
        for free in _free_below(version, folder)
    ]


def limits_of_groups(root: Path, process: Path = Path("/proc/self")) -> list[int]:
    """Bytes that each control group of the process may have; see free_below_limits()."""
    return [
        limit
        for version in _VERSIONS
        for folder in dict.fromkeys(_folders(version, root, process))
        for limit in _limits(version, folder)
        if limit < _NO_LIMIT
    ]


def _folders(version: _Version, root: Path, process: Path) -> Iterator[Path]:
    """The groups of the process, and where there is no telling, the mount itself."""
    yield root if version.file_system == "cgroup2" else root / "memory"
    group = _group(version, process)
    for top, mount in _mounts(version, process):
        if not mount.is_relative_to(root):
            continue
        yield mount
        # A group outside what is mounted here, "/../a" in a namespace, cannot be seen.
        if group is not None and ".." not in group.parts and group.is_relative_to(top):
            folder = mount / group.relative_to(top)
            yield from (path for path in (folder, *folder.parents) if path.is_relative_to(mount))


def _group(version: _Version, process: Path) -> PurePosixPath | None:
    """The group of the process in its hierarchy: lines "hierarchy-ID:controllers:path"."""
    for line in _lines(process / "cgroup"):
        hierarchy_id, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_v2 = version.file_system == "cgroup2"
        is_own = hierarchy_id == "0" if is_v2 else _has_memory(controllers)
        if is_own and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mounts(version: _Version, process: Path) -> Iterator[tuple[PurePosixPath, Path]]:
    """(the group that is mounted, where) of each mount of this version that counts memory.

    A container that has no namespace of its own sees its group mounted as the top.
    """
    for line in _lines(process / "mountinfo"):
        fields, _, rest = line.partition(" - ")
        words, described = fields.split(" "), rest.split(" ")
        if len(words) < 5 or len(described) < 3 or described[0] != version.file_system:
            continue
        if version.file_system == "cgroup2" or _has_memory(described[2]):
            yield PurePosixPath(_unescaped(words[3])), Path(_unescaped(words[4]))


def _has_memory(words: str) -> bool:
    return "memory" in words.split(",")


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return []


def _free_below(version: _Version, folder: Path) -> Iterator[int]:
    """Free bytes under each limit of one group; none where it counts no memory, or is gone."""
    used = _number(folder / version.usage)
    if used is None:
        return
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    reclaimable = counts.get(version.reclaimable, "0").strip()
    used -= int(reclaimable) if reclaimable.isdecimal() else 0
    for limit in _limits(version, folder):
        yield max(0, limit - used)


def _limits(version: _Version, folder: Path) -> Iterator[int]:
    limits = (_number(folder / name) for name in version.limits)
    return (limit for limit in limits if limit is not None)


def _number(path: Path) -> int | None:
    """What a file holds; None for "max", which is no limit, and where there is no such file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def allocate(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 zeros on the CPU, page-aligned, in anonymous memory of their own."""
    with torch.inference_mode(False):
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        try:
            region = private_pages(nbytes)
        except (OSError, OverflowError) as error:
            raise BudgetError(
                f"cannot allocate {format_bytes(nbytes)} of memory: {error}"
            ) from error
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
            start, end = span.split("-")
            spans.append((int(start, 16), int(end, 16)))
    starts = [start for start, _ in spans]  # the system lists them in order

    def is_mapped(address: int) -> bool:
        index = bisect_right(starts, address) - 1
        return index >= 0 and address < spans[index][1]

    return is_mapped


def free_bytes() -> int:
    """Bytes of memory that can still be allocated, by this process and the groups that it is in."""
    return min([_system_free_bytes(), *free_below_limits(Path("/sys/fs/cgroup"))])


def _system_free_bytes() -> int:
    if sys.platform == "win32":
        return _windows_free_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    # macOS counts no "available" pages here; half of the memory is a guess on the safe side.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _windows_free_bytes() -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulong) for name in ("length", "load")] + [
            (name, ctypes.c_ulonglong) for name in ("total", "available", "c", "d", "e", "f", "g")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.available)
