"""The bytes of each block as they come from files: read, cast and packed some rows at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bminf.checkpoint.quantized import ColumnsOf, Packed, Quantized
from bminf.checkpoint.recorded import InMemory
from bminf.checkpoint.safetensors_file import lying_in_files
from bminf.checkpoint.stored import InFile, Stored, pieces
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.experts import PackedStack
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import Chunk, Layout
from bminf.offload import memory
from bminf.offload.blob import Blobs
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight, empty
from bminf.quantization.packing import pack

_CHUNK_ELEMENTS = 2**22  # of a matrix that are read and packed together
_EXPERT_CHUNK = 2**18  # of an expert that are packed together, beside all of it, that is read
_WITH_NAN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that torch compares

_PACKED = (QuantizedLinear, PackedStack)

_Lying = tuple[InFile | None, list[tuple[str, InFile]]]
Packer = Callable[[torch.Tensor, Format], PackedWeight]


@dataclass(frozen=True)
class Contents:
    """What a network on the meta device is filled with.

    network: packed, with a QuantizedLinear in place of each linear that is to be, and a PackedStack
    in place of each stack of experts.   blobs: its layouts.   tensors: by the names in the network;
    of a packed linear or stack either what it holds, which is taken as it is, or its `weight`, of a
    stack that of its own name, which is packed.   packer: packs rows of a weight.
    """

    network: torch.nn.Module
    blobs: Blobs
    tensors: Mapping[str, Stored]
    packer: Packer = pack
    _lying: dict[str, _Lying] = field(default_factory=dict, repr=False)
    _by_rows: dict[str, Stored] = field(default_factory=dict, repr=False)

    def lying(self, block: str) -> _Lying:
        """What of a block lies in files as it is to be read; see lying_in_files()."""
        if block not in self._lying:
            self._lying[block] = lying_in_files(self.tensors, block, self.layout(block))
        return self._lying[block]

    def stack(self, name: str) -> Stored:
        """A stack of experts that can be read one by one; if need be, in memory until another
        module of experts is read."""
        if name not in self._by_rows:
            others = {one for one in self._by_rows if _module_of(one) != _module_of(name)}
            for one in others:
                del self._by_rows[one]
            self._by_rows[name] = _by_rows(self.tensors[name])
        return self._by_rows[name]

    def layout(self, block: str) -> Layout:
        """That of a block, of an expert in a list, or "" for what lies outside all of them."""
        if not block:
            return self.blobs.outside
        return self.blobs.blocks.get(block) or self.blobs.listed(block)

    def of_tables(self) -> Contents:
        """The same, with the tables that are read by row as what lies outside all blocks."""
        return replace(self, blobs=replace(self.blobs, outside=self.blobs.of_tables), _lying={})


def read_block(contents: Contents, block: str, blob: torch.Tensor) -> None:
    """Fill `blob`, (extent,) uint8: in one read, where the bytes lie in a file as the layout says,
    as in a folder of our own; otherwise tensor by tensor.   Raises CheckpointError."""
    layout = contents.layout(block)
    run, found = contents.lying(block)
    if run is not None:
        run.read_into(blob)
        if not run.file.has_checksums:
            for name, stored in found:
                _check_taken(contents, block, name, stored, layout.view(blob, name))
        return
    as_they_are: set[int] = set()
    for name, stored in found:
        if (offset := layout.offsets[name]) not in as_they_are:
            room = blob[offset : offset + stored.span_bytes]
            stored.read_into(room)
            _check_taken(contents, block, name, stored, room.view(stored.dtype))
            as_they_are.add(offset)
    layout.fill(blob, tensors_of_block(contents, block, as_they_are))


def read_expert(contents: Contents, name: str, expert: int, blob: torch.Tensor) -> None:
    """Fill `blob`, (extent,) uint8, with one expert of a module.   Raises CheckpointError."""
    stack = contents.blobs.stacks[name]
    if stack.members:
        read_block(contents, f"{name}.{stack.members[expert]}", blob)
        return
    layout = stack.experts[expert]
    layout.fill(blob, _tensors_of_expert(contents, name, expert, layout))


def _tensors_of_expert(
    contents: Contents, name: str, expert: int, layout: Layout
) -> Iterator[Chunk]:
    module = contents.network.get_submodule(name)
    for key, stack in module.named_children():
        whole = f"{name}.{key}"
        if isinstance(stack, PackedStack) and whole in contents.tensors:
            packed = _packed_expert(stack, contents.stack(whole), expert, contents)
            held = [field for field in PACKED_FIELDS if f"{key}.{field}" in layout.specs]
            yield from ((f"{key}.{field}", getattr(packed, field)) for field in held)
    for key, spec in layout.specs.items():
        whole = f"{name}.{key}"
        if _module_of(whole) == name or _module_of(whole) not in contents.tensors:
            stored = contents.stack(whole)
            is_packed = _is_packed(whole, contents)
            part = stored.rows(expert, expert + 1).read()[0]
            yield key, _check_finite(part, stored, takes_infinity=not is_packed).to(spec.dtype)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def streamable_run(contents: Contents, block: str) -> InFile | None:
    """The bytes of a block, where they can be read from their file in each pass, as they are.

    What of them has no checksum, because another program wrote it, is looked through here, once.
    Raises CheckpointError where that holds NaN.
    """
    run, found = contents.lying(block)
    if run is not None and not run.file.has_checksums:
        for name, stored in found:
            for _, tensor in pieces(stored):
                _check_taken(contents, block, name, stored, tensor)
    return run


def table_in(
    contents: Contents, name: str, hold: Callable[..., torch.Tensor], is_mapped: bool
) -> torch.Tensor:
    """A table that is read by row: mapped, where it lies in a file as it is to be.

    hold: makes one of its shape, dtype and rows (see Backend).   is_mapped: whether it may be left
    in its file.   Raises CheckpointError.
    """
    stored, dtype = contents.tensors[name], contents.blobs.of_tables.specs[name].dtype
    checked = (_check_finite(rows, stored).to(dtype) for _, rows in pieces(stored))
    if is_mapped and _is_mapped_as(stored, dtype):
        deque(checked, maxlen=0)
        return stored.read()
    return hold(stored.shape, dtype, checked)


def tensors_of_block(contents: Contents, block: str, filled: Iterable[int] = ()) -> Iterator[Chunk]:
    """The tensors of a block's layout by their names in it, read and packed some rows at a time.

    block: "" for what lies outside all blocks.   filled: offsets of tensors that are left out.
    Raises CheckpointError.
    """
    layout, done = contents.layout(block), set(filled)
    root = contents.network.get_submodule(block)
    packed = {name: m for name, m in root.named_modules() if isinstance(m, _PACKED)}
    for name, linear in packed.items():
        inner = f"{name}." if name else ""
        if f"{inner}qweight" in layout.specs:
            held = [key for key in PACKED_FIELDS if inner + key in layout.specs]
            for key, tensor, first_row in _packed(linear, held, _joined(block, name), contents):
                if layout.offsets[inner + key] not in done:
                    yield inner + key, tensor, first_row
    keys = {f"{name}.{key}".lstrip(".") for name in packed for key in PACKED_FIELDS}
    for name, spec in layout.specs.items():
        if name not in keys and layout.offsets[name] not in done:
            done.add(layout.offsets[name])  # tied tensors are read once
            stored = contents.tensors[_joined(block, name)]
            if not stored.shape or _is_mapped_as(stored, spec.dtype):
                yield name, _check_finite(stored.read(), stored).to(spec.dtype)
                continue
            for first_row, tensor in pieces(stored):
                yield name, _check_finite(tensor, stored).to(spec.dtype), first_row


def _check_taken(
    contents: Contents, block: str, name: str, stored: Stored, tensor: torch.Tensor
) -> None:
    """Raise CheckpointError where what is taken as it lies in a file is of no use."""
    is_packed = _is_packed(_joined(block, name), contents)
    _check_finite(tensor, stored, takes_infinity=not is_packed)


def _is_packed(name: str, contents: Contents) -> bool:
    """Whether a tensor is one that a packed linear or stack has in place of its weight."""
    path, _, key = name.rpartition(".")
    return key in PACKED_FIELDS and isinstance(contents.network.get_submodule(path), _PACKED)


def _is_mapped_as(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether reading all of it takes no memory: its pages are those of the file."""
    is_aligned = type(stored) is InFile and stored.offset % dtype.itemsize == 0
    return is_aligned and stored.dtype == dtype


def _packed(
    linear: QuantizedLinear | PackedStack, keys: Sequence[str], name: str, contents: Contents
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(buffer, some of its rows, index of the first), of the buffers that it has."""
    tensors = contents.tensors
    if f"{name}.qweight" in tensors:
        for key in keys:
            stored = tensors[f"{name}.{key}"]
            for first_row, tensor in pieces(stored):
                yield key, _check_finite(tensor, stored, takes_infinity=False), first_row
        return
    if isinstance(linear, PackedStack):
        yield from _packed_experts(linear, keys, tensors[name], contents)
        return
    stored = _by_rows(tensors[f"{name}.weight"])
    num_rows, num_columns = stored.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    for first_row in range(0, num_rows, step):
        rows = stored.rows(first_row, min(first_row + step, num_rows))
        packed = _pack(rows, linear.form, contents.packer)
        for key in keys:
            yield key, getattr(packed, key), first_row


def _packed_experts(
    stack: PackedStack, keys: Sequence[str], stored: Stored, contents: Contents
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """One expert after another."""
    stored = _by_rows(stored)
    for expert in range(stack.num_experts):
        packed = _packed_expert(stack, stored, expert, contents)
        for key in keys:
            yield key, getattr(packed, key).unsqueeze(0), expert


def _packed_expert(
    stack: PackedStack, stored: Stored, expert: int, contents: Contents
) -> PackedWeight:
    """Some rows after others: what packing takes beside them is a multiple of their bytes."""
    weight = InMemory(stack.matrix(stored.rows(expert, expert + 1).read()[0]), stored.where)
    whole = empty(stack.out_features, stack.in_features, stack.form, "cpu")
    step = max(1, _EXPERT_CHUNK // max(1, stack.in_features))
    for first_row in range(0, stack.out_features, step):
        rows = slice(first_row, min(first_row + step, stack.out_features))
        packed = _pack(weight.rows(rows.start, rows.stop), stack.form, contents.packer)
        for key in PACKED_FIELDS:
            if (target := getattr(whole, key)) is not None:
                target[rows] = getattr(packed, key)
    del weight, packed
    if stack.out_features * stack.in_features >= _EXPERT_CHUNK:
        memory.trim()  # malloc would keep what several of them took
    return whole


def _by_rows(stored: Stored) -> Stored:
    """In memory, if a part of it cannot be read by itself."""
    return stored if stored.is_read_by_rows else InMemory(stored.read(), stored.where)


def _pack(stored: Stored, weight_format: Format, packer: Packer) -> PackedWeight:
    if isinstance(stored, ColumnsOf):
        whole = _pack(stored.whole, weight_format, packer)
        return whole.columns(stored.start, stored.end)
    try:
        if isinstance(stored, Quantized | Packed) and weight_format == stored.form:
            found = stored.packed()
            _check_finite(found.scale, stored, takes_infinity=False)
            return found
        return packer(stored.read(), weight_format)
    except ArgumentError as error:
        raise CheckpointError(f"{stored.where} cannot be quantized: {error}") from error


def _check_finite(
    tensor: torch.Tensor, stored: Stored, takes_infinity: bool = True
) -> torch.Tensor:
    """`tensor`, read from `stored`; CheckpointError where it holds NaN, of which maxima are NaN.

    takes_infinity: as masks do, and scales do not.
    """
    if tensor.dtype not in _WITH_NAN or tensor.numel() == 0:
        return tensor
    extremes = [tensor.max()] if takes_infinity else tensor.aminmax()
    if any(x.isnan() or (x.isinf() and not takes_infinity) for x in extremes):
        raise CheckpointError(
            f"{stored.where} holds NaN{'' if takes_infinity else ' or infinity'}, and no model "
            "that computes does; it is damaged, or its training went wrong: get another one"
        )
    return tensor


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
