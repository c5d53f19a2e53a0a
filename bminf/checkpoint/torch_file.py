"""Files of torch.save, read as data: tensors that stay in the file, and plain containers.

Both forms are known: the zip archive that torch writes since 1.6, and the older sequence of pickles
and raw storages. Nothing in the file is imported or called (see pickled.py).

Source of both forms: torch/serialization.py.
"""

from __future__ import annotations

import io
import mmap
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bminf.checkpoint import torch_objects
from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.pickled import Placeholder, Stream
from bminf.checkpoint.stored import InFile
from bminf.checkpoint.torch_objects import StorageId
from bminf.checkpoint.zip_entries import Entry, zip_entries
from bminf.errors import CheckpointError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_MOST_PICKLE_BYTES = 2**28
_HEAD_BYTES = 512
_PICKLE, _ZIP = b"\x80", b"PK\x03\x04"


def read_torch_file(path: Path) -> object:
    """What was saved, with an InFile in the place of each tensor and parameter.

    Comes as dict, OrderedDict, list, tuple, set, frozenset, numbers, str, bytes, bool, None,
    torch.dtype, and a Placeholder for everything else; a torch.Size is a tuple, a torch.device a
    str. Tensors are named after their storage; weights_of knows their names.
    Raises CheckpointError where the file is damaged, compressed, big-endian, or no torch file.
    """
    file = BinaryFile(path)
    head = file.at(0, min(_HEAD_BYTES, file.nbytes), "its beginning")
    if head.startswith(_ZIP):
        return _read_zip(file)
    if head.startswith(_PICKLE):
        return _read_old(file)
    raise CheckpointError(
        f"{path} is no file of torch.save: {_looks_like(head)}; "
        "fetch the file itself, or save it again with torch.save"
    )


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as torch.save's do.   Raises CheckpointError if it is not there."""
    file = BinaryFile(path)
    return file.at(0, min(4, file.nbytes), "its beginning").startswith((_ZIP, _PICKLE))


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
    return f"it begins with {head[:16]!r}"


# The zip form: one pickle, and a stored entry for each storage.


def _read_zip(file: BinaryFile) -> object:
    entries = zip_entries(file)
    prefix = next(iter(entries), "").partition("/")[0]
    pickled = entries.get(f"{prefix}/data.pkl")
    if pickled is None or f"{prefix}/constants.pkl" in entries:
        raise CheckpointError(
            f"{file.path} is a zip file, but not one of torch.save (it may be TorchScript, or a "
            "folder that was zipped); save the state dict with torch.save"
        )
    byte_order = entries.get(f"{prefix}/byteorder")
    if byte_order is not None and _short_text(file, byte_order) != b"little":
        raise _big_endian(file)
    data = _checked_pickle(file, pickled)

    def offset_of(found: StorageId) -> int:
        entry = entries.get(f"{prefix}/data/{found.key}")
        if entry is None or entry.nbytes != found.nbytes:
            raise _damaged(
                file,
                f"its storage {found.key!r} should have {found.nbytes} bytes, "
                f"but {'is missing' if entry is None else f'has {entry.nbytes}'}",
            )
        return entry.offset

    return _load(file, Stream(io.BytesIO(data)), offset_of)


def _short_text(file: BinaryFile, entry: Entry) -> bytes:
    return file.at(entry.offset, min(entry.nbytes, _HEAD_BYTES), f"the entry {entry.name!r}")


def _checked_pickle(file: BinaryFile, entry: Entry) -> bytes:
    if entry.nbytes > _MOST_PICKLE_BYTES:
        raise CheckpointError(
            f"{file.path}: {entry.name!r} has {entry.nbytes} bytes; "
            f"at most {_MOST_PICKLE_BYTES} are accepted beside the tensors"
        )
    data = file.at(entry.offset, entry.nbytes, f"the entry {entry.name!r}")
    if entry.checksum not in (0, zlib.crc32(data)):  # 0: torch was told not to compute it
        raise _damaged(file, f"the checksum of {entry.name!r} is wrong")
    return data


# The old form: magic number, protocol version, system, object, storage keys (a pickle each), then
# each storage as its number of elements (int64) and its bytes.


def _read_old(file: BinaryFile) -> object:
    found: dict[str, StorageId] = {}

    def note(storage: StorageId) -> int:
        found.setdefault(storage.key, storage)
        return 0

    # Twice: only the object says which storages there are, and only behind it is where they lie.
    pickles = file.stream(_MOST_PICKLE_BYTES)
    _read_head(file, pickles)
    start = pickles.tell()
    _load_next(file, pickles, note)
    keys = _load_next(file, pickles, note)
    offsets = _offsets(file, keys, found, pickles.tell())
    pickles.seek(start)
    return _load_next(file, pickles, lambda storage: offsets[storage.key])


def _read_head(file: BinaryFile, pickles: mmap.mmap) -> None:
    """Read what comes before the object, and check it."""
    if _load_next(file, pickles, _no_storage) != _MAGIC_NUMBER:
        raise CheckpointError(
            f"{file.path} is a pickle, but not one of torch.save; save the state dict with that"
        )
    if _load_next(file, pickles, _no_storage) != _PROTOCOL_VERSION:
        raise _damaged(file, f"its version is not {_PROTOCOL_VERSION}, the only one there is")
    system = _load_next(file, pickles, _no_storage)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _big_endian(file)


def _no_storage(storage: StorageId) -> int:
    raise ValueError(f"a storage {storage.key!r} before the object")


def _offsets(
    file: BinaryFile, keys: object, found: dict[str, StorageId], position: int
) -> dict[str, int]:
    """Key -> where its bytes start.   position: of the first storage."""
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if len(set(names)) != len(names) or set(names) != set(found):
        raise _damaged(file, "its list of storages is not that of its tensors")
    offsets: dict[str, int] = {}
    for key in names:
        what, storage = f"the storage {key!r}", found[key]
        (num_elements,) = struct.unpack("<q", file.at(position, 8, what))
        if num_elements != storage.num_elements:
            raise _damaged(file, f"{what} has {num_elements} elements, not {storage.num_elements}")
        offsets[key] = position + 8
        file.check(offsets[key], storage.nbytes, what)
        position = offsets[key] + storage.nbytes
    return offsets


def _load_next(
    file: BinaryFile, pickles: mmap.mmap, offset_of: Callable[[StorageId], int]
) -> object:
    return _load(file, Stream(pickles), offset_of)


def _load(file: BinaryFile, stream: Stream, offset_of: Callable[[StorageId], int]) -> object:
    try:
        return torch_objects.load(file, stream, offset_of)
    except (ValueError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _big_endian(file: BinaryFile) -> CheckpointError:
    return CheckpointError(
        f"{file.path} was not written on a little-endian machine; "
        "load it with torch on such a machine and save it again there"
    )


def _damaged(file: BinaryFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path} is damaged or truncated, or torch.save did not write it: {why}; "
        "fetch it again"
    )
