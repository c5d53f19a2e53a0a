"""A packed weight back to numbers. Kernel: kernels/dequantize.cu."""

from __future__ import annotations

from typing import Any

import torch

from bminf.cuda.launcher import Launcher, launcher_for
from bminf.cuda.source import Grid, Kernel
from bminf.errors import ArgumentError
from bminf.ops.rows import ELEMENTS, check_codes
from bminf.quantization.packed import Format, PackedWeight, dequantize
from bminf.tracing import active_tracer

_THREADS = 128
_MAX_GRID_BLOCKS = 65535  # along a row, in one launch


def dequantize_weight(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """(out_features, in_features) in `dtype`: code * scale + minimum, rounded once from float32.

    dtype: float16, bfloat16 or float32.   Raises ArgumentError.
    """
    if torch.compiler.is_compiling() or active_tracer() is not None:
        y: torch.Tensor = _traced_dequantize(
            weight.qweight, weight.scale, weight.minimum, weight.in_features, weight.group_size,
            dtype, weight.row_scale,
        )  # fmt: skip
        return y
    if dtype not in ELEMENTS:
        raise ArgumentError(f"dtype={dtype}; accepted: float32, float16, bfloat16")
    launcher = launcher_for(weight.qweight.device)
    if launcher is None or 0 in (weight.out_features, weight.in_features):
        return dequantize(weight, dtype)
    weight.check()
    return _launch(launcher, weight, dtype)


def format_macros(dtype: torch.dtype, form: Format) -> tuple[tuple[str, int], ...]:
    """What tells a kernel how a weight is packed, and the type it computes with."""
    return (
        ("ELEMENT", ELEMENTS[dtype]),
        ("BITS", form.bits),
        ("HAS_MINIMUM", int(form.has_minimum)),
        ("SCALE_BITS", 8 * form.scale_dtype.itemsize),
    )


def weight_arguments(weight: PackedWeight | None) -> list[torch.Tensor | None]:
    """A weight as kernels take it; None is nothing."""
    if weight is None:
        return [None] * 4
    return [weight.qweight, weight.scale, weight.minimum, weight.row_scale]


def group_arguments(weight: PackedWeight) -> list[int]:
    """Its groups: what divides a column by their width, and how many there are."""
    columns = weight.in_features
    return [*divider(max(2, min(weight.group_size or columns, columns))), weight.num_groups]


def divider(width: int) -> tuple[int, int]:
    """A multiplier of 32 bits and a shift: n // width is the upper 32 bits of n * multiplier,
    shifted, for n from 0 to 2**31 - 1 and a width of at least 2.

    Source: Granlund & Montgomery 1994, doi:10.1145/773473.178249, section 4.
    """
    shift = (width - 1).bit_length() - 1
    return -(-(2 ** (32 + shift)) // width), shift


def kernel(dtype: torch.dtype, form: Format, in_features: int) -> Kernel:
    """The kernel for a weight of that kind."""
    macros = {"SPAN": _span(form, in_features), "IS_ALIGNED": int(in_features % 8 == 0)}
    return Kernel("dequantize.cu", "dequantize", (*format_macros(dtype, form), *macros.items()))


def _span(form: Format, in_features: int) -> int:
    """-1 where a row has one scale, 8 where 8 columns have, 0 where groups begin anywhere."""
    if form.group_size is None or form.group_size >= in_features:
        return -1
    return 0 if form.group_size % 8 else 8


def row_grid(rows: int, columns: int, columns_of_block: int) -> Grid:
    """A row of blocks for each row, so that no thread divides to know its own.

    Raises ArgumentError for rows longer than a grid.
    """
    blocks = -(-columns // columns_of_block)
    if blocks > _MAX_GRID_BLOCKS:
        raise ArgumentError(
            f"rows of {columns} elements; at most {_MAX_GRID_BLOCKS * columns_of_block} at once"
        )
    return rows, blocks, 1


def _launch(launcher: Launcher, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    check_codes("qweight", weight.qweight)
    rows, columns = weight.out_features, weight.in_features
    y = torch.empty((rows, columns), dtype=dtype, device=weight.qweight.device)
    launcher.launch(
        kernel(dtype, weight.form, columns),
        row_grid(rows, columns, 8 * _THREADS),
        (_THREADS, 1, 1),
        [*weight_arguments(weight), y, columns, *group_arguments(weight)],
    )
    return y


# For torch.compile: the same, opaque to it, and left out where only the shape is asked for.
_traced_dequantize: Any = torch.library.custom_op(
    "bminf::dequantize",
    lambda qweight, scale, minimum, in_features, group_size, dtype, row_scale=None: (
        dequantize_weight(
            PackedWeight(qweight, scale, minimum, in_features, group_size, row_scale=row_scale),
            dtype,
        )
    ),
    mutates_args=(),
    schema=(
        "(Tensor qweight, Tensor scale, Tensor? minimum, int in_features, int? group_size, "
        "ScalarType dtype, Tensor? row_scale=None) -> Tensor"
    ),
)
_traced_dequantize.register_fake(
    lambda qweight, scale, minimum, in_features, group_size, dtype, row_scale=None: (
        qweight.new_empty((qweight.shape[0], in_features), dtype=dtype)
    )
)
