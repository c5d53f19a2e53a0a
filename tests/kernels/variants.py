"""Every kernel that the ops can ask for, and the compute capabilities it is for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import torch

from bminf.cuda.source import Kernel
from bminf.ops import attention, dequantize, linear_w8a8, linear_weight_only, norm, quantize_rows
from bminf.ops.grouped_linear import grouped_kernel
from bminf.ops.rotary_append import rotary_append_kernel
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, empty

IS_EVERY = "BMINF_EVERY_VARIANT" in os.environ
"""Whether all that can be asked for is compiled, which takes many minutes."""

CAPABILITIES = (61, 70, 75, 80, 86, 89, 90, 100, 120)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NORMS = ("rms_norm", "layer_norm")
HEAD_DIMS = (8, 16, 24, 64, 80, 96, 128, 256)
# One of each kind that the sources tell apart: bits, minimum, a scale a row, chunks in one, two or
# any groups.
MINIMUM = Format(4, 32, has_minimum=True)
NARROW_MINIMUM = Format(4, 16, has_minimum=True)
FORMS = (
    INT8, INT4, MINIMUM, Format(4, 32), NARROW_MINIMUM, Format(8, 34), Format(4, 34, True),
    Format(4, 34), Format(4, 16), Format(4, 32, True, 8), Format(4, 34, True, 8), Format(4),
)  # fmt: skip

# With those that the sources do not tell apart.
EVERY_FORM = (
    *FORMS, Format(4, 32, False, 8), Format(8, 32), Format(8, 128), Format(4, 64), Format(4, 128),
    Format(4, has_minimum=True), Format(4, 48, True), Format(4, 256, False, 8),
    Format(4, 256, True, 8), Format(4, 34, False, 8), Format(4, 16, True, 8),
)  # fmt: skip


def weight_of(form: Format) -> PackedWeight:
    return empty(8, 256, form, "meta")


def variants(capability: int) -> list[Kernel]:
    """What is compiled for `capability`: all that macros tell apart where a branch of the sources
    begins, for 8.0; elsewhere each kernel with its lightest and its heaviest macros on the others,
    and for 6.1, where another branch begins, with each element."""
    if IS_EVERY:
        return every_variant(capability)
    chosen = _few_rows() if capability == 80 else _few_rows_extremes()
    found = [*chosen, *_others(DTYPES if capability in (61, 80) else DTYPES[:1])]
    found += _fused(DTYPES) if capability == 80 else fused_extremes()
    found += _grouped(DTYPES if capability == 80 else DTYPES[:1], FORMS)
    found += _products(capability, DTYPES if capability < 75 else (torch.bfloat16,))
    found += _attention() if capability in (61, 80) else _attention_extremes()
    if capability == 61:
        found += [few_rows_of(dtype, form, 1) for dtype in DTYPES for form in (INT8, MINIMUM)]
    if capability >= 80:
        found += _tensor_core() if capability == 80 else _tensor_core_extremes()
    return list(dict.fromkeys(found))


def every_variant(capability: int) -> list[Kernel]:
    """All that tests and benchmarks ask for on a device of `capability`."""
    found = [*_others(DTYPES, EVERY_FORM), *_fused(DTYPES), *every_attention()]
    found += _grouped(DTYPES, EVERY_FORM)
    for dtype, form, is_gated in product(DTYPES, EVERY_FORM, (False, True)):
        for num_rows in range(1, linear_weight_only.MAX_FEW_ROWS + 1):
            found.append(few_rows_of(dtype, form, num_rows, is_gated))
    found += _products(capability, DTYPES)
    if capability >= 80:
        rows = range(1, linear_weight_only.MAX_TENSOR_CORE_ROWS + 1)
        for dtype, form, num_rows, is_narrow in product(
            DTYPES[:2], EVERY_FORM, rows, (False, True)
        ):
            found.append(tensor_core_of(dtype, form, num_rows, is_narrow))
    return list(dict.fromkeys(found))


def _products(capability: int, dtypes: tuple[torch.dtype, ...]) -> list[Kernel]:
    """Of 8-bit activations."""
    if capability < 75:
        return [linear_w8a8.dp4a_kernel(dtype) for dtype in dtypes]
    return [linear_w8a8.tensor_core_kernel(*pair) for pair in product(dtypes, (False, True))]


def few_rows_of(dtype: torch.dtype, form: Format, num_rows: int, is_gated: bool = False) -> Kernel:
    return linear_weight_only.few_rows_kernel(dtype, weight_of(form), num_rows, is_gated)


def _grouped(dtypes: tuple[torch.dtype, ...], forms: tuple[Format, ...]) -> Iterator[Kernel]:
    for dtype, form in product(dtypes, forms):
        yield grouped_kernel(dtype, weight_of(form))


def _few_rows() -> Iterator[Kernel]:
    for dtype, form in product(DTYPES, FORMS):
        yield few_rows_of(dtype, form, 1)
    for num_rows in (2, 4, 8, 16):
        for form in (INT8, INT4, MINIMUM):
            yield few_rows_of(torch.float16, form, num_rows)
        yield few_rows_of(torch.bfloat16, Format(4, 34, True), num_rows)
        yield few_rows_of(torch.float32, INT4, num_rows)
    for num_rows in (1, 4, 8, 16):
        for form in (INT8, INT4):
            yield few_rows_of(torch.bfloat16, form, num_rows, is_gated=True)
    yield few_rows_of(torch.float32, Format(4, 34), 4, is_gated=True)


def _few_rows_extremes() -> Iterator[Kernel]:
    for form in (INT8, INT4, MINIMUM, Format(4, 34, True)):
        yield few_rows_of(torch.float16, form, 1)
    for num_rows in (4, 8, 16):
        yield few_rows_of(torch.bfloat16, INT4, num_rows, is_gated=True)
    yield few_rows_of(torch.float32, INT4, 4)
    # With more rows of the weight these two would spill on 7.5 and 9.0.
    yield few_rows_of(torch.float32, NARROW_MINIMUM, 2)
    yield grouped_kernel(torch.float32, weight_of(NARROW_MINIMUM))


def tensor_core_of(
    dtype: torch.dtype, form: Format, num_rows: int, is_narrow: bool = False
) -> Kernel:
    weight, num_processors = weight_of(form), 1 if is_narrow else 0
    return linear_weight_only.tensor_core_kernel(dtype, weight, num_rows, num_processors)


def _tensor_core() -> Iterator[Kernel]:
    for dtype, form in product(DTYPES[:2], FORMS):
        yield tensor_core_of(dtype, form, 16)
    for num_rows in (8, 32, 64):
        for form, dtype in ((INT8, DTYPES[0]), (INT4, DTYPES[1]), (MINIMUM, DTYPES[0])):
            yield tensor_core_of(dtype, form, num_rows)
            yield tensor_core_of(dtype, form, num_rows, is_narrow=True)


def _tensor_core_extremes() -> Iterator[Kernel]:
    for num_rows in (8, 16, 64):  # some compilers spill here what they do not elsewhere
        yield tensor_core_of(torch.bfloat16, Format(4, 34), num_rows, is_narrow=num_rows == 64)
    for form, num_rows in ((INT8, 8), (INT4, 64), (MINIMUM, 8), (Format(4, 34, True), 64)):
        yield tensor_core_of(torch.float16, form, num_rows)


def every_attention() -> Iterator[Kernel]:
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):
        yield attention.merge_kernel(dtype, head_dim)
        for num_rows in (1, 2, 4):
            yield attention.attention_kernel(dtype, head_dim, num_rows)


def _attention() -> Iterator[Kernel]:
    for dtype, num_rows in product(DTYPES, (1, 2, 4)):
        yield attention.attention_kernel(dtype, 80, num_rows)
    for head_dim, num_rows in ((8, 4), (64, 1), (256, 4)):
        yield attention.attention_kernel(torch.float16, head_dim, num_rows)
    yield attention.merge_kernel(torch.float16, 256)


def _attention_extremes() -> Iterator[Kernel]:
    """Those with most registers for their bounds."""
    yield attention.attention_kernel(torch.bfloat16, 128, 1)
    for dtype in (torch.float16, torch.float32):
        yield attention.attention_kernel(dtype, 80, 4)
    yield attention.merge_kernel(torch.float16, 128)


def _others(
    dtypes: tuple[torch.dtype, ...],
    forms: tuple[Format, ...] = (
        *FORMS[:3],
        Format(4),
        Format(4, 32, True, 8),
        Format(4, 34, True),
    ),
) -> Iterator[Kernel]:
    for dtype in dtypes:
        yield quantize_rows.quantize_rows_kernel(dtype)
        yield quantize_rows.rms_norm_quantize_kernel(dtype)
        yield linear_w8a8.scale_int32_kernel(dtype)
        for form in forms:
            yield from (dequantize.kernel(dtype, form, columns) for columns in (248, 249))


def _fused(dtypes: tuple[torch.dtype, ...]) -> Iterator[Kernel]:
    for dtype in dtypes:
        for name, chunks, is_wide in product(NORMS, (1, 2, 4), (True, False)):
            yield norm.norm_kernel(name, dtype, chunks, is_wide)
        for angle, width in product((torch.float16, torch.float32, None), (8, 1)):
            yield rotary_append_kernel(dtype, angle, width)


def fused_extremes() -> Iterator[Kernel]:
    for dtype, chunks in ((torch.float16, 1), (torch.bfloat16, 2), (torch.float32, 4)):
        yield norm.norm_kernel("layer_norm", dtype, chunks, True)
    yield norm.norm_kernel("layer_norm", torch.float16, 4, False)
    yield norm.norm_kernel("rms_norm", torch.bfloat16, 4, True)
    yield rotary_append_kernel(torch.float16, torch.float16, 8)
    yield rotary_append_kernel(torch.bfloat16, None, 1)
