"""Tensors that are not read yet, and what is made of them: shapes first, bytes when asked for.

Nothing here is read before `read()`, so that a whole checkpoint is checked before anything is
loaded, and a loader holds one tensor at a time, or some rows of one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from bminf.checkpoint.binary_file import BinaryFile
from bminf.errors import ArgumentError, CheckpointError

_COMPARED_BYTES = 2**24  # of a replicated tensor on each rank; all but embeddings are below
_PIECE_BYTES = 2**20


class Stored(Protocol):
    """A tensor that is not read yet.

    where: the file and the tensor's name in it, for error messages.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def where(self) -> str: ...

    @property
    def is_read_by_rows(self) -> bool:
        """Whether some rows can be read without the others."""
        ...

    def read(self) -> torch.Tensor:
        """The values, on the CPU. It may be a view of a mapped file: never write to it.

        Raises CheckpointError where the file is no longer what it was when it was opened.
        """
        ...

    def rows(self, start: int, end: int) -> Stored:
        """Those from `start` to before `end`, not read yet either.

        Raises ArgumentError for a range that is not inside the tensor, or has no rows.
        """
        ...

    def columns(self, start: int, end: int) -> Stored:
        """As rows(), along axis 1."""
        ...


def pieces(stored: Stored, max_bytes: int = _PIECE_BYTES) -> Iterable[tuple[int, torch.Tensor]]:
    """(index of its first row, rows) of a tensor that is read some rows at a time, in order.

    max_bytes: of a piece, which still is one row at least. A tensor without axes is one piece. What
    can only be read as a whole is read once.
    """
    nbytes = nbytes_of(stored)
    if not stored.shape or nbytes <= max_bytes:
        return [(0, stored.read())] if 0 not in stored.shape[:1] else []
    num_rows = stored.shape[0]
    step = max(1, max_bytes * num_rows // nbytes)
    if not stored.is_read_by_rows:
        parts = stored.read().split(step)
        return [(number * step, part) for number, part in enumerate(parts)]
    return (
        (start, stored.rows(start, min(start + step, num_rows)).read())
        for start in range(0, num_rows, step)
    )


def nbytes_of(stored: Stored) -> int:
    """Bytes of its elements."""
    return math.prod(stored.shape) * stored.dtype.itemsize


def slice_of(stored: Stored, axis: int, start: int, end: int) -> Stored:
    """Rows (axis 0) or columns (axis 1).   Raises ArgumentError for a range outside."""
    return stored.rows(start, end) if axis == 0 else stored.columns(start, end)


class Sliced(ABC):
    """Rows and columns of what is sliced alike along both axes. They are checked here."""

    shape: Any
    where: Any
    is_read_by_rows: Any = True

    @abstractmethod
    def _slice(self, axis: int, start: int, end: int) -> Stored: ...

    def rows(self, start: int, end: int) -> Stored:
        return self._checked_slice(0, start, end)

    def columns(self, start: int, end: int) -> Stored:
        return self._checked_slice(1, start, end)

    def _checked_slice(self, axis: int, start: int, end: int) -> Stored:
        what = ("rows", "columns")[axis]
        if len(self.shape) <= axis:
            raise ArgumentError(f"{self.where} has shape {self.shape}, and so no {what}")
        if not 0 <= start < end <= self.shape[axis]:
            raise ArgumentError(
                f"{what} {start} to {end} of {self.where}, which has {self.shape[axis]}; "
                "give one or more of them"
            )
        return self._slice(axis, start, end)


@dataclass(frozen=True)
class InFile(Sliced):
    """A tensor whose bytes lie in a file, little-endian.

    offset: of its first byte in the file.   stride: in elements, as torch counts.
    read() maps the pages it lies on, and costs no memory; only where the offset is not a multiple
    of the element's size are the bytes copied, because compiled code may rely on that.
    Shape, stride and offset are not checked here: the reader of the file format does that.
    """

    file: BinaryFile
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @property
    def where(self) -> str:
        return f"{self.name!r} in {self.file.path}"

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to the last, the gaps of the strides included."""
        if 0 in self.shape:
            return 0
        last = sum([(n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)])
        return (1 + last) * self.dtype.itemsize

    def as_bytes(self) -> InFile:
        """A matrix (N, K) whose rows have no gaps in them as (N, bytes of K) uint8."""
        num_rows, num_columns = self.shape
        size, (step, _) = self.dtype.itemsize, self.stride
        shape, stride = (num_rows, num_columns * size), (step * size, 1)
        return replace(self, shape=shape, stride=stride, dtype=torch.uint8)

    def read(self) -> torch.Tensor:
        count = self.span_bytes
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.file.mapped(self.offset, count, f"the tensor {self.name!r}")
        if self.offset % self.dtype.itemsize:
            with torch.inference_mode(False):
                data = data.clone()
        return data.view(self.dtype).as_strided(self.shape, self.stride)

    def read_into(self, buffer: torch.Tensor) -> None:
        """Fill `buffer`, (span_bytes,) uint8, with its bytes.   Raises as read()."""
        self.file.read_into(self.offset, buffer, f"the tensor {self.name!r}")

    def _slice(self, axis: int, start: int, end: int) -> InFile:
        offset = self.offset + start * self.stride[axis] * self.dtype.itemsize
        shape = (*self.shape[:axis], end - start, *self.shape[axis + 1 :])
        return replace(self, offset=offset, shape=shape)


def contiguous(
    file: BinaryFile, offset: int, shape: Sequence[int], dtype: torch.dtype, name: str
) -> InFile:
    """A tensor in C order."""
    return InFile(file, offset, tuple(shape), strides_of(shape), dtype, name)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor in C order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(strides[::-1][: len(shape)])


@dataclass(frozen=True)
class _Parts(Sliced):
    parts: tuple[Stored, ...]

    _axis: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ArgumentError("parts=(); give at least one tensor to join")
        first, axis = self.parts[0], self._axis
        if len(first.shape) <= axis:
            raise CheckpointError(
                f"{first.where} has shape {first.shape}; it should have {axis + 1} dimensions "
                "or more"
            )
        for other in self.parts[1:]:
            check_alike(first, other, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        shape, axis = self.parts[0].shape, self._axis
        return (*shape[:axis], sum(part.shape[axis] for part in self.parts), *shape[axis + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def where(self) -> str:
        others = {part.where for part in self.parts} - {self.parts[0].where}
        return self.parts[0].where + (f" and {len(others)} more" if others else "")

    def read(self) -> torch.Tensor:
        joined = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for part in self.parts:
            size = part.shape[self._axis]
            joined.narrow(self._axis, start, size).copy_(part.read())
            start += size
        return joined

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        if axis == self._axis:
            parts = tuple(_overlapping(self.parts, axis, start, end))
        else:
            parts = tuple(slice_of(part, axis, start, end) for part in self.parts)
        return parts[0] if len(parts) == 1 else replace(self, parts=parts)


@dataclass(frozen=True)
class Rows(_Parts):
    """Parts one below another: joined along axis 0.

    Raises CheckpointError where they differ in anything but axis 0.
    """


@dataclass(frozen=True)
class Columns(_Parts):
    """Parts side by side: joined along axis 1.

    Raises CheckpointError where they differ in anything but axis 1.
    """

    _axis: ClassVar[int] = 1


def merge_fused(parts: Sequence[Stored], num_fused: int) -> Rows:
    """Parts that each hold a piece of every one of num_fused matrices, such as Q, K and V.

    Each part is split along axis 0 into num_fused equal pieces; all pieces 0 come first, in the
    order of the parts, then all pieces 1, and so on.
    Raises CheckpointError where the parts do not match or cannot be split so.
    """
    given = Rows(tuple(parts)).parts  # which checks that they match
    for part in given:
        if part.shape[0] % num_fused:
            raise CheckpointError(
                f"{part.where} has shape {part.shape}; its rows should be {num_fused} "
                "equal pieces, so it is of another model or of another layout"
            )
    sizes = [part.shape[0] // num_fused for part in given]
    return Rows(
        tuple(
            part.rows(matrix * size, (matrix + 1) * size)
            for matrix in range(num_fused)
            for part, size in zip(given, sizes, strict=True)
        )
    )


@dataclass(frozen=True)
class Replicated(_Parts):
    """One tensor that several files hold alike; read() gives the first.

    Raises CheckpointError where shapes or dtypes differ, and in read() where the values do: those
    of at most 16 MiB are compared.
    """

    def __post_init__(self) -> None:
        for other in self.parts[1:]:
            check_alike(self.parts[0], other)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def read(self) -> torch.Tensor:
        first = self.parts[0].read()
        if first.nbytes <= _COMPARED_BYTES:
            for other in self.parts[1:]:
                if not torch.equal(_bytes_of(first), _bytes_of(other.read())):
                    raise CheckpointError(
                        f"{self.parts[0].where} and {other.where} should be the same, but differ; "
                        "the files are not of one checkpoint"
                    )
        return first

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        is_compared = nbytes_of(self) <= _COMPARED_BYTES
        parts = self.parts if is_compared else self.parts[:1]
        return Replicated(tuple(slice_of(part, axis, start, end) for part in parts))


@dataclass(frozen=True)
class Averaged(_Parts):
    """The mean of what several files hold of one tensor, in float32 at least: the loader rounds it.

    Raises CheckpointError where shapes or dtypes differ, or are not of floating point.
    """

    def __post_init__(self) -> None:
        _check_floating(self.parts[0])
        for other in self.parts[1:]:
            check_alike(self.parts[0], other)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parts[0].dtype, torch.float32)

    def read(self) -> torch.Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype)
        for part in self.parts:
            total += part.read()
        return total.div_(len(self.parts))

    def deviation(self) -> float:
        """The largest distance of a value in a part from the mean; all parts are read for it."""
        if 0 in self.shape:
            return 0.0
        mean = self.read()
        return max([float((part.read() - mean).abs().max()) for part in self.parts])

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        return Averaged(tuple(slice_of(part, axis, start, end) for part in self.parts))


@dataclass(frozen=True)
class Transposed(Sliced):
    """A matrix with rows and columns exchanged; read() gives a view.

    Raises CheckpointError where the part is no matrix.
    """

    part: Stored

    def __post_init__(self) -> None:
        if len(self.part.shape) != 2:
            raise CheckpointError(
                f"{self.part.where} has shape {self.part.shape}; it should be a matrix"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape[::-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def where(self) -> str:
        return self.part.where

    def read(self) -> torch.Tensor:
        return self.part.read().t()

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        return Transposed(slice_of(self.part, 1 - axis, start, end))


@dataclass(frozen=True)
class Scaled(Sliced):
    """A tensor times a number, in float32 at least: the loader rounds it.

    Raises CheckpointError where the part is not of floating point.
    """

    part: Stored
    factor: float

    def __post_init__(self) -> None:
        _check_floating(self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.part.dtype, torch.float32)

    @property
    def where(self) -> str:
        return self.part.where

    def read(self) -> torch.Tensor:
        return self.part.read().to(self.dtype) * self.factor

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        return Scaled(slice_of(self.part, axis, start, end), self.factor)


def _overlapping(parts: tuple[Stored, ...], axis: int, start: int, end: int) -> Iterator[Stored]:
    """What lies between `start` and `end` of each of the parts that have anything there."""
    offset = 0
    for part in parts:
        size = part.shape[axis]
        first, last = max(start - offset, 0), min(end - offset, size)
        if first < last:
            whole = (first, last) == (0, size)
            yield part if whole else slice_of(part, axis, first, last)
        offset += size


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)  # so that a NaN equals itself


def _check_floating(stored: Stored) -> None:
    if not stored.dtype.is_floating_point:
        raise CheckpointError(f"{stored.where} is {stored.dtype}; it should be floating point")


def check_alike(first: Stored, other: Stored, axis: int | None = None) -> None:
    """Raise CheckpointError where dtypes or shapes differ.   axis: whose sizes may differ."""
    shapes = [first.shape, other.shape]
    if axis is not None and len(first.shape) == len(other.shape):
        shapes = [(*shape[:axis], *shape[axis + 1 :]) for shape in shapes]
    if shapes[0] != shapes[1] or first.dtype != other.dtype:
        raise CheckpointError(
            f"{first.where} ({first.dtype} {first.shape}) and {other.where} ({other.dtype} "
            f"{other.shape}) do not go together; the files are of different checkpoints, or of "
            "ranks of different degrees"
        )
