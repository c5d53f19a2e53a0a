"""A GLM of random weights: any size, any memory limit. The sizes are those of GLM-130B, unless
others are given; its embedding takes no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from benchmarks.random_model import filled
from bminf.arch.glm import GLM, GLM130B, INT4_ROW, PUBLISHED_GLM, GLMConfig
from bminf.checkpoint.stored import Stored
from bminf.models.glm_head import head_packing, num_head_parts
from bminf.models.load import Packing, lay_out, plan_for, skeleton
from bminf.models.workspace import reserved_bytes
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Blobs
from bminf.offload.device import host_budget
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.quantization.packed import FORMATS, Format

TITLE = "GLM-130B"
PUBLISHED = PUBLISHED_GLM[TITLE]
GLM_FORMATS: dict[str, Format | None] = {"int4-row": INT4_ROW, **FORMATS, "none": None}


@dataclass(frozen=True)
class Sizes:
    """What the bytes of a model follow from.

    quantization, head_quantization: of GLM_FORMATS.   activations: see bminf.QuantizedLinear.
    batches: (rows, tokens of each) that memory is reserved for, one of them at a time.
    """

    config: GLMConfig
    dtype: torch.dtype
    quantization: str
    head_quantization: str
    activations: str = "auto"
    batches: tuple[tuple[int, int], ...] = ((1, 512),)

    @property
    def packing(self) -> Packing:
        return Packing(GLM_FORMATS[self.quantization])

    @property
    def head_form(self) -> Format | None:
        return GLM_FORMATS[self.head_quantization]


def planned(
    sizes: Sizes, limit: int, device_type: str = "cpu", host_bytes: int | None = None
) -> tuple[GLM, Blobs, Plan]:
    """The model on the meta device, its blobs, and what stays within `limit` bytes, as in
    bminf.models.GLM.

    device_type: "cpu" or "cuda", whose products hold different things on the way.
    host_bytes: of host memory for streamed blocks; None is as much as it takes.
    Raises BudgetError, with numbers.
    """
    num_parts = num_head_parts(sizes.config, sizes.packing, sizes.head_form, sizes.dtype)
    packing = head_packing(sizes.packing, sizes.head_form, num_parts)
    config = replace(sizes.config, num_head_parts=num_parts)
    model, blocks = skeleton(GLM130B, config, sizes.dtype, packing, sizes.activations)
    blobs = lay_out(model, blocks)
    reserve = max(
        reserved_bytes(GLM130B, sizes.config, rows, length, sizes.dtype, packing.usual, device_type)
        for rows, length in sizes.batches
    )
    return (
        cast(GLM, model),
        blobs,
        plan_for(blocks, blobs, limit, {}, reserve, device_type, host_bytes),
    )


@dataclass(frozen=True)
class Loaded:
    """A model that can run."""

    model: GLM
    scheduler: Scheduler


@contextmanager
def loaded(
    sizes: Sizes,
    limit: int,
    backend: Backend,
    offload_dir: Path | None = None,
    table: Stored | None = None,
) -> Iterator[Loaded]:
    """The model with random weights, streaming as planned for `limit` bytes; let go at the end.

    table: the embedding, in place of random numbers that take no room.
    """
    host_bytes = host_budget(backend.device)
    model, blobs, plan = planned(sizes, limit, backend.device.type, host_bytes)
    with filled(model, blobs, plan, backend, offload_dir, table) as scheduler:
        yield Loaded(model, scheduler)
