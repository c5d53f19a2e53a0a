"""safetensors files: a reader that maps, and the writer of our own folders.

A file is the length of a header (uint64), the header (JSON: name -> dtype, shape and data_offsets),
and the data, which has no holes. In our own files each block is one run of bytes, its blob as
bminf/layout.py lays it out, that starts at a multiple of 256 in the file: one read brings it. What
the alignment leaves open is filled with uint8 tensors named "padding.0", "padding.1", ... Their
metadata have a checksum of each run, and one of the header, so that damage is noticed.

Source: the safetensors README, "Format"; its reader in Rust is as strict as this one.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from bminf.checkpoint.binary_file import BinaryFile, parse_json
from bminf.checkpoint.checksum import Span, checksum
from bminf.checkpoint.stored import InFile, Stored, contiguous, strides_of
from bminf.errors import ArgumentError, CheckpointError
from bminf.layout import DEFAULT_ALIGNMENT, Chunk, Layout, TensorSpec
from bminf.units import format_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since 2.7
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
# Of types that no dtype has an element of; the bytes of such a tensor are known, and no more.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 10**8
_POINTER = b"version "  # how git-lfs begins what it leaves in a file's place
_MAX_DIMENSIONS = 64
_METADATA = "__metadata__"
_PADDING = "padding."
# In the metadata: how the names of paddings start; "start-end:checksum" of each span, by bytes of
# the data; the hash of the header, of which this digest itself is zeros.
_PADDING_KEY, _BLOCKS_KEY, _HEADER_KEY = "bminf.padding", "bminf.blocks", "bminf.header"
_DIGITS = 32  # of a checksum, and of the hash


def read_safetensors(path: Path) -> dict[str, InFile]:
    """Name -> tensor, in the order of the header; paddings of our own files are left out.

    A tensor of a type that torch has no elements of is there, and any use of it an error.
    Raises CheckpointError where the header is not valid or does not fit the file.
    """
    file = BinaryFile(path)
    start = file.at(0, 8, "the length of the header")
    if start == _POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer to a file that was not fetched; git lfs pull fetches it"
        )
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file, or is damaged: its header would have "
            f"{header_bytes} bytes; at most {_MAX_HEADER_BYTES} are accepted; fetch it again"
        )
    where = f"the header of {path}"
    text = file.at(8, header_bytes, "the header")
    entries = parse_json(text, where)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where} has {_METADATA} that is not a map of texts")
    _check_header(text, metadata.get(_HEADER_KEY), path)
    file.expect(_spans(metadata.get(_BLOCKS_KEY, ""), 8 + header_bytes, path))
    tensors = {
        name: _tensor(file, name, entry, 8 + header_bytes) for name, entry in entries.items()
    }
    _check_no_holes(entries, file.nbytes - 8 - header_bytes, path)
    if metadata.get(_PADDING_KEY) != _PADDING:
        return tensors
    return {
        n: t
        for n, t in tensors.items()
        if not (n.startswith(_PADDING) and t.dtype == torch.uint8 and len(t.shape) == 1)
    }


def run_of(tensors: Mapping[str, Stored], block: str, layout: Layout) -> InFile | None:
    """The bytes of a block (extent,) uint8, where its tensors lie in one file as `layout` says.

    tensors: by their names in the file, not read yet.   block, layout: as for write_safetensors.
    None where they lie otherwise, or are of other types or shapes, and have to be read one by one.
    """
    return lying_in_files(tensors, block, layout)[0]


def lying_in_files(
    tensors: Mapping[str, Stored], block: str, layout: Layout
) -> tuple[InFile | None, list[tuple[str, InFile]]]:
    """What run_of gives, whose arguments these are; and (name in the layout, tensor) of those whose
    bytes lie in a file as the layout says."""
    given = [
        (name, tensors.get(_full_name(block, name)), spec) for name, spec in layout.specs.items()
    ]
    found = [(name, stored) for name, stored, spec in given if _lies_as(stored, spec)]
    starts = {(stored.file, stored.offset - layout.offsets[name]) for name, stored in found}
    if len(found) < len(layout.specs) or len(starts) != 1:
        return None, found
    ((file, start),) = starts
    return contiguous(file, start, [layout.extent], torch.uint8, block), found


def _lies_as(stored: Stored | None, spec: TensorSpec) -> TypeGuard[InFile]:
    """Whether the bytes of a tensor lie in a file as `spec` says, one after another."""
    if type(stored) is not InFile or (stored.shape, stored.dtype) != (spec.shape, spec.dtype):
        return False
    return stored.stride == strides_of(stored.shape) and _is_contiguous(spec)


def write_safetensors(
    path: Path,
    layouts: Mapping[str, Layout],
    tensors: Callable[[str], Iterable[Chunk]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file in which each block is one contiguous, aligned run of bytes.

    layouts: block -> layout made with keep_addresses=False, of contiguous tensors that do not
        overlap; "" is what lies outside all blocks.
    tensors: asked block by block, in that order, for (name, tensor) of each tensor of the layout,
        in any order; each is freed before the next is asked for.
    The tensor t of block b is named "b.t", that of "" is named "t". The file has another name until
    it is complete, and an error leaves nothing.
    Raises ArgumentError where a layout cannot be written so, or other tensors come than it has;
    CheckpointError where there is no room or no permission.
    """
    for key in (_PADDING_KEY, _BLOCKS_KEY, _HEADER_KEY):
        if key in metadata:
            raise ArgumentError(f"metadata has the key {key!r}, which the writer needs")
    plan = _Plan.of(layouts)
    header = plan.header(metadata, repeat("0" * _DIGITS))
    partial = path.with_name(f"{path.name}.part")
    try:
        with open(partial, "wb+") as file:
            _reserve(file, header, plan.nbytes)
            checksums = list(_write_data(file, len(header), plan, layouts, tensors))
            file.seek(0)
            file.write(plan.header(metadata, checksums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({format_bytes(plan.nbytes)}): {error}; "
            "give a folder with room that you may write to"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _tensor(file: BinaryFile, name: str, entry: Any, data_start: int) -> InFile:
    kind, shape, offsets = (
        entry.get(key) if isinstance(entry, dict) else None
        for key in ("dtype", "shape", "data_offsets")
    )
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    bits = _BITS.get(str(kind)) if dtype is None else 8 * dtype.itemsize
    if bits is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{name!r} in {file.path} has no dtype, shape and two data_offsets that are known; "
            f"dtypes: {', '.join({**_DTYPES, **_BITS})}"
        )
    start, end = offsets
    if math.prod(shape) * bits != 8 * (end - start):
        raise CheckpointError(
            f"{name!r} in {file.path} has the shape {tuple(shape)} and dtype {dtype or kind}, but "
            f"{end - start} bytes; the file is damaged"
        )
    tensor = contiguous(file, data_start + start, shape, dtype or torch.bits8, name)
    return tensor if dtype is not None else _Unread(**vars(tensor), kind=str(kind))


@dataclass(frozen=True)
class _Unread(InFile):
    """A tensor of a type that torch has no elements of, beside those that a model needs.

    kind: the type.
    """

    kind: str = ""

    @property
    def where(self) -> str:
        return f"{self.name!r} (of the type {self.kind}, which cannot be read) in {self.file.path}"

    def read(self) -> torch.Tensor:
        raise CheckpointError(f"{self.where} is needed; save it in another type")

    def _slice(self, axis: int, start: int, end: int) -> InFile:
        raise CheckpointError(f"{self.where} is needed; save it in another type")


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > _MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**60 for value in values)


def _check_no_holes(entries: Mapping[str, Any], data_bytes: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if start != position:
            raise CheckpointError(
                f"{path} is damaged: {name!r} starts at byte {start} of the data, "
                f"but what is before it ends at {position}"
            )
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{path} is damaged or truncated: its tensors end at byte {position} of the data, "
            f"but there are {data_bytes}; fetch it again"
        )


def names_of(layouts: Mapping[str, Layout]) -> list[str]:
    """What the tensors of these blocks are called in a file, as write_safetensors() does."""
    return [_full_name(block, name) for block, layout in layouts.items() for name in layout.specs]


def _full_name(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


@dataclass(frozen=True)
class _Plan:
    """entries: of the header, without holes.   starts: block -> where its blob starts.

    spans: block -> (start, end) of what has a checksum: all of it; outside all blocks each tensor,
    because what is laid out there with others is read one by one.
    """

    entries: Mapping[str, Any]
    starts: Mapping[str, int]
    spans: Mapping[str, Sequence[tuple[int, int]]]
    nbytes: int

    @classmethod
    def of(cls, layouts: Mapping[str, Layout]) -> _Plan:
        starts: dict[str, int] = {}
        spans: dict[str, list[tuple[int, int]]] = {}
        entries: dict[str, Any] = {}
        paddings: dict[str, Any] = {}
        end = 0
        for block, layout in layouts.items():
            starts[block] = blob = -(-end // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
            spans[block] = [(blob, blob + layout.extent)] if block else []
            for name, spec, offset in _in_order(block, layout):
                start = blob + offset
                if name in entries or name == _METADATA or name.startswith(_PADDING):
                    raise ArgumentError(f"the tensor name {name!r} is taken; rename the block")
                if start < end:
                    raise ArgumentError(f"{name!r} overlaps another tensor; store it once")
                if start > end:
                    gap = _entry("U8", [start - end], end, start)
                    paddings[f"{_PADDING}{len(paddings)}"] = gap
                end = start + spec.nbytes
                entries[name] = _entry(_DTYPE_NAMES[spec.dtype], spec.shape, start, end)
                if not block:
                    spans[block].append((start, end))
        return cls({**entries, **paddings}, starts, spans, end)

    def header(self, metadata: Mapping[str, str], checksums: Iterable[str]) -> bytes:
        """The length and the header, filled with spaces so that the data starts aligned.

        checksums: of each span; the length does not depend on them.
        """
        spans = chain.from_iterable(self.spans.values())
        blocks = [f"{a}-{b}:{found}" for (a, b), found in zip(spans, checksums, strict=False)]
        own = {
            _HEADER_KEY: "0" * _DIGITS, _PADDING_KEY: _PADDING, _BLOCKS_KEY: " ".join(blocks)
        }  # fmt: skip
        given = {_METADATA: {**own, **metadata}, **self.entries}
        text = json.dumps(given, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % DEFAULT_ALIGNMENT)
        return struct.pack("<Q", len(text)) + _with_hash(text)


def _with_hash(header: bytes, digest: str = "0" * _DIGITS) -> bytes:
    """A header whose hash is `digest`, with the right one."""
    key = f'"{_HEADER_KEY}":"'.encode()
    blank = header.replace(key + digest.encode(), key + b"0" * _DIGITS, 1)
    found = hashlib.blake2b(blank, digest_size=_DIGITS // 2).hexdigest()
    return blank.replace(key + b"0" * _DIGITS, key + found.encode(), 1)


def _check_header(text: bytes, digest: str | None, path: Path) -> None:
    if digest is not None and _with_hash(text, digest) != text:
        raise CheckpointError(
            f"the header of {path} is damaged: it is not as it was written; fetch the file again"
        )


def _spans(given: str, data_start: int, path: Path) -> Iterator[Span]:
    """Of the file, those in the metadata."""
    for one in given.split():
        found = re.fullmatch(rf"(\d{{1,18}})-(\d{{1,18}}):([0-9a-f]{{{_DIGITS}}})", one)
        if found is None:
            raise CheckpointError(f"{path} has {one!r} for a checksum; the file is damaged")
        yield Span(data_start + int(found[1]), data_start + int(found[2]), found[3])


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _in_order(block: str, layout: Layout) -> Iterator[tuple[str, TensorSpec, int]]:
    """(full name, spec, offset) in the order of the bytes."""
    by_offset = sorted(layout.specs, key=lambda n: (layout.offsets[n], layout.specs[n].nbytes))
    for name in by_offset:
        spec, offset, full_name = layout.specs[name], layout.offsets[name], _full_name(block, name)
        if offset % DEFAULT_ALIGNMENT:
            raise ArgumentError(
                f"{full_name!r} lies at {offset} in its blob, no multiple of {DEFAULT_ALIGNMENT}; "
                "make the layout with keep_addresses=False"
            )
        if not _is_contiguous(spec) or spec.dtype not in _DTYPE_NAMES:
            raise ArgumentError(
                f"{full_name!r} is {spec.dtype} of shape {spec.shape} and strides {spec.stride}; "
                f"safetensors holds contiguous tensors of {', '.join(_DTYPES)}"
            )
        yield full_name, spec, offset


def _is_contiguous(spec: TensorSpec) -> bool:
    steps = zip(spec.shape, spec.stride, strides_of(spec.shape), strict=True)
    return 0 in spec.shape or all(size == 1 or stride == right for size, stride, right in steps)


def _reserve(file: BinaryIO, header: bytes, data_bytes: int) -> None:
    """Write the header and take the room: to a map with no room behind it nothing can be written.

    A process that tries is killed, so a full disk has to be found here.
    """
    file.write(header)
    file.flush()
    nbytes = len(header) + data_bytes
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
    else:
        os.ftruncate(file.fileno(), nbytes)


def _write_data(
    file: BinaryIO,
    header_bytes: int,
    plan: _Plan,
    layouts: Mapping[str, Layout],
    tensors: Callable[[str], Iterable[Chunk]],
) -> Iterator[str]:
    """The checksum of each span, as it is written."""
    region = mmap.mmap(file.fileno(), header_bytes + plan.nbytes)
    with torch.inference_mode(False):
        data = torch.frombuffer(region, dtype=torch.uint8)[header_bytes:]
    for block, layout in layouts.items():
        blob = plan.starts[block]
        _fill(block, layout, data[blob : blob + layout.extent], tensors(block))
        yield from (checksum(data[start:end]) for start, end in plan.spans[block])
    region.flush()


def _fill(block: str, layout: Layout, blob: torch.Tensor, tensors: Iterable[Chunk]) -> None:
    num_rows = {name: _num_rows(spec.shape) for name, spec in layout.specs.items()}
    missing = dict(num_rows)  # rows of each tensor that have not come yet
    for name, tensor, *first_row in tensors:
        full_name = _full_name(block, name)
        if not missing.get(name):
            raise ArgumentError(f"{full_name!r} came twice, or is not in the layout")
        start = first_row[0] if first_row else 0
        if start != num_rows[name] - missing[name]:
            raise ArgumentError(
                f"{full_name!r} came with the row {start}, but {num_rows[name] - missing[name]} is "
                "the next one; give the rows in order"
            )
        _check_piece(full_name, tensor, layout.specs[name], missing[name] if first_row else None)
        layout.fill(blob, [(name, tensor, start) if first_row else (name, tensor)])
        missing[name] -= _num_rows(tuple(tensor.shape))
        del tensor  # before the next one is made
    left = [name for name, rows in missing.items() if rows]
    if left:
        raise ArgumentError(f"{_full_name(block, min(left))!r} did not come; give every tensor")


def _num_rows(shape: tuple[int, ...]) -> int:
    """Rows that have to come; a tensor without axes, or without elements, comes as one."""
    return shape[0] if shape and shape[0] else 1


def _check_piece(
    full_name: str, tensor: torch.Tensor, spec: TensorSpec, max_rows: int | None
) -> None:
    """max_rows: of a tensor that comes in pieces; None where it comes whole."""
    shape = tuple(tensor.shape)
    is_fitting = shape == spec.shape
    if max_rows is not None:
        is_fitting = shape[1:] == spec.shape[1:] and 0 < shape[0] <= max_rows
    if not is_fitting or tensor.dtype != spec.dtype:
        raise ArgumentError(
            f"{full_name!r} came as {tensor.dtype} {shape}; its layout has {spec.dtype} "
            f"{spec.shape}"
        )
