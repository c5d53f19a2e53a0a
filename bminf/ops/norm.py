"""RMSNorm and LayerNorm, also behind a residual connection, which one kernel adds and normalizes.

Kernels: kernels/rms_norm.cu, kernels/layer_norm.cu. They round where torch's operators do, so that
results differ by the order of sums in float32 at most.
Sources: Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from bminf.cuda.launcher import Launcher, fused_launcher
from bminf.cuda.source import Kernel
from bminf.errors import ArgumentError
from bminf.ops.fused import is_fusible
from bminf.ops.rows import ELEMENTS, KERNEL_COLUMNS, is_aligned

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
    if launcher is None or not _is_taken(x, weight, delta=delta):
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
    if launcher is None or not _is_taken(x, weight, bias, delta=delta):
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


def _is_taken(x: torch.Tensor, *weights: torch.Tensor, delta: torch.Tensor | None = None) -> bool:
    """By the kernel; otherwise by torch's operators, which check by themselves.

    Raises ArgumentError.
    """
    others = weights if delta is None else (*weights, delta)
    if x.shape[-1] > MAX_COLUMNS or not is_fusible(x, *others):
        return False
    for weight in weights:
        if weight.shape != x.shape[-1:] or weight.device != x.device:
            raise ArgumentError(
                f"a weight of the norm is {tuple(weight.shape)} on {weight.device}; x is "
                f"{tuple(x.shape)} on {x.device}, and takes {tuple(x.shape[-1:])} there"
            )
    if delta is not None and (delta.shape != x.shape or delta.device != x.device):
        raise ArgumentError(
            f"delta is {tuple(delta.shape)} on {delta.device}, x {tuple(x.shape)} on {x.device}; "
            "they must be alike"
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
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    weights = [weight.contiguous() for weight in weights]
    columns = x.shape[-1]
    total, y = None if delta is None else torch.empty_like(x), torch.empty_like(x)
    read = (x, *weights) if delta is None else (x, delta, *weights)
    is_wide = columns % KERNEL_COLUMNS == 0 and all(map(is_aligned, read))
    chunks, threads = _shares(columns)
    launcher.launch(
        norm_kernel(name, x.dtype, chunks, is_wide),
        (x.numel() // columns, 1, 1),
        (threads, 1, 1),
        [x, delta, *weights, total, y, columns, float(scale), float(eps)],
    )
    return x if total is None else total, y


@cache
def _shares(columns: int) -> tuple[int, int]:
    """Chunks of 8 columns for each thread, and threads."""
    needed = -(-columns // KERNEL_COLUMNS)
    chunks = next(n for n in _CHUNKS if needed <= n * _MAX_THREADS)
    return chunks, -(-needed // (chunks * _WARP)) * _WARP
