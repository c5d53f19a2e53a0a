"""The bytes of a model: from the files of its weights straight to where the plan wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

import torch

from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.safetensors_file import run_of
from bminf.checkpoint.stored import InFile, Rows, Stored, pieces
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.embedding import HostEmbedding
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import WHOLE, Chunk
from bminf.models.assemble import Assembly
from bminf.models.source import PACKED_FIELDS, Source, Weights
from bminf.offload.backends.base import Backend
from bminf.offload.hooks import Scheduler
from bminf.offload.placement import load
from bminf.offload.plan import Plan
from bminf.offload.start import start
from bminf.quantization.packed import Format, PackedWeight

_CHUNK_ELEMENTS = 2**24  # of a matrix that are read and packed together


def fill(
    assembly: Assembly, plan: Plan, backend: Backend, offload_dir: str | Path | None
) -> Scheduler:
    """Read the weights as planned, and start to stream; on an error nothing is left.

    Raises CheckpointError for what cannot be read, OffloadError for a backing store that cannot be
    made.
    """
    network, weights, blobs = assembly.network, assembly.source.weights, assembly.blobs
    scheduler = Scheduler(plan, backend, backend.device)

    def read() -> None:
        with torch.device("cpu"):  # where files are read to, whatever the caller's default is
            load(network, blobs, scheduler, lambda name: _chunks(assembly, name))
        for module in network.modules():
            if isinstance(module, HostEmbedding):
                _keep_table(module, weights)

    start(network, blobs, scheduler, offload_dir, read, backend.close)
    return scheduler


def _chunks(assembly: Assembly, block: str) -> Iterable[Chunk]:
    """All bytes of a block in one read, where they lie in a file as its layout says, as in a
    converted folder; otherwise its tensors."""
    blobs, weights = assembly.blobs, assembly.source.weights
    run = run_of(weights.tensors, block, blobs.blocks[block] if block else blobs.outside)
    if run is not None:
        return [(WHOLE, run.read())]
    return tensors_of_block(assembly, block)


def tensors_of_block(assembly: Assembly, block: str) -> Iterator[Chunk]:
    """All tensors of a block's layout by their names in it, read and packed some rows at a time.

    block: "" for what lies outside all blocks.
    """
    weights, blobs = assembly.source.weights, assembly.blobs
    layout = blobs.blocks[block] if block else blobs.outside
    root = assembly.network.get_submodule(block)
    packed = {name: m for name, m in root.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in packed.items():
        inner = f"{name}." if name else ""
        if f"{inner}qweight" in layout.specs:
            for key, tensor, first_row in _packed(linear, _joined(block, name), assembly.source):
                yield inner + key, tensor, first_row
    keys = {f"{name}.{key}".lstrip(".") for name in packed for key in PACKED_FIELDS}
    for name, spec in layout.specs.items():
        if name not in keys:
            for first_row, tensor in pieces(weights.tensors[_joined(block, name)]):
                yield name, tensor.to(spec.dtype), first_row


def _packed(
    linear: QuantizedLinear, name: str, source: Source
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(buffer, some of its rows, index of the first)."""
    like, weights = linear.packed, source.weights
    keys = [key for key in PACKED_FIELDS if getattr(like, key) is not None]
    if weights.packing is not None:
        for key in keys:
            for first_row, tensor in pieces(weights.tensors[f"{name}.{key}"]):
                yield key, tensor, first_row
        return
    stored = weights.tensors[f"{name}.weight"]
    num_rows, num_columns = stored.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    for first_row in range(0, num_rows, step):
        rows = stored.rows(first_row, min(first_row + step, num_rows))
        packed = _pack(rows, linear.form, source.architecture.pack)
        for key in keys:
            yield key, getattr(packed, key), first_row


def _pack(
    stored: Stored, weight_format: Format, packer: Callable[[torch.Tensor, Format], PackedWeight]
) -> PackedWeight:
    try:
        if isinstance(stored, Quantized) and weight_format == stored.form:
            return stored.packed()
        return packer(stored.read(), weight_format)
    except ArgumentError as error:
        raise CheckpointError(f"{stored.where} cannot be quantized: {error}") from error


def _keep_table(embedding: HostEmbedding, weights: Weights) -> None:
    """Give an embedding its table as the tensors that it consists of, mapped from their files."""
    table = weights.table
    assert table is not None, "check_shapes() has seen it"
    parts = table.parts if isinstance(table, Rows) else (table,)
    mapped = [part.as_bytes().read() if _is_misaligned(part) else part.read() for part in parts]
    embedding.keep(mapped, table.dtype)


def _is_misaligned(part: Stored) -> TypeGuard[InFile]:
    """Whether a part lies where no number may begin, and would be copied as a whole."""
    if not isinstance(part, InFile) or part.stride[1] != 1:
        return False
    return part.offset % part.dtype.itemsize != 0


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
