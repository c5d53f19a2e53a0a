"""The bytes of each block as they come from files: read, cast and packed some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.recorded import sliceable
from bminf.checkpoint.safetensors_file import run_of
from bminf.checkpoint.stored import InFile, Stored, pieces
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import WHOLE, Chunk, Layout
from bminf.offload.blob import Blobs
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight, pack

_CHUNK_ELEMENTS = 2**22  # of a matrix that are read and packed together

Packer = Callable[[torch.Tensor, Format], PackedWeight]


@dataclass(frozen=True)
class Contents:
    """What a network on the meta device is filled with.

    network: packed, with a QuantizedLinear in place of each linear that is to be.   blobs: its
    layouts.   tensors: by the names in the network; of a packed linear either what it holds, which
    is taken as it is, or its `weight`, which is packed.   packer: packs rows of a weight.
    """

    network: torch.nn.Module
    blobs: Blobs
    tensors: Mapping[str, Stored]
    packer: Packer = pack

    def layout(self, block: str) -> Layout:
        """That of a block, or "" for what lies outside all of them."""
        return self.blobs.blocks[block] if block else self.blobs.outside


def chunks_of_block(contents: Contents, block: str) -> Iterable[Chunk]:
    """All bytes of a block in one read, where they lie in a file as its layout says, as in a folder
    of our own; otherwise its tensors."""
    run = run_of(contents.tensors, block, contents.layout(block))
    if run is not None:
        return [(WHOLE, run.read())]
    return tensors_of_block(contents, block)


def tensors_of_block(contents: Contents, block: str) -> Iterator[Chunk]:
    """All tensors of a block's layout by their names in it, read and packed some rows at a time.

    block: "" for what lies outside all blocks.   Raises CheckpointError.
    """
    layout = contents.layout(block)
    root = contents.network.get_submodule(block)
    packed = {name: m for name, m in root.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in packed.items():
        inner = f"{name}." if name else ""
        if f"{inner}qweight" in layout.specs:
            for key, tensor, first_row in _packed(linear, _joined(block, name), contents):
                yield inner + key, tensor, first_row
    keys = {f"{name}.{key}".lstrip(".") for name in packed for key in PACKED_FIELDS}
    filled: set[int] = set()  # offsets: tied tensors are read once
    for name, spec in layout.specs.items():
        if name not in keys and layout.offsets[name] not in filled:
            filled.add(layout.offsets[name])
            stored = sliceable(contents.tensors[_joined(block, name)])
            if not stored.shape or _is_mapped_as(stored, spec.dtype):
                yield name, stored.read().to(spec.dtype)
                continue
            for first_row, tensor in pieces(stored):
                yield name, tensor.to(spec.dtype), first_row


def _is_mapped_as(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether reading all of it takes no memory: its pages are those of the file."""
    is_aligned = type(stored) is InFile and stored.offset % dtype.itemsize == 0
    return is_aligned and stored.dtype == dtype


def _packed(
    linear: QuantizedLinear, name: str, contents: Contents
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(buffer, some of its rows, index of the first)."""
    like, tensors = linear.packed, contents.tensors
    keys = [key for key in PACKED_FIELDS if getattr(like, key) is not None]
    if f"{name}.qweight" in tensors:
        for key in keys:
            for first_row, tensor in pieces(tensors[f"{name}.{key}"]):
                yield key, tensor, first_row
        return
    stored = sliceable(tensors[f"{name}.weight"])
    num_rows, num_columns = stored.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    for first_row in range(0, num_rows, step):
        rows = stored.rows(first_row, min(first_row + step, num_rows))
        packed = _pack(rows, linear.form, contents.packer)
        for key in keys:
            yield key, getattr(packed, key), first_row


def _pack(stored: Stored, weight_format: Format, packer: Packer) -> PackedWeight:
    try:
        if isinstance(stored, Quantized) and weight_format == stored.form:
            return stored.packed()
        return packer(stored.read(), weight_format)
    except ArgumentError as error:
        raise CheckpointError(f"{stored.where} cannot be quantized: {error}") from error


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
