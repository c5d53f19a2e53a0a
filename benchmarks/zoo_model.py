"""A CPM-2 of random packed weights: any size, any memory limit, loaded as from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from bminf.arch.t5 import T5, T5Cache, T5Config
from bminf.checkpoint.stored import Stored
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.models.config import PUBLISHED_CPM2
from bminf.models.family import CPM2
from bminf.models.load import Packing, Weights, fill, lay_out, plan_for, skeleton
from bminf.models.source import skeleton_of
from bminf.models.workspace import reserved_bytes
from bminf.quantization.packed import FORMATS, Format, PackedWeight
from bminf.scheduler.backends.base import Backend
from bminf.scheduler.blob import Blobs
from bminf.scheduler.blocks import tensors_of
from bminf.scheduler.hooks import Scheduler
from bminf.scheduler.plan import Plan

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


def planned(sizes: Sizes, limit: int, device_type: str = "cpu") -> tuple[T5, Blobs, Plan]:
    """The model on the meta device, its blobs, and what stays within `limit` bytes.

    device_type: "cpu" or "cuda", whose products hold different things on the way.
    Raises BudgetError, with numbers.
    """
    empty = cast(T5, skeleton_of(CPM2, sizes.config))
    model, blocks = skeleton(empty, sizes.dtype, Packing(sizes.form), sizes.activations)
    blobs = lay_out(model, blocks)
    reserve = reserved_bytes(
        sizes.config, 1, sizes.max_length, sizes.dtype, sizes.form, device_type
    )
    return model, blobs, plan_for(blocks, blobs, limit, CPM2.uses, reserve)


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
    model, blobs, plan = planned(sizes, limit, backend.device.type)
    scheduler = fill(model, blobs, plan, backend, random_weights(model), offload_dir)
    try:
        cache = model.new_cache(1, sizes.max_length, sizes.max_length)
        yield Loaded(model, cache, scheduler)
    finally:
        scheduler.uninstall()
        backend.close()


def random_weights(model: torch.nn.Module) -> Weights:
    """What a checkpoint of `model`, a skeleton with packed linears, would hold.

    Weights have the variance 1 / in_features, all else lies between 0.5 and 1.5. The codes of all
    linears are views of one block of random bytes, as large as the largest of them: nothing more is
    held while a model is filled, and filling it is copying.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    packed: dict[tuple[int, int], PackedWeight] = {}
    tensors: dict[str, Stored] = {}
    forms = {linear.form for linear in linears.values()}
    (form,) = forms
    block = _random_codes(form, max(linear.qweight.nbytes for linear in linears.values()))
    for name, linear in linears.items():
        size = (linear.out_features, linear.in_features)
        if size not in packed:
            packed[size] = _random_packed(linear.packed, block)
        fields = packed[size]._asdict().items()
        made = {f"{name}.{key}": value for key, value in fields if torch.is_tensor(value)}
        tensors |= {key: _InMemory(key, value) for key, value in made.items()}
    generator = torch.Generator().manual_seed(0)
    for name, _, like in tensors_of(model):
        if name not in tensors:
            row = torch.rand(like.shape[-1], generator=generator) + 0.5
            tensors[name] = _InMemory(name, row.to(like.dtype).expand(like.shape))
    return Weights(tensors, Path("random weights"), Packing(form))


@dataclass(frozen=True)
class _InMemory:
    """A Stored that is there already."""

    where: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor

    def rows(self, begin: int, end: int) -> Stored:
        return _InMemory(self.where, self.tensor[begin:end])

    def columns(self, begin: int, end: int) -> Stored:
        return _InMemory(self.where, self.tensor[:, begin:end])


def _random_codes(form: Format, nbytes: int) -> torch.Tensor:
    """(nbytes,): int8 from -127 on, or two codes of 4 bits in each uint8."""
    generator = torch.Generator().manual_seed(0)
    if form.bits == 8:
        return torch.randint(-127, 128, (nbytes,), dtype=torch.int8, generator=generator)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def _random_packed(like: PackedWeight, block: torch.Tensor) -> PackedWeight:
    """A weight of the sizes of `like`, which is on the meta device; its codes are those of `block`
    but for the padding of rows, which holds zeros."""
    qweight = block[: like.qweight.numel()].view(like.qweight.shape)
    num_bytes = like.in_features * like.bits // 8
    if num_bytes < qweight.shape[1]:
        qweight = qweight.clone()
        qweight[:, num_bytes:] = 0
    num_codes = 255 if like.bits == 8 else 16
    scale = math.sqrt(12 / like.in_features) / num_codes  # a uniform distribution has 1/12
    scales = torch.full((), scale, dtype=like.scale.dtype).expand(like.scale.shape)
    code_sum = None if like.code_sum is None else qweight.sum(1, dtype=torch.int32)
    minimum = None if like.minimum is None else scales * -((num_codes - 1) / 2)
    return PackedWeight(qweight, scales, minimum, like.in_features, like.group_size, code_sum)
