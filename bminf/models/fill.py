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
from bminf.offload.placement import load
from bminf.offload.plan import Plan
from bminf.offload.reading import Contents, chunks_of_block
from bminf.offload.start import start


def fill(
    assembly: Assembly, plan: Plan, backend: Backend, offload_dir: str | Path | None
) -> Scheduler:
    """Read the weights as planned, and start to stream; on an error nothing is left.

    Raises CheckpointError for what cannot be read, OffloadError for a backing store that cannot be
    made.
    """
    network, weights, blobs = assembly.network, assembly.source.weights, assembly.blobs
    scheduler = Scheduler(plan, backend, backend.device)
    chunks = partial(chunks_of_block, contents_of(assembly))

    def read() -> None:
        with torch.device("cpu"):  # where files are read to, whatever the caller's default is
            load(network, blobs, scheduler, chunks)
        for module in network.modules():
            if isinstance(module, HostEmbedding):
                _keep_table(module, weights)

    start(network, blobs, scheduler, offload_dir, read, backend.close)
    return scheduler


def contents_of(assembly: Assembly) -> Contents:
    """What its network is filled with, all but the table of a HostEmbedding."""
    source = assembly.source
    return Contents(
        assembly.network, assembly.blobs, source.weights.tensors, source.architecture.pack
    )


def _keep_table(embedding: HostEmbedding, weights: Weights) -> None:
    """Give an embedding its table as the tensors that it consists of, mapped from their files."""
    table = weights.table
    assert table is not None, "check_shapes() has seen it"
    parts = table.parts if isinstance(table, Rows) else (table,)
    mapped = [part.as_bytes().read() if _is_misaligned(part) else part.read() for part in parts]
    embedding.keep(mapped, table.dtype)


def _is_misaligned(part: Stored) -> TypeGuard[InFile]:
    """Whether a part lies where no number may begin, and would be copied as a whole."""
    if not isinstance(part, InFile) or part.stride[1] != 1:
        return False
    return part.offset % part.dtype.itemsize != 0
