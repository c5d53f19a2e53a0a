"""Tensors that are not read yet, and what is made of them: shapes first, bytes when asked for.

Nothing here is read before `read()`, so that a whole checkpoint is checked before anything is
loaded, and a loader holds one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from bminf.checkpoint.binary_file import BinaryFile
from bminf.errors import ArgumentError, CheckpointError
from bminf.layout import TensorSpec

_MOST_ELEMENTS = 2**60
_MOST_DIMENSIONS = 64  # torch's own kernels take no more
_COMPARED_BYTES = 2**24  # of a replicated tensor on each rank; all but embeddings are below


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

    def read(self) -> torch.Tensor:
        """The values, on the CPU. It may be a view of a mapped file: never write to it.

        Raises CheckpointError where the file is no longer what it was when it was opened.
        """
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor whose bytes lie in a file, little-endian.

    offset: of its first byte in the file.   stride: in elements, as torch counts.
    read() maps the pages it lies on, and costs no memory; only where the offset is not a multiple
    of the element's size are the bytes copied, because compiled code may rely on that.
    Raises CheckpointError for shapes and strides that no tensor has.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    name: str

    def __post_init__(self) -> None:
        sizes = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{self.where} has {len(self.shape)} dimensions and {len(self.stride)} strides; "
                f"as many of both, at most {_MOST_DIMENSIONS}, are accepted"
            )
        if min(sizes) < 0 or max(sizes) > _MOST_ELEMENTS or self.num_elements > _MOST_ELEMENTS:
            raise CheckpointError(
                f"{self.where} has the shape {self.shape}, strides {self.stride} and offset "
                f"{self.offset}, which no tensor has; the file is damaged"
            )

    @property
    def where(self) -> str:
        return f"{self.name!r} in {self.path}"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to the last, the gaps of the strides included."""
        return TensorSpec(self.shape, self.stride, self.dtype).nbytes

    def read(self) -> torch.Tensor:
        with BinaryFile(self.path) as file:
            file.check(self.offset, self.span_bytes, f"the tensor {self.name!r}")
            if self.span_bytes == 0:
                return torch.empty(self.shape, dtype=self.dtype)
            is_aligned = self.offset % self.dtype.itemsize == 0
            take = file.mapped if is_aligned else file.copied
            data = take(self.offset, self.span_bytes)
        return data.view(self.dtype).as_strided(self.shape, self.stride)


def contiguous(
    path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype, name: str
) -> InFile:
    """A tensor in C order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return InFile(path, offset, tuple(shape), tuple(strides[::-1][: len(shape)]), dtype, name)


@dataclass(frozen=True)
class _Parts:
    parts: tuple[Stored, ...]

    _axis: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_joint(self.parts, self._axis)

    @property
    def shape(self) -> tuple[int, ...]:
        return _joined_shape(self.parts, self._axis)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def where(self) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return self.parts[0].where + more

    def read(self) -> torch.Tensor:
        joined = torch.empty(self.shape, dtype=self.dtype)
        begin = 0
        for part in self.parts:
            size = part.shape[self._axis]
            joined.narrow(self._axis, begin, size).copy_(part.read())
            begin += size
        return joined


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


@dataclass(frozen=True)
class Striped(_Parts):
    """Parts that each hold a piece of every one of num_stripes matrices, such as Q, K and V.

    Each part is cut along axis 0 into num_stripes equal pieces; all pieces 0 come first, in the
    order of the parts, then all pieces 1, and so on.
    Raises CheckpointError where the parts do not go together or cannot be cut so.
    """

    num_stripes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            if part.shape[0] % self.num_stripes:
                raise CheckpointError(
                    f"{part.where} has shape {part.shape}; its rows should be {self.num_stripes} "
                    "equal pieces, so it is of another model or of another layout"
                )

    def read(self) -> torch.Tensor:
        joined = torch.empty(self.shape, dtype=self.dtype)
        stripes = joined.view(self.num_stripes, self.shape[0] // self.num_stripes, *self.shape[1:])
        begin = 0
        for part in self.parts:
            num_rows = part.shape[0] // self.num_stripes
            pieces = part.read().reshape(self.num_stripes, num_rows, *self.shape[1:])
            stripes[:, begin : begin + num_rows].copy_(pieces)
            del pieces  # before the next part is read
            begin += num_rows
        return joined


@dataclass(frozen=True)
class Replicated(_Parts):
    """One tensor that several files hold alike; read() gives the first.

    Raises CheckpointError where shapes or dtypes differ, and in read() where the values do: those
    of at most 16 MiB are compared.
    """

    def __post_init__(self) -> None:
        for other in self.parts[1:]:
            _check_alike(self.parts[0], other, self.parts[0].shape == other.shape)

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


@dataclass(frozen=True)
class Transposed:
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


@dataclass(frozen=True)
class Scaled:
    """A tensor times a number, in float32 at least: rounding is left to whoever loads it.

    Raises CheckpointError where the part is not of floating point.
    """

    part: Stored
    factor: float

    def __post_init__(self) -> None:
        if not self.part.dtype.is_floating_point:
            raise CheckpointError(
                f"{self.part.where} is {self.part.dtype}; it should be floating point"
            )

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


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix stored as 8-bit codes with a scale a row, as BMInf 1.x does: codes * scale.

    codes: (N, K) int8.   scale: (N,) floating point.   read() gives (N, K) float32; a loader that
    wants 8 bits takes codes and scale as they are.
    Raises CheckpointError where the two do not go together.
    """

    codes: Stored
    scale: Stored

    def __post_init__(self) -> None:
        is_matrix = len(self.codes.shape) == 2 and self.codes.dtype == torch.int8
        is_scale = self.scale.shape == self.codes.shape[:1] and self.scale.dtype.is_floating_point
        if not (is_matrix and is_scale):
            raise CheckpointError(
                f"{self.codes.where} is {self.codes.dtype} of shape {self.codes.shape} and "
                f"{self.scale.where} {self.scale.dtype} of shape {self.scale.shape}; they should "
                "be int8 (N, K) and floating point (N,)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def where(self) -> str:
        return self.codes.where

    def read(self) -> torch.Tensor:
        return self.codes.read().float().mul_(self.scale.read().float().unsqueeze(-1))


def quantized_rows(parts: Iterable[QuantizedRows]) -> QuantizedRows:
    """Quantised matrices one below another, as one that still offers its codes and scales."""
    given = tuple(parts)
    return QuantizedRows(Rows(tuple(p.codes for p in given)), Rows(tuple(p.scale for p in given)))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)  # so that a NaN equals itself


def _check_joint(parts: tuple[Stored, ...], axis: int) -> None:
    if not parts:
        raise ArgumentError("parts=(); give at least one tensor to join")
    first = parts[0]
    if len(first.shape) <= axis:
        raise CheckpointError(
            f"{first.where} has shape {first.shape}; it should have {axis + 1} dimensions or more"
        )
    for other in parts[1:]:
        _check_alike(first, other, _without(first.shape, axis) == _without(other.shape, axis))


def _check_alike(first: Stored, other: Stored, are_shapes_alike: bool) -> None:
    if not are_shapes_alike or first.dtype != other.dtype:
        raise CheckpointError(
            f"{first.where} ({first.dtype} {first.shape}) and {other.where} ({other.dtype} "
            f"{other.shape}) do not go together; the files are not of one checkpoint"
        )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (len(shape), *shape[:axis], *shape[axis + 1 :])


def _joined_shape(parts: tuple[Stored, ...], axis: int) -> tuple[int, ...]:
    shape = parts[0].shape
    return (*shape[:axis], sum(part.shape[axis] for part in parts), *shape[axis + 1 :])
