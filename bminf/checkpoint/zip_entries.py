"""Where the entries of a zip file lie: the little of the format that torch.save's files need.

Sources: PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bminf.checkpoint.binary_file import BinaryFile
from bminf.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_ZIP64 = 2**32 - 1
_MOST_COMMENT_BYTES = 2**16 - 1
_MOST_DIRECTORY_BYTES = 2**28


@dataclass(frozen=True)
class Entry:
    """One file in the archive, stored as it is.

    offset: of its first byte in the archive.   checksum: CRC-32; 0 may mean that none was made.
    """

    name: str
    offset: int
    nbytes: int
    checksum: int


def zip_entries(file: BinaryFile) -> dict[str, Entry]:
    """Name -> entry, in the order of the directory.

    Raises CheckpointError where the archive is damaged, compressed or encrypted.
    """
    directory = _directory(file)
    entries: dict[str, Entry] = {}
    position = 0
    while position < len(directory):
        try:
            entry, position = _entry(file, directory, position)
        except (struct.error, UnicodeDecodeError) as error:
            raise _damaged(file, "its directory is not readable") from error
        if entry.name in entries:
            raise _damaged(file, f"it holds {entry.name!r} twice")
        entries[entry.name] = entry
    return entries


def _directory(file: BinaryFile) -> bytes:
    tail_bytes = min(file.nbytes, _END.size + _MOST_COMMENT_BYTES)
    tail = file.at(file.nbytes - tail_bytes, tail_bytes, "the end of the archive")
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or found + _END.size > tail_bytes:
        raise _damaged(file, "its end is missing")
    end = file.nbytes - tail_bytes + found
    *_, nbytes, offset, _ = _END.unpack_from(tail, found)
    if end >= _END64_LOCATOR.size:
        data = file.at(end - _END64_LOCATOR.size, _END64_LOCATOR.size, "the end of the archive")
        signature, _, end64, _ = _END64_LOCATOR.unpack(data)
        if signature == b"PK\x06\x07":
            end = end64
            *_, nbytes, offset = _END64.unpack(file.at(end, _END64.size, "the zip64 record"))
    if offset + nbytes != end or nbytes > _MOST_DIRECTORY_BYTES:
        raise _damaged(file, "its directory is not where its end says")
    return file.at(offset, nbytes, "the directory of the archive")


def _entry(file: BinaryFile, directory: bytes, position: int) -> tuple[Entry, int]:
    """The entry described at `position` of the directory, and where the next one is described."""
    fields = _CENTRAL.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, checksum, packed_bytes, nbytes = fields[:10]
    name_bytes, extra_bytes, comment_bytes, _, _, _, header = fields[10:]
    begin = position + _CENTRAL.size
    raw_name = directory[begin : begin + name_bytes]
    extra = directory[begin + name_bytes : begin + name_bytes + extra_bytes]
    after = begin + name_bytes + extra_bytes + comment_bytes
    if signature != b"PK\x01\x02" or after > len(directory):
        raise _damaged(file, "its directory is not readable")
    name = raw_name.decode()
    nbytes, packed_bytes, header = _from_zip64(extra, [nbytes, packed_bytes, header])
    if method != 0 or nbytes != packed_bytes or flags & 1:
        raise CheckpointError(
            f"{file.path}: {name!r} is compressed or encrypted in the archive, so it cannot be "
            "read in place; unpack it and save it again with torch.save"
        )
    offset = _data_offset(file, header, raw_name)
    file.check(offset, nbytes, f"the entry {name!r}")
    return Entry(name, offset, nbytes, checksum), after


def _from_zip64(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset, those that do not fit into 32 bits taken from the extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(wide, v) if v == _IN_ZIP64 else v for v in values]
        position += 4 + length
    return values


def _data_offset(file: BinaryFile, header: int, raw_name: bytes) -> int:
    local = _LOCAL.unpack(file.at(header, _LOCAL.size, f"the header of {raw_name!r}"))
    name_bytes, extra_bytes = local[-2:]
    begin = header + _LOCAL.size
    is_same = name_bytes == len(raw_name) and file.at(begin, name_bytes, "a name") == raw_name
    if local[0] != b"PK\x03\x04" or not is_same:
        raise _damaged(file, f"the entry {raw_name!r} is not where its directory says")
    return int(begin + name_bytes + extra_bytes)


def _damaged(file: BinaryFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path} begins as a zip file (so torch.save writes) but is damaged or truncated: "
        f"{why}; fetch it again"
    )
