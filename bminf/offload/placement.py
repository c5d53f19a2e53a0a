"""Every tensor to the place that the plan gives it, block by block, and back again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from bminf.layers.experts import stacks_of
from bminf.layers.quantize import Replacements, places_of, replace_module
from bminf.layout import Layout, tensors_of
from bminf.offload import memory
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Blobs, Stack, unmapped_bytes
from bminf.offload.hooks import Scheduler
from bminf.offload.listed_experts import ListedExperts
from bminf.offload.streamed_experts import StreamedExperts
from bminf.offload.tables import Table
from bminf.progress import progress_bar

_TRIMMED_BYTES = 2**22
"""Of blocks that are read before malloc gives back what it keeps: to ask it takes time."""


def place(
    model: torch.nn.Module,
    blobs: Blobs,
    replacements: Replacements,
    scheduler: Scheduler,
    offload_dir: str | Path | None = None,
) -> None:
    """Quantize, move and free one block after another, so that no two copies are held.

    blobs: the layouts of all blocks, in module order.   offload_dir: see Backend.
    """
    streamed = set(scheduler.plan.streamed)
    # malloc keeps what it is given back in pieces; a mapped model gives it next to nothing.
    is_trimmed = 8 * unmapped_bytes(model) > blobs.nbytes
    places, stacks = places_of(model, replacements), blobs.stacks_by_block()

    def quantize(modules: Iterable[torch.nn.Module]) -> None:
        for module in modules:
            if module in places:
                replace_module(module, replacements[module].form, places)

    with torch.inference_mode(False), torch.no_grad():
        # What lies in no block, or in several, and so outside all of them, comes first.
        paths = {name.rpartition(".")[0] for name in blobs.outside.specs}
        named = model.named_modules(remove_duplicate=False)
        quantize([module for path, module in named if path in paths])
        _move_resident(model, blobs.outside, scheduler.backend, scheduler.source_device)
        if not scheduler.plan.tables:
            _move_resident(model, blobs.of_tables, scheduler.backend, scheduler.source_device)
        else:
            _hold_tables(model, blobs.tables, scheduler, offload_dir)
        for name, layout in _with_progress(blobs.blocks):
            quantize(list(model.get_submodule(name).modules()))
            module = model.get_submodule(name)
            if name in streamed:
                tensors = [(key, t) for key, _, t in tensors_of(module) if key in layout.specs]
                fill = partial(layout.fill, tensors=tensors)
                scheduler.backend.put(len(scheduler.blocks), fill)
                scheduler.add(name, module, layout)
            else:
                _move_resident(module, layout, scheduler.backend, scheduler.source_device)
            for path, stack in stacks.get(name, {}).items():
                _place_experts(model.get_submodule(path), path, stack, scheduler)
            if is_trimmed:
                memory.trim()


def _place_experts(module: torch.nn.Module, name: str, stack: Stack, scheduler: Scheduler) -> None:
    """Each expert to its host copy."""
    for expert, layout in enumerate(stack.experts):
        fill = partial(layout.fill, tensors=_tensors_of_expert(module, stack, expert))
        scheduler.backend.put(scheduler.next_expert + expert, fill)
    scheduler.add_experts(name, module, stack)


def _tensors_of_expert(
    module: torch.nn.Module, stack: Stack, expert: int
) -> list[tuple[str, torch.Tensor]]:
    if not stack.members:
        return [(key, tensor[expert]) for key, tensor in stacks_of(module).items()]
    member, layout = module.get_submodule(stack.members[expert]), stack.experts[expert]
    return [(key, tensor) for key, _, tensor in tensors_of(member) if key in layout.specs]


def load(
    model: torch.nn.Module,
    blobs: Blobs,
    scheduler: Scheduler,
    read: Callable[[str, torch.Tensor], object],
    read_expert: Callable[[str, int, torch.Tensor], object],
    read_tables: Callable[[torch.Tensor], object] = lambda blob: None,
    hold_table: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Fill a model that lies on the meta device, block by block, straight into the blobs.

    read: fills the blob, (extent,) uint8, of the block of this name, "" for what lies outside all
    of them.   read_expert: the same of one expert of the module of this name.   read_tables: fills
    that of the tables that are read by row.   hold_table: gives the table of this name on the host,
    (N, C).
    """
    streamed, untrimmed_bytes = set(scheduler.plan.streamed), 0
    stacks = blobs.stacks_by_block()
    with torch.inference_mode(False), torch.no_grad():
        _fill(model, blobs.outside, scheduler.backend, partial(read, ""))
        scheduler.loaded_bytes = blobs.outside.nbytes + blobs.of_tables.nbytes
        if not scheduler.plan.tables:
            if blobs.tables:
                _fill(model, blobs.of_tables, scheduler.backend, read_tables)
        else:
            assert hold_table is not None
            for table in blobs.tables:
                scheduler.hold(table, model, hold_table(table.names[0]))
        for name, layout in _with_progress(blobs.blocks, "loading"):
            module = model.get_submodule(name)
            if name in streamed:
                index = len(scheduler.blocks)
                if index not in scheduler.lying:
                    scheduler.backend.put(index, partial(read, name))
                    scheduler.loaded_bytes += layout.nbytes
                scheduler.add(name, module, layout)
            else:
                _fill(module, layout, scheduler.backend, partial(read, name))
                scheduler.loaded_bytes += layout.nbytes
            for path, stack in stacks.get(name, {}).items():
                for expert in range(len(stack.experts)):
                    fill = partial(read_expert, path, expert)
                    scheduler.backend.put(scheduler.next_expert + expert, fill)
                scheduler.add_experts(path, model.get_submodule(path), stack)
                scheduler.loaded_bytes += stack.whole.nbytes
                untrimmed_bytes += stack.whole.nbytes
            untrimmed_bytes += layout.nbytes
            if untrimmed_bytes >= _TRIMMED_BYTES:
                untrimmed_bytes = 0
                memory.trim()  # what was read or merged on the way, which malloc keeps in pieces


def restore(model: torch.nn.Module, scheduler: Scheduler) -> None:
    """End the streaming: all weights in memory again, on the device they came from.

    What needs memory comes first; BudgetError leaves the model streaming. Done twice, after an
    interrupt, it ends what it began.
    """
    with torch.inference_mode(False), torch.no_grad():
        blobs = [
            memory.allocate(block.layout.extent).copy_(scheduler.backend.host_copy(block.index))
            for block in progress_bar(scheduler.blocks, desc="unwrapping", delay=1, leave=False)
        ]
        stacks = [_stacked(experts) for experts in scheduler.experts]
        tables = [memory.allocate(table.rows.nbytes) for table in scheduler.tables]
        scheduler.uninstall()
        for block, blob in zip(scheduler.blocks, blobs, strict=True):
            block.restore(blob.to(scheduler.source_device))
        for experts, blob in zip(scheduler.experts, stacks, strict=True):
            experts.restore(blob.to(scheduler.source_device))
        for table, blob in zip(scheduler.tables, tables, strict=True):
            rows = blob.view(table.rows.dtype).view(table.rows.shape).copy_(table.rows)
            table.restore(rows.to(scheduler.source_device))
    while scheduler.blocks:
        scheduler.blocks.pop().forget()
    while scheduler.experts:
        scheduler.experts.pop().forget()
    scheduler.tables.clear()
    if scheduler.source_device != scheduler.backend.device:
        model.to(scheduler.source_device)


def _stacked(experts: StreamedExperts | ListedExperts) -> torch.Tensor:
    """The experts of a module as it held them: (extent,) uint8."""
    whole = experts.stack.whole
    blob = memory.allocate(whole.extent)
    if isinstance(experts, ListedExperts):
        whole.fill(blob, ((name, experts.whole(name)) for name in whole.specs))
        return blob
    for name in whole.specs:
        rows = enumerate(experts.parts(name))
        whole.fill(blob, ((name, part[None], at) for at, part in rows))
    return blob


def _hold_tables(
    model: torch.nn.Module,
    tables: Iterable[Table],
    scheduler: Scheduler,
    offload_dir: str | Path | None,
) -> None:
    """Leave tables on the host: where they lie, if that takes no memory which the limit counts."""
    is_mapped, is_cpu = memory.mapped_files(), scheduler.backend.device.type == "cpu"
    held = {name: tensor for name, _, tensor in tensors_of(model)}
    for table in tables:
        rows = held[table.names[0]].detach()
        stays = rows.device.type == "cpu" and (not is_cpu or is_mapped(rows.data_ptr()))
        if not stays or offload_dir is not None:
            rows = scheduler.backend.hold(rows.shape, rows.dtype, [rows], offload_dir)
        scheduler.hold(table, model, rows)


def _with_progress(
    layouts: Mapping[str, Layout], what: str = "wrapping"
) -> Iterator[tuple[str, Layout]]:
    total = sum(layout.nbytes for layout in layouts.values())
    with progress_bar(
        total=total, desc=what, unit="B", unit_scale=True, delay=1, leave=False
    ) as bar:
        for name, layout in layouts.items():
            yield name, layout
            bar.update(layout.nbytes)


def _move_resident(
    module: torch.nn.Module, layout: Layout, backend: Backend, source_device: torch.device
) -> None:
    """Bring the tensors of `layout`, which stay, to the device.

    On the CPU they are copied too: into anonymous memory, so that a mapped checkpoint is freed.
    """
    if backend.device == source_device and backend.device.type != "cpu":
        return
    buffer = backend.allocate(layout.extent)
    renewed: dict[int, torch.Tensor] = {}
    for name, place, tensor in tensors_of(module):
        if name not in layout.specs:
            continue
        view = layout.view(buffer, name)
        layout.fill(buffer, [(name, tensor)])
        if not tensor.is_inference():
            tensor.data = view
            continue
        # An inference tensor takes no new data; a new object takes its place wherever it is held.
        if place.is_parameter:
            view = torch.nn.Parameter(view, requires_grad=tensor.requires_grad)
        place.set(renewed.setdefault(id(tensor), view))


def _fill(
    module: torch.nn.Module,
    layout: Layout,
    backend: Backend,
    read: Callable[[torch.Tensor], object],
) -> None:
    """Give the tensors of `layout`, which have no bytes yet, their place on the device."""
    buffer = backend.allocate(layout.extent)
    read(buffer)
    layout.bind(module, buffer)
