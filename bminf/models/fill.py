"""The bytes of a model: from the files of its weights straight to where the plan wants them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch

from bminf.checkpoint.stored import InFile, Rows, Stored
from bminf.layers.embedding import HostEmbedding
from bminf.models.assemble import Assembly
from bminf.models.source import Weights
from bminf.offload.backends.base import Backend
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.offload.reading import Contents
from bminf.offload.start import start_from_files


def fill(
    assembly: Assembly, plan: Plan, backend: Backend, offload_dir: str | Path | None
) -> Scheduler:
    """Read the weights as planned, and start to stream; on an error nothing is left. Ranks read
    when all of them have the room.

    Raises CheckpointError for what cannot be read, OffloadError for a backing store that cannot be
    made.
    """
    scheduler = Scheduler(plan, backend, backend.device)
    keep_tables = partial(_keep_tables, assembly.network, assembly.source.weights)
    agreement = assembly.group.agreement
    start_from_files(contents_of(assembly), scheduler, offload_dir, keep_tables, agreement)
    return scheduler


def contents_of(assembly: Assembly) -> Contents:
    """What its network is filled with, all but the table of a HostEmbedding."""
    source = assembly.source
    return Contents(
        assembly.network, assembly.blobs, source.weights.tensors, source.architecture.pack
    )


def _keep_tables(network: torch.nn.Module, weights: Weights) -> None:
    """Give each HostEmbedding its table as the tensors that it consists of, mapped from files."""
    for embedding in network.modules():
        if isinstance(embedding, HostEmbedding):
            table = weights.table
            assert table is not None, "check_shapes() has seen it"
            parts = table.parts if isinstance(table, Rows) else (table,)
            embedding.keep([_mapped(part) for part in parts], table.dtype)


def _mapped(part: Stored) -> torch.Tensor:
    return part.as_bytes().read() if _is_misaligned(part) else part.read()


def _is_misaligned(part: Stored) -> TypeGuard[InFile]:
    """Whether a part lies where no number may begin, and would be copied as a whole."""
    if not isinstance(part, InFile) or part.stride[1] != 1:
        return False
    return part.offset % part.dtype.itemsize != 0
