"""Streaming tied to a live model: what happens when a block, or the model around it, is called.

Each block, and each module around blocks, gets a `forward` of its own on the instance. It calls the
original inside try/finally, which a pair of forward hooks cannot: they are skipped when a block is
left by KeyboardInterrupt, or when its `forward` is called directly.

Outside its forward a streamed block holds lazy tensors, which fetch their values from the host copy
when anything reads them; inside, views into the slot.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bminf.errors import UnsupportedModelError
from bminf.layout import Layout, span_elements, tensors_of
from bminf.lazy import LazyTensor
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Stack
from bminf.offload.listed_experts import ListedExpert, ListedExperts
from bminf.offload.plan import Plan
from bminf.offload.pool import ExpertPool
from bminf.offload.ring import NUM_SLOTS, Ring
from bminf.offload.routers import Router, find_routers
from bminf.offload.streamed_block import StreamedBlock, not_convertible
from bminf.offload.streamed_experts import ExpertInSlot, SlotViews, StreamedExperts
from bminf.offload.tables import HostTable, Table
from bminf.tracing import active_capture, active_tracer, disable_compile

logger = logging.getLogger("bminf")

_NO_GRAPH = (
    "cannot record a model with streamed blocks: a graph would keep the weights that happen to lie "
    "in the two slots; record it before wrapping, or call bminf.unwrap(model) first (torch.compile "
    "without fullgraph=True leaves the streamed blocks uncompiled)"
)

_Part = StreamedBlock | StreamedExperts | Router

ATTRIBUTE = "_bminf_scheduler"
"""Where a model holds its Scheduler."""


@dataclass(frozen=True)
class Stats:
    """What the scheduler did since wrapping. Bytes are those of the blobs; times are in seconds.

    expert_hits, expert_misses: experts that a layer wanted, and that were in the pool or were not,
    each once a layer and pass.   expert_bytes_copied: of bytes_copied, those of experts.
    expert_bytes_guessed: of these, what prefetch_experts= has copied before a router chose it, and
    expert_bytes_unused what was copied and not chosen then.
    """

    passes: int = 0
    copies: int = 0
    bytes_copied: int = 0
    copied_s: float = 0.0
    waits: int = 0
    waited_s: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0
    expert_bytes_copied: int = 0
    expert_bytes_guessed: int = 0
    expert_bytes_unused: int = 0

    @property
    def link_gbps(self) -> float:
        """GB/s (1e9) while copying."""
        return self.bytes_copied / self.copied_s / 1e9 if self.copied_s else 0.0


class Scheduler:
    """Streams the blocks of one model. It holds the lock, the ring and what was counted.

    prefetch_experts: whether the next layer's experts are guessed.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        source_device: torch.device,
        prefetch_experts: bool = False,
    ) -> None:
        self.plan, self.backend, self.source_device = plan, backend, source_device
        self._prefetch_experts = prefetch_experts
        self.blocks: list[StreamedBlock] = []
        self.experts: list[StreamedExperts | ListedExperts] = []
        self.tables: list[HostTable] = []
        self.routers: list[Router] = []
        self.ring: Ring | None = None
        self.pool: ExpertPool | None = None
        self.lying: Collection[int] = ()  # blocks that are read from where they were before
        self.loaded_bytes = 0  # read from files before it was ready
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._inside = False  # a guarded call is running; only read and set under the lock
        self._pass_counted = False
        self._num_passes = 0
        self._reads_host = False
        self._warned = self._warned_of_removed = False
        self._listed: set[ListedExpert] = set()  # those that run
        self._slot_views = SlotViews(backend)
        self._overrides: list[tuple[torch.nn.Module, str, Any, Any]] = []

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model that fits entirely is a model that is not wrapped."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def stats(self) -> Stats:
        counters, pool = vars(self.backend.counters()), self.pool
        found = Stats(passes=self._num_passes, **counters)
        if pool is None:
            return found
        return replace(
            found, expert_hits=pool.hits, expert_misses=pool.misses,
            expert_bytes_copied=pool.bytes_copied, expert_bytes_guessed=pool.bytes_guessed,
            expert_bytes_unused=pool.bytes_unused,
        )  # fmt: skip

    def add(self, name: str, module: torch.nn.Module, layout: Layout) -> None:
        """Take over a block whose blob has a host copy."""
        write = functools.partial(self.call, self._write)
        block = StreamedBlock(
            name, len(self.blocks), module, layout, self.backend, self._read, write
        )
        self.blocks.append(block)  # before it lets go: an interrupt finds it and takes it back
        block.release()

    def add_experts(self, name: str, module: torch.nn.Module, stack: Stack) -> None:
        """Take over a module of experts whose blobs have host copies."""
        first_block = len(self.plan.streamed)
        where = name, module, stack, self.next_expert - first_block, first_block, self.backend
        experts: StreamedExperts | ListedExperts
        if stack.members:
            keep = functools.partial(self.call, self._write)
            experts = ListedExperts(*where, self._read, keep)
        else:
            write = functools.partial(self.call, self._write_stack)
            experts = StreamedExperts(
                *where, self._read_stack, write, self._saved_by_autograd, self._slot_views
            )
        self.experts.append(experts)
        experts.release()

    @property
    def next_expert(self) -> int:
        """The blob, in the backend, of the first expert that was not added yet."""
        added = sum(len(one.stack.experts) for one in self.experts)
        return len(self.plan.streamed) + added

    def hold(self, table: Table, model: torch.nn.Module, rows: torch.Tensor) -> None:
        """Take over a table whose values lie on the host: `rows`, (N, C)."""
        write = functools.partial(self.call, self._write_table)
        held = HostTable(table, model, rows, self.backend, lambda: self._reads_host, write)
        self.tables.append(held)  # before it lets go, as a block
        held.release()

    def install(self, model: torch.nn.Module) -> None:
        """Begin to stream: every block, all experts, every table on the host, and every module
        around one, is guarded from now on."""
        self.ring = Ring(len(self.blocks), self.backend) if self.blocks else None
        if self.plan.experts is not None:
            sizes = [layout.nbytes for one in self.experts for layout in one.stack.experts]
            slots = self.plan.experts.num_slots
            self.pool = ExpertPool(sizes, slots, self.backend, len(self.blocks), NUM_SLOTS)
        of_stacks = [one for one in self.experts if isinstance(one, StreamedExperts)]
        lists = [one for one in self.experts if isinstance(one, ListedExperts)]
        streamed = [*self.blocks, *(expert for one in lists for expert in one.experts)]
        blocks = {block.module: block for block in streamed}
        experts = {one.module: one for one in of_stacks}
        parts: dict[torch.nn.Module, _Part] = {**experts, **blocks}
        guarded = set(parts).union(*(table.holders() for table in self.tables))
        self.routers = self._find_routers(model, parts)
        around_routers = {router.around: router for router in self.routers}
        parts = {**around_routers, **parts}
        around = [m for m in model.modules() if any(inner in guarded for inner in m.modules())]
        for module in around:
            self._override(module, "forward", _Forward(self, module, parts.get(module)))
            state_dict = functools.partial(self.call, self.state_dict, module.state_dict)
            self._override(module, "state_dict", state_dict)
            load = functools.partial(self.call, self.load_state_dict, module.load_state_dict)
            self._override(module, "load_state_dict", load)
            self._override(module, "__prepare_scriptable__", _refuse_scripting)
        for router in self.routers:
            self._override(router.module, "forward", _Forward(self, router.module, router))
        # Only modules that hold tensors: others, such as activations, may be shared by all models.
        holders = {module: block for block in streamed for module in block.holders()}
        stacks = [module for one in of_stacks for module in one.holders()]
        for module in dict.fromkeys([*around, *holders, *stacks]):
            block = blocks.get(module, holders.get(module))
            self._override(module, "_apply", _Apply(module, block))
        if self.ring is not None:
            self.ring.start()

    def _find_routers(
        self, model: torch.nn.Module, guarded: Collection[torch.nn.Module]
    ) -> list[Router]:
        if self.pool is None:
            return []
        found = find_routers(model, self.experts, self.pool, self._prefetch_experts)
        return [router for router in found if router.module not in guarded]

    def uninstall(self) -> None:
        with self._lock:
            self._clear()
            while self._overrides:  # one by one, so that an interrupted run can be repeated
                module, name, override, before = self._overrides[-1]
                if module.__dict__.get(name) is override:
                    module.__dict__.pop(name)
                    if before is not None:
                        module.__dict__[name] = before
                elif isinstance(override, _Forward):
                    override.remove_from(module)
                if isinstance(override, _Override):
                    override.is_removed = True
                self._overrides.pop()
            self.ring = None
            if self.pool is not None:
                self.pool.clear()
                self.pool = None
            self._slot_views.forget()
            self.routers = []

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `function` as the only thread in the model; calls may nest."""
        if (tracer := active_tracer() or active_capture()) is not None:
            raise UnsupportedModelError(f"{tracer} {_NO_GRAPH}")
        if os.getpid() != self._process:
            raise UnsupportedModelError(
                "a model with streamed blocks cannot be used in a forked process, which has "
                "neither its reader thread nor its streams; wrap the model in that process"
            )
        with self._lock:
            # No call stands between `with` and `try`, nor in `finally` before the flag is set:
            # there is no point at which KeyboardInterrupt could leave it wrong.
            outermost = not self._inside
            try:
                self._inside = True
                if outermost:
                    self._clear()
                return function(*args, **kwargs)
            finally:
                if outermost:
                    self._inside = False

    def run(
        self, block: StreamedBlock, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the forward of a block with its tensors in a slot. Only inside call()."""
        is_listed = isinstance(block, ListedExpert)
        # It calls itself, or was unwrapped.
        if block.slot is not None or (self.pool if is_listed else self.ring) is None:
            return forward(*args, **kwargs)
        slot = self._enter_listed(block) if is_listed else self.ring.enter(block.index)  # type: ignore
        is_cached = torch.is_autocast_cache_enabled()
        try:
            # Its cache would keep a copy of every streamed weight.
            torch.set_autocast_cache_enabled(False)
            if not self._pass_counted:
                self._pass_counted = True
                self._num_passes += 1
            block.bind(slot)
            if not torch.is_grad_enabled():
                return _detached(block, forward(*args, **kwargs))
            with self._saved_by_autograd(block):
                output = forward(*args, **kwargs)
            return _detached(block, output)
        finally:
            torch.set_autocast_cache_enabled(is_cached)
            self._leave(block, slot)

    def run_experts(
        self, experts: StreamedExperts, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the forward of a module of experts with those it needs in slots. Inside call()."""
        if experts.is_running or self.pool is None or experts not in self.experts:
            return forward(*args, **kwargs)
        is_cached = torch.is_autocast_cache_enabled()
        try:
            torch.set_autocast_cache_enabled(False)
            if not self._pass_counted:
                self._pass_counted = True
                self._num_passes += 1
            return experts.run(self.pool, forward, *args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(is_cached)

    def state_dict(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run state_dict, and give streamed tensors as they lie on the host, mapped from a file."""
        weights = function(*args, **kwargs)
        if kwargs.get("keep_vars", False):
            return weights
        with self._reading_host():
            for name, tensor in weights.items():
                if isinstance(tensor, LazyTensor):
                    weights[name] = tensor.fetch()
        return weights

    def load_state_dict(
        self,
        function: Callable[..., Any],
        /,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
    ) -> Any:
        """Run load_state_dict; what it copies into streamed tensors is kept where they lie."""
        if assign:
            raise UnsupportedModelError(
                "load_state_dict(assign=True) would put tensors beyond the plan in place of "
                "streamed ones; leave assign out, so that their values are copied, or call "
                "bminf.unwrap(model) first"
            )
        with self._reading_host():
            return function(state_dict, strict=strict)

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor of the model as it lies on the host: indices of rows, and the rows from there
        on. Of a stack of experts one after another, so that no more is in memory at a time."""
        for one in self.experts:
            name = one.name_of(tensor) if isinstance(one, StreamedExperts) else None
            if name is not None and isinstance(one, StreamedExperts):
                yield from ((at, part[None]) for at, part in enumerate(one.parts(name)))
                return
        with self._reading_host():
            yield 0, tensor.fetch() if isinstance(tensor, LazyTensor) else tensor.detach().cpu()

    @contextmanager
    def _reading_host(self) -> Iterator[None]:
        """Streamed tensors are read as they lie on the host, and without a warning."""
        self._reads_host, before = True, self._reads_host
        try:
            yield
        finally:
            self._reads_host = before

    def _enter_listed(self, expert: ListedExpert) -> int:
        """The slot that holds an expert, which is left again."""
        assert self.pool is not None
        self._listed.add(expert)
        return expert.enter(self.pool)

    def _leave_listed(self, expert: ListedExpert) -> None:
        assert self.pool is not None
        if expert.changed():
            expert.write_back()
        expert.unbind()
        self._listed.discard(expert)
        expert.leave(self.pool)

    def _leave(self, block: StreamedBlock, slot: int) -> None:
        if isinstance(block, ListedExpert):
            self._leave_listed(block)
            return
        assert self.ring is not None
        if block.changed():
            self.backend.write_back(block.index, slot)
            self.ring.changed(block.index)
        block.unbind()
        self.ring.leave(block.index)

    def _clear(self) -> None:
        """Put in order whatever a call that was cut short left behind."""
        self._pass_counted = False
        for block in (*self.blocks, *self._listed):
            block.unbind()
        self._listed.clear()
        if self.ring is not None:
            self.ring.clear()
        if self.pool is not None:
            self.pool.clear()

    def _read(self, block: StreamedBlock, name: str) -> torch.Tensor:
        """One tensor of a block from the host, for a read outside the block's forward."""
        self._warn_of_read(name, block.name)
        view = block.layout.view(self.backend.host_copy(block.index), name)
        return view if self._reads_host else view.to(self.backend.device)

    def _read_stack(self, experts: StreamedExperts, name: str) -> torch.Tensor:
        """One stack from the host, for a read that is not of one expert in its turn."""
        self._warn_of_read(name, experts.name)
        if self._reads_host:
            return experts.held(name)
        return experts.whole(name).to(self.backend.device)

    def _warn_of_read(self, name: str, block: str) -> None:
        if not self._reads_host and not self._warned and not self._warn_of_removed():
            self._warned = True
            logger.warning(
                "%s of the streamed block %s is read outside the block's forward: it is fetched "
                "anew each time, which is slow",
                name,
                block,
            )

    def _warn_of_removed(self) -> bool:
        """Whether blocks have lost the forward that streams them; one warning says so."""
        forwards = [
            override for _, _, override, _ in self._overrides if isinstance(override, _Forward)
        ]
        lost = [
            override.block_name
            for override in forwards
            if override.block_name and not override.is_reached()
        ]
        if lost and not self._warned_of_removed:
            self._warned_of_removed = True
            warnings.warn(
                f"the forward that streamed {', '.join(lost[:3])}"
                f"{f' and {len(lost) - 3} more blocks' if len(lost) > 3 else ''} was removed or "
                "replaced, so the streaming of that has ended: its weights are fetched one by one "
                "when they are read, which is slow; call bminf.unwrap(model), put hooks of other "
                "libraries on or take them off, and wrap it again",
                stacklevel=2,
            )
        return bool(lost)

    def _write(self, block: StreamedBlock, name: str, value: torch.Tensor) -> None:
        """Keep what was written to a tensor of a block outside the block's forward."""
        with torch.inference_mode(False), torch.no_grad():
            block.overwrite(name, value)
            self.backend.rewrite(block.index, name, value)
        if isinstance(block, ListedExpert):
            if self.pool is not None and block.slot is None:  # or its slot has the values
                self.pool.forget(block.number)
        elif self.ring is not None:
            self.ring.changed(block.index)

    def _write_stack(self, experts: StreamedExperts, name: str, value: torch.Tensor) -> None:
        """As _write(), of a stack of experts."""
        with torch.inference_mode(False), torch.no_grad():
            experts.rewrite(name, value, self.pool)

    def _write_table(self, table: HostTable, value: torch.Tensor) -> None:
        """Keep new values of a table; those it had may lie in a file of somebody else."""
        with torch.inference_mode(False), torch.no_grad():
            table.rows = self.backend.hold(value.shape, value.dtype, [value.detach()])

    def _saved_by_autograd(
        self, block: StreamedBlock | ExpertInSlot
    ) -> AbstractContextManager[Any]:
        """Weights saved by autograd would be overwritten in the slot: save where they lie."""
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                "gradients by torch.func (grad, vjp, jacrev, hessian) are not supported for a "
                "model with streamed blocks: they would keep the weights that happen to lie in the "
                "two slots; use torch.autograd or torch.func.jacfwd, or call bminf.unwrap(model) "
                "first"
            )

        def pack(tensor: torch.Tensor) -> Any:
            offset = block.offset_in_slot(tensor)
            if offset is None:
                # Without its history: an output that is saved would otherwise keep itself alive.
                return tensor.detach()
            return offset, tensor.shape, tensor.stride(), tensor.dtype

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, torch.Tensor):
                return saved
            offset, shape, stride, dtype = saved
            end = offset + span_elements(shape, stride) * dtype.itemsize
            data = self.backend.host_copy(block.index)[offset:end].to(self.backend.device)
            return data.view(dtype).as_strided(shape, stride)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _override(self, module: torch.nn.Module, name: str, value: Any) -> None:
        self._overrides.append((module, name, value, module.__dict__.get(name)))
        module.__dict__[name] = value


def _detached(block: StreamedBlock, output: Any) -> Any:
    """An output that is a view of a weight would change with the slot: copy it."""
    if isinstance(output, torch.Tensor):  # most outputs are, and the tree walk is not free
        return output if block.offset_in_slot(output) is None else output.clone()
    if is_dataclass(output) and not isinstance(output, type | Mapping):
        for field in fields(output):
            value = getattr(output, field.name, None)
            if (copied := _detached(block, value)) is not value:
                object.__setattr__(output, field.name, copied)
        return output
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if all(block.offset_in_slot(leaf) is None for leaf in leaves):
        return output  # the very object, as without streaming
    return tree_map_only(torch.Tensor, functools.partial(_detached, block), output)


def is_streaming(module: torch.nn.Module) -> bool:
    """Whether `module` is, holds or belongs to a model with streamed blocks."""
    values = module.__dict__.values()
    return any(isinstance(value, _Override) and not value.is_removed for value in values)


class _Override:
    """Stands in a module's __dict__; a copy or a pickle of that would act on the wrong model."""

    is_removed = False  # the model is unwrapped, but something else still refers to this

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
    """The forward of a block, or of a module around blocks, under the scheduler's lock.

    block_name: of the block, or the experts, that it streams; "" for a module around blocks.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        module: torch.nn.Module,
        block: _Part | None,
    ) -> None:
        functools.update_wrapper(self, module.forward)  # keeps the signature that generate() reads
        self._module, self._forward = module, module.forward
        self.block_name = block.name if block is not None else ""
        run = self._forward
        if isinstance(block, StreamedExperts):
            run = functools.partial(scheduler.run_experts, block, run)
        elif isinstance(block, Router):
            run = functools.partial(block.run if module is block.module else block.run_around, run)
        elif block is not None:
            run = functools.partial(scheduler.run, block, run)
        self._uncompiled = functools.partial(scheduler.call, run)
        self._call: Callable[..., Any] = self._uncompiled
        self._is_compile_disabled = False

    def __getattr__(self, name: str) -> Any:
        """The attributes of a function (__code__, __defaults__), for code that inspects them."""
        if not name.startswith("__") or "_forward" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._forward, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self._forward(*args, **kwargs)
        # A compiled graph would keep the weights it was traced with, so streaming stays out of
        # torch.compile; that is only asked where its machinery is loaded at all. Dynamo must not
        # come to that question: tracing it, it walks through all modules while it imports more.
        if not self._is_compile_disabled and (
            torch.compiler.is_compiling() or "torch._dynamo" in sys.modules
        ):
            reason = f"bminf: torch.compile {_NO_GRAPH}"
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=reason)
            self._call = disable_compile(self._uncompiled, reason)
            self._is_compile_disabled = True
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._forward, memo) if self.is_removed else super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.is_removed:
            return self._forward.__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)

    def remove_from(self, module: torch.nn.Module) -> None:
        """Give up the places where hooks of other libraries have put this."""
        for name, value in list(module.__dict__.items()):
            if value is self:
                module.__dict__[name] = self._forward

    def is_reached(self) -> bool:
        """Whether a call of the module comes here, as far as that can be seen."""
        if any(value is self for value in self._module.__dict__.values()):
            return True
        forward = self._module.__dict__.get("forward")
        while forward is not None and forward is not self:
            with suppress(TypeError, ValueError):  # no function; a variable without a value
                closed_over = inspect.getclosurevars(forward).nonlocals.values()
                if any(value is self for value in closed_over):
                    return True
            forward = getattr(forward, "__wrapped__", None)
        return forward is self


def _refuse_scripting(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(f"torch.jit.script {_NO_GRAPH}")


class _Apply(_Override):
    """Module._apply, which .to() and .half() call: accept what changes nothing, refuse the rest.

    Within the forward of its block a part may be converted: hooks that keep weights in one dtype
    and compute in another (layerwise casting) do so in each pass.
    """

    def __init__(self, module: torch.nn.Module, block: StreamedBlock | None) -> None:
        self._module, self._block = module, block

    def __call__(self, fn: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
        if self._block is not None and self._block.slot is not None:
            self._block.convert(self._module, fn)
            return self._module
        with torch.no_grad():
            for name, _, tensor in tensors_of(self._module):
                if _changes(fn, tensor):
                    raise not_convertible(name, tensor)
        return self._module


def _changes(fn: Callable[..., Any], tensor: torch.Tensor) -> bool:
    """Whether `fn` would give something else than `tensor`, or write to it.

    It is asked with a tensor that has the very metadata and values, but keeps nothing.
    """
    written: list[torch.Tensor] = []
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    read = tensor.fetch if isinstance(tensor, LazyTensor) else tensor.detach
    probe = LazyTensor(read, tensor, is_parameter=is_parameter, write=written.append)
    try:
        return fn(probe) is not probe or bool(written)
    except UnsupportedModelError:  # of the probe: it has no memory to share
        return True
