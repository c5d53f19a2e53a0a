"""Pages of anonymous memory that belong to one buffer alone.

Letting go of the buffer gives its memory back to the system at once, which malloc does not promise.
"""

from __future__ import annotations

import errno
import mmap
import sys
from contextlib import suppress

_HUGE_PAGE_BYTES = 2**21
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 and later; Python has no name for it


def private_pages(nbytes: int) -> mmap.mmap:
    """`nbytes` of zeros, page-aligned, in huge pages where the system has them for asking.

    Memory is taken as pages are touched. Raises OSError or OverflowError where so much cannot be
    mapped, ValueError for no bytes.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    # The default, a shared mapping, would be counted as shared memory and take no huge pages.
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE_BYTES:
        _advise(region, "MADV_HUGEPAGE")  # fewer faults, and fewer misses of the address cache
    return region


def forbid_fork(region: mmap.mmap) -> None:
    """Let no fork of the process have these pages: what a driver has locked must not be copied when
    it is written, which is what a fork does to private pages."""
    _advise(region, "MADV_DONTFORK")


def allow_fork(region: mmap.mmap) -> None:
    """Undo forbid_fork()."""
    with suppress(OSError):  # in a fork there is nothing to undo
        _advise(region, "MADV_DOFORK")


def populate(region: mmap.mmap) -> None:
    """Take memory for every page now. Raises OSError where the system says that it has none."""
    if sys.platform == "linux":
        try:
            region.madvise(_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which an older kernel says
                raise
        else:
            return
    for start in range(0, len(region), mmap.PAGESIZE):
        region[start] = 0


def _advise(region: mmap.mmap, name: str) -> None:
    advice = getattr(mmap, name, None)  # of some systems only
    if advice is not None:
        region.madvise(advice)
