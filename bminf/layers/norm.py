"""RMSNorm as T5 has it."""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; no mean is subtracted, no bias added.

    x: (..., C) in the dtype of weight, (C,). The mean is taken in float32, and the quotient rounded
    to the dtype of x before it is scaled, as in the models' training.
    Source: Raffel et al. 2020, arXiv:1910.10683; Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.float().square().mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight
