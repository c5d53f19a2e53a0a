"""A linear with 8-bit weights and 8-bit activations, exact in between: y = x W^T + bias (W8A8).

On a GPU the activations are rounded by a kernel; then either torch's integer product and a kernel
for the scales, or a kernel that does both, whichever is the faster one on the device.
Kernels: kernels/quantize_rows.cu, kernels/gemm_w8a8_dp4a.cu, kernels/gemm_w8a8_tensor_core.cu,
kernels/scale_int32.cu; on a CPU kernels/cpu/bytes.h.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher
from bminf.cuda.source import Grid, Kernel
from bminf.errors import ArgumentError
from bminf.ops.cpu_linear import w8a8_linear
from bminf.ops.dequantize import row_grid
from bminf.ops.quantize_rows import quantize_rows
from bminf.ops.rows import ELEMENTS, check_codes
from bminf.quantization.packed import PackedWeight

MIN_LIBRARY_ROWS = 64
"""From so many rows on torch's integer product is taken, where there are tensor cores for it."""

MAX_CODE_COLUMNS = (2**31 - 1) // 127**2
"""Of products of codes with codes, -127 to 127: their sums are sure to fit 32 bits."""

_DP4A_TILE = 64
_SCALE_THREADS = 256
_MAX_GRID_ROWS = 65535  # tiles along M in one launch


def linear_w8a8(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launcher: Launcher | None
) -> torch.Tensor:
    """x: (M, K).   bias: (N,) in the dtype of x, or None.   Returns (M, N) in the dtype of x.

    launcher: of the device, None for a CPU.

    The arguments are taken to be right and not empty; bminf.ops.linear sees to that.
    """
    if launcher is None:
        return w8a8_linear(x, weight, bias)
    codes, x_scale = quantize_rows(x)
    check_codes("qweight", weight.qweight)
    is_library = is_library_faster(launcher.capability, codes.shape[0])
    product = library_product if is_library else kernel_product
    return product(launcher, codes, x_scale, weight, bias, x.dtype)


def check_columns(weight: PackedWeight) -> None:
    """Raise ArgumentError where sums of 8-bit products may not fit into 32 bits."""
    if weight.in_features > MAX_CODE_COLUMNS:
        raise ArgumentError(
            f"the weight has {weight.in_features} columns; sums of 8-bit products fit 32 bits "
            f'up to {MAX_CODE_COLUMNS}; use activations="float"'
        )


def is_library_faster(capability: int, num_rows: int) -> bool:
    return capability >= 75 and num_rows >= MIN_LIBRARY_ROWS


def library_product(
    launcher: Launcher,
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch._int_mm, which wants more than 16 rows and multiples of 8, and the scales after it."""
    num_rows = codes.shape[0]
    codes = F.pad(codes, (0, 0, 0, max(0, 17 - num_rows)))
    missing = -weight.out_features % 8
    columns = F.pad(weight.qweight, (0, 0, 0, missing)) if missing else weight.qweight
    sums = torch._int_mm(codes, columns.t())
    y = torch.empty((num_rows, weight.out_features), dtype=dtype, device=codes.device)
    launcher.launch(
        scale_int32_kernel(dtype),
        row_grid(num_rows, weight.out_features, _SCALE_THREADS),
        (_SCALE_THREADS, 1, 1),
        [sums, x_scale, weight.scale, bias, y, weight.out_features, sums.shape[1]],
    )
    return y


def kernel_product(
    launcher: Launcher,
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One kernel from codes to results: dp4a, or tensor cores from compute capability 7.5 on."""
    num_rows = codes.shape[0]
    y = torch.empty((num_rows, weight.out_features), dtype=dtype, device=codes.device)
    kernel, grid, threads = _product_launch(launcher.capability, dtype, *y.shape)
    arguments = [codes, x_scale, weight.qweight, weight.scale, bias, y, *y.shape, codes.shape[1]]
    launcher.launch(kernel, grid, (threads, 1, 1), arguments)
    return y


def scale_int32_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("scale_int32.cu", "scale_int32", (("ELEMENT", ELEMENTS[dtype]),))


def dp4a_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("gemm_w8a8_dp4a.cu", "gemm_w8a8_dp4a", (("ELEMENT", ELEMENTS[dtype]),))


def tensor_core_kernel(dtype: torch.dtype, is_large: bool) -> Kernel:
    """Tiles of 128 x 128 and 8 warps, or of 32 x 64 and 4 warps."""
    shape = (128, 128, 2, 4) if is_large else (32, 64, 1, 4)
    names = ("TILE_M", "TILE_N", "WARPS_M", "WARPS_N")
    return Kernel(
        "gemm_w8a8_tensor_core.cu",
        "gemm_w8a8_tensor_core",
        (("ELEMENT", ELEMENTS[dtype]), *zip(names, shape, strict=True)),
    )


def _product_launch(
    capability: int, dtype: torch.dtype, num_rows: int, out_features: int
) -> tuple[Kernel, Grid, int]:
    if capability < 75:
        grid = _grid(num_rows, out_features, _DP4A_TILE, _DP4A_TILE)
        return dp4a_kernel(dtype), grid, 256
    kernel = tensor_core_kernel(dtype, is_large=num_rows > 64)
    macros = {name: int(value) for name, value in kernel.macros}
    grid = _grid(num_rows, out_features, macros["TILE_M"], macros["TILE_N"])
    return kernel, grid, 32 * macros["WARPS_M"] * macros["WARPS_N"]


def _grid(num_rows: int, out_features: int, tile_m: int, tile_n: int) -> Grid:
    if num_rows > _MAX_GRID_ROWS * tile_m:
        raise ArgumentError(f"x has {num_rows} rows; at most {_MAX_GRID_ROWS * tile_m} at once")
    return -(-out_features // tile_n), -(-num_rows // tile_m), 1
