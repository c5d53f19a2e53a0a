"""A GLM of random weights: any size, any memory limit. The sizes are those of GLM-130B, unless
others are given; its embedding takes no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from benchmarks.random_model import filled
from bminf.arch.glm import GLM, GLM130B, INT4_ROW, PUBLISHED_GLM, GLMConfig
from bminf.checkpoint.stored import Stored
from bminf.models.assemble import Assembly, Formats, assemble, plan_within, reserved_bytes
from bminf.models.source import sizes_of
from bminf.offload.backends import host_budget
from bminf.offload.backends.base import Backend
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
    def formats(self) -> Formats:
        return Formats(GLM_FORMATS[self.quantization], GLM_FORMATS[self.head_quantization])


def planned(
    sizes: Sizes, limit: int, device_type: str = "cpu", host_bytes: int | None = None
) -> tuple[Assembly, Plan]:
    """The model on the meta device, and what stays within `limit` bytes, as in bminf.models.GLM.

    device_type: "cpu" or "cuda", whose products hold different things on the way.
    host_bytes: of host memory for streamed blocks; None is as much as it takes.
    Raises BudgetError, with numbers.
    """
    source = sizes_of(GLM130B, sizes.config, TITLE)
    assembly = assemble(source, sizes.formats, sizes.dtype, sizes.activations)
    num_rows, length = max(
        sizes.batches, key=lambda batch: reserved_bytes(assembly, batch[1], batch[0], device_type)
    )
    return assembly, plan_within(assembly, limit, length, num_rows, device_type, host_bytes)


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
    assembly, plan = planned(sizes, limit, backend.device.type, host_bytes)
    with filled(assembly, plan, backend, offload_dir, table) as scheduler:
        yield Loaded(cast(GLM, assembly.network), scheduler)
