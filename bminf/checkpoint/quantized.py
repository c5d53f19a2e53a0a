"""Matrices that files hold as integer codes and scales: BMInf 1.x's, and those of ranks.

Both are symmetric, code * scale, with a scale a row. In ranks that each hold some columns, each
rank has scales of its own, so the whole has one for each group of columns, and they stay so: with
one scale the codes would have to be rounded a second time.

Sources: BMInf 1.0.2, bminf/quantization; Zeng et al. 2022, arXiv:2210.02414, of its code
quantization/layers.py and kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from bminf.checkpoint.stored import Rows, Sliced, Stored
from bminf.errors import ArgumentError, CheckpointError
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight, dequantize, empty

_SLICE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Quantized(Sliced):
    """A matrix (N, K) stored as codes with a scale a row, or a scale a group of a row's columns.

    codes: (N, K) int8 for 8 bits; for 4 (N, K/2) int8, two codes a byte in two's complement, the
    even column in the high half.   scale: (N,), or (N, G) for G groups of equal width, floating
    point; for 4 bits float16.
    dtype: what read() gives, of code * scale in float32: rounded once for float16, as the
    second source does. A loader that packs takes packed().
    Raises CheckpointError where these do not match.
    """

    codes: Stored
    scale: Stored
    bits: int = 8
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        is_matrix = len(codes.shape) == 2 and codes.dtype == torch.int8
        is_scale = len(scale.shape) in (1, 2) and scale.shape[:1] == codes.shape[:1]
        is_held = scale.dtype == torch.float16 if self.bits == 4 else scale.dtype.is_floating_point
        if not (is_matrix and is_scale and is_held):
            kind = "float16" if self.bits == 4 else "floating point"
            raise CheckpointError(
                f"{codes.where} is {codes.dtype} of shape {codes.shape} and {scale.where} "
                f"{scale.dtype} of shape {scale.shape}; they should be int8 (N, columns) and "
                f"{kind} (N,) or (N, groups)"
            )
        if codes.shape[1] % self.num_groups:
            raise CheckpointError(
                f"{codes.where} has shape {codes.shape}, which the {self.num_groups} groups of "
                f"{scale.where} do not divide; the files are not of one checkpoint"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def where(self) -> str:
        return self.codes.where

    @property
    def num_groups(self) -> int:
        """Columns of scales."""
        return self.scale.shape[1] if len(self.scale.shape) == 2 else 1

    @property
    def form(self) -> Format:
        """What packed() is packed as.   Raises ArgumentError for groups of an odd width."""
        group_size = self.shape[1] // self.num_groups
        return Format(self.bits, None if self.num_groups == 1 else group_size)

    def read(self) -> torch.Tensor:
        """(N, K) in `dtype`."""
        num_rows, num_columns = self.shape
        out = torch.empty(
            (num_rows, self.num_groups, num_columns // self.num_groups), dtype=self.dtype
        )
        for rows, part in self._some_rows():
            scale = part.scale.read().float().view(-1, self.num_groups, 1)
            out[rows] = part._codes().view(-1, *out.shape[1:]).float().mul_(scale)
        return out.view(num_rows, num_columns)

    def packed(self) -> PackedWeight:
        """The same codes and scales, in rows that are padded as packed.py says.

        Raises CheckpointError for scales that are not finite, ArgumentError as `form`.
        """
        num_rows, num_columns = self.shape
        packed = empty(num_rows, num_columns, self.form, "cpu")
        scale = self.scale.read()
        if not scale.isfinite().all():
            raise CheckpointError(f"{self.scale.where} holds NaN or infinity; fetch it again")
        packed.scale.copy_(scale.view_as(packed.scale))
        num_bytes = self.codes.shape[1]
        for rows, part in self._some_rows():
            codes, target = part.codes.read(), packed.rows(rows)
            target.qweight.view(torch.int8)[:, :num_bytes] = codes
            if target.code_sum is not None:
                target.code_sum.copy_(codes.sum(1, dtype=torch.int32))
        return packed

    def _slice(self, axis: int, start: int, end: int) -> Quantized:
        if axis == 0:
            codes, scale = (x.rows(start, end) for x in (self.codes, self.scale))
            return replace(self, codes=codes, scale=scale)
        width, per_byte = self.shape[1] // self.num_groups, 8 // self.bits
        is_in_one = start // width == (end - 1) // width
        step = per_byte if is_in_one else width
        if start % step or end % step:
            raise ArgumentError(
                f"columns {start} to {end} of {self.where}, in which {step} go together (two codes "
                "a byte, or one scale); give a multiple"
            )
        scale = self.scale
        if self.num_groups > 1:
            scale = scale.columns(start // width, -(-end // width))
        codes = self.codes.columns(start // per_byte, end // per_byte)
        return replace(self, codes=codes, scale=scale)

    def _some_rows(self) -> Iterator[tuple[slice, Quantized]]:
        """All rows, some at a time, and where they are."""
        num_rows, num_columns = self.shape
        step = max(1, _SLICE_ELEMENTS // max(1, num_columns))
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            yield slice(start, end), self._slice(0, start, end)

    def _codes(self) -> torch.Tensor:
        """The codes as numbers, (N, K) int8."""
        codes = self.codes.read()
        if self.bits == 8:
            return codes
        # Shifts of int8 keep the sign: the low half is first brought to the place of the high one.
        return torch.stack([codes >> 4, (codes << 4) >> 4], dim=-1).flatten(1)


@dataclass(frozen=True)
class Packed(Sliced):
    """A matrix (N, K) whose packed weight is stored, tensor by tensor.

    fields: by the names of PackedWeight's tensors.   num_columns: K.   form: how it is packed.
    """

    fields: Mapping[str, Stored]
    num_columns: int
    form: Format

    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fields["qweight"].shape[0], self.num_columns

    @property
    def where(self) -> str:
        return self.fields["qweight"].where

    def read(self) -> torch.Tensor:
        """(N, K) in `dtype`."""
        return dequantize(self.packed(), self.dtype)

    def packed(self) -> PackedWeight:
        held = {name: stored.read() for name, stored in self.fields.items()}
        empty_fields = dict.fromkeys(PACKED_FIELDS)
        return PackedWeight(
            **{**empty_fields, **held},  # type: ignore[arg-type]
            in_features=self.num_columns, group_size=self.form.group_size,
        )  # fmt: skip

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        if axis == 1:
            return ColumnsOf(self, start, end)
        some = {name: stored.rows(start, end) for name, stored in self.fields.items()}
        return replace(self, fields=some)


@dataclass(frozen=True)
class ColumnsOf(Sliced):
    """Some columns of a matrix, of which a loader packs whole rows and then cuts: so that ranks
    together have the codes and scales that one has."""

    whole: Stored
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape[0], self.end - self.start

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def where(self) -> str:
        return self.whole.where

    def read(self) -> torch.Tensor:
        return self.whole.columns(self.start, self.end).read()

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        if axis == 0:
            return replace(self, whole=self.whole.rows(start, end))
        return replace(self, start=self.start + start, end=self.start + end)


def quantized_rows(parts: Iterable[Quantized]) -> Quantized:
    """Quantized matrices one below another, as one that still offers its codes and scales.

    Raises CheckpointError where they differ in anything but their rows.
    """
    given = tuple(parts)
    codes, scale = Rows(tuple(p.codes for p in given)), Rows(tuple(p.scale for p in given))
    return replace(given[0], codes=codes, scale=scale)
