"""Activations to 8-bit codes, token by token, also straight from an RMSNorm.

Kernels: kernels/quantize_rows.cu, kernels/rms_norm_quantize.cu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import launcher_for
from bminf.cuda.source import Kernel
from bminf.ops.rows import ELEMENTS, as_rows, check_activations, check_vector, kernel_rows
from bminf.quantization.packed import row_bytes
from bminf.quantization.packing import int8_rows

_THREADS = 256


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token of `x` to 8 bits by its absolute maximum.

    x: (..., K) float16, bfloat16 or float32.   Returns codes (M, row_bytes) int8, K padded with
    zeros to 16, and scale (M,) float32; M is the number of tokens.   Raises ArgumentError.
    """
    check_activations(x, x.shape[-1] if x.dim() else 0, x.device)
    rows = as_rows(x.detach())
    launcher = launcher_for(x.device)
    if launcher is None or rows.numel() == 0:
        return _reference(rows)
    codes, scale = _empty(rows)
    rows = kernel_rows(rows)
    launcher.launch(
        quantize_rows_kernel(x.dtype),
        (len(rows), 1, 1),
        (_THREADS, 1, 1),
        [rows, codes, scale, rows.shape[1], codes.shape[1]],
    )
    return codes, scale


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS-normalize each token of `x`, scale by `weight`, and round to 8 bits: one kernel for both.

    x: (..., K) float16, bfloat16 or float32.   weight: (K,).   eps: added to the mean square.
    Returns codes and scale as quantize_rows does; sums in float32.   Raises ArgumentError.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    check_activations(x, weight.shape[0] if weight.dim() == 1 else -1, x.device)
    check_vector("weight", weight, x.shape[-1], x.device)
    rows, weight = as_rows(x.detach()), weight.detach().to(x.dtype)
    launcher = launcher_for(x.device)
    if launcher is None or rows.numel() == 0:
        return _reference(rms_norm_reference(rows, weight, eps))
    codes, scale = _empty(rows)
    num_columns = rows.shape[1]
    rows, weight = kernel_rows(rows), kernel_rows(weight.unsqueeze(0))
    launcher.launch(
        rms_norm_quantize_kernel(x.dtype),
        (len(rows), 1, 1),
        (_THREADS, 1, 1),
        [rows, weight, codes, scale, rows.shape[1], num_columns, codes.shape[1], float(eps)],
    )
    return codes, scale


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(M, K) float32, before it is rounded."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def quantize_rows_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("quantize_rows.cu", "quantize_rows", (("ELEMENT", ELEMENTS[dtype]),))


def rms_norm_quantize_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("rms_norm_quantize.cu", "rms_norm_quantize", (("ELEMENT", ELEMENTS[dtype]),))


def _empty(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (rows.shape[0], row_bytes(rows.shape[1], 8))
    codes = torch.empty(shape, dtype=torch.int8, device=rows.device)
    return codes, torch.empty(shape[0], dtype=torch.float32, device=rows.device)


def _reference(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = int8_rows(rows)
    return F.pad(codes, (0, row_bytes(codes.shape[1], 8) - codes.shape[1])), scale
