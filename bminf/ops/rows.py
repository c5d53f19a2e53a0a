"""Activations as rows: what every op accepts, and the form in which kernels take them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from bminf.errors import ArgumentError

ELEMENTS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}
"""dtype of activations -> the macro ELEMENT of the kernels."""

KERNEL_COLUMNS = 8  # kernels read this many neighbours at once
KERNEL_ALIGNMENT = 16  # bytes
_MAX_SIZE = 2**31 - 1


def check_activations(x: torch.Tensor, in_features: int, device: torch.device) -> None:
    """Raise ArgumentError unless `x` is (..., in_features) of an accepted dtype, on `device`."""
    if x.dtype not in ELEMENTS:
        raise ArgumentError(f"x is {x.dtype}; accepted: float32, float16, bfloat16")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ArgumentError(
            f"x has shape {tuple(x.shape)}, but the weight takes {in_features} columns"
        )
    if x.device != device:
        raise ArgumentError(f"x is on {x.device}, the weight on {device}; move them together")


def check_vector(name: str, vector: torch.Tensor | None, size: int, device: torch.device) -> None:
    """Raise ArgumentError unless `vector` is None or (size,) floating point on `device`."""
    if vector is None:
        return
    if not vector.is_floating_point() or tuple(vector.shape) != (size,):
        raise ArgumentError(
            f"{name} is {vector.dtype} of shape {tuple(vector.shape)}; it must be floating point, "
            f"({size},)"
        )
    if vector.device != device:
        raise ArgumentError(f"{name} is on {vector.device}, the weight on {device}")


@cache
def is_ordinary(kind: type) -> bool:
    """Whether tensors of this class do what those of torch.Tensor do, as those in a slot."""
    if kind is torch.Tensor:
        return True
    functions = getattr(kind, "__torch_function__", None), getattr(kind, "__torch_dispatch__", None)
    return functions == (
        torch._C._disabled_torch_function_impl,
        torch._C._disabled_torch_dispatch_impl,
    )


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (M, K)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def kernel_rows(x: torch.Tensor) -> torch.Tensor:
    """(M, K) as kernels read it: contiguous, aligned, K padded with zeros to a multiple of 8.

    Nothing is copied where that holds already. Raises ArgumentError for sizes over 2**31.
    """
    missing = -x.shape[1] % KERNEL_COLUMNS
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    if max(x.shape) > _MAX_SIZE:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; kernels count to {_MAX_SIZE}")
    return x if is_aligned(x) else x.clone()


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether kernels can read `tensor` 16 bytes at a time."""
    return tensor.data_ptr() % KERNEL_ALIGNMENT == 0


def check_codes(name: str, codes: torch.Tensor) -> None:
    """Raise ArgumentError for codes that a kernel cannot read: misaligned, or too many rows."""
    if not is_aligned(codes):
        raise ArgumentError(
            f"{name} begins at {codes.data_ptr():#x}, which is no multiple of "
            f"{KERNEL_ALIGNMENT} bytes; pass {name}.clone()"
        )
    if max(codes.shape) > _MAX_SIZE:
        raise ArgumentError(f"{name} has shape {tuple(codes.shape)}; kernels count to {_MAX_SIZE}")
