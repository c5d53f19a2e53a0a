"""Files for the tests of bminf.checkpoint: torch files of given pickles, and what is read of them.

The classes and functions here act when a pickle that names them is loaded; no reader of ours may
let them.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.stored import InFile, Sliced, Stored

FORMS = ("zip", "old")
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Given(Sliced):
    """A tensor in memory, in the place of one in a file."""

    tensor: torch.Tensor
    where: str = "'w' in a file"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor

    def _slice(self, axis: int, begin: int, end: int) -> Stored:
        return replace(self, tensor=self.tensor.narrow(axis, begin, end - begin))


def check(stored: Stored, expected: torch.Tensor) -> None:
    """That it is what was announced, and has the values."""
    read = stored.read()
    assert stored.shape == tuple(expected.shape) == tuple(read.shape)
    assert stored.dtype == expected.dtype == read.dtype
    assert torch.equal(read, expected)


def write_pickle(pickled: bytes, path: Path, form: str) -> Path:
    """A torch file of the form whose object is the one of `pickled`, without storages."""
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
        return path
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], protocol=2))
    return path


def same(ours: object, theirs: object) -> int:
    """The number of tensors in what torch loaded; fails where ours is anything else."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, InFile)
        read = ours.read()
        assert read.dtype == theirs.dtype and read.stride() == theirs.stride(), ours.name
        assert torch.equal(read, theirs), ours.name
        return 1
    if isinstance(theirs, dict):
        assert type(ours) is type(theirs) and list(ours) == list(theirs)
        return sum(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        kind = list if isinstance(theirs, list) else tuple
        assert type(ours) is kind and len(ours) == len(theirs)
        return sum(same(mine, their) for mine, their in zip(ours, theirs, strict=True))
    assert type(ours) is type(theirs) and ours == theirs
    return 0


def read_all(found: object) -> int:
    """Read every tensor in what a reader gave; the bytes of them all."""
    if hasattr(found, "read"):
        return int(found.read().clone().nbytes)
    if isinstance(found, dict):
        return sum(map(read_all, found.values()))
    return sum(map(read_all, found)) if isinstance(found, list | tuple) else 0


# What acts when it is called, made, built, or filled.


def create(path: str) -> None:
    Path(path).touch()


class Creating:
    def __new__(cls, path: str, **_: object) -> Creating:
        create(path)
        return super().__new__(cls)


class Setting:
    def __setstate__(self, path: str) -> None:
        create(path)


class HookedDict(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: object, path: str) -> None:
        create(path)


class HookedList(list):  # type: ignore[type-arg]
    def append(self, path: str) -> None:
        create(path)

    def extend(self, paths: Any) -> None:
        create(next(iter(paths)))


class HookedSet:
    def add(self, path: str) -> None:
        create(path)


class HashedKey:
    """Acts when it becomes the key of a dict."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __hash__(self) -> int:
        create(self.path)
        return 0


def text(value: str) -> bytes:
    """The instruction that puts a text on the stack."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str) -> bytes:
    return f"csaved_files\n{name}\n".encode()


def attacks(path: Path) -> dict[str, bytes]:
    """What each pickle that creates the file `path` is made of: instructions for one value."""
    target, command = text(str(path)), text(f"touch '{path}'")
    return {
        "REDUCE": b"cos\nsystem\n(" + command + b"tR",
        "REDUCE_of_a_dotted_name": text("saved_files") + text("Path.touch")
        + b"\x93(" + b"cpathlib\nPath\n(" + target + b"tRtR",
        "STACK_GLOBAL": text("saved_files") + text("create") + b"\x93(" + target + b"tR",
        "INST": b"(" + command + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + command + b"o",
        "NEWOBJ": named("Creating") + b"(" + target + b"t\x81",
        "NEWOBJ_EX": named("Creating") + b"(" + target + b"t}\x92",
        "BUILD": named("Setting") + b")\x81" + target + b"b",
        "SETITEM": named("HookedDict") + b")\x81" + text("k") + target + b"s",
        "SETITEMS": named("HookedDict") + b")\x81(" + text("k") + target + b"u",
        "APPEND": named("HookedList") + b")\x81" + target + b"a",
        "APPENDS": named("HookedList") + b")\x81(" + target + b"e",
        "ADDITEMS": named("HookedSet") + b")\x81(" + target + b"\x90",
        "hash": b"}" + named("HashedKey") + b"(" + target + b"tR" + text("v") + b"s",
        "eval": b"cbuiltins\neval\n(" + text(f"open({str(path)!r}, 'w').close()") + b"tR",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR("
        + command + b"tR",
    }  # fmt: skip
