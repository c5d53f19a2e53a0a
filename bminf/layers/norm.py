"""The norms of the zoo. Each also adds what the part before it is added to, as one kernel does."""

from __future__ import annotations

import torch

from bminf.ops.norm import Added, add_layer_norm, add_rms_norm, layer_norm, rms_norm


class RMSNorm(torch.nn.Module):
    """RMSNorm as T5 has it: no mean is subtracted, no bias added; see rms_norm().

    x: (..., C) in the dtype of weight, (C,). As in the models' training, the quotient is rounded to
    the dtype of x before it is scaled.
    Source: Raffel et al. 2020, arXiv:1910.10683; Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> Added:
        """x + delta, and that normalized."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last axis, with weight and bias, (C,) each."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor, scale: float = 1.0) -> Added:
        """x * scale + delta, and that normalized.   scale: DeepNorm's alpha."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps, scale)
