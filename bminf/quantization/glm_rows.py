"""Rows of 8- or 4-bit codes exactly as GLM-130B's own code makes them.

    scale = half(largest of a row / qmax),  code = round(weight / scale),  qmax = 127 or 7

Both divisions are rounded to the weight's own dtype before anything else happens to them; so a
code may be the neighbour of the one that exact numbers would give. Codes of 4 bits are two a byte,
the even column in the high half, in two's complement.

Source: GLM-130B, quantization/layers.py and tools/convert_tp.py.
"""

from __future__ import annotations

import torch

from bminf.errors import ArgumentError
from bminf.quantization.packed import Format, PackedWeight
from bminf.quantization.packing import pack

BITS = (8, 4)


def quantize_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row, as they are stored in a checkpoint.

    weight: (N, K) floating point.   bits: 8 or 4.
    Returns codes (N, K) int8, or (N, K/2) int8 for 4 bits, and scales (N,) float16. A row of zeros
    has the scale 0 (where the source divides by it), and codes never leave -127..127 or -7..7.
    Raises ArgumentError: other bits, an odd K in 4 bits, a weight that is not finite or too large
    for half-precision scales.
    """
    _check(weight, bits)
    scale = _scales(weight, bits)
    codes = _codes(weight, scale, bits)
    if bits == 4:
        codes = (codes[:, ::2] << 4) | (codes[:, 1::2] & 15)
    return codes, scale


def row_scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The scales alone, (N,) float16; arguments and errors as for quantize_rows."""
    _check(weight, bits)
    return _scales(weight, bits)


def pack_rows(weight: torch.Tensor, bits: int) -> PackedWeight:
    """The codes and scales of quantize_rows, as a packed weight of Format(bits).

    On the meta device shapes only.   Raises ArgumentError as quantize_rows.
    """
    _check_bits(bits)
    return pack(weight, Format(bits), _pack_rows)


def _pack_rows(weight: torch.Tensor, format_: Format, packed: PackedWeight) -> None:
    codes, scale = quantize_rows(weight, format_.bits)
    packed.qweight.view(torch.int8)[:, : codes.shape[1]] = codes
    packed.scale.copy_(scale)
    if packed.code_sum is not None:
        packed.code_sum.copy_(codes.sum(1, dtype=torch.int32))


def _check(weight: torch.Tensor, bits: int) -> None:
    _check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ArgumentError(
            f"the weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be a matrix of "
            "floating point"
        )
    if bits == 4 and weight.shape[1] % 2:
        raise ArgumentError(
            f"a weight with {weight.shape[1]} columns cannot be quantized to 4 bits, where two "
            "columns share a byte; use 8 bits for it"
        )
    if not weight.isfinite().all():
        raise ArgumentError("the weight holds NaN or infinity and cannot be quantized")


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ArgumentError(f"bits={bits!r}; accepted: {', '.join(map(str, BITS))}")


def _scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    if weight.shape[1] == 0:
        return torch.zeros(len(weight), dtype=torch.float16, device=weight.device)
    scale = (weight.abs().amax(dim=1) / _qmax(bits)).half()
    if not scale.isfinite().all():
        raise ArgumentError(
            f"the weight is too large for half-precision scales (largest "
            f"{float(weight.abs().max()):.3g}); it cannot be quantized in this format"
        )
    return scale


def _codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, K) int8."""
    divisor = torch.where(scale == 0, torch.full_like(scale, torch.inf), scale).unsqueeze(1)
    # Rounded scales this small may be well below the exact ones: hence the clamp.
    return torch.round(weight / divisor).clamp_(-_qmax(bits), _qmax(bits)).to(torch.int8)


def _qmax(bits: int) -> int:
    return (1 << (bits - 1)) - 1
