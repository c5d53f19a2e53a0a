"""The only place where an architecture without weights, a checkpoint, quantization and the
scheduler meet: tensors go from the files straight to where the plan wants them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bminf.checkpoint.names import listed
from bminf.checkpoint.stored import QuantizedRows, Stored
from bminf.errors import ArgumentError, BudgetError, CheckpointError
from bminf.layers.quantize import quantize_children
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.quantization.packed import INT8, Format, PackedWeight, of_codes, pack
from bminf.scheduler.backends.base import Backend
from bminf.scheduler.blob import Blobs, survey
from bminf.scheduler.blocks import ModuleBlock, find_blocks
from bminf.scheduler.hooks import ATTRIBUTE, Scheduler
from bminf.scheduler.placement import load
from bminf.scheduler.plan import Block, Plan, least_budget, plan
from bminf.units import format_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of all that is not packed."""

Model = TypeVar("Model", bound=torch.nn.Module)

_PACKED_FIELDS = ("qweight", "scale", "minimum", "code_sum")


@dataclass(frozen=True)
class Weights:
    """Tensors that are not read yet, under the names of the architecture.

    form: how the linears in the blocks are packed there already (named as a QuantizedLinear's
    buffers); None where they are not.   original_name: what the files call a tensor.
    """

    tensors: Mapping[str, Stored]
    path: Path
    form: Format | None = None
    original_name: Callable[[str], str] = str


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


def skeleton(
    model: Model, dtype: torch.dtype, form: Format | None, activations: str
) -> tuple[Model, list[ModuleBlock]]:
    """`model`, on the meta device, in `dtype`, the linears of its blocks packed; and the blocks.

    Raises ArgumentError for activations that do not go with the format.
    """
    model.to(dtype).eval().requires_grad_(False)
    # By name, because a list of one layer is not seen to repeat.
    lists = [n for n, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = find_blocks(model, lists)
    if form is not None:
        inside = {module for b in blocks for module in model.get_submodule(b.name).modules()}
        stand_ins: dict[torch.nn.Module, QuantizedLinear] = {
            module: QuantizedLinear(module, activations, form)
            for module in model.modules()
            if type(module) is torch.nn.Linear and module in inside
        }
        list(quantize_children(model, stand_ins))
    elif activations not in ("auto", "float"):
        raise ArgumentError(
            f"activations={activations!r}, but quantization=None leaves the weights in floating "
            'point; accepted with it: "auto", "float"'
        )
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
) -> Plan:
    """See plan().   Raises BudgetError, with numbers."""
    given = [Block(b.name, blobs.blocks[b.name].nbytes, b.list_name) for b in blocks]
    fixed = {"outside_bytes": blobs.outside.nbytes, "reserved_bytes": reserved_bytes}
    try:
        return plan(given, budget, uses, **fixed)
    except BudgetError:
        least = least_budget(plan(given, 2**60, uses, **fixed))
        raise BudgetError(
            f"the limit of {format_bytes(budget)} ({budget} bytes) is below the least that would "
            f"do, {format_bytes(least)} ({least} bytes), of which {format_bytes(reserved_bytes)} "
            "are for max_length and max_batch_size; raise memory_limit, lower those two, or pack "
            "the weights to fewer bits"
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
            backend.open([blobs.blocks[name] for name in the_plan.streamed], offload_dir)
        with torch.device("cpu"):  # where files are read to, whatever the caller's default is
            load(
                model, blobs, scheduler, lambda name: tensors_of_block(model, name, blobs, weights)
            )
        if the_plan.streamed:
            scheduler.install(model)
    except BaseException:
        backend.close()
        raise
    model.__dict__[ATTRIBUTE] = scheduler
    weakref.finalize(model, backend.release)
    return scheduler


def tensors_of_block(
    model: torch.nn.Module, block: str, blobs: Blobs, weights: Weights
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the block, tensor) of all tensors of its layout, read and packed one at a time.

    block: "" for what lies outside all blocks.
    """
    layout = blobs.blocks[block] if block else blobs.outside
    root = model.get_submodule(block)
    packed = {name: m for name, m in root.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in packed.items():
        inner = f"{name}." if name else ""
        if f"{inner}qweight" in layout.specs:
            for field, tensor in _packed(linear, _joined(block, name), weights):
                yield inner + field, tensor
    fields = {f"{name}.{field}".lstrip(".") for name in packed for field in _PACKED_FIELDS}
    for name, spec in layout.specs.items():
        if name not in fields:
            yield name, _read(weights, _joined(block, name)).to(spec.dtype)


def _packed(
    linear: QuantizedLinear, name: str, weights: Weights
) -> Iterator[tuple[str, torch.Tensor]]:
    if weights.form is not None:
        for field in _fields_of(linear):
            yield field, _read(weights, f"{name}.{field}")
        return
    packed = _pack(weights.tensors[f"{name}.weight"], linear.form)
    for field in _fields_of(linear):
        yield field, getattr(packed, field)


def _pack(stored: Stored, form: Format) -> PackedWeight:
    try:
        if isinstance(stored, QuantizedRows) and form == INT8:
            return of_codes(stored.codes.read(), stored.scale.read())
        return pack(stored.read(), form)
    except ArgumentError as error:
        raise CheckpointError(f"{stored.where} cannot be quantised: {error}") from error


def _wanted(
    model: torch.nn.Module, weights: Weights
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype | None]]]:
    """(name, (shape, dtype)) of each tensor that the checkpoint must have; None is any that is
    floating point."""
    for prefix, module in model.named_modules():
        is_packed = isinstance(module, QuantizedLinear)
        if is_packed and weights.form is None:
            yield _joined(prefix, "weight"), ((module.out_features, module.in_features), None)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            is_code = is_packed and key in _PACKED_FIELDS
            if tensor is not None and not (is_code and weights.form is None):
                dtype = tensor.dtype if is_code else None
                yield _joined(prefix, key), (tuple(tensor.shape), dtype)


def _fields_of(linear: QuantizedLinear) -> Iterable[str]:
    return [field for field in _PACKED_FIELDS if getattr(linear, field) is not None]


def _read(weights: Weights, name: str) -> torch.Tensor:
    return weights.tensors[name].read()


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
