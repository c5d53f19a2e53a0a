"""A file that is opened once and read at given places, never beyond its end."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.checksum import PIECE_BYTES, Bytes, Checksum, Span, pieces_of
from bminf.errors import CheckpointError

_MAX_JSON_BYTES = 10**8
_MAX_OPEN = 64  # a process may have 256 files open on macOS, 1024 on most Linux systems


class BinaryFile:
    """A file that stays open as long as anything refers to it.

    Only the 64 files opened last are open at a time; an earlier one is opened anew when it is read.
    No position is in common: threads and processes that fork may read one file at the same time.
    nbytes: its size when it was opened first.   has_checksums: whether it came with some, as our
    own files do, of which each byte is checked when it is read first.
    Raises CheckpointError where it is missing, no file, or not readable.
    """

    def __init__(self, path: Path, unread: Iterable[Span] = ()) -> None:
        self.path = path
        self._descriptor: Descriptor | None = None
        self.nbytes = os.fstat(self.opened().fd).st_size
        self._unread = tuple(unread)
        self.has_checksums = bool(self._unread)

    def __reduce__(self) -> tuple[type[BinaryFile], tuple[Path, tuple[Span, ...]]]:
        return BinaryFile, (self.path, self._unread)  # another process has no such descriptor

    def expect(self, spans: Iterable[Span]) -> None:
        """Have mapped() compare the checksum of each span before any of its bytes are given."""
        self._unread = tuple(spans)
        self.has_checksums = bool(self._unread)
        for span in self._unread:
            self.check(span.start, span.end - span.start, "what has a checksum")

    def at(self, offset: int, count: int, what: str) -> bytes:
        """`count` bytes from `offset` on.

        what: what these bytes are, for the CheckpointError if the file ends before.
        """
        if count == 0:
            return b""
        region, start = self._map(offset, count, what, mmap.ACCESS_READ)
        with region:
            return region[start:]

    def check(self, offset: int, count: int, what: str, nbytes: int | None = None) -> None:
        """Raise CheckpointError where `count` bytes from `offset` on are not all in the file.

        nbytes: its size; None is the one that it had first.
        """
        nbytes = self.nbytes if nbytes is None else nbytes
        if offset < 0 or count < 0 or offset + count > nbytes:
            raise CheckpointError(
                f"{self.path} is damaged or truncated: {what} should lie at bytes {offset} to "
                f"{offset + count}, but the file has {nbytes}; fetch it again"
            )

    def stream(self, max_bytes: int) -> mmap.mmap:
        """The file from its beginning, at most `max_bytes` of it, to be read in order."""
        return self._map(0, min(self.nbytes, max_bytes), "its beginning", mmap.ACCESS_READ)[0]

    def mapped(self, offset: int, count: int, what: str) -> torch.Tensor:
        """`count` bytes, (count,) uint8, as a private map: pages are read when touched.

        what: as for at().   count: at least 1.
        """
        self._compare_all(offset, offset + count, what)
        return self._mapped(offset, count, what)

    def _mapped(self, offset: int, count: int, what: str) -> torch.Tensor:
        region, start = self._map(offset, count, what, mmap.ACCESS_COPY)
        with torch.inference_mode(False):
            return torch.frombuffer(region, dtype=torch.uint8, offset=start, count=count)

    def read_into(self, offset: int, buffer: torch.Tensor, what: str) -> None:
        """Fill `buffer`, (bytes,) uint8 in one piece, with the bytes from `offset` on.

        No page of the file is mapped, which takes a fault for every few of them. what: as for at().
        """
        if not hasattr(os, "preadv") or buffer.device.type != "cpu":
            if len(buffer):
                buffer.copy_(self.mapped(offset, len(buffer), what))
            return
        end = offset + len(buffer)
        span = next((one for one in self._unread if (one.start, one.end) == (offset, end)), None)
        if span is None:
            self._compare_all(offset, end, what)
        self._holding(offset, len(buffer), what)
        found = Checksum()
        for piece in pieces_of(buffer.numpy()):
            self._fill(offset, piece, what)
            offset += len(piece)
            if span is not None:
                found.update(piece)  # which is in the caches still
        if span is not None:
            self._settle(span, found, what)

    def _fill(self, offset: int, piece: Bytes, what: str) -> None:
        left = memoryview(piece)  # type: ignore[arg-type]
        while left:
            descriptor = self.opened()
            try:
                count = os.preadv(descriptor.fd, [left], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what} cannot be read: {error}") from error
            if count == 0:
                self.check(offset, len(left), what, nbytes=offset)
            offset, left = offset + count, left[count:]

    def _compare_all(self, start: int, end: int, what: str) -> None:
        """Compare the checksums of all spans that have bytes from `start` to `end`."""
        for span in self._unread:
            if span.start < end and start < span.end:
                self._compare(span, what)

    def _compare(self, span: Span, what: str) -> None:
        """Read a span for its checksum, once."""
        found = Checksum()
        for start in range(span.start, span.end, PIECE_BYTES):
            count = min(PIECE_BYTES, span.end - start)
            found.update(self._mapped(start, count, what).numpy())
        self._settle(span, found, what)

    def _settle(self, span: Span, found: Checksum, what: str) -> None:
        """A span has been read: CheckpointError where it is not as it was written."""
        if found.hexdigest() != span.checksum:
            raise CheckpointError(
                f"{self.path} is damaged: between bytes {span.start} and {span.end}, where {what} "
                "lies, some are not as they were written; fetch it again, or write it anew"
            )
        self._unread = tuple(one for one in self._unread if one != span)

    def _map(self, offset: int, count: int, what: str, access: int) -> tuple[mmap.mmap, int]:
        """A map that begins with a whole page, and where `offset` is in it."""
        descriptor = self._holding(offset, count, what)
        start = offset % mmap.ALLOCATIONGRANULARITY
        try:
            region = mmap.mmap(descriptor.fd, start + count, access=access, offset=offset - start)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {what} cannot be mapped: {error}") from error
        return region, start

    def _holding(self, offset: int, count: int, what: str) -> Descriptor:
        """The file, opened; CheckpointError where it does not hold these bytes (any more)."""
        descriptor = self.opened()
        self.check(offset, count, what, os.fstat(descriptor.fd).st_size)
        return descriptor

    def opened(self) -> Descriptor:
        """The file, open for as long as this is held.   Raises CheckpointError."""
        descriptor = self._descriptor
        if descriptor is None:
            descriptor = self._descriptor = _open(self.path)
            _OPEN.append(weakref.ref(self))
            while len(_OPEN) > _MAX_OPEN:
                if (earliest := _OPEN.popleft()()) is not None:
                    earliest._descriptor = None
        return descriptor


class Descriptor:
    """An open file. It is closed with the last reference, so never in the middle of a read."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)


_OPEN: deque[weakref.ref[BinaryFile]] = deque()  # in the order of opening


def _open(path: Path) -> Descriptor:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no such file" if not path.exists() else "not a file")
        return Descriptor(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in any encoding of Unicode, with or without a byte-order mark.

    Raises CheckpointError where it is anything else.
    """
    file = BinaryFile(path)
    return parse_json(file.at(0, min(file.nbytes, _MAX_JSON_BYTES), "JSON"), str(path))


def check_beside(index: Path, name: object) -> None:
    """Raise CheckpointError where what an index names is not a file in its own folder."""
    # A path out of the folder would let a downloaded index name any file of this machine.
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise CheckpointError(f"{index} names the file {name!r}; it should be one beside it")


def file_beside(index: Path, name: object) -> Path:
    """The file that an index names.   Raises CheckpointError as check_beside(), and where it is not
    there."""
    check_beside(index, name)
    path = index.with_name(str(name))
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, which {index.name} names; fetch it too")
    return path


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; a key that comes twice is an error, not the last one's value."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}; a JSON object is needed")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found
