"""A block whose bytes are elsewhere until a slot holds them."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bminf.errors import UnsupportedModelError
from bminf.layout import Layout, TensorPlace, tensors_of
from bminf.lazy import LazyTensor
from bminf.offload.backends.base import Backend

logger = logging.getLogger("bminf")


class _InSlot(torch.Tensor):
    """A tensor in a slot. What is written through its `data` is noticed like any other write: torch
    gives `data` a count of versions of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    is_elsewhere = False  # its data was set: it lies in other memory until the block is left

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        kinds = [(t.shape, t.dtype, t.device) for t in (value, self)]
        self.is_elsewhere = kinds[0] == kinds[1]  # or it is the model's own, beyond the plan
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class _ParameterInSlot(_InSlot, torch.nn.Parameter):
    """The same, of a parameter."""


_EXCHANGED = (_ParameterInSlot, LazyTensor, _InSlot)
_PLAIN = (torch.Tensor, torch.nn.Parameter, _InSlot, _ParameterInSlot)

_requires_grad, _version = map(operator.attrgetter, ("requires_grad", "_version"))


@dataclass
class _StreamedTensor:
    """One tensor of a streamed block: where it belongs, and what stands there when."""

    name: str
    place: TensorPlace
    lazy: LazyTensor
    in_slot: list[torch.Tensor]
    views: list[torch.Tensor]  # of the slots
    attributes: dict[str, Any]  # what python code hung on it
    cast: torch.Tensor | None = None  # what a hook made of it, for the time of a forward
    cast_version: int = 0

    def __post_init__(self) -> None:
        self.is_listed = self.place.is_listed

    def is_in_place(self) -> bool:
        """Whether nobody else has put a tensor in its place."""
        current = self.place.get()
        if current is self.lazy:  # torch.utils.swap_tensors gives it another tensor's values
            return isinstance(current, LazyTensor)
        return current is not None and any(current is t for t in (self.cast, *self.in_slot))

    def convert(self, fn: Callable[[torch.Tensor], torch.Tensor], slot: int) -> None:
        """Put `fn` of what stands there in its place; back in its own dtype it is in the slot."""
        current, own = self.place.get(), self.in_slot[slot]
        assert current is not None
        converted = fn(current)
        if converted is current:
            return
        if converted.device != own.device:
            raise not_convertible(self.name, own)
        is_in_place = self.is_in_place()
        if is_in_place and (converted.dtype, converted.stride()) == (own.dtype, own.stride()):
            self.take_over(slot, converted)
            self.place.set(own)
            return
        converted = guarded(self.kept(converted.detach()))
        self.place.set(converted)
        if is_in_place:
            self.cast, self.cast_version = converted, converted._version

    @torch.no_grad()
    def take_over(self, slot: int, converted: torch.Tensor | None = None) -> None:
        """Bring what was written to the cast tensor, if anything was, into the slot."""
        own = self.in_slot[slot]
        if converted is not None:  # from a wider dtype, what was not written to is as before
            if self.cast is None or self._is_written() or self.cast.itemsize <= own.itemsize:
                own.copy_(converted)
        elif self.cast is not None and self._is_written():
            own.copy_(self.cast)
        self.cast = None

    @torch.no_grad()
    def put_back(self, slot: int, value: torch.Tensor) -> None:
        weight: Any = self.in_slot[slot]
        self.views[slot].copy_(value)
        torch.Tensor.data.__set__(weight, self.views[slot])  # type: ignore[attr-defined]
        weight.__class__ = _ParameterInSlot if self.place.is_parameter else _InSlot
        weight.is_elsewhere = False

    def _is_written(self) -> bool:
        if not self.place.is_parameter and self.place.module.training:
            return True  # fused operations update running statistics without a trace
        return self.cast is not None and self.cast._version != self.cast_version

    def kept(self, view: torch.Tensor) -> torch.Tensor:
        """`view` as the kind of tensor that was there."""
        if not self.place.is_parameter:
            return view
        parameter = torch.nn.Parameter(view, requires_grad=self.lazy.requires_grad)
        parameter.__dict__.update(self.attributes)
        return parameter


class InSlot:
    """What lies in a slot. slot: its number; None while it is in none.   layout: of its blob."""

    slot: int | None
    layout: Layout
    _starts: Sequence[int]  # addresses of the slots

    def offset_in_slot(self, tensor: torch.Tensor) -> int | None:
        """Where in the bound slot `tensor` begins, in bytes; None where it lies elsewhere."""
        assert self.slot is not None
        if type(tensor) not in _PLAIN:
            return None
        if tensor.layout != torch.strided or tensor.is_meta:
            return None
        try:
            offset = tensor.data_ptr() - self._starts[self.slot]
        except RuntimeError:  # inside torch.func transforms a tensor has no address
            return None
        return offset if 0 <= offset < self.layout.extent else None


class StreamedBlock(InSlot):
    """A block whose tensors are elsewhere until it is bound to a slot.

    name, index: in the model, and in the backend.   layout: of its blob.   module: the block
    itself, whose tensors have host copies already and are let go here.
    read, write: fetch one tensor from the host copy, and keep new values of one there.
    slots: where it may come to; None is the ring of the backend.
    """

    def __init__(
        self,
        name: str,
        index: int,
        module: torch.nn.Module,
        layout: Layout,
        backend: Backend,
        read: Callable[[StreamedBlock, str], torch.Tensor],
        write: Callable[[StreamedBlock, str, torch.Tensor], None],
        slots: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._read, self._write = read, write
        slots = backend.slots if slots is None else slots
        self.name, self.index, self.module, self.layout = name, index, module, layout
        self.slot: int | None = None
        self._versions = 0
        self._warned = False
        # By place: a part that stands twice in the block holds its tensors once.
        places = {p: (key, t) for key, p, t in tensors_of(module) if key in layout.specs}
        self._held = [self._hold(key, p, t, backend) for p, (key, t) in places.items()]
        self._put_in(slots)
        # As in _held, by what stands in place at a time: they are exchanged together.
        self._lazy = [held.lazy for held in self._held]
        self._has_buffers = any(not held.place.is_parameter for held in self._held)

    def _hold(
        self, name: str, place: TensorPlace, tensor: torch.Tensor, backend: Backend
    ) -> _StreamedTensor:
        fetch, keep = (functools.partial(do, self, name) for do in (self._read, self._write))
        lazy = LazyTensor(fetch, tensor, backend.device, place.is_parameter, keep)
        return _StreamedTensor(name, place, lazy, [], [], dict(tensor.__dict__))

    def _put_in(self, slots: Sequence[torch.Tensor]) -> None:
        """Make what stands in place while the block is in one of these."""
        self._starts = [slot.data_ptr() for slot in slots]
        for held in self._held:
            held.views = [self.layout.view(slot, held.name) for slot in slots]
            held.in_slot = [self._weight(held, view) for view in held.views]
        self._in_slot = [[held.in_slot[at] for held in self._held] for at in range(len(slots))]

    def _weight(self, held: _StreamedTensor, view: torch.Tensor) -> torch.Tensor:
        weight: Any = guarded(held.kept(view.detach()))
        weight.__class__ = _ParameterInSlot if held.place.is_parameter else _InSlot
        return weight  # type: ignore[no-any-return]

    def release(self) -> None:
        """Put the lazy tensors in place; the originals are free, if nobody else holds them."""
        for held in self._held:
            held.place.set(held.lazy)

    def holders(self) -> set[torch.nn.Module]:
        """The modules that hold a tensor of the block."""
        return {held.place.module for held in self._held}

    def bind(self, slot: int) -> None:
        """Put the tensors of a slot in place, except where somebody has set one of their own."""
        self.slot, weights = slot, self._in_slot[slot]
        self._require_grad_as_lazy(weights)
        for held, weight in self._exchange(self._lazy, weights):
            if held.is_in_place():
                held.place.set(weight)
            elif not self._warned:
                self._warned = True
                logger.warning(
                    "%s.%s was set anew; that tensor is used, and stays there beyond the plan",
                    self.name,
                    held.name,
                )
        self._versions = _num_writes(weights)

    def unbind(self) -> None:
        """Put the lazy tensors back, except where the model has set a tensor of its own."""
        if self.slot is None:
            return
        for held, lazy in self._exchange(self._in_slot[self.slot], self._lazy):
            if held.is_in_place():
                held.place.set(lazy)
        self.slot = None

    def _exchange(
        self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
    ) -> list[tuple[_StreamedTensor, torch.Tensor]]:
        """Put `after` where `before` stands; what is left to be looked at one by one is returned.

        Without a call for a tensor: both directions are taken in every pass of every block.
        """
        left = []
        for held, old, new in zip(self._held, before, after, strict=True):
            place = held.place
            module, key = place.module, place.key
            holder: Any = module._parameters if place.is_parameter else module._buffers
            if holder.get(key) is old and type(old) in _EXCHANGED and not held.is_listed:
                holder[key] = new
            else:
                left.append((held, new))
        return left

    def _require_grad_as_lazy(self, weights: Sequence[torch.Tensor]) -> None:
        """Pass on whether gradients are wanted, where that was set since wrapping."""
        if _are_trained(self._lazy) == _are_trained(weights):
            return
        for held, weight in zip(self._held, weights, strict=True):
            if held.is_in_place() and weight.requires_grad is not held.lazy.requires_grad:
                weight.requires_grad_(held.lazy.requires_grad)

    def restore(self, blob: torch.Tensor, layout: Layout | None = None, prefix: str = "") -> None:
        """Give the module ordinary tensors again, views into `blob`: (layout.extent,) uint8.

        layout: None is its own; another one has its names behind a prefix.
        """
        layout = layout or self.layout
        for held in self._held:
            weight = held.kept(layout.view(blob, prefix + held.name))
            # Whoever still has the lazy tensor goes on reading the right values.
            held.lazy._read, held.lazy._write = weight.detach, weight.detach().copy_
            if held.is_in_place():
                held.place.set(weight)

    def forget(self) -> None:
        """Hold no tensor any more, in case somebody else holds the block."""
        for tensors in (self._held, self._lazy, self._in_slot):
            tensors.clear()

    def overwrite(self, name: str, value: torch.Tensor) -> None:
        """Give the tensor `name` new values in the slot, if the block is bound to one."""
        if self.slot is not None:
            held = next(held for held in self._held if held.name == name)
            with torch.no_grad():
                held.in_slot[self.slot].copy_(value)

    def convert(self, module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Module._apply for a part of the block that is bound: until the block is left."""
        assert self.slot is not None
        inside = set(module.modules())
        with torch.no_grad():
            for held in self._held:
                if held.place.module in inside:
                    held.convert(fn, self.slot)

    def changed(self) -> bool:
        """Whether anything wrote in place to a parameter or buffer since bind().

        In training, a block with buffers always counts as changed: fused operations update running
        statistics without a trace.
        """
        if self.slot is None:
            return False
        for held in self._held:
            if held.cast is not None:
                held.take_over(self.slot)
        if self._put_back(self.slot) or (self._has_buffers and self.module.training):
            return True
        return _num_writes(self._in_slot[self.slot]) != self._versions

    def _put_back(self, slot: int) -> bool:
        """Bring what was set as the data of tensors into the slot; whether there was any."""
        moved = [
            held
            for held, weight in zip(self._held, self._in_slot[slot], strict=True)
            if getattr(weight, "is_elsewhere", True)  # without: swapped with another tensor
        ]
        if not moved:
            return False
        values = [held.in_slot[slot].detach().clone() for held in moved]  # if they were exchanged
        for held, value in zip(moved, values, strict=True):
            held.put_back(slot, value)
        return True


def _num_writes(tensors: Sequence[torch.Tensor]) -> int:
    # Of a subclass torch looks for a __torch_function__ first, which would take most of the time.
    with torch._C.DisableTorchFunctionSubclass():
        return sum(map(_version, tensors))


def _are_trained(tensors: Sequence[torch.Tensor]) -> list[bool]:
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(_requires_grad, tensors))


def guarded(weight: torch.Tensor) -> torch.Tensor:
    """`weight`, such that a gradient for it raises, also if it is asked for later."""
    if isinstance(weight, torch.nn.Parameter) and weight.is_floating_point():
        is_trainable = weight.requires_grad
        weight.requires_grad_(True).register_hook(_refuse_gradient)
        weight.requires_grad_(is_trainable)
    return weight


def not_convertible(name: str, tensor: torch.Tensor) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a model with streamed blocks cannot be moved or converted ({name!r} is "
        f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}); do it before wrapping, "
        "or call bminf.unwrap(model) first"
    )


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise UnsupportedModelError(
        "a gradient reached a streamed weight, which cannot be trained; freeze the model's blocks "
        "with requires_grad_(False) before wrapping and train adapters beside them, such as "
        "peft.get_peft_model(model, LoraConfig(...)), or call bminf.unwrap(model) to train them"
    )
