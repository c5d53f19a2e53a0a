"""A linear with packed weights and float activations: y = x W^T + bias (W8A16, W4A16).

On a GPU: for few rows a kernel that reads the codes once, and tensor cores from 3 to 64 rows where
there are some; above, the weight is dequantized, slice by slice, for the library's product.
Kernels: kernels/linear_few_rows.cu, kernels/linear_tensor_core.cu, kernels/dequantize.cu.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.ops.cpu_linear import weight_only_linear
from bminf.ops.dequantize import (
    dequantize_weight,
    format_macros,
    group_arguments,
    weight_arguments,
)
from bminf.ops.rows import (
    ELEMENTS,
    KERNEL_ALIGNMENT,
    KERNEL_COLUMNS,
    check_codes,
    is_ordinary,
    kernel_rows,
)
from bminf.quantization.packed import CHUNK_BYTES, PackedWeight
from bminf.tracing import has_autocast, is_autocast

MAX_FEW_ROWS = 16
MIN_TENSOR_CORE_ROWS = 3
"""By count of instructions (tools.instructions), never measured: with one row and two the other
kernel needs 3.6 to 5.5 for a weight, which an H100 issues while its memory brings the next one, and
computes both halves of a gated feed-forward in one launch; with three and four 7.6 to 8.2, this
one, with up to eight, 1.7 to 3.8."""
MAX_TENSOR_CORE_ROWS = 64
"""By count of bytes, never measured: 16 rows of the weight share the activations, so that 64 rows
of these bring 8 bytes from the cache for a weight, 128 twice as many; dequantizing it first
writes and reads 2 from memory and leaves the activations to the library."""

FEW_ROWS_THREADS = 128
_BLOCKS_OF_PROCESSOR = 4  # at least, of the kernel for tensor cores
_SLICE_ELEMENTS = 2**26  # of a dequantized weight at a time: 128 MiB in 16 bits


def linear_weight_only(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launcher: Launcher | None
) -> torch.Tensor:
    """x: (M, K).   bias: (N,) in the dtype of x, or None.   Returns (M, N) in the dtype of x.

    launcher: of the device, None for a CPU.

    The arguments are taken to be right and not empty; bminf.ops.linear sees to that.
    """
    if launcher is None:
        return weight_only_linear(x, weight, bias)
    if uses_tensor_cores(launcher.capability, x.shape[0], x.dtype):
        check_codes("qweight", weight.qweight)
        return launch_tensor_cores(launcher, kernel_rows(x), weight, bias)
    if x.shape[0] <= MAX_FEW_ROWS:
        check_codes("qweight", weight.qweight)
        return launch_few_rows(launcher, kernel_rows(x), weight, bias)
    return _dequantized(x, weight, bias)


def few_rows_launched(
    launcher: Launcher,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    up: PackedWeight | None = None,
    up_bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor | None:
    """x W^T + bias by a kernel, or with `up` as launch_few_rows, for 1 to 16 rows in all that it
    can read as they lie; None for whatever else.

    This is the only check between a layer and its launch, so it takes nothing for granted but that
    the parts of a weight match, that both weights are alike, and that nobody watches (is_watched).
    x: (..., K).   Returns (..., N) in the dtype of x.
    """
    if up is not None and not _is_readable(x, up, up_bias):
        return None
    if not _is_readable(x, weight, bias):
        return None
    codes, scale, minimum, columns, group_size, _, row_scale = weight
    known = (
        *(x.dtype, x.shape, codes.dtype, codes.shape, columns, group_size, minimum is None),
        *(row_scale is None, up is None, activation, launcher.capability, launcher.num_processors),
    )
    launch = _launches.get(known)
    if launch is None:
        launch = _launch_of(launcher, x, weight, up is not None, activation)
        if launch is None:
            return None
        _launches[known] = launch
    plan, shape, is_tiled = launch
    y = x.new_empty(*shape)  # sizes one by one are read faster than a torch.Size
    of_up: tuple[torch.Tensor | None, ...] = () if is_tiled else _NO_UP
    if up is not None:
        of_up = *weight_arguments(up), up_bias
    launcher.run(plan, (x, codes, scale, minimum, row_scale, bias, *of_up, y))
    return y


def _is_readable(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> bool:
    """Whether a kernel can read a product as it lies, and it needs no derivative; its sizes and
    dtypes are another question."""
    codes = weight.qweight
    if not (is_ordinary(type(x)) and x.is_contiguous() and x.device == codes.device):
        return False
    if (x.data_ptr() | codes.data_ptr()) % KERNEL_ALIGNMENT:
        return False
    if (has_autocast() and is_autocast(x)) or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return bias is None or _is_bias_of(bias, x, codes)


_NO_UP = (None,) * 5
_launches: dict[tuple[Any, ...], tuple[LaunchPlan, tuple[int, ...], bool]] = {}
"""For what a check of sizes and dtypes looks at: the launch, the shape of its result, and whether
that is by tensor cores. What is in it was checked."""


def _launch_of(
    launcher: Launcher, x: torch.Tensor, weight: PackedWeight, is_gated: bool, activation: int
) -> tuple[LaunchPlan, tuple[int, ...], bool] | None:
    """None for sizes and dtypes that other ways are for."""
    columns, outputs = weight.in_features, weight.out_features
    if x.dtype not in ELEMENTS or not 0 < x.numel() <= MAX_FEW_ROWS * columns or not outputs:
        return None
    if columns % KERNEL_COLUMNS or x.shape[-1:] != (columns,):
        return None
    is_tiled = uses_tensor_cores(launcher.capability, x.numel() // columns, x.dtype)
    if is_tiled and is_gated:
        return None
    if is_tiled:
        plan = tensor_core_plan(x, weight, launcher.num_processors)
    else:
        plan = few_rows_plan(x, weight, is_gated, activation)
    return plan, (*x.shape[:-1], outputs), is_tiled


def _is_bias_of(bias: torch.Tensor, x: torch.Tensor, codes: torch.Tensor) -> bool:
    return (
        is_ordinary(type(bias))
        and bias.dtype == x.dtype
        and bias.device == x.device
        and bias.shape == codes.shape[:1]
        and bias.is_contiguous()
    )


def uses_tensor_cores(capability: int, num_rows: int, dtype: torch.dtype) -> bool:
    return (
        capability >= 80
        and dtype != torch.float32
        and MIN_TENSOR_CORE_ROWS <= num_rows <= MAX_TENSOR_CORE_ROWS
    )


def _dequantized(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The library's product with the dequantized weight, some rows of it at a time."""
    num_rows = max(1, _SLICE_ELEMENTS // max(1, weight.in_features))
    if num_rows >= weight.out_features:
        return F.linear(x, dequantize_weight(weight, x.dtype), bias)
    y = torch.empty((x.shape[0], weight.out_features), dtype=x.dtype, device=x.device)
    for start in range(0, weight.out_features, num_rows):
        rows = slice(start, start + num_rows)
        bias_slice = None if bias is None else bias[rows]
        y[:, rows] = F.linear(x, dequantize_weight(weight.rows(rows), x.dtype), bias_slice)
    return y


# ---- few rows ------------------------------------------------------------------------------------


def few_rows_kernel(
    dtype: torch.dtype, weight: PackedWeight, num_rows: int, is_gated: bool = False
) -> Kernel:
    """The kernel for `num_rows` rows of activations and a weight of this kind."""
    rows_of_x = rows_of_x_for(dtype, num_rows)
    if is_gated and (span_of(weight) == 0 or weight.form.has_minimum):
        rows_of_x = min(rows_of_x, 8)  # more would not fit the registers
    return Kernel(
        "linear_few_rows.cu",
        "linear_few_rows",
        (
            *_weight_macros(dtype, weight),
            ("ROWS_OF_X", rows_of_x),
            ("ROWS_OF_W", _rows_of_w(dtype, weight, rows_of_x, is_gated)),
            ("GATED", int(is_gated)),
        ),
    )


def rows_of_x_for(dtype: torch.dtype, num_rows: int) -> int:
    """Rows that a block takes together: the next power of two, up to what its registers hold."""
    limit = 4 if dtype == torch.float32 else MAX_FEW_ROWS
    return min(limit, 1 << (num_rows - 1).bit_length())


def span_of(weight: PackedWeight) -> int:
    """Columns that surely share a scale, counted from multiples of themselves: those of 16 bytes of
    codes, or 16; 0 where groups begin anywhere, -1 where a row has one scale."""
    if weight.num_groups == 1:
        return -1
    columns = 8 * CHUNK_BYTES // weight.bits
    assert weight.group_size is not None
    return next((span for span in (columns, 16) if weight.group_size % span == 0), 0)


def few_rows_grid(kernel: Kernel, num_rows: int, out_features: int) -> tuple[int, int, int]:
    macros = dict(kernel.macros)
    outputs = int(macros["ROWS_OF_W"]) // (1 + int(macros["GATED"]))
    return -(-out_features // outputs), -(-num_rows // int(macros["ROWS_OF_X"])), 1


def _rows_of_w(dtype: torch.dtype, weight: PackedWeight, rows_of_x: int, is_gated: bool) -> int:
    """Weight rows of a block: as many as fit its registers beside the rows of activations."""
    span = span_of(weight)
    # Minima and scales of two groups a chunk, beside activations of 32 bits: some compilers spill.
    is_heavy = dtype == torch.float32 and weight.minimum is not None and span == 16
    if rows_of_x <= 4 and span and not is_heavy:
        return 4
    return 1 if rows_of_x > 8 and not is_gated else 2


def _weight_macros(dtype: torch.dtype, weight: PackedWeight) -> tuple[tuple[str, int], ...]:
    return *format_macros(dtype, weight.form), ("SPAN", span_of(weight))


def launch_few_rows(
    launcher: Launcher,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    up: PackedWeight | None = None,
    up_bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor:
    """One product; with `up`, activation(the one with `weight`) * the one with `up`.

    x: as kernel_rows() gives it, with any number of axes.   Returns (..., N).
    """
    y = x.new_empty((*x.shape[:-1], weight.qweight.shape[0]))
    plan = few_rows_plan(x, weight, up is not None, activation)
    tensors = x, *weight_arguments(weight), bias, *weight_arguments(up), up_bias, y
    launcher.run(plan, tensors)
    return y


def few_rows_plan(
    x: torch.Tensor, weight: PackedWeight, is_gated: bool, activation: int
) -> LaunchPlan:
    """How such a product is launched, worked out once for such sizes."""
    key = (x.numel(), x.shape[-1], x.dtype, is_gated, activation, *sizes_of(weight))
    plan = _few_rows_plans.get(key)
    if plan is None:
        num_rows, num_columns = x.numel() // x.shape[-1], x.shape[-1]
        kernel = few_rows_kernel(x.dtype, weight, num_rows, is_gated)
        numbers = num_rows, weight.out_features, num_columns, *group_arguments(weight), activation
        grid = few_rows_grid(kernel, num_rows, weight.out_features)
        plan = LaunchPlan(kernel, grid, (FEW_ROWS_THREADS, 1, 1), numbers)
        _few_rows_plans[key] = plan
    return plan


_few_rows_plans: dict[tuple[Any, ...], LaunchPlan] = {}


def sizes_of(weight: PackedWeight) -> tuple[Any, ...]:
    """All of a weight that a launch depends on."""
    codes, _, minimum, columns, group_size, _, row_scale = weight
    return codes.shape[0], codes.dtype, columns, group_size, minimum is None, row_scale is None


# ---- tensor cores --------------------------------------------------------------------------------


def tensor_core_kernel(
    dtype: torch.dtype, weight: PackedWeight, num_rows: int, num_processors: int
) -> Kernel:
    """The kernel that takes the rows of activations in as few tiles of 8 to 64 as they fill.

    num_processors: of the device. Where 32 rows of the weight a block would be fewer blocks than
    four for each, a block takes 16 with twice the warps, which share out the columns: so that
    enough of the weight is on its way at once.
    """
    tiles = min(8, 1 << (-(-num_rows // 8) - 1).bit_length())
    is_narrow = weight.out_features < 32 * _BLOCKS_OF_PROCESSOR * num_processors
    # Fewer rows of the weight where more sums are in registers, and where groups begin anywhere.
    has_few_rows = is_narrow or tiles == 8 or span_of(weight) == 0
    macros = {
        "X_TILES": tiles, "W_TILES": 1 if has_few_rows else 2, "WARPS": 8 if is_narrow else 4,
    }  # fmt: skip
    return Kernel(
        "linear_tensor_core.cu",
        "linear_tensor_core",
        (*_weight_macros(dtype, weight), *macros.items()),
    )


def launch_tensor_cores(
    launcher: Launcher, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """One product.   x: as kernel_rows() gives it, with any number of axes.   Returns (..., N)."""
    y = x.new_empty((*x.shape[:-1], weight.qweight.shape[0]))
    plan = tensor_core_plan(x, weight, launcher.num_processors)
    tensors = x, *weight_arguments(weight), bias, y
    launcher.run(plan, tensors)
    return y


def tensor_core_plan(x: torch.Tensor, weight: PackedWeight, num_processors: int) -> LaunchPlan:
    """As few_rows_plan."""
    key = (x.numel(), x.shape[-1], x.dtype, num_processors, *sizes_of(weight))
    plan = _tensor_core_plans.get(key)
    if plan is None:
        num_rows, num_columns = x.numel() // x.shape[-1], x.shape[-1]
        kernel = tensor_core_kernel(x.dtype, weight, num_rows, num_processors)
        grid = tensor_core_grid(kernel, num_rows, weight.out_features)
        numbers = num_rows, weight.out_features, num_columns, *group_arguments(weight)
        threads = 32 * int(dict(kernel.macros)["WARPS"])
        plan = LaunchPlan(kernel, grid, (threads, 1, 1), numbers)
        _tensor_core_plans[key] = plan
    return plan


def tensor_core_grid(kernel: Kernel, num_rows: int, out_features: int) -> tuple[int, int, int]:
    macros = dict(kernel.macros)
    rows_of_x, rows_of_w = 8 * int(macros["X_TILES"]), 16 * int(macros["W_TILES"])
    return -(-out_features // rows_of_w), -(-num_rows // rows_of_x), 1


_tensor_core_plans: dict[tuple[Any, ...], LaunchPlan] = {}
