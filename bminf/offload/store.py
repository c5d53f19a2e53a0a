"""The file home: streamed blobs in one nameless temporary file, read straight into a slot."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from bminf.errors import ArgumentError, OffloadError
from bminf.units import format_bytes

_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


class FileStore:
    """Blobs of given sizes in a temporary file of `offload_dir`.

    The file has no name where the system allows that, and vanishes with the process in any case.
    Its room is reserved at once, so that a full disk is found before anything is moved.
    Raises OffloadError where the folder cannot be written or has not enough room.
    """

    def __init__(self, blob_bytes: Sequence[int], offload_dir: str | Path | None = None) -> None:
        self._blob_bytes = list(blob_bytes)
        self._offsets, end = _offsets(blob_bytes)
        if offload_dir is not None and not isinstance(offload_dir, str | os.PathLike):
            raise ArgumentError(
                f"offload_dir={offload_dir!r} is a {type(offload_dir).__name__}; give a path"
            )
        try:
            folder = _folder(offload_dir)
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL
            raise OffloadError(f"offload_dir={offload_dir!r} is not a folder: {error}") from error
        self._file = _open(folder, end)
        self._descriptor = self._file.fileno()
        weakref.finalize(self, self._file.close)

    def write(self, block: int, blob: torch.Tensor, begin: int = 0) -> None:
        """Keep a blob, or the part of one that begins at `begin`. blob: (bytes,) uint8, CPU."""
        data, offset = bytes_of(blob), self._offsets[block] + begin
        try:
            while data:
                written = _write_at(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OffloadError(f"writing a streamed block failed: {error}") from error

    def read_into(self, block: int, blob: torch.Tensor | memoryview) -> None:
        """Fetch a blob. blob: (bytes of the block,) uint8, CPU; it is overwritten."""
        data = bytes_of(blob) if isinstance(blob, torch.Tensor) else blob
        offset = self._offsets[block]
        try:
            while data:
                count = _read_at(self._file, data, offset)
                if count == 0:
                    raise OSError("the file is shorter than what was written to it")
                data, offset = data[count:], offset + count
        except (OSError, ValueError) as error:
            raise OffloadError(f"reading a streamed block failed: {error}") from error

    def map(self, block: int) -> torch.Tensor:
        """The blob as (bytes of the block,) uint8, mapped: pages are read when they are touched.

        Writing to it changes a private copy. It stays valid after close().
        """
        nbytes = self._blob_bytes[block]
        region = mmap.mmap(
            self._descriptor, nbytes, access=mmap.ACCESS_COPY, offset=self._offsets[block]
        )
        with torch.inference_mode(False):
            return torch.frombuffer(region, dtype=torch.uint8)

    def close(self) -> None:
        self._file.close()


def _offsets(blob_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where each blob starts, such that it can be mapped, and where the last one ends."""
    offsets, end = [], 0
    for nbytes in blob_bytes:
        offsets.append(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
        end = offsets[-1] + nbytes
    return offsets, end


def _open(folder: Path, nbytes: int) -> tempfile._TemporaryFileWrapper[bytes]:
    try:
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise OSError(f"{format_bytes(free)} are free there")
        file = tempfile.TemporaryFile(dir=folder, buffering=0)
        try:
            _reserve(file.fileno(), nbytes)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise OffloadError(
            f"{format_bytes(nbytes)} of streamed blocks cannot be kept in {str(folder)!r}: "
            f"{error}; give a folder with room on a disk as offload_dir=..."
        ) from error
    return file  # type: ignore[return-value]


def _reserve(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(1, nbytes))
    else:
        os.ftruncate(descriptor, nbytes)


def _folder(offload_dir: str | Path | None) -> Path:
    """The folder to use; by default a temporary one that is not itself in memory."""
    if offload_dir is not None:
        folder = Path(offload_dir)
        if _file_system(folder) in _MEMORY_FILE_SYSTEMS:
            warnings.warn(
                f"offload_dir={str(folder)!r} lies in memory, so streamed blocks do not leave it; "
                "give a folder on a disk",
                stacklevel=2,
            )
        return folder
    folder, other = Path(tempfile.gettempdir()), Path("/var/tmp")
    if _file_system(folder) in _MEMORY_FILE_SYSTEMS and os.access(other, os.W_OK):
        return other
    return folder


def _file_system(folder: Path) -> str:
    """Its kind ("ext4", "tmpfs", ...), or "" where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    path, best, kind = folder.resolve(), Path("/"), ""
    for line in mounts.read_text().splitlines():
        _, point, file_system, *_ = line.split()
        mount = Path(point.encode().decode("unicode_escape"))
        if path.is_relative_to(mount) and mount.is_relative_to(best):
            best, kind = mount, file_system
    return kind


def bytes_of(blob: torch.Tensor) -> memoryview:
    """The memory of `blob`: (bytes,) uint8, CPU."""
    return memoryview(blob.numpy())  # type: ignore[arg-type]


# preadv and pwrite move bytes at an offset in one call and without the GIL; Windows has neither.
if hasattr(os, "preadv"):

    def _read_at(file: tempfile._TemporaryFileWrapper[bytes], data: memoryview, offset: int) -> int:
        return os.preadv(file.fileno(), [data], offset)

    def _write_at(
        file: tempfile._TemporaryFileWrapper[bytes], data: memoryview, offset: int
    ) -> int:
        return os.pwrite(file.fileno(), data, offset)

else:

    def _read_at(file: tempfile._TemporaryFileWrapper[bytes], data: memoryview, offset: int) -> int:
        file.seek(offset)
        return file.readinto(data) or 0

    def _write_at(
        file: tempfile._TemporaryFileWrapper[bytes], data: memoryview, offset: int
    ) -> int:
        file.seek(offset)
        return file.write(data)
