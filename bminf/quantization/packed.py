"""Packed weights: what their numbers mean, in plain torch. Kernels must give what this file says.

A matrix (N, K) is stored as integer codes, each row padded to a multiple of 16 bytes, with a scale
for each row, or for each group of neighbouring columns of a row:

    weight ~ code * scale              symmetric: codes -127..127 in 8 bits, -8..7 in 4
    weight ~ code * scale + minimum    4 bits only: codes 0..15

8-bit codes are int8, one a byte; scales are float32. 4-bit codes are two a byte (uint8), the even
column in the high half, signed ones in two's complement; scales and minima are float16. The padding
holds zeros and stands for nothing.

Sources: absolute-maximum rows, Dettmers et al. 2022, arXiv:2208.07339, section 2; signed codes of 4
bits, the code of Zeng et al. 2022, arXiv:2210.02414; scale and minimum for a group, the Q4_1 blocks
of the GGUF file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bminf.errors import ArgumentError

CHUNK_BYTES = 16
"""Rows are padded to this: what a thread of a kernel reads at once."""

_SLICE_ELEMENTS = 2**18  # of a weight are packed at once: temporaries stay small beside any block
_SCALE_DTYPES = {8: torch.float32, 4: torch.float16}
_CODE_DTYPES = {8: torch.int8, 4: torch.uint8}


@dataclass(frozen=True)
class Format:
    """How a weight is packed.

    bits: 8 or 4.   group_size: columns that share a scale, an even number; None is the whole row.
    has_minimum: codes count from a minimum of their group (4 bits only).
    Raises ArgumentError for anything else.
    """

    bits: int
    group_size: int | None = None
    has_minimum: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _CODE_DTYPES:
            raise ArgumentError(f"bits={self.bits!r}; accepted: 8, 4")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 2 or size % 2):
            raise ArgumentError(f"group_size={size!r}; accepted: an even number, or None")
        if self.has_minimum and self.bits == 8:
            raise ArgumentError("has_minimum=True goes with bits=4; 8-bit codes are symmetric")

    def bits_per_weight(self, in_features: int) -> float:
        """All that is stored of a row, padding and scales included, over its columns."""
        num_groups = -(-in_features // (self.group_size or in_features))
        scale_bytes = _SCALE_DTYPES[self.bits].itemsize * (2 if self.has_minimum else 1)
        sum_bytes = 4 if self == INT8 else 0
        packed_bytes = row_bytes(in_features, self.bits) + num_groups * scale_bytes + sum_bytes
        return 8 * packed_bytes / in_features


INT8 = Format(8)
INT4 = Format(4, group_size=16)
"""The default in 4 bits; docs/quantization.md has the measurements that chose it."""

FORMATS = {"int8": INT8, "int4": INT4}

PACKED_FIELDS = ("qweight", "scale", "minimum", "code_sum")
"""The tensors of a PackedWeight."""


def parse_format(
    given: str | Format | bool | None,
    argument: str = "quantization",
    formats: Mapping[str, Format] = FORMATS,
    default: Format | None = None,
    is_optional: bool = True,
) -> Format | None:
    """The format that a user asks for: one of `formats` by its name, or a Format.

    None and False ask for none, where that is allowed (is_optional); True asks for `default`, where
    there is one. Raises ArgumentError for anything else, in the name of `argument`.
    """
    if is_optional and (given is None or given is False):
        return None
    if default is not None and given is True:
        return default
    if isinstance(given, Format):
        return given
    if isinstance(given, str) and given in formats:
        return formats[given]
    names = [f'True or "{n}"' if f == default else f'"{n}"' for n, f in formats.items()]
    choices = [*names, "a bminf.Format", "None"] if is_optional else [*names, "a bminf.Format"]
    known = f"{', '.join(choices[:-1])}, or {choices[-1]}"
    raise ArgumentError(f"{argument}={given!r}; accepted: {known}")


@dataclass(frozen=True)
class Packing:
    """The formats of the linears in the blocks.

    default: of all of them but `exceptions`, by name; None is not packed.
    """

    default: Format | None = None
    exceptions: Mapping[str, Format | None] = field(default_factory=dict)

    def of(self, name: str) -> Format | None:
        return self.exceptions.get(name, self.default)

    def of_each(self, names: Iterable[str]) -> dict[str, Format | None]:
        return {name: self.exceptions.get(name, self.default) for name in names}

    @property
    def of_layers(self) -> Format | None:
        """That of the layers, which sizes the workspace."""
        return self.default or next(iter(self.exceptions.values()), None)


class PackedWeight(NamedTuple):
    """A weight (out_features, in_features) as codes and scales.

    qweight: (out_features, row_bytes) int8 for 8 bits, uint8 for 4.
    scale: (out_features,) for a scale a row, otherwise (out_features, num_groups).
    minimum: as scale, or None.   in_features: columns that count.
    group_size: columns that share a scale; None for a scale a row.
    code_sum: (out_features,) int32, the sum of each row's codes, or None. Only of 8-bit codes with
        a scale a row; it says nothing new, but spares the CPU half of a product with one row.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    in_features: int
    group_size: int | None = None
    code_sum: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def bits(self) -> int:
        return 8 if self.qweight.dtype == torch.int8 else 4

    @property
    def form(self) -> Format:
        return Format(self.bits, self.group_size, self.minimum is not None)

    @property
    def num_groups(self) -> int:
        return 1 if self.group_size is None else _num_groups(self.in_features, self.group_size)

    def rows(self, rows: slice) -> PackedWeight:
        """Some rows, as views."""
        held = {name: getattr(self, name) for name in PACKED_FIELDS}
        some: dict[str, Any] = {name: t if t is None else t[rows] for name, t in held.items()}
        return self._replace(**some)

    def check(self) -> None:
        """Raise ArgumentError where dtypes, shapes, strides or devices do not match."""
        _check_codes(self.qweight, self.in_features)
        shape: tuple[int, ...] = (self.out_features,)
        if self.form.group_size is not None:
            shape += (self.num_groups,)
        scale = shape, _SCALE_DTYPES[self.bits]
        sums = (self.out_features,), torch.int32
        for name, expected in (("scale", scale), ("minimum", scale), ("code_sum", sums)):
            tensor = getattr(self, name)
            if tensor is not None:
                _check_scale(name, tensor, *expected, self.qweight.device)


RowPacker = Callable[[torch.Tensor, Format, PackedWeight], None]
"""Packs rows of a weight, (n, K), in a format into a PackedWeight of n rows."""


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of a packed row: whole chunks."""
    return -(-in_features * bits // (8 * CHUNK_BYTES)) * CHUNK_BYTES


def pack(weight: torch.Tensor, format_: Format, pack_rows: RowPacker | None = None) -> PackedWeight:
    """`weight`, (N, K) floating point, in `format_`; on the meta device shapes only.

    pack_rows: packs some rows into their place; None rounds as this file says.
    Raises ArgumentError: an odd K in 4 bits, a weight that is not finite or too large for half
    precision scales.
    """
    packed = empty(weight.shape[0], weight.shape[1], format_, weight.device)
    if weight.is_meta or 0 in weight.shape:
        return packed
    num_rows = max(1, _SLICE_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        (pack_rows or _pack_rows)(weight[rows].detach(), format_, packed.rows(rows))
    return packed


def empty(
    out_features: int, in_features: int, format_: Format, device: torch.device | str
) -> PackedWeight:
    """A packed weight with nothing in it yet: codes and scales are zeros."""
    if format_.bits == 4 and in_features % 2:
        raise ArgumentError(
            f"a weight with {in_features} columns cannot be packed to 4 bits, where two columns "
            'share a byte; use quantization="int8" for it'
        )
    shape: tuple[int, ...] = (out_features,)
    if format_.group_size is not None:
        shape += (_num_groups(in_features, format_.group_size),)
    scales = torch.zeros(shape, dtype=_SCALE_DTYPES[format_.bits], device=device)
    codes = torch.zeros(
        (out_features, row_bytes(in_features, format_.bits)),
        dtype=_CODE_DTYPES[format_.bits],
        device=device,
    )
    minimum = torch.zeros_like(scales) if format_.has_minimum else None
    code_sum = None
    if format_ == INT8:
        code_sum = torch.zeros(out_features, dtype=torch.int32, device=device)
    return PackedWeight(codes, scales, minimum, in_features, format_.group_size, code_sum)


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) in `dtype`: code * scale + minimum in float32, rounded once."""
    out = torch.empty(
        (packed.out_features, packed.in_features), dtype=dtype, device=packed.qweight.device
    )
    if out.is_meta or out.numel() == 0:
        return out
    num_rows = max(1, _SLICE_ELEMENTS // packed.in_features)
    for start in range(0, packed.out_features, num_rows):
        rows = slice(start, start + num_rows)
        out[rows] = _dequantize_rows(packed.rows(rows))
    return out


def codes_of(packed: PackedWeight) -> torch.Tensor:
    """The codes as numbers: (N, K) int8."""
    if packed.bits == 8:
        return packed.qweight[:, : packed.in_features]
    high, low = packed.qweight >> 4, packed.qweight & 15
    codes = torch.stack([high, low], dim=-1).flatten(1)[:, : packed.in_features].to(torch.int8)
    return codes if packed.minimum is not None else (codes ^ 8) - 8


def store_codes(codes: torch.Tensor, packed: PackedWeight) -> None:
    """The inverse of codes_of: (N, K) integers into packed.qweight."""
    if packed.bits == 8:
        packed.qweight[:, : packed.in_features] = codes.to(torch.int8)
        return
    nibbles = (codes.to(torch.int16) & 15).to(torch.uint8)
    packed.qweight[:, : packed.in_features // 2] = nibbles[:, ::2] << 4 | nibbles[:, 1::2]


def _pack_rows(weight: torch.Tensor, format_: Format, packed: PackedWeight) -> None:
    weight = weight.float()
    if not weight.isfinite().all():
        raise ArgumentError("the weight holds NaN or infinity and cannot be quantized")
    if format_ == INT8:
        codes, scale = int8_rows(weight)
        packed.scale.copy_(scale)
        packed.code_sum.copy_(codes.sum(1, dtype=torch.int32))  # type: ignore[union-attr]
        store_codes(codes, packed)
        return
    groups = _grouped(weight, format_.group_size)
    if format_.has_minimum:
        scale, minimum = _range_scale(groups)
        packed.minimum.copy_(minimum.view_as(packed.scale))  # type: ignore[union-attr]
        codes = _codes(groups - minimum, scale, 0, 15)
    elif format_.bits == 4:
        scale = _signed_scale(groups)
        codes = _codes(groups, scale, -8, 7)
    else:
        scale = groups.abs().amax(-1, keepdim=True) / 127
        codes = _codes(groups, scale, -127, 127)
    packed.scale.copy_(scale.view_as(packed.scale))
    store_codes(codes.flatten(1)[:, : weight.shape[1]], packed)


def _range_scale(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each group, (N, G, 1), as half precision holds them."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return _as_half((high - low) / 15), _as_half(low)


def _signed_scale(groups: torch.Tensor) -> torch.Tensor:
    """The scale of each group, (N, G, 1), with the sign that gives the largest weight code -8.

    -8 has no positive twin: this way all 16 codes are used.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return _as_half(largest / -8)


def _as_half(values: torch.Tensor) -> torch.Tensor:
    rounded = values.half()
    if not rounded.isfinite().all():
        raise ArgumentError(
            "the weight is too large for half-precision scales "
            f"(largest of a group {float(values.abs().max()):.3g}); "
            'use quantization="int8" for it'
        )
    return rounded.float()


def _codes(values: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    # Of zeros the scale is 0; dividing by 1 instead keeps their codes at 0.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    # The clamp is for scales so small that they have few digits themselves.
    return torch.round(values / divisor).clamp_(qmin, qmax)


def _grouped(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """(N, G, group_size); the last group is filled with the row's last column, which changes no
    minimum or maximum."""
    columns = weight.shape[1]
    size = min(group_size or columns, columns)
    missing = -columns % size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    return weight.reshape(len(weight), -1, size)


def _dequantize_rows(packed: PackedWeight) -> torch.Tensor:
    codes = codes_of(packed).float()
    scale = _a_column(packed.scale, packed)
    if packed.minimum is None:
        return codes.mul_(scale)
    return codes.mul_(scale).add_(_a_column(packed.minimum, packed))


def _a_column(values: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """Values of rows or groups as float32, to be multiplied with (N, K)."""
    if packed.group_size is None:
        return values.float().unsqueeze(-1)
    group_of_column = torch.arange(packed.in_features, device=values.device) // packed.group_size
    return values.float().index_select(1, group_of_column)


def _num_groups(in_features: int, group_size: int) -> int:
    return -(-in_features // group_size)


def _check_codes(qweight: torch.Tensor, in_features: int) -> None:
    if qweight.dtype not in (torch.int8, torch.uint8) or qweight.dim() != 2:
        raise ArgumentError(
            f"qweight is {qweight.dtype} of shape {tuple(qweight.shape)}; it must be "
            "(N, row_bytes), int8 for 8-bit codes or uint8 for 4-bit codes"
        )
    bits = 8 if qweight.dtype == torch.int8 else 4
    if bits == 4 and in_features % 2:
        raise ArgumentError(f"4-bit codes come in pairs of columns, but in_features={in_features}")
    if qweight.shape[1] != row_bytes(in_features, bits):
        raise ArgumentError(
            f"qweight has rows of {qweight.shape[1]} bytes; {in_features} columns of {bits} bits, "
            f"padded to {CHUNK_BYTES} bytes, are {row_bytes(in_features, bits)}"
        )
    if not qweight.is_contiguous():
        raise ArgumentError("qweight is not contiguous; pass qweight.contiguous()")


def _check_scale(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ArgumentError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} {shape}"
        )
    if tensor.device != device:
        raise ArgumentError(
            f"{name} is on {tensor.device}, qweight on {device}; move them together"
        )
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name} is not contiguous; pass {name}.contiguous()")


QMAX = 127


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each row (last axis) of `x` by its absolute maximum.

    x: (..., K) floating point.   Returns q (..., K) int8 and scale (...) float32.
    """
    x = x.detach().float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), torch.ones(x.shape[:-1], device=x.device)
    scale = x.abs().amax(dim=-1) / QMAX
    return _codes(x, scale.unsqueeze(-1), -QMAX, QMAX).to(torch.int8), scale
