"""Streaming tied to a live model: what happens when a block, or the model around it, is called.

Each block, and each module around blocks, gets a `forward` of its own on the instance. It calls the
original inside try/finally, which a pair of forward hooks cannot: they are skipped when a block is
left by KeyboardInterrupt, or when its `forward` is called directly.

Outside its forward a streamed block holds lazy tensors, which fetch their values from the home when
anything reads them; inside, views into the slot.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from bminf.errors import UnsupportedModelError
from bminf.layout import Layout
from bminf.scheduler.backends.base import Backend
from bminf.scheduler.blocks import tensors_of
from bminf.scheduler.plan import Plan
from bminf.scheduler.ring import Ring
from bminf.scheduler.streamed_block import StreamedBlock

logger = logging.getLogger("bminf")


@dataclass(frozen=True)
class Stats:
    """What the scheduler did since wrapping. Bytes are those of the blobs; times are in seconds."""

    passes: int = 0
    copies: int = 0
    bytes_copied: int = 0
    copied_s: float = 0.0
    waits: int = 0
    waited_s: float = 0.0

    @property
    def link_gbps(self) -> float:
        """GB/s (1e9) while copying."""
        return self.bytes_copied / self.copied_s / 1e9 if self.copied_s else 0.0


class Scheduler:
    """Streams the blocks of one model. It holds the lock, the ring and what was counted."""

    def __init__(self, plan: Plan, backend: Backend, source_device: torch.device) -> None:
        self.plan, self.backend, self.source_device = plan, backend, source_device
        self.blocks: list[StreamedBlock] = []
        self.ring: Ring | None = None
        self._lock = threading.RLock()
        self._inside = False  # somebody is in a guarded call; only read and set under the lock
        self._pass_counted = False
        self._num_passes = 0
        self._reads_host = False
        self._warned = False
        self._overrides: list[tuple[torch.nn.Module, str, Any]] = []

    def stats(self) -> Stats:
        counters = self.backend.counters()
        return Stats(passes=self._num_passes, **vars(counters))

    def add(self, name: str, module: torch.nn.Module, layout: Layout) -> None:
        """Take over a block whose blob is at home."""
        block = StreamedBlock(name, len(self.blocks), module, layout, self.backend, self._read)
        self.blocks.append(block)

    def install(self, model: torch.nn.Module) -> None:
        """Begin to stream: every block, and every module around one, is guarded from now on."""
        self.ring = Ring(len(self.blocks), self.backend)
        blocks = {block.module: block for block in self.blocks}
        around = [m for m in model.modules() if any(inner in blocks for inner in m.modules())]
        for module in around:
            self._override(module, "forward", _Forward(self, module, blocks.get(module)))
            self._override(module, "state_dict", _StateDict(self, module.state_dict))
            self._override(module, "load_state_dict", _refuse_loading)
        inside = [inner for block in blocks for inner in block.modules()]
        for module in dict.fromkeys([*around, *inside]):
            self._override(module, "_apply", _Apply(module))
        self.ring.start()

    def uninstall(self) -> None:
        with self._lock:
            self._settle()
            for module, name, before in reversed(self._overrides):
                if before is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
            self._overrides = []

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `function` as the only thread in the model; calls may nest."""
        with self._lock:
            # No call stands between `with` and `try`, nor in `finally` before the flag is set:
            # there is no point at which KeyboardInterrupt could leave it wrong.
            outermost = not self._inside
            try:
                self._inside = True
                if outermost:
                    self._settle()
                return function(*args, **kwargs)
            finally:
                if outermost:
                    self._inside = False

    def run(self, block: StreamedBlock, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the forward of a block with its tensors in a slot. Only inside call()."""
        if block.slot is not None:  # it calls itself
            return forward(*args, **kwargs)
        assert self.ring is not None
        slot = self.ring.enter(block.index)
        try:
            self._count_pass()
            block.bind(slot)
            with self._saved_by_autograd(block):
                output = forward(*args, **kwargs)
            return _detached(block, output)
        finally:
            self._leave(block, slot)

    def state_dict(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run state_dict with streamed tensors read from home as they lie there, on the host."""
        self._reads_host, before = True, self._reads_host
        try:
            return function(*args, **kwargs)
        finally:
            self._reads_host = before

    def _leave(self, block: StreamedBlock, slot: int) -> None:
        assert self.ring is not None
        if block.changed():
            self.backend.write_back(block.index, slot)
            self.ring.changed(block.index)
        block.unbind()
        self.ring.leave(block.index)

    def _settle(self) -> None:
        """Put in order whatever a call that was cut short left behind."""
        self._pass_counted = False
        for block in self.blocks:
            block.unbind()
        if self.ring is not None:
            self.ring.settle()

    def _count_pass(self) -> None:
        if not self._pass_counted:
            self._pass_counted = True
            self._num_passes += 1

    def _read(self, block: StreamedBlock, name: str) -> torch.Tensor:
        """One tensor of a block from its home, for whoever reads it outside the block's forward."""
        if not self._reads_host and not self._warned:
            self._warned = True
            logger.warning(
                "%s of the streamed block %s is read outside the block's forward: it is fetched "
                "anew each time, which is slow",
                name,
                block.name,
            )
        view = block.layout.view(self.backend.home(block.index), name)
        return view if self._reads_host else view.to(self.backend.device)

    def _saved_by_autograd(self, block: StreamedBlock) -> AbstractContextManager[Any]:
        """Weights saved by autograd would be overwritten in the slot: save where they lie."""
        if not torch.is_grad_enabled():
            return nullcontext()

        def pack(tensor: torch.Tensor) -> Any:
            offset = block.offset_in_slot(tensor)
            if offset is None:
                return tensor
            return offset, tensor.shape, tensor.stride(), tensor.dtype

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, torch.Tensor):
                return saved
            offset, *rest = saved
            return self._read_saved(block, offset, *rest)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _read_saved(
        self,
        block: StreamedBlock,
        offset: int,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        count = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        data = self.backend.home(block.index)[offset : offset + count * dtype.itemsize]
        return data.to(self.backend.device).view(dtype).as_strided(shape, stride)

    def _override(self, module: torch.nn.Module, name: str, value: Any) -> None:
        self._overrides.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = value


def _detached(block: StreamedBlock, output: Any) -> Any:
    """An output that is a view of a weight would change with the slot: copy it."""
    if isinstance(output, torch.Tensor):  # most outputs are, and the tree walk is not free
        return output if block.offset_in_slot(output) is None else output.clone()
    return tree_map_only(torch.Tensor, functools.partial(_detached, block), output)


def is_streaming(module: torch.nn.Module) -> bool:
    """Whether `module` is, holds or belongs to a model with streamed blocks."""
    return any(isinstance(value, _Override) for value in module.__dict__.values())


class _Override:
    """Stands in a module's __dict__; a copy or a pickle of that would act on the wrong model."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnsupportedModelError(
            "a model with streamed blocks cannot be copied; copy it before wrapping, "
            "or call bminf.unwrap(model) first"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedModelError(
            "a model with streamed blocks cannot be pickled; save its state_dict(), "
            "or call bminf.unwrap(model) first"
        )


class _Forward(_Override):
    """The forward of a block, or of a module around blocks, under the scheduler's lock."""

    def __init__(
        self, scheduler: Scheduler, module: torch.nn.Module, block: StreamedBlock | None
    ) -> None:
        functools.update_wrapper(self, module.forward)  # keeps the signature that generate() reads
        self._scheduler, self._forward, self._block = scheduler, module.forward, block
        self._uncompiled = self._call = self._run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph would keep the weights it was traced with, so streaming stays out of
        # torch.compile; that is only asked where its machinery is loaded at all.
        if self._call is self._uncompiled and "torch._dynamo" in sys.modules:
            self._call = torch.compiler.disable(self._uncompiled)
        return self._call(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._scheduler.call(self._inner, args, kwargs)

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        if self._block is None:
            return self._forward(*args, **kwargs)
        return self._scheduler.run(self._block, self._forward, args, kwargs)


class _StateDict(_Override):
    """state_dict with the real weights of streamed blocks, mapped from their home."""

    def __init__(self, scheduler: Scheduler, state_dict: Callable[..., Any]) -> None:
        self._scheduler, self._state_dict = scheduler, state_dict

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._scheduler.call(self._inner, args, kwargs)

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        return self._scheduler.state_dict(self._state_dict, args, kwargs)


def _refuse_loading(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "weights cannot be loaded into a model with streamed blocks; load them before wrapping, "
        "or call bminf.unwrap(model) first"
    )


class _Apply(_Override):
    """Module._apply, which .to() and .half() call: accept what changes nothing, refuse the rest."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self, fn: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
        for name, _, tensor in tensors_of(self._module):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            if fn(probe) is not probe:
                raise UnsupportedModelError(
                    f"a model with streamed blocks cannot be moved or converted ({name!r} is "
                    f"{tensor.dtype} on {tensor.device}); do it before wrapping, "
                    "or call bminf.unwrap(model) first"
                )
        return self._module
