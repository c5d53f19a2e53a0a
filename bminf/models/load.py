"""The only place where an architecture without weights, a checkpoint, quantization and the
scheduler meet: tensors go from the files straight to where the plan wants them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from bminf.arch.architecture import Architecture, Config
from bminf.checkpoint.names import listed
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.safetensors_file import run_of
from bminf.checkpoint.stored import InFile, Rows, Stored, pieces
from bminf.errors import ArgumentError, BudgetError, CheckpointError
from bminf.layers.host_embedding import HostEmbedding
from bminf.layers.quantize import quantize_children
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import WHOLE, Filling
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Blobs, survey
from bminf.offload.blocks import ModuleBlock, find_blocks
from bminf.offload.device import taken_bytes
from bminf.offload.hooks import ATTRIBUTE, Scheduler
from bminf.offload.placement import load
from bminf.offload.plan import Block, Plan, least_budget, plan
from bminf.quantization.packed import Format, PackedWeight, pack
from bminf.units import format_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of all that is not packed."""

_PACKED_FIELDS = ("qweight", "scale", "minimum", "code_sum")
_ELEMENTS_AT_ONCE = 2**24  # of a matrix that are read and packed together


@dataclass(frozen=True)
class Packing:
    """The formats of the linears in the blocks.

    form: of all of them but `exceptions`, by name; None is not packed.
    """

    form: Format | None = None
    exceptions: Mapping[str, Format | None] = field(default_factory=dict)

    def of(self, name: str) -> Format | None:
        return self.exceptions.get(name, self.form)

    @property
    def usual(self) -> Format | None:
        """That of the layers: what a pass needs beside its weights is reckoned by it."""
        return self.form or next(iter(self.exceptions.values()), None)


@dataclass(frozen=True)
class Weights:
    """Tensors that are not read yet, under the names of the architecture.

    packing: how the linears in the blocks are packed there already (named as a QuantizedLinear's
    buffers); None where they are not.   original_name: what the files call a tensor.
    table: of a HostEmbedding, if the model has one.   pack: of a weight that is not packed yet.
    """

    tensors: Mapping[str, Stored]
    path: Path
    packing: Packing | None = None
    original_name: Callable[[str], str] = str
    table: Stored | None = None
    pack: Callable[[torch.Tensor, Format], PackedWeight] = pack


def check_shapes(model: torch.nn.Module, weights: Weights) -> None:
    """Raise CheckpointError where tensors are missing, unknown, or of another shape or kind.

    model: on the meta device, as it will be; nothing is read.
    """
    expected = dict(_wanted(model, weights))
    call = weights.original_name
    missing = [call(name) for name in expected if name not in weights.tensors]
    unknown = [call(name) for name in weights.tensors if name not in expected]
    if missing or unknown:
        lacking = f"lacks {listed(missing)}" if missing else ""
        more = f"has {listed(unknown)} too many" if unknown else ""
        raise CheckpointError(
            f"{weights.path} {' and '.join(part for part in (lacking, more) if part)} for a "
            f"{type(model).__name__} of this configuration; see whether the configuration is that "
            "of the checkpoint, and whether the checkpoint is complete"
        )
    for name, (shape, dtype) in expected.items():
        _check_alike(weights.tensors[name], shape, dtype)
    for module in model.modules():
        if isinstance(module, HostEmbedding) and weights.table is not None:
            _check_alike(weights.table, (module.num_rows, module.hidden_size), None)


def _check_alike(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(stored.shape) != shape:
        raise CheckpointError(
            f"{stored.where} has the shape {tuple(stored.shape)}; the configuration asks for "
            f"{shape}: it is of another model, or the configuration is"
        )
    if stored.dtype != dtype if dtype is not None else not stored.dtype.is_floating_point:
        raise CheckpointError(
            f"{stored.where} is {stored.dtype}; it must be {dtype or 'floating point'}"
        )


def skeleton_of(architecture: Architecture, config: Config) -> torch.nn.Module:
    """The network on the meta device, in float32, with nothing packed."""
    with torch.device("meta"):
        return architecture.build(config)


def skeleton(
    architecture: Architecture,
    config: Config,
    dtype: torch.dtype,
    packing: Packing,
    activations: str,
) -> tuple[torch.nn.Module, list[ModuleBlock]]:
    """The network on the meta device, in `dtype`, the linears of its blocks packed; and the blocks.

    Raises ArgumentError for activations that do not go with the format.
    """
    model = skeleton_of(architecture, config)
    model.to(dtype).eval().requires_grad_(False)
    blocks = find_blocks(model, architecture.blocks(model))
    if packing == Packing() and activations not in ("auto", "float"):
        raise ArgumentError(
            f"activations={activations!r}, but quantization=None leaves the weights in floating "
            'point; accepted with it: "auto", "float"'
        )
    inside = {module for b in blocks for module in model.get_submodule(b.name).modules()}
    stand_ins: dict[torch.nn.Module, QuantizedLinear] = {}
    for name, module in model.named_modules():
        form = packing.of(name)
        if type(module) is torch.nn.Linear and module in inside and form is not None:
            stand_ins[module] = QuantizedLinear(module, activations, form)
    list(quantize_children(model, stand_ins))
    return model, blocks


def lay_out(model: torch.nn.Module, blocks: list[ModuleBlock]) -> Blobs:
    """The blobs of a skeleton, each tensor aligned to 256: on disk, at home and in a slot."""
    return survey(model, blocks, {}, keep_addresses=False)


def plan_for(
    blocks: list[ModuleBlock],
    blobs: Blobs,
    budget: int,
    uses: Mapping[str, float],
    reserved_bytes: int,
    device_type: str,
    host_bytes: int | None = None,
    form: Format | None = None,
) -> Plan:
    """See plan().   device_type: "cpu" or "cuda", what the budget is of.   form: how the weights
    are packed.   Raises BudgetError, with numbers."""
    sizes = {name: taken_bytes(x.nbytes, device_type) for name, x in blobs.blocks.items()}
    given = [Block(b.name, sizes[b.name], b.list_name) for b in blocks]
    fixed: dict[str, Any] = {
        "outside_bytes": taken_bytes(blobs.outside.nbytes, device_type),
        "reserved_bytes": reserved_bytes,
    }
    try:
        return plan(given, budget, uses, **fixed, host_bytes=host_bytes)
    except BudgetError:
        least = least_budget(plan(given, 2**60, uses, **fixed))
        if least <= budget:  # host memory is what is missing
            raise
        fewer = ", or pack the weights to fewer bits" if form is None or form.bits > 4 else ""
        raise BudgetError(
            f"the limit of {format_bytes(budget)} ({budget} bytes) is below the least that would "
            f"do, {format_bytes(least)} ({least} bytes), of which {format_bytes(reserved_bytes)} "
            f"are for max_length and max_batch_size; raise memory_limit, lower those two{fewer}"
        ) from None


def fill(
    model: torch.nn.Module,
    blobs: Blobs,
    the_plan: Plan,
    backend: Backend,
    weights: Weights,
    offload_dir: str | Path | None,
) -> Scheduler:
    """Read `weights` into `model` as planned, and begin to stream; on an error nothing is left.

    Raises CheckpointError for what cannot be read, OffloadError for a home that cannot be made.
    """
    scheduler = Scheduler(the_plan, backend, backend.device)
    try:
        if the_plan.streamed:
            layouts = [blobs.blocks[name] for name in the_plan.streamed]
            backend.open(layouts, offload_dir, the_plan.disk_places)
        with torch.device("cpu"):  # where files are read to, whatever the caller's default is
            load(model, blobs, scheduler, lambda name: _fillings(model, name, blobs, weights))
        for module in model.modules():
            if isinstance(module, HostEmbedding):
                _keep_table(module, weights)
        if the_plan.streamed:
            scheduler.install(model)
    except BaseException:
        backend.close()
        raise
    model.__dict__[ATTRIBUTE] = scheduler
    weakref.finalize(model, backend.release)
    return scheduler


def _fillings(
    model: torch.nn.Module, block: str, blobs: Blobs, weights: Weights
) -> Iterable[Filling]:
    """All bytes of a block in one read, where they lie in a file as its layout says, as in a folder
    of ours; otherwise its tensors."""
    run = run_of(weights.tensors, block, blobs.blocks[block] if block else blobs.outside)
    if run is not None:
        return [(WHOLE, run.read())]
    return tensors_of_block(model, block, blobs, weights)


def tensors_of_block(
    model: torch.nn.Module, block: str, blobs: Blobs, weights: Weights
) -> Iterator[Filling]:
    """All tensors of a block's layout by their names in it, read and packed some rows at a time.

    block: "" for what lies outside all blocks.
    """
    layout = blobs.blocks[block] if block else blobs.outside
    root = model.get_submodule(block)
    packed = {name: m for name, m in root.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in packed.items():
        inner = f"{name}." if name else ""
        if f"{inner}qweight" in layout.specs:
            for key, tensor, first_row in _packed(linear, _joined(block, name), weights):
                yield inner + key, tensor, first_row
    keys = {f"{name}.{key}".lstrip(".") for name in packed for key in _PACKED_FIELDS}
    for name, spec in layout.specs.items():
        if name not in keys:
            for first_row, tensor in pieces(weights.tensors[_joined(block, name)]):
                yield name, tensor.to(spec.dtype), first_row


def _packed(
    linear: QuantizedLinear, name: str, weights: Weights
) -> Iterator[tuple[str, torch.Tensor, int]]:
    if weights.packing is not None:
        for key in _keys_of(linear):
            for first_row, tensor in pieces(weights.tensors[f"{name}.{key}"]):
                yield key, tensor, first_row
        return
    stored = weights.tensors[f"{name}.weight"]
    for begin, end in _ranges(stored):
        packed = _pack(stored.rows(begin, end), linear.form, weights.pack)
        for key in _keys_of(linear):
            yield key, getattr(packed, key), begin


def _pack(
    stored: Stored, form: Format, packer: Callable[[torch.Tensor, Format], PackedWeight]
) -> PackedWeight:
    try:
        if isinstance(stored, Quantized) and form == stored.form:
            return stored.packed()
        return packer(stored.read(), form)
    except ArgumentError as error:
        raise CheckpointError(f"{stored.where} cannot be quantised: {error}") from error


def _ranges(stored: Stored) -> Iterator[tuple[int, int]]:
    """Rows of a matrix that are packed together."""
    num_rows, num_columns = stored.shape
    at_once = max(1, _ELEMENTS_AT_ONCE // max(1, num_columns))
    for begin in range(0, num_rows, at_once):
        yield begin, min(begin + at_once, num_rows)


def _keep_table(embedding: HostEmbedding, weights: Weights) -> None:
    """Give an embedding its table as the tensors that it consists of, mapped from their files."""
    table = weights.table
    if table is None:
        raise CheckpointError(f"{weights.path} has no embedding; fetch it again")
    parts = table.parts if isinstance(table, Rows) else (table,)
    mapped = [part.as_bytes().read() if _is_odd(part) else part.read() for part in parts]
    embedding.keep(mapped, table.dtype)


def _is_odd(part: Stored) -> TypeGuard[InFile]:
    """Whether a part lies where no number may begin, and would be copied as a whole."""
    if not isinstance(part, InFile) or part.stride[1] != 1:
        return False
    return part.offset % part.dtype.itemsize != 0


def _wanted(
    model: torch.nn.Module, weights: Weights
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype | None]]]:
    """(name, (shape, dtype)) of each tensor that the checkpoint must have; None is any that is
    floating point."""
    for prefix, module in model.named_modules():
        is_packed = isinstance(module, QuantizedLinear)
        if is_packed and weights.packing is None:
            yield _joined(prefix, "weight"), ((module.out_features, module.in_features), None)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            is_code = is_packed and key in _PACKED_FIELDS
            if tensor is not None and not (is_code and weights.packing is None):
                dtype = tensor.dtype if is_code else None
                yield _joined(prefix, key), (tuple(tensor.shape), dtype)


def _keys_of(linear: QuantizedLinear) -> Iterable[str]:
    return [key for key in _PACKED_FIELDS if getattr(linear.packed, key) is not None]


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
