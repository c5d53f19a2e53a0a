"""Which bytes make the blob of each block, and which lie outside all blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bminf.errors import UnsupportedModelError
from bminf.layers.experts import PackedExperts, forward_of, listed_experts, stacks_of
from bminf.layers.quantize import choose_linears
from bminf.layout import (
    ADDRESS_MODULUS,
    DEFAULT_ALIGNMENT,
    Layout,
    ModuleBlock,
    TensorSpec,
    overlapping,
    specs_of,
    tensors_of,
)
from bminf.offload import memory
from bminf.offload.backends import allocated_bytes_on
from bminf.offload.plan import Block, Remedy, least_bytes
from bminf.offload.pool import LEAST_SLOTS
from bminf.offload.tables import Table, find_tables
from bminf.quantization.packed import FORMATS, Format

_KINDS = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.nn.Parameter))


@dataclass(frozen=True)
class Stack:
    """The experts of one module, each of which is a blob. Names are relative to the module.

    block: in which the module lies.   whole: their tensors as the module holds them.
    experts: of each expert, the part of every stack that is its own.
    members: where the module is a list of modules, those in it, to which the names in `experts` are
    relative.
    """

    block: str
    whole: Layout
    experts: Sequence[Layout]
    members: tuple[str, ...] = ()

    @property
    def slot_bytes(self) -> int:
        """Of a slot for any of these experts, wherever their tensors begin."""
        return max(
            -(-layout.nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
            + DEFAULT_ALIGNMENT * len(layout.specs)
            for layout in self.experts
        )


@dataclass(frozen=True)
class Blobs:
    """Layouts with names relative to the block; `outside` has names relative to the model.

    A tensor that a block shares with anything outside it (tied weights, a part of two blocks) lies
    outside: it stays, and is counted once. A block that stands in two places is one block.
    stacks: of modules of experts, by name, what is in no block but streams by need.
    tables: what can be read by row on the host; in no block, nor in `outside`.   of_tables: their
    layout where they lie on the device, with names relative to the model.
    """

    blocks: Mapping[str, Layout]
    outside: Layout
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    of_tables: Layout = field(default_factory=lambda: Layout.of({}))

    @property
    def nbytes(self) -> int:
        wholes = [stack.whole for stack in self.stacks.values()]
        layouts = [self.outside, self.of_tables, *self.blocks.values(), *wholes]
        return sum(layout.nbytes for layout in layouts)

    def listed(self, path: str) -> Layout:
        """That of the expert in a list which is the module of this name."""
        name, _, member = path.rpartition(".")
        stack = self.stacks[name]
        return stack.experts[stack.members.index(member)]

    def stacks_by_block(self) -> dict[str, dict[str, Stack]]:
        """Of the blocks that have any."""
        found: dict[str, dict[str, Stack]] = {}
        for name, stack in self.stacks.items():
            found.setdefault(stack.block, {})[name] = stack
        return found


def lay_out(
    model: torch.nn.Module,
    blocks: Sequence[ModuleBlock],
    replacements: Mapping[torch.nn.Module, torch.nn.Module],
    keep_addresses: bool,
    tables: Sequence[Table] = (),
    by_need: bool = False,
) -> Blobs:
    """Lay out every parameter and buffer of `model`.

    replacements: modules that will be exchanged, with their replacements.
    keep_addresses: see Layout.of.   tables: what is laid out apart, see find_tables().
    by_need: whether each expert of a stack in a block is a blob.
    """
    places = list(_places(model, blocks))
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[str, tuple[str, str]] = {}  # name -> block, name in there
    for path, block, inner_path, module in places:
        holder = replacements.get(module, module)
        for key, tensor in _held(holder):
            tensors[_joined(path, key)] = tensor
            owners[_joined(path, key)] = block, _joined(inner_path, key)
    specs = specs_of(tensors)
    by_row = {name: specs.pop(name) for table in tables for name in table.names}
    outside = _shared(specs, owners) | _adapters(places, replacements)
    parts: dict[str, dict[str, TensorSpec]] = {"": {}, **{block.name: {} for block in blocks}}
    lists = _lists(places, specs, outside) if by_need else {}
    stacks = _stacks(places, replacements, outside) if by_need else {}
    stacks = {name: found for name, found in stacks.items() if not _is_within(name, lists)}
    in_stacks = {_joined(name, key) for name, (_, stack) in stacks.items() for key in stack}
    in_stacks |= {_joined(name, key) for name, (_, _, inner) in lists.items() for key in inner}
    for name, spec in specs.items():
        block, inner_name = ("", name) if name in outside else owners[name]
        if name not in in_stacks:
            parts[block][inner_name] = spec
    layouts = {block: Layout.of(part, keep_addresses) for block, part in parts.items()}
    laid_out = {n: _lay_out_experts(*found, keep_addresses) for n, found in stacks.items()}
    laid_out |= {n: _lay_out_list(*found, keep_addresses) for n, found in lists.items()}
    of_tables = Layout.of(by_row, keep_addresses)
    return Blobs(layouts, layouts.pop(""), laid_out, tables, of_tables)


def _stacks(
    places: Sequence[_Place],
    replacements: Mapping[torch.nn.Module, torch.nn.Module],
    outside: Collection[str],
) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Name of a module of experts in a block -> the block, and its stacks, where all can move."""
    counts = Counter(module for *_, module in places)
    found = {}
    for path, block, _, module in places:
        holder = replacements.get(module, module)
        if block and counts[module] == 1 and forward_of(holder) is not None:
            stacks = stacks_of(holder)
            if stacks and not any(_joined(path, key) in outside for key in stacks):
                found[path] = block, stacks
    return found


def _lay_out_experts(block: str, stacks: Mapping[str, torch.Tensor], keep_addresses: bool) -> Stack:
    whole = Layout.of(specs_of(stacks), keep_addresses)
    number = len(next(iter(stacks.values())))
    steps = [t.stride(0) * t.itemsize for t in stacks.values() if not t.is_meta]
    are_alike = not keep_addresses or not any(step % ADDRESS_MODULUS for step in steps)
    layouts = [
        Layout.of({key: TensorSpec.of(t[expert]) for key, t in stacks.items()}, keep_addresses)
        for expert in range(1 if are_alike else number)
    ]
    return Stack(block, whole, layouts * number if are_alike else layouts)


def _lists(
    places: Sequence[_Place], specs: Mapping[str, TensorSpec], outside: Collection[str]
) -> dict[str, tuple[str, list[str], dict[str, TensorSpec]]]:
    """Name of a list of experts in a block -> the block, its items, and all that they hold, by
    names relative to the list, where each holds tensors that nothing else does."""
    counts = Counter(module for *_, module in places)
    owners: dict[str, str] = {}  # name of a tensor -> of the expert that it is of
    found: dict[str, tuple[str, list[str], dict[str, TensorSpec]]] = {}
    for path, block, _, module in places:
        experts = listed_experts(path.rpartition(".")[2], module) if block else {}
        if not experts or any(counts[child] > 1 for child in experts.values()):
            continue
        if _is_within(path, found):  # an expert comes with all that it holds, experts too
            continue
        inner = {n[len(path) + 1 :]: x for n, x in specs.items() if n.startswith(f"{path}.")}
        is_apart = {n.partition(".")[0] for n in inner} == set(experts)
        if is_apart and not any(_joined(path, n) in outside for n in inner):
            found[path] = block, list(experts), inner
            owners |= {_joined(path, n): _joined(path, n.partition(".")[0]) for n in inner}
    located = {name: spec for name, spec in specs.items() if spec.start is not None}
    for _, names in overlapping(located) if found else []:
        if len(several := {owners.get(name, "") for name in names}) > 1:
            for expert in several:
                found.pop(expert.rpartition(".")[0], None)
    return found


def _is_within(path: str, modules: Iterable[str]) -> bool:
    """Whether the module `path` lies in one of these."""
    return any(path.startswith(f"{outer}.") for outer in modules)


def _lay_out_list(
    block: str, members: Sequence[str], inner: Mapping[str, TensorSpec], keep_addresses: bool
) -> Stack:
    parts: dict[str, dict[str, TensorSpec]] = {member: {} for member in members}
    for name, spec in inner.items():
        member, _, key = name.partition(".")
        parts[member][key] = spec
    layouts = [Layout.of(part, keep_addresses) for part in parts.values()]
    return Stack(block, Layout.of(inner, keep_addresses), layouts, tuple(members))


def _held(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module itself, and of the stacks that stand in packed experts in place of
    parameters."""
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield key, tensor
    if isinstance(module, PackedExperts):
        for name, stack in module.stacks():
            yield from ((_joined(name, key), tensor) for key, tensor in _held(stack))


_Place = tuple[str, str, str, torch.nn.Module]
"""Path of a module, name of the block that it lies in ("" outside all), path in there, module."""


def _places(model: torch.nn.Module, blocks: Sequence[ModuleBlock]) -> Iterator[_Place]:
    """Every path to every module; also by the other names of a block that stands in several
    places."""
    names = {model.get_submodule(block.name): block.name for block in blocks}
    around = {"": ("", "")}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, key = path.rpartition(".")
        block, inner_path = around[parent]
        inner_path = _joined(inner_path, key)
        if not block and module in names:
            block, inner_path = names[module], ""
        around[path] = block, inner_path
        yield path, block, inner_path, module


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shared(specs: Mapping[str, TensorSpec], owners: Mapping[str, tuple[str, str]]) -> set[str]:
    """Names of tensors whose bytes also belong to another block, or lie outside all."""
    located = {name: spec for name, spec in specs.items() if spec.start is not None}
    groups = [names for _, names in overlapping(located)]
    return {n for names in groups if len({owners[n][0] for n in names}) > 1 for n in names}


def _adapters(
    places: Sequence[_Place], replacements: Mapping[torch.nn.Module, torch.nn.Module]
) -> set[str]:
    """Parameters in blocks whose bulk is frozen that are not: adapters, which have to stay.

    A gradient needs them where they are, and they are small. Where most of the bytes are trainable,
    as in a model that nobody froze, none is.
    """
    parameters = [
        (_joined(path, key), module, parameter)
        for path, block, _, module in places
        if block
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    trained = [item for item in parameters if item[2].requires_grad]
    if 2 * sum(p.nbytes for *_, p in trained) > sum(p.nbytes for *_, p in parameters):
        return set()
    return {name for name, module, _ in trained if module not in replacements}


def unmapped_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model that occupy memory; a mapped file is the system's to take back."""
    is_mapped = memory.mapped_files()
    specs = [TensorSpec.of(tensor) for *_, tensor in tensors_of(model)]
    starts = {spec.start: spec.nbytes for spec in specs if spec.start is not None}
    return sum(nbytes for start, nbytes in starts.items() if not is_mapped(start))


def check_tensors(model: torch.nn.Module) -> torch.device:
    """The one device of all tensors. Raises UnsupportedModelError for what is not plain bytes."""
    check_kinds(model)
    devices: dict[torch.device, str] = {}
    for name, _, tensor in tensors_of(model):
        _check_place(name, tensor)
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        hooks = any("_hf_hook" in module.__dict__ for module in model.modules())
        first = "remove accelerate's hooks (accelerate.hooks.remove_hook_from_module(model, "
        raise UnsupportedModelError(
            f"the model lies on several devices ({where}); "
            f"{first + 'recurse=True)) and ' if hooks else ''}move it to one first"
        )
    return next(iter(devices), torch.device("cpu"))


def check_kinds(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError for tensors that are not plain bytes, wherever they lie."""
    for name, _, tensor in tensors_of(model):
        if torch.nn.parameter.is_lazy(tensor):
            reason = "is not initialised yet; run the model once first"
        elif type(tensor) not in _KINDS:
            reason = f"is a {type(tensor).__name__}, whose bytes are not those of a plain tensor"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else tensor.layout
            reason = f"is {kind}, not a dense tensor"
        else:
            continue
        raise UnsupportedModelError(f"the tensor {name!r} {reason}")


def _check_place(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        reason = "is on the meta device and has no values; load the weights first"
    elif tensor.device.type not in ("cpu", "cuda"):
        reason = f"is on {tensor.device}; accepted: cpu, cuda"
    else:
        return
    raise UnsupportedModelError(f"the tensor {name!r} {reason}")


def remedies(
    model: torch.nn.Module,
    blocks: Sequence[ModuleBlock],
    blobs: Blobs,
    format_: Format | None,
    reserved_bytes: int,
    has_context: bool,
    device_type: str,
) -> list[Remedy]:
    """In the words of wrapper().   blobs: as they will be, packed in `format_`.

    reserved_bytes: in all.   has_context: whether max_length is a reason of them.
    device_type: "cpu" or "cuda", where the model is to run.
    """
    least = _least_of(blobs, device_type)
    found = []
    for name, packed in FORMATS.items():
        if format_ is None or packed.bits < format_.bits:
            replacements = choose_linears(model, blocks, packed).replacements
            tables = find_tables(model, replacements)
            by_need = bool(blobs.stacks)
            smaller = lay_out(model, blocks, replacements, False, tables, by_need)
            saved = least - _least_of(smaller, device_type)
            found.append(
                Remedy(f'quantize with quantization="{name}"', saved, True, "quantization")
            )
    if blobs.blocks:
        allocated = allocated_bytes_on(device_type)
        finer = least - allocated(blobs.outside.nbytes) - 2 * _largest_part(blobs)
        found.append(Remedy("cut finer blocks with blocks=", finer, True))
    if reserved_bytes:
        advice = "lower max_length or max_batch_size" if has_context else "lower reserve"
        found.append(Remedy(advice, reserved_bytes, False))
    return found


def _least_of(blobs: Blobs, device_type: str) -> int:
    allocated = allocated_bytes_on(device_type)
    blocks = [Block(n, allocated(x.nbytes)) for n, x in blobs.blocks.items()]
    slots = LEAST_SLOTS * max((stack.slot_bytes for stack in blobs.stacks.values()), default=0)
    return allocated(blobs.outside.nbytes) + least_bytes(blocks) + slots


def _largest_part(blobs: Blobs) -> int:
    """Bytes of the module with the most tensors of its own: no block can be cut finer."""
    sizes: Counter[tuple[str, str]] = Counter()
    for block, layout in blobs.blocks.items():
        for name, spec in layout.specs.items():
            sizes[block, name.rpartition(".")[0]] += spec.nbytes
    return max(sizes.values(), default=0)
