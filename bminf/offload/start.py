"""What a wrapped model and one of the zoo begin with alike: a plan of what is laid out, and every
tensor at the place that the plan gives it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.stored import InFile
from bminf.layout import ModuleBlock
from bminf.offload.backends import allocated_bytes_on
from bminf.offload.backends.base import NOT_POOLED, Pooled
from bminf.offload.blob import Blobs
from bminf.offload.hooks import ATTRIBUTE, Scheduler
from bminf.offload.placement import load
from bminf.offload.plan import Block, Plan, plan
from bminf.offload.reading import (
    Contents,
    read_block,
    read_expert,
    streamable_run,
    table_in,
)

Agreement = Callable[[], AbstractContextManager[object]]
"""In which ranks do what may fail on one of them, see Group.agreement()."""


def plan_on(
    device_type: str,
    blocks: Iterable[ModuleBlock],
    blobs: Blobs,
    budget: int,
    uses: Mapping[str, float],
    unregistered_bytes: int = 0,
    **more: Any,
) -> Plan:
    """plan() of blocks that are laid out, each counted as a device ("cuda", "cpu") allocates it.

    unregistered_bytes: of the device, beside the blobs.   more: see plan().
    """
    allocated = allocated_bytes_on(device_type)
    return plan(
        [Block(b.name, allocated(blobs.blocks[b.name].nbytes), b.list_name) for b in blocks],
        budget,
        uses,
        outside_bytes=allocated(blobs.outside.nbytes) + unregistered_bytes,
        table_bytes=allocated(blobs.of_tables.nbytes),
        tables=[table.names[0] for table in blobs.tables],
        **more,
    )


def start(
    model: torch.nn.Module,
    blobs: Blobs,
    scheduler: Scheduler,
    offload_dir: str | Path | None,
    place: Callable[[], object],
    undo: Callable[[], object],
    lying: Mapping[str, InFile] | None = None,
    agreement: Agreement = nullcontext,
) -> None:
    """Bring every tensor to its place, and begin to stream.

    place: moves the tensors there, or reads them.   undo: what has to be done on any error.
    lying: blocks whose bytes lie in a file as they are to be read.
    agreement: of ranks, that all of them have room, before any of them moves or reads anything.
    Raises OffloadError for a backing store that cannot be made, and what `place` raises.
    """
    the_plan, backend = scheduler.plan, scheduler.backend
    try:
        with agreement():
            if the_plan.is_streaming:
                _open(blobs, scheduler, offload_dir, lying or {})
        model.__dict__[ATTRIBUTE] = scheduler
        place()
        if the_plan.is_streaming or the_plan.tables:
            scheduler.install(model)
    except BaseException:
        undo()
        raise
    weakref.finalize(model, backend.release)


def _open(
    blobs: Blobs,
    scheduler: Scheduler,
    offload_dir: str | Path | None,
    lying: Mapping[str, InFile],
) -> None:
    """Make room for what streams."""
    the_plan = scheduler.plan
    layouts = [blobs.blocks[name] for name in the_plan.streamed]
    numbers = {name: index for index, name in enumerate(the_plan.streamed)}
    there = {numbers[name]: run for name, run in lying.items()}
    pooled = _pooled(the_plan, blobs)
    scheduler.lying = scheduler.backend.open(
        layouts, offload_dir, the_plan.disk_places, there, pooled
    )


def _pooled(the_plan: Plan, blobs: Blobs) -> Pooled:
    """The experts, in the order in which place() and load() put them: block by block."""
    if the_plan.experts is None:
        return NOT_POOLED
    found = blobs.stacks_by_block()
    stacks = [stack for block in blobs.blocks for stack in found.get(block, {}).values()]
    layouts = [layout for stack in stacks for layout in stack.experts]
    return Pooled(layouts, the_plan.experts.num_slots, the_plan.experts.slot_bytes)


def start_from_files(
    contents: Contents,
    scheduler: Scheduler,
    offload_dir: str | Path | None,
    also_read: Callable[[], object] = lambda: None,
    agreement: Agreement = nullcontext,
) -> None:
    """Read a network that lies on the meta device to its places, and begin to stream; on an error
    nothing is left.

    also_read: what lies outside its blobs.   agreement: see start().
    Raises as start(), and CheckpointError for what cannot be read.
    """

    def hold_table(name: str) -> torch.Tensor:
        hold = partial(scheduler.backend.hold, offload_dir=offload_dir)
        return table_in(contents, name, hold, is_mapped=offload_dir is None)

    def read() -> None:
        with torch.device("cpu"):  # where files are read to, whatever the caller's default is
            load(
                contents.network, contents.blobs, scheduler, partial(read_block, contents),
                partial(read_expert, contents), partial(read_block, contents.of_tables(), ""),
                hold_table,
            )  # fmt: skip
        also_read()

    # Whoever names a folder wants them there.
    lying = _lying(contents, scheduler.plan.streamed) if offload_dir is None else {}
    undo = scheduler.backend.close
    start(contents.network, contents.blobs, scheduler, offload_dir, read, undo, lying, agreement)


def _lying(contents: Contents, blocks: Iterable[str]) -> dict[str, InFile]:
    """Those of `blocks` whose bytes lie in a file as their layouts say, as in a folder of ours."""
    if not hasattr(os, "preadv"):  # Windows, where a file that is open cannot be replaced either
        return {}
    found = {name: streamable_run(contents, name) for name in blocks}
    return {name: run for name, run in found.items() if run is not None}
