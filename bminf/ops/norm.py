"""RMSNorm and LayerNorm, also behind a residual connection, which one kernel adds and normalizes.

Kernels: kernels/rms_norm.cu, kernels/layer_norm.cu. They round where torch's operators do, so that
results differ by the order of sums in float32 at most.
Sources: Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import ArgumentError
from bminf.ops.fused import launcher_in_place
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
    found = _launched("rms_norm", x, None, (weight,), 1.0, eps)
    return rms_norm_reference(x, weight, eps) if found is None else found[1]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
) -> Added:
    """x * scale + delta, and the rms_norm() of that.   x, delta: (..., C) alike.

    Raises ArgumentError.
    """
    found = _launched("rms_norm", x, delta, (weight,), scale, eps)
    if found is not None:
        return found
    total = _added(x, delta, scale)
    return total, rms_norm_reference(total, weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis.

    x: (..., C) float16, bfloat16 or float32.   weight, bias: (C,).   All in float32, rounded once.
    Returns (..., C).   Raises ArgumentError.
    """
    found = _launched("layer_norm", x, None, (weight, bias), 1.0, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps) if found is None else found[1]


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
    found = _launched("layer_norm", x, delta, (weight, bias), scale, eps)
    if found is not None:
        return found
    total = _added(x, delta, scale)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


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


def _launched(
    name: str,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weights: tuple[torch.Tensor, ...],
    scale: float,
    eps: float,
) -> Added | None:
    """By the kernel, where without a delta the sum is x; None where torch's operators are to be
    taken, which check by themselves.   Raises ArgumentError."""
    others = weights if delta is None else (delta, *weights)
    launcher = launcher_in_place(x, *others)
    if launcher is None:
        return None
    plan = _plan_of(name, x, others, delta is not None, scale, eps)
    if plan is None:
        return None
    x, *parts = [tensor.contiguous() for tensor in (x, *others)]
    y, total = torch.empty_like(x), None if delta is None else torch.empty_like(x)
    nothing = (None,) if delta is None else ()
    launcher.run(plan, (x, *nothing, *parts, total, y))
    return x if total is None else total, y


def _plan_of(
    name: str,
    x: torch.Tensor,
    others: tuple[torch.Tensor, ...],
    has_delta: bool,
    scale: float,
    eps: float,
) -> LaunchPlan | None:
    """How the kernel is launched; None for rows that it does not take.

    others: delta, if there is one, and weights.
    Raises ArgumentError where shapes or devices do not go together.
    """
    shape, addresses = x.shape, x.data_ptr()
    known: list[Any] = [name, has_delta, x.dtype, shape, x.device, scale, eps]
    for other in others:
        known += other.shape, other.device
        addresses |= other.data_ptr()
    is_aligned = addresses % KERNEL_ALIGNMENT == 0
    key = *known, is_aligned
    plan = _plans.get(key)
    if plan is None and shape[-1] <= MAX_COLUMNS:
        _check(x, others, has_delta)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        rows = x.numel() // shape[-1]
        plan = _plans[key] = _plan(name, x.dtype, rows, shape[-1], is_aligned, scale, eps)
    return plan


def _check(x: torch.Tensor, others: tuple[torch.Tensor, ...], has_delta: bool) -> None:
    columns, device = x.shape[-1:], x.device
    for index, other in enumerate(others):
        is_delta = has_delta and not index
        if other.shape != (x.shape if is_delta else columns) or other.device != device:
            raise ArgumentError(
                f"{'delta' if is_delta else 'a weight'} of a norm is {tuple(other.shape)} on "
                f"{other.device}; it does not go with x, {tuple(x.shape)} on {device}"
            )


_MAX_PLANS = 1024  # a prompt of each length has one
_plans: dict[tuple[Any, ...], LaunchPlan] = {}
"""By what _plan_of() looks at: what has a plan was checked."""


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
