"""From weights to the numbers of a packed weight, whose meaning is in packed.py.

The scale of a group is its largest absolute weight over a divisor. Float16 scales of 4-bit codes
carry the sign that gives this weight the code -8, with the divisor 8. Integer scales have no sign;
of some divisors each group takes the one of the least squared error, in which each weight counts
by its size. That weighting, and which divisors are tried, were chosen by what a model predicts
(docs/quantization.md); the plain squared error makes predictions worse.

Source: absolute-maximum rows, Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bminf.errors import ArgumentError
from bminf.quantization.packed import (
    INT8,
    MINIMUM_STEP,
    SLICE_ELEMENTS,
    Format,
    PackedWeight,
    empty,
)

QMAX = 127
DIVISORS = (7.0, 7.25, 7.5, 7.75, 8.0)
"""That are tried for integer scales: 7 reaches the largest weight, whatever its sign, and 8 gives
it the code -8."""

_MOST_SCALE = 255  # of an integer scale
_CHOOSING = 8  # so many times as much is held while one is chosen

RowPacker = Callable[[torch.Tensor, Format, PackedWeight], None]
"""Packs rows of a weight, (n, K), in a format into a PackedWeight of n rows."""


def pack(weight: torch.Tensor, format_: Format, packer: RowPacker | None = None) -> PackedWeight:
    """`weight`, (N, K) floating point, in `format_`; on the meta device shapes only.

    packer: packs some rows into their place; None is pack_rows.
    Raises ArgumentError: an odd K in 4 bits, a weight that is not finite or too large for half
    precision scales.
    """
    packed = empty(weight.shape[0], weight.shape[1], format_, weight.device)
    if weight.is_meta or 0 in weight.shape:
        return packed
    elements = SLICE_ELEMENTS if format_.scale_bits == 16 else SLICE_ELEMENTS // _CHOOSING
    num_rows, weight = max(1, elements // weight.shape[1]), weight.detach()
    if len(weight) <= num_rows:
        (packer or pack_rows)(weight, format_, packed)
        return packed
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        (packer or pack_rows)(weight[rows], format_, packed.rows(rows))
    return packed


def pack_rows(
    weight: torch.Tensor,
    format_: Format,
    packed: PackedWeight,
    divisors: Sequence[float] = DIVISORS,
) -> None:
    """Round rows of a weight, (n, K), to the nearest codes, into `packed`, of n rows.

    divisors: to choose from for integer scales without minima; a single one is no choice.
    Raises ArgumentError as pack().
    """
    weight = weight.float()
    if not weight.isfinite().all():
        raise ArgumentError("the weight holds NaN or infinity and cannot be quantized")
    if format_ == INT8:
        codes, scale = int8_rows(weight)
        packed.scale.copy_(scale)
        packed.code_sum.copy_(codes.sum(1, dtype=torch.int32))  # type: ignore[union-attr]
        store_codes(codes, packed)
        return
    groups = _grouped(weight, format_)
    if format_.has_minimum:
        codes = _codes_above_minima(groups, packed)
    elif format_.scale_bits == 8 and format_.bits == 4:
        codes = _codes_of_integer_scales(groups, packed, divisors)
    elif format_.bits == 4:
        codes = _codes_of_half_scales(groups, packed)
    else:
        scale = groups.abs().amax(-1, keepdim=True) / QMAX
        packed.scale.copy_(scale.view_as(packed.scale))
        codes = _codes(groups, scale, -QMAX, QMAX)
    store_codes(codes.flatten(1)[:, : weight.shape[1]], packed)


def store_codes(codes: torch.Tensor, packed: PackedWeight) -> None:
    """The inverse of codes_of: (N, K) integers into packed.qweight."""
    if packed.bits == 8:
        packed.qweight[:, : packed.in_features] = codes.to(torch.int8)
        return
    nibbles = (codes.to(torch.int16) & 15).to(torch.uint8)
    packed.qweight[:, : packed.in_features // 2] = nibbles[:, ::2] << 4 | nibbles[:, 1::2]


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each row (last axis) of `x` by its absolute maximum.

    x: (..., K) floating point.   Returns q (..., K) int8 and scale (...) float32.
    """
    x = x.detach().float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), torch.ones(x.shape[:-1], device=x.device)
    scale = x.abs().amax(dim=-1) / QMAX
    return _codes(x, scale.unsqueeze(-1), -QMAX, QMAX).to(torch.int8), scale


# ---- 4 bits: groups (N, G, group_size) to codes; scales and minima go into their place -----------


def _codes_of_half_scales(groups: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """-8 has no positive twin: with a scale of the sign that gives the largest weight this code,
    all 16 codes are used."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = _as_half(largest / -8)
    packed.scale.copy_(scale.view_as(packed.scale))
    return _codes(groups, scale, -8, 7)


def _codes_of_integer_scales(
    groups: torch.Tensor, packed: PackedWeight, divisors: Sequence[float]
) -> torch.Tensor:
    largest = groups.abs().amax(-1, keepdim=True)
    row_scale = largest.amax(1, keepdim=True) / (min(divisors) * _MOST_SCALE)
    choices = [_integers(largest / divisor, row_scale) for divisor in divisors]
    scale = choices[0] if len(choices) == 1 else _best(groups, largest, row_scale, choices)
    packed.scale.copy_(scale.view_as(packed.scale))
    packed.row_scale.copy_(row_scale.flatten())  # type: ignore[union-attr]
    return _codes(groups, scale * row_scale, -8, 7)


def _best(
    groups: torch.Tensor,
    largest: torch.Tensor,
    row_scale: torch.Tensor,
    choices: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Of some integer scales, (N, G, 1) each, those of the least error; the first of equals.

    All is counted in the largest weight of each group, so that no square is too large or small.
    """
    inverse = 1 / _nonzero(largest)
    relative, step = groups * inverse, row_scale * inverse
    weighting = relative.abs()
    best, least = choices[0], torch.full_like(largest, torch.inf)
    for scale in choices:
        own = scale * step
        error = _codes(relative, own, -8, 7).mul_(own).sub_(relative).square_().mul_(weighting)
        total = error.sum(-1, keepdim=True)
        best = torch.where(total < least, scale, best)
        least = torch.minimum(total, least)
    return best


def _codes_above_minima(groups: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """The smallest weight gets 0, the largest 15."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    assert packed.minimum is not None
    if packed.row_scale is None:
        scale, minimum = _as_half((high - low) / 15), _as_half(low)
        packed.scale.copy_(scale.view_as(packed.scale))
        packed.minimum.copy_(minimum.view_as(packed.scale))
        return _codes(groups - minimum, scale, 0, 15)
    low, high = low.clamp(max=0), high.clamp(min=0)  # integers count from 0
    row_scale = (high - low).amax(1, keepdim=True) / (15 * _MOST_SCALE)
    depth = _integers(-low, MINIMUM_STEP * row_scale)
    minimum = -MINIMUM_STEP * depth * row_scale
    scale = _integers((high - minimum) / 15, row_scale)
    packed.scale.copy_(scale.view_as(packed.scale))
    packed.minimum.copy_(depth.view_as(packed.scale))
    packed.row_scale.copy_(row_scale.flatten())
    return _codes(groups - minimum, scale * row_scale, 0, 15)


def _integers(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Values, none below 0, as multiples of `step` that fit 8 bits."""
    return (values / _nonzero(step)).round_().clamp_(max=_MOST_SCALE)


def _as_half(values: torch.Tensor) -> torch.Tensor:
    rounded = values.half()
    if not rounded.isfinite().all():
        raise ArgumentError(
            "the weight is too large for half-precision scales "
            f"(largest of a group {float(values.abs().max()):.3g}); "
            'use quantization="int4" or "int8" for it'
        )
    return rounded.float()


def _codes(values: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    # The clamp is for scales so small that they have few digits themselves.
    return (values / _nonzero(scale)).round_().clamp_(qmin, qmax)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Of zeros the scale is 0; dividing by 1 instead keeps their codes at 0."""
    return torch.where(scale == 0, 1, scale)


def _grouped(weight: torch.Tensor, format_: Format) -> torch.Tensor:
    """(N, G, group_size); the last group is filled with what changes neither its scale nor its
    minimum: the row's last column above minima, zeros elsewhere."""
    columns = weight.shape[1]
    size = min(format_.group_size or columns, columns)
    missing = -columns % size
    if missing:
        last = weight[:, -1:] if format_.has_minimum else torch.zeros_like(weight[:, -1:])
        weight = torch.cat([weight, last.expand(-1, missing)], dim=1)
    return weight.reshape(len(weight), -1, size)
