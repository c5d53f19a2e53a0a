"""Products with packed weights on the CPU: by the kernels of kernels/cpu/, or by torch.

Up to 16 rows the kernels multiply the codes as they are, and more rows 16 at a time: as integers
that is twice as fast as a product in float32. Many rows times weights of 8 bits with a scale a row
go by torch's product of integers where that is faster still. What the kernels would multiply as
floats they unpack, some rows of the weight at a time, for torch to multiply in float32 while they
are in the cache.

Where tokens are to be rounded to 8 bits the kernels do that, too, and give all bits that torch's
operations give; these serve for more rows where they are fast.

Where the kernels are not compiled, and for what is no plain tensor in memory (traced, fake, wrapped
by functorch, a subclass), the fastest operation of torch that is right is taken. Where the CPU has
AVX-512, 8-bit codes are multiplied as integers, several times faster than in float32 even in large
products; for weight-only products the activations are written with two base-256 digits: 16 bits a
token, finer than bfloat16. With AVX2 alone torch has no fast product of integers (it is 15 to 60
times slower than float32). There, for small weights, where it saves nothing, and for 4-bit codes
the weights become float32, a slice of rows at a time so that it stays in the cache.

`torch._weight_int8pack_mm` is not used: it is no faster, rounds activations and results to
bfloat16, and reads out of bounds where K is no multiple of 16. `torch._weight_int4pack_mm_for_cpu`
is not: it rounds scales to bfloat16, and wants the codes in an order of its own, another one on
each kind of CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from bminf.cpu.library import MAX_ROWS, PRODUCT, Kernels, kernels
from bminf.cuda.launcher import launcher_for
from bminf.ops.rows import ELEMENTS, is_ordinary
from bminf.quantization.packed import (
    INT8,
    Format,
    PackedWeight,
    dequantize,
    group_minima,
    group_scales,
    row_bytes,
)
from bminf.quantization.packing import int8_rows
from bminf.tracing import is_watched

MAX_DIGIT_COLUMNS = (2**31 - 1) // (255 * 128)
"""Of products of codes with digits, 0 to 255 or -128 to 127: their sums are sure to fit 32 bits."""

FINEST_BITS = 16
"""Of activations in the kernels that are not asked for fewer."""

_SLICE_BYTES = 2**20  # codes that stay in the second-level cache between two products
_ROWS_IN_CACHE = 128
_SLICE_ELEMENTS = 2**18  # float32 weights that do
_SMALL_ELEMENTS = 2**16  # of a weight whose products take about as long in float32
_FLOAT_ELEMENTS = 2**15  # the same by the kernels: a few microseconds, and nothing is rounded
_TINY = 1e-30  # in place of a maximum of 0, whose reciprocal would be infinite


def few_rows_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_bits: int = FINEST_BITS,
) -> torch.Tensor | None:
    """x W^T + bias by the kernels, for 1 to 16 rows in all; None for whatever they do not take.

    This is the only check between a layer and its product, so it takes nothing for granted but that
    the parts of the weight match and nobody watches (is_watched).
    x: (..., K) float32, float16 or bfloat16.   bias: (N,) or None.
    activation_bits: 8 rounds each token first, as w8a8_linear.
    Returns (..., N) in the dtype of x.
    """
    found = _kernels_for(x, weight, bias)
    if found is None or x.numel() > MAX_ROWS * weight.in_features:
        return None
    if activation_bits == 8 and not _fits_bytes(weight):
        return None
    y = x.new_empty(*x.shape[:-1], weight.qweight.shape[0])
    num_rows = x.numel() // weight.in_features
    product = _packed(
        weight, bias, x.data_ptr(), y.data_ptr(), num_rows, y.dtype, activation_bits=activation_bits
    )
    found.multiply(product)
    return y


@dataclass(frozen=True)
class Part:
    """Rows start to stop - 1 of x, at most MAX_ROWS, and what they are multiplied with."""

    start: int
    stop: int
    weight: PackedWeight
    bias: torch.Tensor | None


def few_rows_of_many(x: torch.Tensor, parts: Sequence[Part], y: torch.Tensor) -> bool:
    """Put the product of each part in its rows of y, all by one call of the kernels, with the bits
    of few_rows_linear; False, and nothing is done, where the kernels do not take one of them.

    x: (P, K).   y: (P, N) contiguous, in the dtype of x.   Their weights have N and K alike.
    """
    if not parts:
        return True
    found = None if is_watched() else _kernels_for(x, parts[0].weight, parts[0].bias)
    if found is None or not all(_is_readable(part, x) for part in parts[1:]):
        return False
    found.multiply_many([_part_of(x, part, y) for part in parts])
    return True


def _is_readable(part: Part, x: torch.Tensor) -> bool:
    """What a part that is like another one, which the kernels take, may still not be."""
    bias, weight = part.bias, part.weight
    return _is_plain(weight.qweight) and (bias is None or _is_bias_of(bias, x, weight))


def _part_of(x: torch.Tensor, part: Part, y: torch.Tensor) -> bytes:
    """The PRODUCT, without the views that slices would be."""
    x_bytes, y_bytes = x.shape[1] * x.itemsize, y.shape[1] * y.itemsize
    return _packed(
        part.weight, part.bias, x.data_ptr() + part.start * x_bytes,
        y.data_ptr() + part.start * y_bytes, part.stop - part.start, y.dtype,
    )  # fmt: skip


def few_rows_gated(
    x: torch.Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    activation: int,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """activation(x W_gate^T + gate_bias) * (x W_up^T + up_bias), as few_rows_linear.

    gate, up: of one format.   activation: its place in ACTIVATION_FUNCTIONS.
    """
    found = _kernels_for(x, gate, gate_bias)
    if found is None or x.numel() > MAX_ROWS * gate.in_features or not _is_plain(up.qweight):
        return None
    if up.qweight.shape != gate.qweight.shape or up.in_features != gate.in_features:
        return None
    if not (up_bias is None or _is_bias_of(up_bias, x, up)):
        return None
    y = x.new_empty(*x.shape[:-1], gate.qweight.shape[0])
    num_rows = x.numel() // gate.in_features
    sizes = x.data_ptr(), y.data_ptr(), num_rows, y.dtype
    first, second = _packed(gate, gate_bias, *sizes), _packed(up, up_bias, *sizes)
    found.multiply_gated(first, second, activation)
    return y


def _kernels_for(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> Kernels | None:
    """The kernels, where they can compute the whole of x W^T + bias, and it needs no derivative."""
    found = kernels()
    if found is None or not (_is_plain(x) and _is_plain(weight.qweight)):
        return None
    if (
        x.dtype not in ELEMENTS
        or not x.is_contiguous()
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        return None
    if not x.numel() or not x.dim() or x.shape[-1] != weight.in_features:
        return None
    if not weight.qweight.shape[0] or not (bias is None or _is_bias_of(bias, x, weight)):
        return None
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is numbers in the memory of the CPU and nothing else."""
    return (
        is_ordinary(type(tensor))
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()  # a view of negative numbers
    )


def _is_bias_of(bias: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> bool:
    return (
        is_ordinary(type(bias))
        and bias.dtype == x.dtype
        and bias.is_cpu
        and bias.shape == weight.qweight.shape[:1]
        and bias.is_contiguous()
        and not (bias.requires_grad and torch.is_grad_enabled())
    )


def _product(
    x: torch.Tensor | None,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    num_rows: int,
    float_elements: int = _FLOAT_ELEMENTS,
    activation_bits: int = FINEST_BITS,
) -> bytes:
    """The PRODUCT of these tensors, which the caller keeps."""
    x_address = 0 if x is None else x.data_ptr()
    return _packed(
        weight, bias, x_address, y.data_ptr(), num_rows, y.dtype, float_elements, activation_bits
    )


def _packed(
    weight: PackedWeight,
    bias: torch.Tensor | None,
    x_address: int,
    y_address: int,
    num_rows: int,
    dtype: torch.dtype,
    float_elements: int = _FLOAT_ELEMENTS,
    activation_bits: int = FINEST_BITS,
) -> bytes:
    """The same of addresses, for who has no view of rows, and in one call less."""
    codes, scale, minimum, columns, group_size, _, row_scale = weight
    out_features, row_bytes = codes.shape
    return PRODUCT.pack(
        codes.data_ptr(),
        scale.data_ptr(),
        0 if minimum is None else minimum.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x_address,
        y_address,
        num_rows,
        out_features,
        columns,
        row_bytes,
        group_size or columns,
        1 if group_size is None else -(-columns // group_size),
        8 if codes.dtype is torch.int8 else 4,
        ELEMENTS[dtype],
        torch.get_num_threads(),
        float_elements,
        activation_bits,
    )


def weight_only_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + bias, (M, N) in the dtype of x.   x: (M, K).   bias: (N,) in that dtype, or None."""
    x = (x.detach() if x.requires_grad else x).contiguous()
    found = None if is_watched() else _kernels_for(x, weight, bias)
    if found is not None and (len(x) <= MAX_ROWS or _is_fast_for_many(found, weight)):
        return _product_of_all(x, weight, bias, found)
    y = weight_only_product(x, weight)
    y = y if bias is None else y.add_(bias)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _is_fast_for_many(found: Kernels, weight: PackedWeight) -> bool:
    """Whether the kernels are the fastest for any number of rows."""
    return _has_integers(found, weight.form) and not _is_left_to_torch(weight)


def _has_integers(found: Kernels, form: Format) -> bool:
    """Whether the kernels multiply integers, in this format: nothing is then unpacked."""
    return found.level != "portable" and (form.group_size or 0) % (32 // form.bits) == 0


def row_bytes_of_many(inputs: int, outputs: int, itemsize: int, form: Format) -> int:
    """Bytes that a product of many rows holds for each row, beside its input and its result.

    itemsize: of activations.
    """
    found, is_int8 = kernels(), form == INT8
    is_integers_of_torch = is_int8 and is_fast()
    if found is not None and _has_integers(found, form) and not is_integers_of_torch:
        return 0
    wide = 0 if itemsize == 4 else 4 * (inputs + outputs)  # all is done in float32
    is_in_cache = row_bytes(inputs, 8) * outputs <= _SLICE_BYTES
    if is_integers_of_torch and is_in_cache:  # of a few rows at a time
        return wide
    if is_integers_of_torch:  # numbers, two digits of each, the sums of both
        return wide + max(20 * inputs, 10 * inputs + 16 * outputs)
    if is_int8 or found is not None:  # the parts of the result
        return wide + 4 * outputs
    return wide + 5 * inputs + 4 * outputs


def _is_left_to_torch(weight: PackedWeight) -> bool:
    return weight.bits == 8 and weight.group_size is None and _has_integer_product(weight)


def _fits_bytes(weight: PackedWeight) -> bool:
    """Whether the kernels multiply it with tokens of 8 bits."""
    has_row_scales = weight.bits == 8 and weight.group_size is None
    return has_row_scales and weight.in_features <= MAX_DIGIT_COLUMNS


def _product_of_all(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    found: Kernels,
    activation_bits: int = FINEST_BITS,
) -> torch.Tensor:
    y = x.new_empty((x.shape[0], weight.out_features))
    for start in range(0, x.shape[0], MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        part, number = y[rows], len(x[rows])
        found.multiply(
            _product(x[rows], weight, bias, part, number, activation_bits=activation_bits)
        )
    return y


def weight_only_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T. x: (M, K) floating point.   Returns (M, N) float32."""
    x = _float(x)
    is_plain = not is_watched() and _is_plain(x) and _is_plain(weight.qweight)
    if is_plain and launcher_for(x.device) is None:
        found = None if _is_left_to_torch(weight) else kernels()
        if found is not None:
            return _unpacked_product(x, weight, found)
    if weight.qweight.dtype == torch.uint8:
        return _four_bit_product(x, weight)
    # Where integers save less than their digits cost, nothing need be rounded either.
    is_small = weight.qweight.numel() <= _SMALL_ELEMENTS
    if weight.group_size is not None or not _has_integer_product(weight) or is_small:
        return _dequantized_product(x, weight)
    ordinary = _ordinary_row(x)
    if ordinary is not None:
        return _one_row_as_digits(*ordinary, weight)
    if weight.qweight.numel() > _SLICE_BYTES:
        return _rows_as_digits(x, weight)
    # Few at a time, where that reads the codes from a cache: what is held on the way stays in one.
    y = x.new_empty((x.shape[0], weight.out_features))
    for rows, part in zip(x.split(_ROWS_IN_CACHE), y.split(_ROWS_IN_CACHE), strict=True):
        part.copy_(_rows_as_digits(rows, weight))
    return y


def w8a8_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias with each token rounded to 8 bits, as weight_only_linear.

    Up to 16 rows, and any number where torch has no fast product of integers, by the kernels.
    """
    x = (x.detach() if x.requires_grad else x).contiguous()
    found = _kernels_for(x, weight, bias) if _fits_bytes(weight) else None
    if found is not None and (len(x) <= MAX_ROWS or not _has_integer_product(weight)):
        return _product_of_all(x, weight, bias, found, activation_bits=8)
    y = w8a8_product(x, weight)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def w8a8_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T with each token rounded to 8 bits. x: (M, K).   Returns (M, N) float32."""
    x = _float(x)
    has_product = _has_integer_product(weight)
    ordinary = _ordinary_row(x) if has_product else None
    if ordinary is not None:
        return _one_row_in_8_bits(*ordinary, weight)
    if has_product:
        codes, x_scale = int8_rows(x)
        sums = torch._int_mm(_padded(codes, weight), weight.qweight.t()).float()
        return sums.mul_(x_scale.unsqueeze(-1)).mul_(weight.scale)
    num_rows = max(1, _SLICE_ELEMENTS // max(1, x.shape[1]))
    return torch.cat([_rows_in_8_bits(rows, weight) for rows in x.split(num_rows)])


def _rows_in_8_bits(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """In float64, which adds codes without loss on any CPU; some rows of the weight at a time."""
    codes, x_scale = int8_rows(x)
    wide = _padded(codes, weight).double()
    parts = weight.qweight.split(max(1, _SLICE_ELEMENTS // wide.shape[1]))
    sums = torch.cat([(wide @ part.double().t()).float() for part in parts], dim=1)
    return sums.mul_(x_scale.unsqueeze(-1)).mul_(weight.scale)


def _float(x: torch.Tensor) -> torch.Tensor:
    """In float32, without a history. A call that changes nothing is a tenth of a small product."""
    x = x.detach() if x.requires_grad else x
    return x if x.dtype == torch.float32 else x.float()


def _has_integer_product(weight: PackedWeight) -> bool:
    return weight.in_features <= MAX_DIGIT_COLUMNS and is_fast() and is_exact(torch.int8)


# ---- one row: arithmetic in NumPy, whose calls on short rows cost a third of torch's -------------


def _one_row_as_digits(row: np.ndarray, amax: float, weight: PackedWeight) -> torch.Tensor:
    """row ~ (256 * high + low - 32768) * step: digits without a sign take the fastest product."""
    numbers = np.empty(row.size, np.uint16)
    np.add(row * np.float32(32767 / amax), np.float32(32768.5), out=numbers, casting="unsafe")
    digits = np.zeros((2, weight.qweight.shape[1]), np.uint8)
    np.right_shift(numbers, 8, out=digits[0, : row.size], casting="unsafe")
    digits[1, : row.size] = numbers
    high, low = _one_row_products(digits, weight)
    y = (high - 128 * _code_sum(weight)) * 256.0 + low  # float64
    return torch.from_numpy((y * (weight.scale.numpy() * (amax / 32767))).astype(np.float32))


def _one_row_in_8_bits(row: np.ndarray, amax: float, weight: PackedWeight) -> torch.Tensor:
    """As int8_rows and an integer product, with codes moved by 128 to lose their sign."""
    scale = np.float32(amax) / np.float32(127)
    digits = np.zeros((1, weight.qweight.shape[1]), np.uint8)
    digits[0, : row.size] = np.rint(row / scale) + np.float32(128)
    (sums,) = _one_row_products(digits, weight)
    codes = (sums - 128 * _code_sum(weight)).astype(np.float32)
    return torch.from_numpy(codes * scale * weight.scale.numpy())


def _ordinary_row(x: torch.Tensor) -> tuple[np.ndarray, float] | None:
    """The only row of `x` and its largest absolute value; None for more rows, for a row of zeros,
    infinity or NaN, and where this CPU has no fast product for one row."""
    # NumPy sees the values only of an ordinary tensor, and no trace sees what NumPy does.
    is_traced = bool(torch._C._get_tracing_state())
    is_plain = type(x) is torch.Tensor and x.device.type == "cpu" and not is_traced
    if x.shape[0] != 1 or not is_plain or not is_exact(torch.uint8):
        return None
    row = x.numpy()[0]
    amax = float(np.abs(row).max())
    return (row, amax) if _TINY < amax < float("inf") else None


def _one_row_products(digits: np.ndarray, weight: PackedWeight) -> list[np.ndarray]:
    """Each row of digits, (rows, row_bytes) uint8, times the codes: (1, N) int32 each.

    One row after the other, for a slice of the codes at a time, so that all but the first find it
    in the cache; together they would go through a slower operation.
    """
    # Slices, not digits[i][None]: that has a stride of 0, which makes torch's product wrong.
    rows = [torch.from_numpy(digits[i : i + 1]) for i in range(len(digits))]
    if len(rows) == 1 or weight.qweight.numel() <= _SLICE_BYTES:
        columns = weight.qweight.t()
        return [torch._int_mm(row, columns).numpy() for row in rows]
    slices = weight.qweight.split(max(1, _SLICE_BYTES // digits.shape[1]))
    products = [[torch._int_mm(row, codes.t()).numpy() for row in rows] for codes in slices]
    return [np.concatenate(parts, axis=1) for parts in zip(*products, strict=True)]


def _code_sum(weight: PackedWeight) -> np.ndarray:
    if weight.code_sum is not None:
        return weight.code_sum.numpy()
    ones = torch.ones((1, weight.qweight.shape[1]), dtype=torch.uint8, device="cpu")
    return torch._int_mm(ones, weight.qweight.t()).numpy()


# ---- any number of rows --------------------------------------------------------------------------


def _rows_as_digits(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x ~ (256 * high + low) * step with signed digits, all tokens' digits in one product."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY).div_(32512)
    numbers = (x / step).round_()
    high = (numbers / 256).round_()
    low = numbers.sub_(high, alpha=256).clamp_(-128, 127)
    digits = torch.cat([high.to(torch.int8), low.to(torch.int8)])
    sums = torch._int_mm(_padded(digits, weight), weight.qweight.t()).float()
    high_sums, low_sums = sums.chunk(2)
    return torch.add(low_sums, high_sums, alpha=256).mul_(step).mul_(weight.scale)


def _padded(digits: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Digits with as many columns as the codes: zeros meet the padding."""
    missing = weight.qweight.shape[1] - digits.shape[1]
    return F.pad(digits, (0, missing)) if missing else digits


def _four_bit_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The even columns, in the high halves of the bytes, and the odd ones are two products.

    Codes without a sign are multiplied by their scales; what they count from, the minimum or -8
    scales, meets the sums of x over each group.
    """
    half_size = (weight.group_size or weight.in_features) // 2
    half_columns = weight.num_groups * half_size
    if half_columns > weight.qweight.shape[1]:
        return _dequantized_product(x, weight)  # a last group longer than the padded row
    x = F.pad(x, (0, 2 * half_columns - x.shape[1]))
    even, odd = x[:, ::2].contiguous(), x[:, 1::2].contiguous()
    scale, minimum = group_scales(weight), group_minima(weight)
    offset = -8 * scale if minimum is None else minimum
    group_sums = x.view(x.shape[0], weight.num_groups, -1).sum(-1)
    y = F.linear(group_sums, offset)
    num_rows = max(1, _SLICE_ELEMENTS // half_columns)
    for start in range(0, weight.out_features, num_rows):
        rows = slice(start, start + num_rows)
        codes = weight.qweight[rows, :half_columns]
        codes = codes if weight.minimum is not None else codes ^ 0x88
        scale_slice = scale[rows].unsqueeze(-1)
        y[:, rows] += F.linear(even, _scaled(codes >> 4, scale_slice))
        y[:, rows] += F.linear(odd, _scaled(codes & 15, scale_slice))
    return y


def _scaled(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes: (n, K) unsigned.   scale: (n, G, 1).   Returns (n, K) float32."""
    return codes.float().view(*scale.shape[:2], -1).mul_(scale).flatten(1)


def _unpacked_product(x: torch.Tensor, weight: PackedWeight, found: Kernels) -> torch.Tensor:
    num_rows = max(1, _SLICE_ELEMENTS // weight.in_features)
    y = x.new_empty((x.shape[0], weight.out_features))
    space = x.new_empty((min(num_rows, weight.out_features), weight.in_features))
    for start in range(0, weight.out_features, num_rows):
        part = weight.rows(slice(start, start + num_rows))
        numbers = space[: part.out_features]
        found.unpack(_product(None, part, None, numbers, 0))
        y[:, start : start + num_rows] = F.linear(x, numbers)
    return y


def _dequantized_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    num_rows = max(1, _SLICE_ELEMENTS // weight.in_features)
    return torch.cat(
        [
            F.linear(x, dequantize(weight.rows(slice(start, start + num_rows)), torch.float32))
            for start in range(0, weight.out_features, num_rows)
        ],
        dim=1,
    )


@cache
def is_fast() -> bool:
    """Whether torch has a fast product of 8-bit numbers for this CPU."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


@cache
def is_exact(dtype: torch.dtype) -> bool:
    """Whether this CPU sums products of `dtype` (int8, uint8) and int8 codes without loss.

    Where 16-bit sums of pairs saturate (AVX2 and the first AVX-512), the largest numbers show it.
    """
    largest = torch.iinfo(dtype).max
    x = torch.full((3, 64), largest, dtype=dtype, device="cpu")
    codes = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    try:
        sums = [torch._int_mm(rows, codes.t()) for rows in (x, x[:1])]
    except RuntimeError:  # older versions of torch refuse uint8
        return False
    return all(bool((product == 64 * largest * 127).all()) for product in sums)
