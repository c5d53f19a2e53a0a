"""Memory that a model takes beside the parameters and buffers that are moved.

Tensors in plain attributes, lists and objects are neither moved nor streamed nor packed: a plan
counts them as what stays, and wrapping a model that has many warns. Weights that were let go
take memory all the same while somebody else holds them.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from types import CellType, FunctionType, MethodType
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from bminf.layout import tensors_of
from bminf.lazy import LazyTensor
from bminf.offload import memory
from bminf.units import format_bytes

_OBJECT_DEPTH = 2  # objects inside objects; deeper lie trainers and data sets, not weights
_WARN_DIVISOR = 16  # rotary tables and masks are far smaller than a 16th of the model
# torch's own, and hooks with the stores of what other libraries offloaded (see offloaded.py).
_OTHERS = {"_hf_hook", "_diffusers_hook"}
_SKIPPED = _OTHERS | set(torch.nn.Module().__dict__)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, functools.partial, MethodType, CellType)


@dataclass(frozen=True)
class Unregistered:
    """What one attribute of a module keeps. nbytes: of its storages, those seen before not again.

    is_renewed: a hook computes it anew in each pass (weight_norm, pruning).
    is_opaque: it holds an object whose bytes cannot be seen.
    """

    name: str
    device: torch.device
    nbytes: int
    is_renewed: bool = False
    is_opaque: bool = False


def find_unregistered(model: torch.nn.Module) -> list[Unregistered]:
    """Whatever attributes of modules of `model` keep, views of registered tensors left out."""
    search = _Search(model)
    return [item for name, module in model.named_modules() for item in search.of(name, module)]


def bytes_on(found: Iterable[Unregistered], device: torch.device | None) -> int:
    """Bytes that lie on `device`; None counts all."""
    return sum(item.nbytes for item in found if device is None or item.device == device)


def warn_of_unregistered(found: Iterable[Unregistered], model_bytes: int, stacklevel: int) -> None:
    """One warning that names them, where they are large against the model or cannot be seen."""
    named = [item for item in found if not item.is_renewed]
    nbytes = sum(item.nbytes for item in named)
    if nbytes and nbytes * _WARN_DIVISOR >= model_bytes:
        warn(
            f"{format_bytes(nbytes)} of tensors are kept outside parameters and buffers "
            f"({_names(item.name for item in named if item.nbytes)}): they are neither moved nor "
            "streamed nor packed, and count as what stays; register them (torch.nn.Parameter, "
            "register_buffer) to have that done",
            stacklevel=stacklevel + 1,
        )
    if opaque := [item.name for item in named if item.is_opaque]:
        warn(
            f"what {_names(opaque)} hold cannot be seen: it is neither moved nor streamed nor "
            "packed, and not counted",
            stacklevel=stacklevel + 1,
        )


def _names(names: Iterable[str]) -> str:
    first, *more = dict.fromkeys(names)
    shown = ", ".join([first, *more[:2]])
    return f"{shown} and {len(more) - 2} more" if len(more) > 2 else shown


_Piece = tuple[torch.device, int | None]
"""Where something lies, and its bytes; None for what cannot be seen."""


class _Search:
    """A walk over attributes that looks at no storage and no object twice."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._seen: dict[int, Any] = {id(module): module for module in model.modules()}
        self._storages = {_address(tensor) for _, _, tensor in tensors_of(model)}

    def of(self, name: str, module: torch.nn.Module) -> Iterator[Unregistered]:
        renewed = {
            getattr(hook, "name", getattr(hook, "_tensor_name", None))
            for hook in module._forward_pre_hooks.values()
        }
        for attribute, value in _attributes(module):
            full_name = f"{name}.{attribute}" if name else attribute
            sizes: dict[torch.device, list[int | None]] = {}
            for device, nbytes in self._pieces(value, _OBJECT_DEPTH):
                sizes.setdefault(device, []).append(nbytes)
            for device, pieces in sizes.items():
                total, is_renewed = sum(nbytes or 0 for nbytes in pieces), attribute in renewed
                yield Unregistered(full_name, device, total, is_renewed, is_opaque=None in pieces)

    def _pieces(self, value: Any, depth: int) -> Iterator[_Piece]:
        if value is None or isinstance(value, str | bytes | int | float | type | LazyTensor):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            yield from self._of_tensor(value)
        elif isinstance(value, torch.UntypedStorage):
            yield from self._of_tensor(torch.empty(0, dtype=torch.uint8).set_(value))
        elif isinstance(value, torch.ScriptObject):
            parts = _unpacked(value)
            if not parts:
                yield torch.device("cpu"), None
            for part in parts:
                yield from self._pieces(part, depth)
        elif isinstance(value, np.ndarray):
            yield torch.device("cpu"), value.nbytes
        else:
            for inner, inner_depth in self._inside(value, depth):
                yield from self._pieces(inner, inner_depth)

    def _inside(self, value: Any, depth: int) -> Iterator[tuple[Any, int]]:
        if isinstance(value, torch.nn.Module):
            if all(inner is not self._model for inner in value.modules()):  # not one around us
                yield from ((tensor, depth) for _, _, tensor in tensors_of(value))
                for module in value.modules():  # torch's quantized ones pack weights elsewhere
                    yield from ((inner, depth - 1) for _, inner in _attributes(module))
        elif isinstance(value, _CONTAINERS):
            yield from ((inner, depth) for inner in gc.get_referents(value))
        elif isinstance(value, FunctionType):  # what it has closed over, and its defaults
            kept = [value.__closure__, value.__defaults__, value.__kwdefaults__]
            yield from ((inner, 0) for inner in kept)
        elif not callable(value) and (depth > 0 or is_dataclass(value)):
            yield from ((inner, depth - 1) for inner in gc.get_referents(value))

    def _of_tensor(self, tensor: torch.Tensor) -> Iterator[_Piece]:
        if tensor.layout != torch.strided:
            yield tensor.device, _bytes_of_sparse(tensor)
            return
        address = _address(tensor)
        if address is not None and address not in self._storages:
            self._storages.add(address)
            yield tensor.device, tensor.untyped_storage().nbytes()


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(module, torch.jit.ScriptModule):
        yield from _attributes_of_script(module)
        return
    for name, value in list(module.__dict__.items()):
        if name not in _SKIPPED:
            yield name, value


def _attributes_of_script(module: torch.jit.ScriptModule) -> Iterator[tuple[str, Any]]:
    """What its program reads, and the tensors that freezing has made part of it."""
    try:
        graph: Any = module.graph  # its nodes do not keep it alive
    except RuntimeError:  # a module that was never given a forward has no program
        return
    read = {node.s("name") for node in graph.findAllNodes("prim::GetAttr", True)}
    for name in sorted(read):
        if module._c.hasattr(name) and not isinstance(
            module._c.getattr(name), torch._C.ScriptModule
        ):
            yield name, module._c.getattr(name)
    nodes = graph.findAllNodes("prim::Constant", True)
    nodes = [node for node in nodes if "value" in node.attributeNames()]
    yield "constants", [node.t("value") for node in nodes if node.kindOf("value") == "t"]


def _unpacked(value: Any) -> list[Any]:
    """What torch's quantized modules pack their weights into can only be seen by unpacking it."""
    try:
        state = value.__getstate__()
    except (RuntimeError, NotImplementedError, AttributeError):
        return []
    kinds = (torch.Tensor, torch.ScriptObject)
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, kinds)]


def _bytes_of_sparse(tensor: torch.Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.numel() * tensor.itemsize  # at most; the parts have other names in each layout


def _address(tensor: torch.Tensor) -> int | None:
    """What tells the storage of a tensor from others; None for one without bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or storage._cdata if storage.nbytes() else None
    except (RuntimeError, NotImplementedError):  # a subclass of its own, a fake tensor
        return None


_PLAIN = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.nn.Parameter))
_WARN_BYTES = 2**16


class Originals:
    """The memory of a model's tensors before they are moved, none of it kept alive by this.

    Mapped files are left out: their pages are the system's to take back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        is_mapped = memory.mapped_files()
        self._storages = {
            storage._cdata: (StorageWeakRef(storage), storage.nbytes())
            for storage in _storages(model)
            if not (storage.device.type == "cpu" and is_mapped(storage.data_ptr()))
        }

    def held_bytes(self, model: torch.nn.Module, kept: Iterable[torch.Tensor] = ()) -> int:
        """Bytes that are still referenced, other than by `model` itself, or as one of `kept`."""
        own = {tensor.untyped_storage()._cdata for tensor in kept}
        left = self._left(model) - own
        if left:
            gc.collect()  # modules that were exchanged may be part of a cycle
            left = self._left(model) - own
        held = _in_containers(left) if left else set()
        return sum(self._storages[key][1] for key in held)

    def _left(self, model: torch.nn.Module) -> set[int]:
        current = {storage._cdata for storage in _storages(model)}
        references = {key: reference for key, (reference, _) in self._storages.items()}
        return {key for key, ref in references.items() if key not in current and not ref.expired()}


def _in_containers(storages: set[int]) -> set[int]:
    """Those of `storages` whose tensors an object of Python has.

    The others belong to a graph of autograd alone, which goes with the output it leads to.
    """
    tensors = [obj for obj in gc.get_objects() if type(obj) in _PLAIN and _key(obj) in storages]
    keys = {id(tensor): _key(tensor) for tensor in tensors}
    holders = [holder for holder in gc.get_referrers(*tensors) if holder is not tensors]
    items = {id(item) for holder in holders for item in gc.get_referents(holder)}
    return {key for tensor_id, key in keys.items() if key is not None and tensor_id in items}


def warn_of_held(
    originals: Originals,
    model: torch.nn.Module,
    kept: Iterable[torch.Tensor],
    on_device: bool,
    stacklevel: int,
) -> None:
    """One warning with the bytes, where they matter. kept: what was meant to stay.

    on_device: the limit is of that memory.
    """
    nbytes = originals.held_bytes(model, kept)
    if nbytes >= _WARN_BYTES:
        beside = (
            "they count beside the limit" if on_device else "they take memory beside the copies"
        )
        warn(
            f"{format_bytes(nbytes)} of the weights that were let go are still held by other "
            "references (such as the state dict they were loaded from, an optimizer, another "
            f"model): {beside}; delete those references",
            stacklevel=stacklevel + 1,
        )


def _storages(model: torch.nn.Module) -> list[torch.UntypedStorage]:
    """Those of real tensors; a lazy one has none."""
    tensors = (tensor for _, _, tensor in tensors_of(model))
    return [t.untyped_storage() for t in tensors if type(t) in _PLAIN and t.nbytes]


def _key(tensor: torch.Tensor) -> int | None:
    try:
        key: int = tensor.untyped_storage()._cdata
        return key
    except (RuntimeError, NotImplementedError):  # sparse ones have none
        return None
