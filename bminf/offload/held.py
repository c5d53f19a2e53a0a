"""Weights that were let go and are in memory all the same, because somebody else has them."""

from __future__ import annotations

import gc
from warnings import warn

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bminf.layout import tensors_of
from bminf.offload import memory
from bminf.units import format_bytes

_PLAIN = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.nn.Parameter))
_WORTH_A_WORD = 2**16


class Originals:
    """The memory of a model's tensors before they are moved, none of it kept alive by this.

    Mapped files are left out: their pages are the system's to take back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        is_mapped = memory.mapped_files()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for storage in _storages(model):
            if not (storage.device.type == "cpu" and is_mapped(storage.data_ptr())):
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def held_bytes(self, model: torch.nn.Module) -> int:
        """Bytes that somebody still has, and not because `model` itself has them still."""
        left = self._left(model)
        if left:
            gc.collect()  # modules that were exchanged may be part of a cycle
            left = self._left(model)
        held = _in_containers(left) if left else set()
        return sum(self._storages[key][1] for key in held)

    def _left(self, model: torch.nn.Module) -> set[int]:
        own = {storage._cdata for storage in _storages(model)}
        references = {key: reference for key, (reference, _) in self._storages.items()}
        return {key for key, ref in references.items() if key not in own and not ref.expired()}


def _in_containers(storages: set[int]) -> set[int]:
    """Those of `storages` whose tensors an object of Python has.

    The others belong to a graph of autograd alone, which goes with the output it leads to.
    """
    tensors = [obj for obj in gc.get_objects() if type(obj) in _PLAIN and _key(obj) in storages]
    keys = {id(tensor): _key(tensor) for tensor in tensors}
    holders = [holder for holder in gc.get_referrers(*tensors) if holder is not tensors]
    items = {id(item) for holder in holders for item in gc.get_referents(holder)}
    return {key for number, key in keys.items() if key is not None and number in items}


def warn_of_held(
    originals: Originals, model: torch.nn.Module, on_device: bool, stacklevel: int
) -> None:
    """One warning with the bytes, where they matter. on_device: the limit is of that memory."""
    nbytes = originals.held_bytes(model)
    if nbytes >= _WORTH_A_WORD:
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
