"""Models of random weights: any size, any memory limit, loaded as from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from bminf.checkpoint.stored import Sliced, Stored, pieces
from bminf.layers.embedding import HostEmbedding
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import tensors_of
from bminf.models.assemble import Assembly
from bminf.models.fill import fill
from bminf.models.source import Weights
from bminf.offload.backends.base import Backend
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.quantization.packed import PackedWeight, Packing

_LENGTH = 2**22 - 3  # a prime number
_MOST_AT_ONCE = 2**20


@contextmanager
def filled(
    assembly: Assembly,
    plan: Plan,
    backend: Backend,
    offload_dir: Path | None = None,
    table: Stored | None = None,
) -> Iterator[Scheduler]:
    """A model with random weights, streaming as planned; let go of at the end.

    table: of a HostEmbedding, in place of random numbers.
    """
    source = replace(assembly.source, weights=random_weights(assembly.network, table))
    scheduler = fill(replace(assembly, source=source), plan, backend, offload_dir)
    try:
        yield scheduler
    finally:
        scheduler.uninstall()
        backend.close()


def random_weights(model: torch.nn.Module, table: Stored | None = None) -> Weights:
    """What a checkpoint of `model`, on the meta device, would hold.   table: see filled().

    Weights have the variance 1 / in_features, all else lies between 0.5 and 1.5. Numbers are made
    as they are read, out of a few megabytes: nothing more is held while a model is filled, filling
    it is copying, and no two rows of a matrix are alike.
    """
    numbers = _Numbers()
    tensors: dict[str, Stored] = {}
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in packed.items():
        tensors |= _packed(name, linear.packed, numbers)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            start, scale = numbers.new_start(), module.in_features**-0.5
            key = f"{name}.weight"
            shape = (module.out_features, module.in_features)
            tensors[key] = _Random(key, numbers, torch.float16, shape, shape[1], start, scale)
    generator = _generator()
    for name, _, like in tensors_of(model):
        if name not in tensors:
            row = torch.rand(like.shape[-1], generator=generator) + 0.5
            tensors[name] = InMemory(name, row.to(like.dtype).expand(like.shape))
    forms = {name: linear.form for name, linear in packed.items()}
    hosts = [module for module in model.modules() if isinstance(module, HostEmbedding)]
    if table is None and hosts:
        table = _table(hosts[0], numbers)
    return Weights(tensors, Path("random weights"), Packing(None, forms), table=table)


def random_matrix(name: str, shape: tuple[int, ...]) -> Stored:
    """Normal numbers in half precision, (N,) or (N, K) with the variance 1 / K."""
    if len(shape) == 1:
        return InMemory(name, torch.randn(shape, generator=_generator()).half())
    num_rows, columns = shape
    size = (num_rows, columns)
    return _Random(name, _Numbers(), torch.float16, size, columns, 0, columns**-0.5)


def _packed(name: str, like: PackedWeight, numbers: _Numbers) -> dict[str, Stored]:
    """The parts of a packed weight of the sizes of `like`, which is on the meta device."""
    num_codes = 255 if like.bits == 8 else 16
    scale = math.sqrt(12 / like.in_features) / num_codes  # a uniform distribution has 1/12
    scales = torch.full((), scale, dtype=like.scale.dtype).expand(like.scale.shape)
    codes = _Random(
        f"{name}.qweight", numbers, like.qweight.dtype, tuple(like.qweight.shape),
        like.in_features * like.bits // 8, numbers.new_start(),
    )  # fmt: skip
    parts: dict[str, Stored] = {codes.where: codes}
    parts[f"{name}.scale"] = InMemory(f"{name}.scale", scales)
    if like.minimum is not None:
        minimum = scales * -((num_codes - 1) / 2)
        parts[f"{name}.minimum"] = InMemory(f"{name}.minimum", minimum)
    if like.code_sum is not None:
        parts[f"{name}.code_sum"] = _Sums(f"{name}.code_sum", codes)
    return parts


def _table(module: HostEmbedding, numbers: _Numbers) -> Stored:
    """Rows of a table that begin a few numbers after each other: it takes no memory of its own."""
    run = numbers.of(torch.float16)
    step = max(1, (len(run) - module.hidden_size) // module.num_rows)
    return InMemory("the table", run.as_strided((module.num_rows, module.hidden_size), (step, 1)))


class _Numbers:
    """A run of random numbers of each dtype, which goes round and round."""

    def __init__(self) -> None:
        self._runs: dict[torch.dtype, torch.Tensor] = {}
        self._num_starts = 0

    def new_start(self) -> int:
        """Where a matrix begins: another place for each."""
        self._num_starts += 1
        return self._num_starts * 1_000_003

    def of(self, dtype: torch.dtype) -> torch.Tensor:
        """The run, and once more what it begins with, so that a piece at its end is one view."""
        if dtype not in self._runs:
            run = _random(dtype)
            self._runs[dtype] = torch.cat([run, run[:_MOST_AT_ONCE]])
        return self._runs[dtype]

    def take(self, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
        """(count,) numbers from `start` on, which may be beyond the end."""
        run = self.of(dtype)
        if count <= _MOST_AT_ONCE:
            return run[start % _LENGTH :][:count]
        ends = range(0, count, _MOST_AT_ONCE)
        return torch.cat(
            [self.take(dtype, start + at, min(_MOST_AT_ONCE, count - at)) for at in ends]
        )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(dtype: torch.dtype) -> torch.Tensor:
    """(_LENGTH,): codes from -127 on, two codes of 4 bits in each uint8, or normal numbers."""
    generator = _generator()
    if dtype.is_floating_point:
        return torch.randn(_LENGTH, generator=generator).to(dtype)
    least, end = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(least, end, (_LENGTH,), dtype=dtype, generator=generator)


@dataclass(frozen=True)
class _Random(Sliced):
    """A matrix of random numbers.

    num_columns: those behind them are padding and hold zeros.   start: of the first row in
    `numbers`.   scale: factor of floating-point numbers.
    """

    where: str
    numbers: _Numbers
    dtype: torch.dtype
    shape: tuple[int, int]
    num_columns: int
    start: int
    scale: float | None = None

    def read(self) -> torch.Tensor:
        count = self.shape[0] * self.shape[1]
        rows = self.numbers.take(self.dtype, self.start, count).view(self.shape)
        if self.scale is not None:
            return rows * self.scale
        if self.num_columns < self.shape[1]:
            rows = rows.clone()
            rows[:, self.num_columns :] = 0
        return rows

    def _slice(self, axis: int, begin: int, end: int) -> Stored:
        if axis == 1:
            return InMemory(self.where, self.read()[:, begin:end])
        start = self.start + begin * self.shape[1]
        return replace(self, shape=(end - begin, self.shape[1]), start=start)


@dataclass(frozen=True)
class _Sums(Sliced):
    """The sum of each row of codes."""

    where: str
    codes: Stored
    dtype: torch.dtype = field(default=torch.int32, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape[:1]

    def read(self) -> torch.Tensor:
        sums = torch.empty(self.shape, dtype=self.dtype)
        for first_row, codes in pieces(self.codes):
            rows = slice(first_row, first_row + len(codes))
            # NumPy makes no wider copy of the codes to add them up.
            np.add.reduce(codes.numpy(), 1, dtype=np.int32, out=sums.numpy()[rows])
        return sums

    def _slice(self, axis: int, begin: int, end: int) -> Stored:
        return replace(self, codes=self.codes.rows(begin, end))


@dataclass(frozen=True)
class InMemory(Sliced):
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

    def _slice(self, axis: int, begin: int, end: int) -> Stored:
        return InMemory(self.where, self.tensor.narrow(axis, begin, end - begin))
