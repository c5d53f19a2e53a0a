"""Which modules of a model are its blocks, and which tensors belong to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layout import TensorSpec, overlapping

_LISTS = (torch.nn.ModuleList, torch.nn.Sequential)
_UNCALLED = (torch.nn.ModuleList, torch.nn.ModuleDict)


@dataclass(frozen=True)
class ModuleBlock:
    """A module that moves as one. list_name: the list it stands in, "" for none."""

    name: str
    list_name: str


def find_blocks(model: torch.nn.Module, names: Iterable[str] | None = None) -> list[ModuleBlock]:
    """The blocks of `model`, in module order.

    names: any modules by their dotted names; a list's name stands for its items. None takes the
    items of the outermost lists of repeated modules.
    Raises ArgumentError for a name that does not exist, is given twice, or lies inside another;
    UnsupportedModelError where nothing repeats.
    """
    blocks = list(_repeated(model)) if names is None else _named(model, names)
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of repeated modules (torch.nn.ModuleList or "
            "Sequential with two items of one class), so there are no blocks to stream; "
            "name some modules with blocks=[...]"
        )
    return blocks


def _repeated(model: torch.nn.Module, prefix: str = "") -> Iterator[ModuleBlock]:
    if isinstance(model, _LISTS) and _repeats(model):
        list_name = prefix.rstrip(".")
        for name, child in _items(model, prefix):
            if _has_tensors(child):
                yield ModuleBlock(name, list_name)
        return
    for name, child in model.named_children():
        yield from _repeated(child, f"{prefix}{name}.")


def _items(modules: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The children; those of a plain list or dict in its place, because that is never called."""
    for name, child in modules.named_children():
        if type(child) in _UNCALLED:
            yield from _items(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _repeats(items: torch.nn.Module) -> bool:
    classes = [type(child) for child in items.children() if _has_tensors(child)]
    return len(set(classes)) < len(classes)


def _has_tensors(module: torch.nn.Module) -> bool:
    return any(True for _ in tensors_of(module))


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
        is_list = type(modules[name]) in _UNCALLED
        items = [item for item, _ in _items(modules[name], f"{name}.")]
        for block in items if is_list else [name]:
            if block in wanted:
                raise ArgumentError(f"blocks names {block!r} twice")
            wanted[block] = None
    for name in wanted:
        _check_not_inside(name, wanted)
    return [
        ModuleBlock(name, _list_around(name, modules))
        for name, module in modules.items()
        if name in wanted and _has_tensors(module)
    ]


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
        if isinstance(modules[outer], _LISTS):
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

    def get(self) -> torch.Tensor | None:
        return self.holder.get(self.key)

    def set(self, tensor: torch.Tensor) -> None:
        self.holder[self.key] = tensor
        if isinstance(self.module, torch.nn.RNNBase):
            # It computes with a list of its own beside its parameters, kept up by setattr.
            setattr(self.module, self.key, tensor)


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


def owners_of(names: Iterable[str], blocks: Sequence[ModuleBlock]) -> dict[str, str]:
    """Tensor name -> name of the block it lies in, "" outside all blocks."""
    block_names = {block.name for block in blocks}
    return {name: _owner(name, block_names) for name in names}


def _owner(name: str, block_names: set[str]) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if outer in block_names:
            return outer
    return ""
