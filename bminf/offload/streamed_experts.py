"""A module of experts whose bytes are elsewhere, of which a layer fetches those that it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from bminf.layers.experts import (
    Tensors,
    forward_of,
    reads_by_index,
    reads_whole_stacks,
    stacks_of,
)
from bminf.layout import Layout, TensorPlace, tensors_of
from bminf.lazy import LazyTensor
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Stack
from bminf.offload.pool import ExpertPool
from bminf.offload.streamed_block import InSlot, guarded

Saved = Callable[[Any], AbstractContextManager[Any]]
"""A context in which autograd saves what lies in a slot as where it lies on the host."""


class ExpertInSlot(InSlot):
    """One expert where it lies now. index: of its blob in the backend."""

    slot = 0  # it knows of no other

    def __init__(self, index: int, slot: torch.Tensor, layout: Layout, tensors: Tensors) -> None:
        self.index, self.layout, self.tensors = index, layout, tensors
        self._starts = [slot.data_ptr()]


class SlotViews:
    """The tensors of experts in slots of the pool. Those that are laid out alike, as mostly all
    are, share them: none are made as experts come and go."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kinds: dict[Any, int] = {}
        self._views: dict[tuple[int, int], Tensors] = {}

    def kind_of(self, layout: Layout) -> int:
        """A number for what is laid out alike."""
        key = tuple(
            (name, layout.offsets[name], spec.shape, spec.stride, spec.dtype)
            for name, spec in layout.specs.items()
        )
        return self._kinds.setdefault(key, len(self._kinds))

    def tensors(self, slot: int, kind: int, layout: Layout) -> Tensors:
        """slot: of the pool.   kind: of the layout."""
        found = self._views.get((slot, kind))
        if found is None:
            buffer = self._backend.pool[slot]
            found = {name: layout.view(buffer, name) for name in layout.specs}
            self._views[slot, kind] = found
        return found

    def forget(self) -> None:
        """Hold no slot any more."""
        self._views.clear()


class StreamedExperts:
    """The experts of one module, in the pool or elsewhere.

    first: the number of the first of them in the pool.   first_block: of all experts, in the
    backend.   module: its stacks have host copies already and are let go here.
    read, write: fetch one stack from the host copies, and keep new values of one there.
    saved: of one expert in a slot.   views: of the backend's slots.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        stack: Stack,
        first: int,
        first_block: int,
        backend: Backend,
        read: Callable[[StreamedExperts, str], torch.Tensor],
        write: Callable[[StreamedExperts, str, torch.Tensor], None],
        saved: Saved,
        views: SlotViews,
    ) -> None:
        self.name, self.module, self.stack = name, module, stack
        self.first, self._first_block, self._backend = first, first_block, backend
        self._read, self._write, self._saved = read, write, saved
        self._places = {
            key: place for key, place, _ in tensors_of(module) if key in stack.whole.specs
        }
        self._attributes = {key: dict(t.__dict__) for key, t in stacks_of(module).items()}
        self._lazy = {key: self._make_lazy(key, place) for key, place in self._places.items()}
        self._views = views
        kinds = {id(layout): views.kind_of(layout) for layout in stack.experts}
        self._kinds = [kinds[id(layout)] for layout in stack.experts]
        self._announced: tuple[torch.Tensor, int | None, list[int]] | None = None
        self.is_running = False

    def _make_lazy(self, key: str, place: TensorPlace) -> LazyTensor:
        fetch, keep = (functools.partial(do, self, key) for do in (self._read, self._write))
        tensor = place.get()
        assert tensor is not None
        return LazyTensor(fetch, tensor, self._backend.device, place.is_parameter, keep)

    @property
    def numbers(self) -> range:
        """Of the experts, in the pool."""
        return range(self.first, self.first + len(self.stack.experts))

    @property
    def blocks(self) -> range:
        """The blobs of the experts, in the backend."""
        start = self._first_block + self.first
        return range(start, start + len(self.stack.experts))

    def holders(self) -> set[torch.nn.Module]:
        """The modules that hold a stack."""
        return {place.module for place in self._places.values()}

    def release(self) -> None:
        """Put the lazy tensors in place; the originals are free, if nobody else holds them."""
        for key, place in self._places.items():
            place.set(self._lazy[key])

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """A stack as it lies on the host: the part of one expert after another."""
        for block, layout in zip(self.blocks, self.stack.experts, strict=True):
            yield layout.view(self._backend.host_copy(block), name)

    def whole(self, name: str) -> torch.Tensor:
        """A stack, put together in memory."""
        return torch.stack(list(self.parts(name)))

    def held(self, name: str) -> torch.Tensor:
        """A stack, put together on the host, where no limit counts it: on a CPU in a file."""
        spec = self.stack.whole.specs[name]
        return self._backend.hold(spec.shape, spec.dtype, (x[None] for x in self.parts(name)))

    def name_of(self, stack: torch.Tensor) -> str | None:
        """Of a stack of these experts; None of any other tensor."""
        return next((name for name, lazy in self._lazy.items() if lazy is stack), None)

    def rewrite(self, name: str, value: torch.Tensor, pool: ExpertPool | None) -> None:
        """Keep new values of a stack."""
        for expert, block in enumerate(self.blocks):
            self._backend.rewrite(block, name, value[expert])
            if pool is not None:
                pool.forget(self.first + expert)

    def restore(self, blob: torch.Tensor) -> None:
        """Give the module ordinary tensors again, views into `blob`: (whole.extent,) uint8."""
        for key, place in self._places.items():
            lazy, view = self._lazy[key], self.stack.whole.view(blob, key)
            lazy._read, lazy._write = view.detach, view.detach().copy_
            if place.get() is lazy:
                if place.is_parameter:
                    view = torch.nn.Parameter(view, requires_grad=lazy.requires_grad)
                    view.__dict__.update(self._attributes[key])
                place.set(view)

    def forget(self) -> None:
        """Hold no tensor any more, in case somebody else holds the module."""
        for held in (self._places, self._lazy):
            held.clear()

    # ---- while the module runs ------------------------------------------------------------------

    def run(
        self, pool: ExpertPool, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """What `forward`, that of the module, would return, with experts from the pool."""
        self.is_running = True
        try:
            if reads_whole_stacks(self.module):
                return forward(*args, **kwargs)  # which puts each stack together, slowly
            if reads_by_index(self.module):
                return self._run_by_index(pool, forward, args, kwargs)
            computes = forward_of(self.module)
            assert computes is not None  # or it would not be streamed
            return computes(self.module, _Visit(self, pool), *args, **kwargs)
        finally:
            self.is_running = False
            self.settle(pool)

    def settle(self, pool: ExpertPool) -> None:
        """The module around has ended."""
        self._announced = None
        pool.settle(self.numbers)

    def announce(self, pool: ExpertPool, ids: torch.Tensor, is_guess: bool = False) -> None:
        """Begin to copy what a router has chosen, before the module is called with that.

        ids: (T, k) integers, which are read on the host now.   is_guess: whether the module may be
        called with others.
        """
        if reads_whole_stacks(self.module):
            return
        chosen = ids.reshape(-1).tolist()
        if not is_guess:
            self._announced = ids, version_of(ids), chosen
        own = sorted({number for number in chosen if 0 <= number < len(self.stack.experts)})
        pool.expect([self.first + number for number in own], self.numbers, is_guess)

    def on_host(self, ids: torch.Tensor) -> list[int]:
        """ids: (T, k) integers, of which those that were announced have been read already."""
        if self._announced is not None:
            announced, version, chosen = self._announced
            if announced is ids and version is not None and version == version_of(ids):
                return chosen
        return ids.reshape(-1).tolist()

    def visit(self, pool: ExpertPool, experts: Sequence[int]) -> Iterator[Mapping[int, Tensors]]:
        """Those that the pool holds already together, then the others as they come: each with those
        that have come meanwhile. Where not all have room one after another: each leaves its slot to
        one that is not copied yet."""
        hits_before = pool.hits
        numbers = pool.want([self.first + expert for expert in experts])
        num_hits = pool.hits - hits_before
        has_room = len(numbers) <= pool.num_slots and not torch.is_grad_enabled()
        together = numbers[:num_hits] if has_room else []
        if together:
            yield from self._visit_all(pool, together)
        left = numbers[len(together) :]
        while left:
            group, left = (pool.arrived(left) if has_room else left[:1]), left[1:]
            if len(group) > 1:
                left = left[len(group) - 1 :]
                yield from self._visit_all(pool, group)
            else:
                yield from self._visit_one(pool, group[0])

    def _visit_all(
        self, pool: ExpertPool, numbers: Sequence[int]
    ) -> Iterator[Mapping[int, Tensors]]:
        slots = {number: pool.enter(number) for number in numbers}
        try:
            yield {n - self.first: self._tensors(n, slot) for n, slot in slots.items()}
        finally:
            for number in numbers:
                pool.leave(number)

    def _visit_one(self, pool: ExpertPool, number: int) -> Iterator[Mapping[int, Tensors]]:
        slot = pool.enter(number)
        try:
            if not torch.is_grad_enabled():
                yield {number - self.first: self._tensors(number, slot)}
                return
            expert = self._in_slot(number, slot)
            with self._saved(expert):
                yield {number - self.first: self._differentiable(expert)}
        finally:
            pool.leave(number)

    def _in_slot(self, number: int, slot: int) -> ExpertInSlot:
        layout, tensors = self.stack.experts[number - self.first], self._tensors(number, slot)
        buffer = self._backend.pool[slot]
        return ExpertInSlot(self._first_block + number, buffer, layout, tensors)

    def _tensors(self, number: int, slot: int) -> Tensors:
        expert = number - self.first
        return self._views.tensors(slot, self._kinds[expert], self.stack.experts[expert])

    def _differentiable(self, expert: ExpertInSlot) -> Tensors:
        """Its tensors, such that a gradient for one that is wanted raises."""
        return {
            key: guarded(torch.nn.Parameter(view.detach()))
            if self._lazy[key].requires_grad
            else view
            for key, view in expert.tensors.items()
        }

    def _run_by_index(
        self, pool: ExpertPool, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """With something in place of each stack that has one expert at a time, for its index."""
        turns = _Turns(self, pool, _integers((*args, *kwargs.values()), len(self.stack.experts)))
        names = {key: place for key, place in self._places.items() if place.module is self.module}
        try:
            for key in names:
                self.module.__dict__[key] = _Indexed(turns, key, self._lazy[key])
            return forward(*args, **kwargs)
        finally:
            for key in names:
                self.module.__dict__.pop(key, None)
            turns.end()


class _Visit:
    """A Visit of experts that come through the pool."""

    def __init__(self, experts: StreamedExperts, pool: ExpertPool) -> None:
        self._experts, self._pool = experts, pool
        self.on_host = experts.on_host

    def __call__(self, experts: Sequence[int]) -> Iterator[Mapping[int, Tensors]]:
        return self._experts.visit(self._pool, experts)


class _Turns:
    """One expert after another, in an order that somebody else keeps to."""

    def __init__(self, experts: StreamedExperts, pool: ExpertPool, wanted: Sequence[int]) -> None:
        self._experts, self._pool = experts, pool
        self._number: int | None = None
        self._tensors: Tensors = {}
        self._context: AbstractContextManager[Any] | None = None
        pool.want([experts.first + expert for expert in wanted])

    def tensors(self, expert: int) -> Tensors:
        """Good until another expert is asked for."""
        number = self._experts.first + expert
        if number != self._number:
            self.end()
            in_slot = self._experts._in_slot(number, self._pool.enter(number))
            self._number, self._tensors = number, in_slot.tensors
            if torch.is_grad_enabled():
                self._tensors = self._experts._differentiable(in_slot)
                self._context = self._experts._saved(in_slot)
                self._context.__enter__()
        return self._tensors

    def end(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
        if self._number is not None:
            self._pool.leave(self._number)
        self._number = self._context = None


class _Indexed:
    """Stands for a stack: [expert] is the part of that, where it lies now."""

    def __init__(self, turns: _Turns, name: str, like: torch.Tensor) -> None:
        self._turns, self._name, self._like = turns, name, like

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._turns.tensors(int(expert))[self._name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._like, name)


def version_of(tensor: torch.Tensor) -> int | None:
    """By which it can be told whether it was written to; None where that cannot be told."""
    return None if tensor.is_inference() else tensor._version


def _integers(values: Sequence[Any], below: int) -> list[int]:
    """Those in the tensors of integers among `values`, each once, ascending."""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.long]
    found = {number for tensor in tensors for number in tensor.flatten().tolist()}
    return sorted(number for number in found if 0 <= number < below)
