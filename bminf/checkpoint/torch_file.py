"""Files of torch.save, read as data: tensors that stay in the file, and plain containers.

Both formats are known: the zip archive that torch writes since 1.6, and the legacy sequence of
pickles and raw storages. Nothing in the file is imported or called (see pickled.py).

Sources: torch/serialization.py; for the zip format also PKWARE's APPNOTE 6.3.10, section 4.3.7.
"""

from __future__ import annotations

import io
import mmap
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, cast
from zipfile import BadZipFile, ZipFile, ZipInfo

from bminf.checkpoint import torch_objects
from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.pickled import Placeholder, Stream
from bminf.checkpoint.stored import InFile
from bminf.checkpoint.torch_objects import StorageId
from bminf.errors import CheckpointError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_MAX_PICKLE_BYTES = 2**28
_HEAD_BYTES = 512
_PICKLE, _ZIP = b"\x80", b"PK\x03\x04"
STARTS = (_PICKLE, _ZIP)
"""What files of torch.save begin with."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_IS_UTF8 = 1 << 11  # of the flags of an entry


def read_torch_file(path: Path) -> object:
    """What was saved, with an InFile in the place of each tensor and parameter.

    Comes as dict, OrderedDict, list, tuple, set, frozenset, numbers, str, bytes, bool, None,
    torch.dtype, and a Placeholder for everything else; a torch.Size is a tuple, a torch.device a
    str. Tensors are named after their storage; weights_of knows their names.
    Raises CheckpointError where the file is damaged, compressed, big-endian, or no torch file.
    """
    file = BinaryFile(path)
    head = file.at(0, min(_HEAD_BYTES, file.nbytes), "its beginning")
    try:
        if head.startswith(_ZIP):
            return _read_zip(file)
        if head.startswith(_PICKLE):
            return _read_legacy(file)
    except (ValueError, OverflowError, NotImplementedError, BadZipFile, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated, or torch.save did not write it: {error}; "
            "fetch it again"
        ) from error
    raise CheckpointError(
        f"{path} is no file of torch.save: {_looks_like(head)}; "
        "fetch the file itself, or save it again with torch.save"
    )


def weights_of(saved: object, path: Path) -> dict[str, InFile]:
    """A saved state dict as name -> tensor, each tensor under its own name.

    saved: a mapping that read_torch_file gave, or a part of it.   path: for messages.
    Raises CheckpointError for anything in it that is no tensor, naming it.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"{path} holds {_described(saved)} where the weights should be: a dict of tensors"
        )
    weights: dict[str, InFile] = {}
    for name, value in saved.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} names a tensor by {_described(name)}, not by a str")
        if not isinstance(value, InFile):
            raise CheckpointError(
                f"{path} holds {_described(value)} under the name {name!r}, among the weights; "
                "save the tensors alone, a flat dict of them, and load that"
            )
        weights[name] = replace(value, name=name)
    return weights


def _described(value: object) -> str:
    # Never its repr: containers of a file may be nested deeper than Python can print.
    if isinstance(value, Placeholder):
        return f"an object that is not read ({value.name[:200]})"
    return "None" if value is None else f"a {type(value).__name__}"


def _looks_like(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer to a file that was not fetched (git lfs pull fetches it)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, perhaps an error that was saved in the file's place"
    if head[257:262] == b"ustar":
        return "it is a tar file; if torch wrote it (before 0.2), load it there and save it again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed; unpack it first"
    if head[8:9] == b"{":
        return "it looks like a safetensors file; give it the suffix .safetensors"
    return f"it starts with {head[:16]!r}"


# The zip format: one pickle, and a stored entry for each storage.


def _read_zip(file: BinaryFile) -> object:
    data = file.stream(file.nbytes)
    entries = _zip_entries(file, data)
    prefix = next(iter(entries), "").partition("/")[0]
    pickled = entries.get(f"{prefix}/data.pkl")
    if pickled is None or f"{prefix}/constants.pkl" in entries:
        raise CheckpointError(
            f"{file.path} is a zip file, but not one of torch.save (it may be TorchScript, or a "
            "folder that was zipped); save the state dict with torch.save"
        )
    byte_order = entries.get(f"{prefix}/byteorder")
    if byte_order is not None and _bytes_of(data, byte_order, _HEAD_BYTES) != b"little":
        raise _big_endian(file)
    saved = _bytes_of(data, pickled, _MAX_PICKLE_BYTES)
    if pickled.CRC not in (0, zlib.crc32(saved)):  # 0: torch was told not to compute it
        raise ValueError(f"the checksum of {pickled.filename!r} is wrong")
    folder = f"{prefix}/data/"
    extents = {
        name.removeprefix(folder): (_offset_of(data, entry), entry.file_size)
        for name, entry in entries.items()
        if name.startswith(folder)
    }
    return torch_objects.load(file, Stream(io.BytesIO(saved)), extents)


def _zip_entries(file: BinaryFile, data: mmap.mmap) -> dict[str, ZipInfo]:
    """Name -> entry, in the order of the directory."""
    entries: dict[str, ZipInfo] = {}
    with ZipFile(cast(IO[bytes], Stream(data))) as archive:
        for entry in archive.infolist():
            if entry.filename in entries:
                raise ValueError(f"it holds {entry.filename!r} twice")
            if entry.compress_type or entry.file_size != entry.compress_size or entry.flag_bits & 1:
                raise CheckpointError(
                    f"{file.path}: {entry.filename!r} is compressed or encrypted in the archive, "
                    "so it cannot be read in place; unpack it and save it again with torch.save"
                )
            entries[entry.filename] = entry
    return entries


def _bytes_of(data: mmap.mmap, entry: ZipInfo, max_bytes: int) -> bytes:
    if entry.file_size > max_bytes:
        raise ValueError(
            f"{entry.filename!r} has {entry.file_size} bytes; at most {max_bytes} are accepted"
        )
    start = _offset_of(data, entry)
    return data[start : start + entry.file_size]


def _offset_of(data: mmap.mmap, entry: ZipInfo) -> int:
    """Where the bytes of an entry start: behind a header of its own, which repeats its name."""
    start = entry.header_offset + _LOCAL_HEADER.size
    header = _LOCAL_HEADER.unpack(data[entry.header_offset : start])
    signature, *_, name_bytes, extra_bytes = header
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _IS_UTF8 else "cp437")
    offset = int(start + name_bytes + extra_bytes)
    if signature != _ZIP or data[start : start + name_bytes] != name:
        raise ValueError(f"the entry {entry.filename!r} is not where its directory says")
    if offset + entry.file_size > len(data):
        raise ValueError(f"the entry {entry.filename!r} reaches beyond the end of the file")
    return offset


# The legacy format: magic number, protocol version, system, object, storage keys (a pickle each),
# then each storage as its number of elements (int64) and its bytes.


def _read_legacy(file: BinaryFile) -> object:
    data = file.stream(_MAX_PICKLE_BYTES)
    pickles = Stream(data)
    if torch_objects.load(file, pickles, {}) != _MAGIC_NUMBER:
        raise CheckpointError(
            f"{file.path} is a pickle, but not one of torch.save; save the state dict with that"
        )
    if torch_objects.load(file, pickles, {}) != _PROTOCOL_VERSION:
        raise ValueError(f"its version is not {_PROTOCOL_VERSION}, the only one there is")
    system = torch_objects.load(file, pickles, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _big_endian(file)
    # Twice: only the object says which storages there are, and only behind it is where they lie.
    start = data.tell()
    storages = torch_objects.storages_in(file, pickles)
    keys = torch_objects.load(file, pickles, {})
    extents = _extents(file, keys, storages, data.tell())
    data.seek(start)
    return torch_objects.load(file, pickles, extents)


def _extents(
    file: BinaryFile, keys: object, storages: Mapping[str, StorageId], position: int
) -> dict[str, tuple[int, int]]:
    """Key -> where its bytes start, and how many there are.   position: of the first storage."""
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if len(set(names)) != len(names) or set(names) != set(storages):
        raise ValueError("its list of storages is not that of its tensors")
    extents: dict[str, tuple[int, int]] = {}
    for key in names:
        what, storage = f"the storage {key!r}", storages[key]
        (num_elements,) = struct.unpack("<q", file.at(position, 8, what))
        if num_elements != storage.num_elements:
            raise ValueError(f"{what} has {num_elements} elements, not {storage.num_elements}")
        extents[key] = position + 8, storage.nbytes
        position += 8 + storage.nbytes
        file.check(position, 0, f"the end of {what}")
    return extents


def _big_endian(file: BinaryFile) -> CheckpointError:
    return CheckpointError(
        f"{file.path} was not written on a little-endian machine; "
        "load it with torch on such a machine and save it again there"
    )
