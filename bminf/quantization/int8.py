"""Row-wise symmetric INT8: what the packed numbers mean, in plain torch.

A matrix (N, K) becomes q (N, K) int8 in -127..127 and scale (N,) float32, one a row, with
weight ~ q * scale. The absolute maximum of a row is kept exactly; zeros stay zeros.
Activations are packed alike, one scale a token.
"""

from __future__ import annotations

import torch

QMAX = 127


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each row (last axis) of `x` by its absolute maximum.

    x: (..., K) floating point.   Returns q (..., K) int8 and scale (...) float32.
    """
    x = x.detach().float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), torch.ones(x.shape[:-1], device=x.device)
    scale = x.abs().amax(dim=-1) / QMAX
    # A row of zeros has scale 0; dividing by 1 instead keeps its q at 0.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    return torch.round(x / divisor).to(torch.int8), scale


def dequantize_rows(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q * scale, rounded once from float32 to `dtype`. q: (..., K) int8, scale: (...) float32."""
    return (q * scale.unsqueeze(-1)).to(dtype)
