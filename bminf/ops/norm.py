"""RMSNorm and LayerNorm, also behind a residual connection, which one kernel adds and normalizes.

Kernels: kernels/rms_norm.cu, kernels/layer_norm.cu. They round where torch's operators do, so that
results differ by the order of sums in float32 at most.
Sources: Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher, fused_launcher
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import ArgumentError
from bminf.ops.fused import is_fusible
from bminf.ops.rows import ELEMENTS, KERNEL_ALIGNMENT, KERNEL_COLUMNS

_MAX_THREADS = 512
_WARP = 32
_CHUNKS = (1, 2, 4)  # of 8 columns, that a thread may hold
MAX_COLUMNS = KERNEL_COLUMNS * _MAX_THREADS * _CHUNKS[-1]
"""Longer rows do not fit the registers of a block: they take torch's operators."""

Added = tuple[torch.Tensor, torch.Tensor]
"""The sum of a residual connection, and that normalized."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: (..., C) float16, bfloat16 or float32.   weight: (C,).   eps: added to the mean square.
    The mean is taken in float32, and the quotient rounded to the dtype of x before it is scaled.
    Returns (..., C).   Raises ArgumentError.
    """
    launcher = fused_launcher(x.device)
    if launcher is None or not _is_taken(x, weight):
        return rms_norm_reference(x, weight, eps)
    return _launch(launcher, "rms_norm", x, None, [weight], 1.0, eps)[1]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
) -> Added:
    """x * scale + delta, and the rms_norm() of that.   x, delta: (..., C) alike.

    Raises ArgumentError.
    """
    launcher = fused_launcher(x.device)
    if launcher is None or not _is_taken(x, delta, weight, has_delta=True):
        total = _added(x, delta, scale)
        return total, rms_norm_reference(total, weight, eps)
    return _launch(launcher, "rms_norm", x, delta, [weight], scale, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis.

    x: (..., C) float16, bfloat16 or float32.   weight, bias: (C,).   All in float32, rounded once.
    Returns (..., C).   Raises ArgumentError.
    """
    launcher = fused_launcher(x.device)
    if launcher is None or not _is_taken(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _launch(launcher, "layer_norm", x, None, [weight, bias], 1.0, eps)[1]


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: float = 1.0,
) -> Added:
    """x * scale + delta, and the layer_norm() of that.   x, delta: (..., C) alike.

    scale: DeepNorm's alpha (Wang et al. 2022, arXiv:2203.00555).   Raises ArgumentError.
    """
    launcher = fused_launcher(x.device)
    if launcher is None or not _is_taken(x, delta, weight, bias, has_delta=True):
        total = _added(x, delta, scale)
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    return _launch(launcher, "layer_norm", x, delta, [weight, bias], scale, eps)


def _added(x: torch.Tensor, delta: torch.Tensor, scale: float) -> torch.Tensor:
    """x * scale + delta, rounded after either step."""
    return (x if scale == 1.0 else x * scale) + delta


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """By operators of torch."""
    mean_square = x.float().square().mean(-1, keepdim=True)
    return (x.float() * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


@cache
def norm_kernel(name: str, dtype: torch.dtype, chunks: int, is_wide: bool) -> Kernel:
    """name: "rms_norm" or "layer_norm".   chunks: of 8 columns, that each thread holds.   is_wide:
    whether 16 bytes of a row can be read at once."""
    macros = (("ELEMENT", ELEMENTS[dtype]), ("CHUNKS", chunks), ("WIDE", int(is_wide)))
    return Kernel(f"{name}.cu", name, macros)


def _is_taken(x: torch.Tensor, *others: torch.Tensor, has_delta: bool = False) -> bool:
    """By the kernel; otherwise by torch's operators, which check by themselves.

    others: delta, if there is one, and weights.   Raises ArgumentError.
    """
    if x.shape[-1] > MAX_COLUMNS or not is_fusible(x, *others):
        return False
    columns, device = x.shape[-1:], x.device
    for index, other in enumerate(others):
        is_delta = has_delta and not index
        if other.shape != (x.shape if is_delta else columns) or other.device != device:
            raise ArgumentError(
                f"{'delta' if is_delta else 'a weight'} of a norm is {tuple(other.shape)} on "
                f"{other.device}; it does not go with x, {tuple(x.shape)} on {device}"
            )
    return True


def _launch(
    launcher: Launcher,
    name: str,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    scale: float,
    eps: float,
) -> Added:
    """Without a delta the sum is x."""
    x, total = x.contiguous(), None
    columns, addresses = x.shape[-1], x.data_ptr()
    if delta is not None:
        delta, total = delta.contiguous(), torch.empty_like(x)
        addresses |= delta.data_ptr()
    weights = [weight.contiguous() for weight in weights]
    for weight in weights:
        addresses |= weight.data_ptr()
    y = torch.empty_like(x)
    is_aligned = addresses % KERNEL_ALIGNMENT == 0
    plan = _plan(name, x.dtype, x.numel() // columns, columns, is_aligned, scale, eps)
    tensors = (x, delta, *weights, total, y)
    launcher.run(plan, tensors)
    return x if total is None else total, y


@lru_cache(maxsize=1024)  # a prompt of each length has one
def _plan(
    name: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    is_aligned: bool,
    scale: float,
    eps: float,
) -> LaunchPlan:
    needed = -(-columns // KERNEL_COLUMNS)
    chunks = next(n for n in _CHUNKS if needed <= n * _MAX_THREADS)
    threads = -(-needed // (chunks * _WARP)) * _WARP
    is_wide = is_aligned and columns % KERNEL_COLUMNS == 0
    kernel, numbers = norm_kernel(name, dtype, chunks, is_wide), (columns, float(scale), float(eps))
    return LaunchPlan(kernel, (rows, 1, 1), (threads, 1, 1), numbers)
