"""Which linears of a model are quantised, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from warnings import warn

import torch

from bminf.errors import ArgumentError
from bminf.layers.quantize import is_quantizable, skeleton
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.quantization.packed import Format
from bminf.scheduler.blocks import ModuleBlock, tensors_of
from bminf.units import format_bytes

StandIns = Mapping[torch.nn.Module, QuantizedLinear]
"""Linears to quantise, each with the skeleton of what will stand in its place."""

Predicate = Callable[[str, torch.nn.Module], bool]


def choose(
    model: torch.nn.Module,
    blocks: Iterable[ModuleBlock],
    form: Format | None,
    wanted: Predicate | None = None,
) -> StandIns:
    """The linears to quantise, as `form`; None is none.

    wanted: says so by name and module; None takes the linears in the blocks but the output head. A
    weight that several modules share stays: packing one of them would add bytes, not save any.
    Raises ArgumentError, with the name, for a linear that cannot be packed that way.
    """
    if wanted is not None and not callable(wanted):
        raise ArgumentError(
            f"quantize={wanted!r}; give a function of the name and the module of a linear "
            "that says whether it is packed"
        )
    if form is None:
        if wanted is not None:
            raise ArgumentError('quantize= chooses what quantization="int8" or "int4" packs')
        return {}
    wanted = wanted or _inside(model, blocks)
    return {
        module: _skeleton(module, form, name)
        for name, module in _unshared_linears(model)
        if wanted(name, module)
    }


def warn_of_what_stays(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], stand_ins: StandIns, stacklevel: int
) -> None:
    """One warning, with the reason, where quantization leaves the bulk of the blocks as it is."""
    kind = type(model).__name__
    if not stand_ins:
        warn(
            f"nothing in the blocks of {kind} could be quantised: they hold no "
            "torch.nn.Linear or Conv1D that was chosen; the weights stay as they are",
            stacklevel=stacklevel + 1,
        )
        return
    stacked = {id(t): t for block in blocks for t in _stacked(model.get_submodule(block.name))}
    nbytes = sum(tensor.nbytes for tensor in stacked.values())
    if nbytes:
        warn(
            f"{format_bytes(nbytes)} in the blocks of {kind} are not quantised: they are "
            f"{len(stacked)} three-dimensional parameters (stacked experts), not linears",
            stacklevel=stacklevel + 1,
        )


def _skeleton(module: torch.nn.Module, form: Format, name: str) -> QuantizedLinear:
    try:
        return skeleton(module, form)
    except ArgumentError as error:
        raise ArgumentError(f"{name!r} cannot be quantised: {error}") from error


def _inside(model: torch.nn.Module, blocks: Iterable[ModuleBlock]) -> Predicate:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    inside = {m for block in blocks for m in model.get_submodule(block.name).modules()}
    return lambda _, module: module in inside and module is not head


def _unshared_linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    num_holders: dict[int, int] = {}
    for _, _, tensor in tensors_of(model):
        num_holders[id(tensor)] = num_holders.get(id(tensor), 0) + 1
    for name, module in model.named_modules():
        if is_quantizable(module) and num_holders[id(module.weight)] == 1:
            yield name, module


def _stacked(block: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters that are several matrices: (experts, rows, columns). Convolutions have three
    dimensions as well, and stay without a word."""
    for module in block.modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
                yield parameter
