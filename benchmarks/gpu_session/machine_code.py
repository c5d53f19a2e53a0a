"""Every kernel that the tests and benchmarks on a GPU can ask for, and whether it is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bminf.cuda.compile import kept_file, read_kept
from bminf.cuda.source import Kernel
from bminf.ops import dequantize, linear_w8a8, linear_weight_only, quantize_rows
from bminf.quantization.packed import Format, PackedWeight, empty

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A row in one group, and groups that begin at whole 16 bytes of codes, at half of them, anywhere.
_FORMS = (
    Format(8), Format(8, 32), Format(8, 34), Format(8, 128),
    Format(4), Format(4, 16), Format(4, 32), Format(4, 34), Format(4, 64), Format(4, 128),
    Format(4, has_minimum=True), Format(4, 32, True), Format(4, 34, True), Format(4, 48, True),
)  # fmt: skip


def kernels(capability: int) -> list[Kernel]:
    """For one compute capability (61, 80, ...), each once."""
    found = [*_few_rows(), *_others(), *_w8a8(capability)]
    if capability >= 80:
        found += _tensor_core()
    return list(dict.fromkeys(found))


def _weights() -> list[PackedWeight]:
    """Of two groups at least, where there are groups."""
    return [empty(16, 256, form, "meta") for form in _FORMS]


def _few_rows() -> Iterator[Kernel]:
    for weight in _weights():
        for dtype in _DTYPES:
            for num_rows in range(1, linear_weight_only.MAX_FEW_ROWS + 1):
                for is_gated in (False, True):
                    yield linear_weight_only.few_rows_kernel(dtype, weight, num_rows, is_gated)


def _tensor_core() -> Iterator[Kernel]:
    for weight in _weights():
        for dtype in _DTYPES[:2]:
            for num_rows in range(1, linear_weight_only.MAX_TENSOR_CORE_ROWS + 1):
                yield linear_weight_only.tensor_core_kernel(dtype, weight, num_rows)


def _w8a8(capability: int) -> Iterator[Kernel]:
    for dtype in _DTYPES:
        yield linear_w8a8.scale_int32_kernel(dtype)
        if capability < 75:
            yield linear_w8a8.dp4a_kernel(dtype)
        else:
            for is_large in (False, True):
                yield linear_w8a8.tensor_core_kernel(dtype, is_large)


def _others() -> Iterator[Kernel]:
    for dtype in _DTYPES:
        yield quantize_rows.quantize_rows_kernel(dtype)
        yield quantize_rows.rms_norm_quantize_kernel(dtype)
        for weight in _weights():
            has_minimum = weight.minimum is not None
            yield dequantize.kernel(dtype, weight.bits, has_minimum)


def missing(chosen: Sequence[Kernel], capability: int, version: tuple[int, int]) -> list[Kernel]:
    """Those that are not there, or damaged."""
    return [k for k in chosen if read_kept(kept_file(k, capability, version)) is None]
