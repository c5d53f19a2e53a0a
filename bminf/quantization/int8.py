"""Rows of 8-bit codes with one scale each: activations, token by token, and weights, row by row.

x ~ q * scale with q in -127..127. The absolute maximum of a row is kept exactly; zeros stay zeros.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.
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
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
    # The clamp is for scales so small that they have few digits themselves.
    return torch.round(x / divisor).clamp_(-QMAX, QMAX).to(torch.int8), scale
