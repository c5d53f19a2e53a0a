"""A CPM-2 of random packed weights: any size, any memory limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from benchmarks.random_model import filled
from bminf.arch.t5 import CPM2, PUBLISHED_CPM2, T5, T5Cache, T5Config
from bminf.models.assemble import Assembly, Formats, assemble, plan_within
from bminf.models.source import sizes_of
from bminf.offload.backends.base import Backend
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.quantization.packed import FORMATS, Format

TITLE, PUBLISHED = next(iter(PUBLISHED_CPM2.items()))
"""The CPM-2 whose speed was published: that of the Chinese vocabulary."""


@dataclass(frozen=True)
class Sizes:
    """What the bytes of a model follow from.

    quantization: "int8" or "int4".   activations: see bminf.QuantizedLinear.
    max_length: tokens of prompt and answer each, for which memory is reserved.
    """

    config: T5Config
    dtype: torch.dtype
    quantization: str
    activations: str = "auto"
    max_length: int = 512

    @property
    def form(self) -> Format:
        return FORMATS[self.quantization]


def planned(sizes: Sizes, limit: int, device_type: str = "cpu") -> tuple[Assembly, Plan]:
    """The model on the meta device, and what stays within `limit` bytes.

    device_type: "cpu" or "cuda", whose products hold different things on the way.
    Raises BudgetError, with numbers.
    """
    source = sizes_of(CPM2, sizes.config, TITLE)
    assembly = assemble(source, Formats(sizes.form), sizes.dtype, sizes.activations)
    return assembly, plan_within(assembly, limit, sizes.max_length, 1, device_type)


@dataclass(frozen=True)
class Loaded:
    """A model that can run."""

    model: T5
    cache: T5Cache
    scheduler: Scheduler


@contextmanager
def loaded(
    sizes: Sizes, limit: int, backend: Backend, offload_dir: Path | None = None
) -> Iterator[Loaded]:
    """The model with random weights, streaming as planned for `limit` bytes; let go at the end."""
    assembly, plan = planned(sizes, limit, backend.device.type)
    model = cast(T5, assembly.network)
    with filled(assembly, plan, backend, offload_dir) as scheduler:
        cache = model.new_cache(1, sizes.max_length, sizes.max_length)
        yield Loaded(model, cache, scheduler)
