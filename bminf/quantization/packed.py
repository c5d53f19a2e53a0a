"""Packed weights: what their numbers mean, in plain torch. Kernels must give what this file says.

A matrix (N, K) is stored as integer codes, each row padded to a multiple of 16 bytes, with a scale
for each row, or for each group of neighbouring columns of a row:

    weight ~ code * scale              symmetric: codes -127..127 in 8 bits, -8..7 in 4
    weight ~ code * scale + minimum    4 bits only: codes 0..15

8-bit codes are int8, one a byte; scales are float32. 4-bit codes are two a byte (uint8), the even
column in the high half, signed ones in two's complement; scales and minima are float16. The padding
holds zeros and stands for nothing.

Scales of groups in 4 bits may be 8-bit integers themselves, and so may minima, of which there are
none above 0. Then all is integers but one float32 a row:

    weight ~ (code * scale - 16 * minimum) * row_scale

How a weight becomes such numbers is in packing.py.

Sources: absolute-maximum rows, Dettmers et al. 2022, arXiv:2208.07339, section 2; signed codes of 4
bits, the code of Zeng et al. 2022, arXiv:2210.02414; scale and minimum for a group, the Q4_1 blocks
of the GGUF file format; scales that are quantized themselves, Dettmers et al. 2023,
arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch

from bminf.errors import ArgumentError
from bminf.keywords import known_fields

CHUNK_BYTES = 16
"""Rows are padded to this: what a thread of a kernel reads at once."""

SLICE_ELEMENTS = 2**18
"""Of a weight are packed or unpacked at once: temporaries stay small beside any block."""

MINIMUM_STEP = 16
"""Integer minima count in so many times their row's scale: they reach as deep as 15 steps do."""

_SCALE_DTYPES = {16: torch.float16, 8: torch.uint8}  # of 4-bit codes, by the bits of a scale
_CODE_DTYPES = {8: torch.int8, 4: torch.uint8}


@known_fields
@dataclass(frozen=True)
class Format:
    """How a weight is packed.

    bits: 8 or 4.   group_size: columns that share a scale, an even number; None is the whole row.
    has_minimum: codes count from a minimum of their group (4 bits only).
    scale_bits: of the scales and minima of groups in 4 bits: 16 for float16, 8 for integers that
        count in one float32 of their row. Scales of 8-bit codes are float32 in any case.
    Raises ArgumentError for anything else.
    """

    bits: int
    group_size: int | None = None
    has_minimum: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in _CODE_DTYPES:
            raise ArgumentError(f"bits={self.bits!r}; accepted: 8, 4")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 2 or size % 2):
            raise ArgumentError(f"group_size={size!r}; accepted: an even number, or None")
        if self.has_minimum and self.bits == 8:
            raise ArgumentError("has_minimum=True goes with bits=4; 8-bit codes are symmetric")
        if self.scale_bits not in (8, 16):
            raise ArgumentError(f"scale_bits={self.scale_bits!r}; accepted: 16, 8")
        if self.scale_bits == 8 and (self.bits == 8 or size is None):
            raise ArgumentError(
                "scale_bits=8 goes with bits=4 and a group_size; 8-bit codes have float32 scales, "
                "and a scale for a whole row is one number"
            )

    def __repr__(self) -> str:
        """As one would write it."""
        given = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self)
                 if getattr(self, one.name) != one.default)  # fmt: skip
        return f"Format({', '.join(given)})"

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and minima."""
        return torch.float32 if self.bits == 8 else _SCALE_DTYPES[self.scale_bits]

    def bits_per_weight(self, in_features: int) -> float:
        """All that is stored of a row, padding and scales included, over its columns."""
        num_groups = -(-in_features // (self.group_size or in_features))
        scale_bytes = self.scale_dtype.itemsize * (2 if self.has_minimum else 1)
        more_bytes = 4 if self == INT8 or self.scale_bits == 8 else 0  # code_sum, or row_scale
        packed_bytes = row_bytes(in_features, self.bits) + num_groups * scale_bytes + more_bytes
        return 8 * packed_bytes / in_features

    def to_json(self) -> dict[str, Any]:
        """The fields, as files have them: what older versions do not know only where it counts."""
        known = asdict(self)
        if self.scale_bits == 16:
            del known["scale_bits"]
        return known


INT8 = Format(8)
INT4 = Format(4, group_size=16, scale_bits=8)
"""The default in 4 bits; docs/quantization.md has the measurements that chose it."""

FORMATS = {"int8": INT8, "int4": INT4}

_EARLIER_INT4 = Format(4, group_size=16)
"""What "int4" was before; folders that are packed so stay so."""

PACKED_FIELDS = ("qweight", "scale", "minimum", "code_sum", "row_scale")
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


def is_asked_for(found: Format | None, asked: Format | None) -> bool:
    """Whether what is packed as `found` is what was asked for: "int4" is what it was when the
    folder was written, too."""
    return found == asked or (asked == INT4 and found == _EARLIER_INT4)


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
    row_scale: (out_features,) float32, what scales and minima count in where they are uint8; None
        where they are not.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    in_features: int
    group_size: int | None = None
    code_sum: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def bits(self) -> int:
        return 8 if self.qweight.dtype == torch.int8 else 4

    @property
    def form(self) -> Format:
        scale_bits = 16 if self.row_scale is None else 8
        return Format(self.bits, self.group_size, self.minimum is not None, scale_bits)

    @property
    def num_groups(self) -> int:
        return 1 if self.group_size is None else _num_groups(self.in_features, self.group_size)

    def rows(self, rows: slice | torch.Tensor) -> PackedWeight:
        """Some rows: of a slice as views, of indices as copies."""
        held = {name: getattr(self, name) for name in PACKED_FIELDS}
        some: dict[str, Any] = {name: t if t is None else t[rows] for name, t in held.items()}
        return self._replace(**some)

    def columns(self, start: int, end: int) -> PackedWeight:
        """Some columns in rows of their own: the same codes and scales.

        Raises ArgumentError for a border inside a group, or inside a byte.
        """
        step = self.group_size or 8 // self.bits
        if start % step or (end % step and end != self.in_features):
            raise ArgumentError(f"columns {start} to {end} are cut inside {step} that go together")
        found = empty(self.out_features, end - start, self.form, self.qweight.device)
        first, last = start * self.bits // 8, -(-end * self.bits // 8)
        found.qweight[:, : last - first] = self.qweight[:, first:last]
        for name in ("scale", "minimum"):
            held, target = getattr(self, name), getattr(found, name)
            if held is not None:
                is_whole = self.group_size is None
                target.copy_(held if is_whole else held[:, start // step : -(-end // step)])
        if found.row_scale is not None and self.row_scale is not None:
            found.row_scale.copy_(self.row_scale)
        if found.code_sum is not None:
            torch.sum(codes_of(found), 1, dtype=torch.int32, out=found.code_sum)
        return found

    def check(self) -> None:
        """Raise ArgumentError where dtypes, shapes, strides or devices do not match."""
        _check_codes(self.qweight, self.in_features)
        shape: tuple[int, ...] = (self.out_features,)
        if self.form.group_size is not None:
            shape += (self.num_groups,)
        scale, row = (shape, self.form.scale_dtype), (self.out_features,)
        expected = {
            "scale": scale, "minimum": scale, "code_sum": (row, torch.int32),
            "row_scale": (row, torch.float32),
        }  # fmt: skip
        for name, like in expected.items():
            tensor = getattr(self, name)
            if tensor is not None:
                _check_scale(name, tensor, *like, self.qweight.device)


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of a packed row: whole chunks."""
    return -(-in_features * bits // (8 * CHUNK_BYTES)) * CHUNK_BYTES


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
    scales = torch.zeros(shape, dtype=format_.scale_dtype, device=device)
    codes = torch.zeros(
        (out_features, row_bytes(in_features, format_.bits)),
        dtype=_CODE_DTYPES[format_.bits],
        device=device,
    )
    minimum = torch.zeros_like(scales) if format_.has_minimum else None
    code_sum = row_scale = None
    if format_ == INT8:
        code_sum = torch.zeros(out_features, dtype=torch.int32, device=device)
    if format_.scale_bits == 8:
        row_scale = torch.zeros(out_features, dtype=torch.float32, device=device)
    return PackedWeight(
        codes, scales, minimum, in_features, format_.group_size, code_sum, row_scale
    )


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) in `dtype`: code * scale + minimum in float32, rounded once.

    Integers, where scales are, stay exact until they are multiplied with the scale of their row.
    """
    out = torch.empty(
        (packed.out_features, packed.in_features), dtype=dtype, device=packed.qweight.device
    )
    if out.is_meta or out.numel() == 0:
        return out
    num_rows = max(1, SLICE_ELEMENTS // packed.in_features)
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


def group_scales(packed: PackedWeight) -> torch.Tensor:
    """The scale of each group as a number, in float32: (N, G), G = 1 for a scale a row."""
    scale = packed.scale.view(-1, packed.num_groups).float()
    return scale if packed.row_scale is None else scale.mul_(packed.row_scale.unsqueeze(1))


def group_minima(packed: PackedWeight) -> torch.Tensor | None:
    """As group_scales; None of symmetric codes."""
    if packed.minimum is None:
        return None
    minimum = packed.minimum.view(-1, packed.num_groups).float()
    if packed.row_scale is None:
        return minimum
    return minimum.mul_(packed.row_scale.unsqueeze(1)).mul_(-MINIMUM_STEP)


def _dequantize_rows(packed: PackedWeight) -> torch.Tensor:
    values = codes_of(packed).float().mul_(_a_column(packed.scale, packed))
    if packed.minimum is not None:
        step = 1 if packed.row_scale is None else -MINIMUM_STEP
        values.add_(_a_column(packed.minimum, packed), alpha=step)
    return values if packed.row_scale is None else values.mul_(packed.row_scale.unsqueeze(1))


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
