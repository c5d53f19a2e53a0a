"""Files of torch.save, written without ever holding what is saved.

The zip format: data.pkl, byteorder, data/0, data/1, ... (a storage a tensor) and version, each
starting at a multiple of 64 in the file, so that torch can map it.

Source: torch/serialization.py, and caffe2/serialize/inline_container.cc for the alignment.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from bminf.checkpoint.stored import Stored, nbytes_of, pieces, strides_of
from bminf.checkpoint.torch_objects import STORAGE_DTYPES
from bminf.errors import ArgumentError

_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_ZIP64_FROM = 2**30  # well below the size from which zipfile would insist
_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}


class Saved:
    """A tensor that is to be written: in the place where torch.load will put one."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        if stored.dtype not in _STORAGES:
            raise ArgumentError(
                f"{stored.where} is {stored.dtype}; a torch file is written of "
                f"{', '.join(map(str, _STORAGES))}"
            )


def write_torch_file(
    path: Path, saved: object, progress: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Write dicts, lists and plain values, with a Saved in the place of each tensor.

    A tensor is read some rows at a time; torch.load gives it contiguous.
    progress: called with the bytes of each piece of a tensor that was written.
    Raises OSError where there is no room or no permission; the caller owns what is left then.
    """
    prefix = path.stem
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(saved)
    with open(path, "wb+") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with _entry(archive, file, f"{prefix}/data.pkl", pickled.tell()) as entry:
                entry.write(pickled.getvalue())
            with _entry(archive, file, f"{prefix}/byteorder", 6) as entry:
                entry.write(b"little")
            for index, stored in enumerate(pickler.tensors):
                with _entry(archive, file, f"{prefix}/data/{index}", nbytes_of(stored)) as entry:
                    for _, rows in pieces(stored):
                        entry.write(_bytes_of(rows))
                        progress(rows.nbytes)
            with _entry(archive, file, f"{prefix}/version", 2) as entry:
                entry.write(b"3\n")
        file.flush()
        os.fsync(file.fileno())


class _Storage:
    """What stands for the bytes of a tensor in the pickle."""

    def __init__(self, persistent_id: tuple[object, ...]) -> None:
        self.persistent_id = persistent_id


class _Pickler(pickle.Pickler):
    """tensors: those that were met, in the order of their storages' keys."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)  # torch's own
        self.tensors: list[Stored] = []

    def persistent_id(self, value: Any) -> Any:
        return value.persistent_id if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Saved):
            return NotImplemented
        stored, key = value.stored, str(len(self.tensors))
        self.tensors.append(stored)
        kind, strides = getattr(torch, _STORAGES[stored.dtype]), strides_of(stored.shape)
        storage = _Storage(("storage", kind, key, "cpu", math.prod(stored.shape)))
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (storage, 0, stored.shape, strides, False, OrderedDict())


@contextmanager
def _entry(archive: zipfile.ZipFile, file: BinaryIO, name: str, nbytes: int) -> Iterator[IO[bytes]]:
    """An entry of `nbytes` that starts aligned, to be written."""
    entry = zipfile.ZipInfo(name)
    is_zip64 = nbytes >= _ZIP64_FROM
    start = file.tell() + _LOCAL_HEADER_BYTES + len(name.encode())
    entry.extra = _padding(start + (_ZIP64_EXTRA_BYTES if is_zip64 else 0))
    with archive.open(entry, "w", force_zip64=is_zip64) as target:
        yield target
    entry.extra = b""  # only the header before the data needs it, not the directory


def _padding(start: int) -> bytes:
    """An extra field that moves what would start at `start` to a multiple of 64."""
    num_bytes = -(start + 4) % _ALIGNMENT
    return b"FB" + num_bytes.to_bytes(2, "little") + b"Z" * num_bytes


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)  # type: ignore[arg-type]
