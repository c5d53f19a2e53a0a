"""A linear layer with row-wise INT8 weights: y = x @ (q * scale)^T + bias.

Two schemes: w8a16 keeps the activations as they are; w8a8 packs them too, one scale a token, and
multiplies integers. Source of the scheme: Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bminf.errors import ArgumentError
from bminf.quantization.int8 import dequantize_rows, quantize_rows


def linear_w8a16(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply `x` by the dequantised weight, and add `bias`.

    x: (..., K) float32, float16 or bfloat16.   qweight: (N, K) int8.   scale: (N,) float32.
    bias: (N,) or None.   Returns (..., N) in the dtype of x. Differentiable in x.
    Raises ArgumentError for other shapes or dtypes.
    """
    _check(x, qweight, scale)
    return F.linear(x, dequantize_rows(qweight, scale, x.dtype), _cast(bias, x.dtype))


def linear_w8a8(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As linear_w8a16, with each token of `x` rounded to INT8; sums are exact in int32.

    The gradient in x passes straight through the rounding.
    """
    _check(x, qweight, scale)
    y: torch.Tensor = _LinearW8A8.apply(x, qweight, scale)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(x.dtype)


class _LinearW8A8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(qweight, scale)
        qx, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = _int8_matmul(qx, qweight) * row_scale.unsqueeze(-1) * scale
        return y.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        qweight, scale = ctx.saved_tensors
        return grads[0] @ dequantize_rows(qweight, scale, grads[0].dtype), None, None


def _int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) x b (N, K)^T -> (M, N) int32, exact."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    # cuBLASLt takes more than 16 rows, and K and N in multiples of 8; zeros change no sum.
    rows, columns = a.shape[0], b.shape[0]
    a = F.pad(a, (0, -a.shape[1] % 8, 0, max(0, 17 - rows)))
    b = F.pad(b, (0, -b.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


def _check(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ArgumentError(f"x is {x.dtype}; accepted: float32, float16, bfloat16")
    if qweight.dtype != torch.int8 or qweight.dim() != 2:
        raise ArgumentError(
            f"qweight is {qweight.dtype} of shape {tuple(qweight.shape)}; it must be int8 (N, K)"
        )
    if x.dim() == 0 or x.shape[-1] != qweight.shape[1]:
        raise ArgumentError(
            f"x has shape {tuple(x.shape)}, but qweight takes {qweight.shape[1]} columns"
        )
    if scale.dtype != torch.float32 or scale.shape != qweight.shape[:1]:
        raise ArgumentError(
            f"scale is {scale.dtype} of shape {tuple(scale.shape)}; "
            f"it must be float32 ({qweight.shape[0]},)"
        )
