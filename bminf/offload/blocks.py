"""Which modules of a model are its blocks, and which tensors belong to each.

Where none are named, a model is a list of layers, or a list of stages, each with layers of its own.
The items of the outermost lists are taken, and cut further where one of them is large against all
of them together and holds a list itself. Only the model decides that, never the memory limit: names
of blocks, the keys of `uses=` and the plans of two limits would otherwise not match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.utils.parametrize import ParametrizationList

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.layout import ModuleBlock

LISTS = (torch.nn.ModuleList, torch.nn.Sequential)
UNCALLED = (torch.nn.ModuleList, torch.nn.ModuleDict)
"""Containers that are never called, only what they hold is."""

_COARSEST = 8  # a block of more than an eighth of all blocks' bytes is cut
_FINEST = 1024  # what comes out of a cut with less than this part of them is not worth a copy

# Wrappers put around one module, by the name under which they hold it: torch.compile,
# activation checkpoints, FSDP, adapters.
_WRAPPED = (
    "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer",
    "original_module",
)  # fmt: skip


class Repeated(NamedTuple):
    """A module that can move as one. list_name: the outermost list it stands in."""

    name: str
    module: torch.nn.Module
    list_name: str


def _repeated_modules(model: torch.nn.Module) -> Iterator[Repeated]:
    """The items of the outermost lists of repeated modules, the large ones cut; in module order.

    A ModuleDict of layers is such a list, too.
    An item with more than an eighth of all items' bytes that holds a list of repeated modules is
    replaced by the items of that list, which are looked at likewise, and by the other modules
    beside and around it, each for itself: they run one after another, so none of them may hold a
    slot while another runs. What such an item holds as parameters of its own belongs to no block,
    and neither do parts of less than a thousandth. A module that stands in several places comes
    once, by the first of its names.
    """
    items = list(_once(_outermost(model, "")))
    sizes = _Sizes(item.module for item in items)
    yield from _once(part for item in items for part in _cut(item, sizes))


def items_of(modules: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The children; those of a plain list or dict in its place, because that is never called."""
    for name, child in modules.named_children():
        if type(child) in UNCALLED:
            yield from items_of(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def has_tensors(module: torch.nn.Module) -> bool:
    """Whether `module` holds a parameter or a buffer, itself or below."""
    return any(True for _ in _tensors(module))


def _outermost(module: torch.nn.Module, prefix: str) -> Iterator[Repeated]:
    is_list = isinstance(module, LISTS) and any(len(some) > 1 for some in _alike(module))
    if is_list or _is_dict_of_layers(module):
        for name, child in items_of(module, prefix):
            if has_tensors(child):
                yield Repeated(name, child, prefix.rstrip("."))
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{prefix}{name}.")


def _once(found: Iterable[Repeated]) -> Iterator[Repeated]:
    seen: set[torch.nn.Module] = set()
    for item in found:
        if item.module not in seen:
            seen.add(item.module)
            yield item


def _cut(item: Repeated, sizes: _Sizes) -> Iterator[Repeated]:
    if sizes.of(item.module) * _COARSEST <= sizes.total or not _holds_layers(item.module, sizes):
        yield item
        return
    for name, child in _parts(item.module, f"{item.name}.", sizes):
        if sizes.of(child) * _FINEST >= sizes.total:
            yield from _cut(Repeated(name, child, item.list_name), sizes)


def _parts(
    module: torch.nn.Module, prefix: str, sizes: _Sizes
) -> Iterator[tuple[str, torch.nn.Module]]:
    """The items of the outermost lists of layers below `module`, and what is called beside them."""
    if _is_list_of_layers(module):
        yield from items_of(module, prefix)
        return
    for name, child in module.named_children():
        if _holds_layers(child, sizes) or type(child) in UNCALLED:
            yield from _parts(child, f"{prefix}{name}.", sizes)
        else:
            yield prefix + name, child


def _holds_layers(module: torch.nn.Module, sizes: _Sizes) -> bool:
    return any(_is_list_of_layers(inner) and sizes.of(inner) > 0 for inner in module.modules())


def _is_list_of_layers(module: torch.nn.Module) -> bool:
    """Two items alike; three, where they are single operations: two linears with an activation
    between them are a feed-forward part, which is no list of layers."""
    return _is_dict_of_layers(module) or (isinstance(module, LISTS) and _has_layers(module))


def _is_dict_of_layers(module: torch.nn.Module) -> bool:
    """Layers in a ModuleDict: keyed by their numbers, or three without lists of layers in them.

    Towers, heads, adapters, parametrisations and the parts of a model stand in dicts as well.
    """
    if not isinstance(module, torch.nn.ModuleDict) or not _has_layers(module):
        return False
    if all(key.isdecimal() for key in module):
        return True
    if any(isinstance(child, ParametrizationList) for child in module.children()):
        return False
    inner = (part for child in module.children() for part in child.modules())
    has_three = any(
        len(some) > 2 and any(True for _ in some[0].children()) for some in _alike(module)
    )
    return has_three and not any(_is_list_of_layers(part) for part in inner)


def _has_layers(module: torch.nn.Module) -> bool:
    return any(
        len(some) > 2 or (len(some) == 2 and any(True for _ in some[0].children()))
        for some in _alike(module)
    )


def _alike(modules: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """The items that hold tensors, those of one kind together."""
    groups: dict[tuple[str, str], list[torch.nn.Module]] = {}
    for child in modules.children():
        if has_tensors(child):
            groups.setdefault(_kind(child), []).append(child)
    return list(groups.values())


def _kind(module: torch.nn.Module) -> tuple[str, str]:
    """By name: parametrised modules, and those of a class made in a function, have one each."""
    for name in _WRAPPED:
        if isinstance(inner := module._modules.get(name), torch.nn.Module):
            return _kind(inner)
    kind = torch.nn.utils.parametrize.type_before_parametrizations(module)
    return kind.__module__, kind.__qualname__


class _Sizes:
    """Bytes of modules, without those that several of `items` hold: they move with none of them."""

    def __init__(self, items: Iterable[torch.nn.Module]) -> None:
        items = list(items)
        held = Counter(key for item in items for key in {id(t) for t in _tensors(item)})
        self._shared = {key for key, count in held.items() if count > 1}
        self.total = sum(self.of(item) for item in items)

    def of(self, module: torch.nn.Module) -> int:
        tensors = {id(tensor): tensor for tensor in _tensors(module)}
        return sum(t.nbytes for key, t in tensors.items() if key not in self._shared)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for child in module.modules():
        for tensor in [*child._parameters.values(), *child._buffers.values()]:
            if tensor is not None:
                yield tensor


def find_blocks(model: torch.nn.Module, names: Iterable[str] | None = None) -> list[ModuleBlock]:
    """The blocks of `model`, in module order; none where nothing repeats.

    names: any modules by their dotted names; a list's name stands for its items. None takes the
    items of the outermost lists of repeated modules, cut finer where they are large: see
    _repeated_modules(). A module that stands in several places is one block.
    Raises ArgumentError for a name that does not exist, is given twice, or lies inside another;
    UnsupportedModelError where nothing that was named holds a tensor.
    """
    if names is None:
        return [ModuleBlock(name, list_name) for name, _, list_name in _repeated_modules(model)]
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


def _around(name: str) -> list[str]:
    """The names of the modules around `name`, from the outermost on."""
    return list(accumulate(name.split("."), "{}.{}".format))[:-1]


def _check_not_inside(name: str, wanted: Mapping[str, None]) -> None:
    outer = next((outer for outer in _around(name) if outer in wanted), None)
    if outer is not None:
        raise ArgumentError(
            f"the block {name!r} lies inside the block {outer!r}; name one or the other"
        )


def _list_around(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The outermost list that `name` stands in."""
    return next((outer for outer in _around(name) if isinstance(modules[outer], LISTS)), "")
