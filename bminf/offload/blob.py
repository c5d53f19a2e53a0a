"""Which bytes make the blob of each block, and which lie outside all blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bminf.errors import UnsupportedModelError
from bminf.layout import FRESH_ALIGNMENT, Layout, TensorSpec
from bminf.offload import memory
from bminf.offload.blocks import ModuleBlock, owners_of, shared_names, tensors_of

_KINDS = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.nn.Parameter))


@dataclass(frozen=True)
class Blobs:
    """Layouts with names relative to the block; `outside` has names relative to the model.

    A tensor that a block shares with anything outside it (tied weights, a part of two blocks) lies
    outside: it stays, and is counted once. A block that stands in two places is one block.
    """

    blocks: Mapping[str, Layout]
    outside: Layout

    @property
    def nbytes(self) -> int:
        return self.outside.nbytes + sum(layout.nbytes for layout in self.blocks.values())


def survey(
    model: torch.nn.Module,
    blocks: Sequence[ModuleBlock],
    stand_ins: Mapping[torch.nn.Module, torch.nn.Module],
    keep_addresses: bool,
) -> Blobs:
    """Lay out every parameter and buffer of `model`.

    stand_ins: modules that will be exchanged, with what will stand in their place.
    keep_addresses: see Layout.of.
    """
    specs = specs_of(model, stand_ins)
    places = owners_of(model, specs, blocks)
    for name in trained_apart(model, blocks, stand_ins):
        places[name] = "", name
    owners = {name: owner for name, (owner, _) in places.items()}
    for name in shared_names({k: s for k, s in specs.items() if s.start is not None}, owners):
        places[name] = "", name
    parts: dict[str, dict[str, TensorSpec]] = {block.name: {} for block in blocks}
    parts[""] = {}
    for name, spec in specs.items():
        owner, inner_name = places[name]
        parts[owner][inner_name] = spec
    outside = Layout.of(parts.pop(""), keep_addresses)
    layouts = {name: Layout.of(part, keep_addresses) for name, part in parts.items()}
    return Blobs(layouts, outside)


def specs_of(
    model: torch.nn.Module, stand_ins: Mapping[torch.nn.Module, torch.nn.Module]
) -> dict[str, TensorSpec]:
    """Every tensor as it will be, by name.

    A tensor on the meta device gets an address of its own, by which it is known again elsewhere;
    those of a stand-in get one if the module it replaces stands in several places.
    """
    specs: dict[str, TensorSpec] = {}
    addresses = _Addresses()
    for name, place, tensor in tensors_of(model):
        if place.module not in stand_ins:
            specs[name] = addresses.spec_of(tensor) if tensor.is_meta else TensorSpec.of(tensor)
    num_places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module in stand_ins:
            spec_of = addresses.spec_of if num_places[module] > 1 else TensorSpec.of
            for name, _, tensor in tensors_of(stand_ins[module]):
                specs[f"{prefix}.{name}" if prefix else name] = spec_of(tensor)
    return specs


class _Addresses:
    """Gives tensors without bytes addresses, none of which overlap."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._next = FRESH_ALIGNMENT  # an empty tensor has the address 0

    def spec_of(self, tensor: torch.Tensor) -> TensorSpec:
        spec = TensorSpec.of(tensor)
        if id(tensor) not in self._starts:
            self._starts[id(tensor)] = self._next
            self._next += -(-spec.nbytes // FRESH_ALIGNMENT) * FRESH_ALIGNMENT
        return replace(spec, start=self._starts[id(tensor)])


def trained_apart(
    model: torch.nn.Module,
    blocks: Sequence[ModuleBlock],
    stand_ins: Mapping[torch.nn.Module, torch.nn.Module],
) -> list[str]:
    """Parameters in blocks whose bulk is frozen that are not: adapters, which have to stay.

    A gradient needs them where they are, and they are small. Where most of the bytes are trainable,
    as in a model that nobody froze, none is.
    """
    inside = {m for block in blocks for m in model.get_submodule(block.name).modules()}
    parameters = [item for item in tensors_of(model) if item[1].is_parameter]
    parameters = [item for item in parameters if item[1].module in inside]
    trained = [item for item in parameters if item[2].requires_grad]
    trained_bytes = sum(tensor.nbytes for *_, tensor in trained)
    if 2 * trained_bytes > sum(tensor.nbytes for *_, tensor in parameters):
        return []
    return [name for name, place, _ in trained if place.module not in stand_ins]


def unmapped_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model that occupy memory; a mapped file is the system's to take back."""
    is_mapped = memory.mapped_files()
    starts = {s.start: s.nbytes for s in specs_of(model, {}).values() if s.start is not None}
    return sum(nbytes for start, nbytes in starts.items() if not is_mapped(start))


def check_tensors(model: torch.nn.Module) -> torch.device:
    """The one device of all tensors. Raises UnsupportedModelError for what is not plain bytes."""
    devices: dict[torch.device, str] = {}
    for name, _, tensor in tensors_of(model):
        _check_kind(name, tensor)
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


def _check_kind(name: str, tensor: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor):
        reason = "is not initialised yet; run the model once first"
    elif tensor.is_meta:
        reason = "is on the meta device and has no values; load the weights first"
    elif type(tensor) not in _KINDS:
        reason = f"is a {type(tensor).__name__}, whose bytes are not those of a plain tensor"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        reason = f"is {'quantized' if tensor.is_quantized else tensor.layout}, not a dense tensor"
    elif tensor.device.type not in ("cpu", "cuda"):
        reason = f"is on {tensor.device}; accepted: cpu, cuda"
    else:
        return
    raise UnsupportedModelError(f"the tensor {name!r} {reason}")
