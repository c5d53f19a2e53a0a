"""Which modules of a model are its blocks, and which tensors belong to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layout import TensorSpec, overlapping
from bminf.offload.repeated import LISTS, UNCALLED, has_tensors, items_of, repeated_modules


@dataclass(frozen=True)
class ModuleBlock:
    """A module that moves as one. list_name: the list it stands in, "" for none."""

    name: str
    list_name: str


def find_blocks(model: torch.nn.Module, names: Iterable[str] | None = None) -> list[ModuleBlock]:
    """The blocks of `model`, in module order; none where nothing repeats.

    names: any modules by their dotted names; a list's name stands for its items. None takes the
    items of the outermost lists of repeated modules, cut finer where they are large: see
    repeated_modules(). A module that stands in several places is one block.
    Raises ArgumentError for a name that does not exist, is given twice, or lies inside another;
    UnsupportedModelError where nothing that was named holds a tensor.
    """
    if names is None:
        return [ModuleBlock(name, list_name) for name, _, list_name in repeated_modules(model)]
    blocks = list(_named(model, names))
    if not blocks:
        raise UnsupportedModelError(
            f"none of the modules that blocks= names holds a tensor of {type(model).__name__}; "
            "name modules with weights"
        )
    return blocks


def _named(model: torch.nn.Module, names: Iterable[str]) -> list[ModuleBlock]:
    if isinstance(names, str):
        raise ArgumentError(f"blocks={names!r} is one string; give a list of module names")
    if not isinstance(names, Iterable) or not (names := list(names)):
        raise ArgumentError(f"blocks={names!r}; give at least one module name, or None")
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or name not in modules or not name:
            raise ArgumentError(_unknown(name, modules))
        is_list = type(modules[name]) in UNCALLED
        items = [item for item, _ in items_of(modules[name], f"{name}.")]
        for block in items if is_list else [name]:
            if block in wanted:
                raise ArgumentError(f"blocks names {block!r} twice")
            wanted[block] = None
    for name in wanted:
        _check_not_inside(name, wanted)
    by_module: dict[torch.nn.Module, str] = {}
    for name, module in modules.items():
        if name in wanted and has_tensors(module):
            by_module.setdefault(module, name)
    return [ModuleBlock(name, _list_around(name, modules)) for name in by_module.values()]


def _unknown(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    import difflib

    near = difflib.get_close_matches(str(name), [key for key in modules if key], n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"blocks names {name!r}, which is not a module of the model{hint}"


def _check_not_inside(name: str, wanted: Mapping[str, None]) -> None:
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if outer in wanted:
            raise ArgumentError(
                f"the block {name!r} lies inside the block {outer!r}; name one or the other"
            )


def _list_around(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The outermost list that `name` stands in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if isinstance(modules[outer], LISTS):
            return outer
    return ""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a module holds a tensor: `module._parameters[key]` or `module._buffers[key]`."""

    module: torch.nn.Module
    key: str
    is_parameter: bool

    @property
    def holder(self) -> dict[str, torch.Tensor | None]:
        return self.module._parameters if self.is_parameter else self.module._buffers  # type: ignore[return-value]

    @property
    def is_listed(self) -> bool:
        """Whether the module computes with a list of its own beside its parameters."""
        return isinstance(self.module, torch.nn.RNNBase)

    def get(self) -> torch.Tensor | None:
        return self.holder.get(self.key)

    def set(self, tensor: torch.Tensor) -> None:
        self.holder[self.key] = tensor
        if self.is_listed:
            setattr(self.module, self.key, tensor)  # this keeps the list up


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, TensorPlace, torch.Tensor]]:
    """(name, place, tensor) of every parameter and buffer below `module`, shared ones each time."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        for key, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                yield name, TensorPlace(child, key, key in child._parameters), tensor


def shared_names(specs: Mapping[str, TensorSpec], owners: Mapping[str, str]) -> set[str]:
    """Names of tensors whose bytes also belong to another owner. owners: name -> owner."""
    groups = (names for _, names in overlapping(specs))
    return {name for names in groups if len({owners[name] for name in names}) > 1 for name in names}


def owners_of(
    model: torch.nn.Module, names: Iterable[str], blocks: Sequence[ModuleBlock]
) -> dict[str, tuple[str, str]]:
    """Tensor name -> (name of the block it lies in, "" outside all blocks; its name in there).

    Also by the other names of a block that stands in several places.
    """
    of_module = {model.get_submodule(block.name): block.name for block in blocks}
    paths = {
        path: of_module[module]
        for path, module in model.named_modules(remove_duplicate=False)
        if module in of_module
    }
    return {name: _owner(name, paths) for name in names}


def _owner(name: str, paths: Mapping[str, str]) -> tuple[str, str]:
    """paths: to a block, by any of its names -> the name of that block."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if (outer := ".".join(parts[:end])) in paths:
            return paths[outer], ".".join(parts[end:])
    return "", name
