"""Rotary positions: queries and keys are rotated by angles that grow with their position.

Source: Su et al. 2021, arXiv:2104.09864. What rotates is in ops/rotary_append.py.
"""

from __future__ import annotations

import torch

_BASE = 10000.0


class Rotary(torch.nn.Module):
    """Cosines and sines of positions, computed once for each device.

    precision: torch.float32, or torch.float16, in which frequencies, angles, cosines and sines are
    all rounded to half precision. That is far from exact, beyond 1024 an angle is rounded to whole
    radians, but what a model was trained with (Zeng et al. 2022, arXiv:2210.02414).
    It holds no tensors that belong to a checkpoint.
    """

    def __init__(self, head_dim: int, num_positions: int, precision: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.num_positions, self.precision = head_dim, num_positions, precision
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) int64 -> cosines and sines, (B, 1, T, head_dim / 2) in `precision`."""
        device = position_ids.device
        if device not in self._tables:
            tables = rotary_table(self.num_positions, self.head_dim, self.precision)
            self._tables[device] = tables[0].to(device), tables[1].to(device)
        cos, sin = self._tables[device]
        return cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)


def rotary_table(
    num_positions: int, head_dim: int, precision: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0, 1, ...: two (num_positions, head_dim / 2) on the CPU."""
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        frequencies = (1.0 / _BASE**exponents).to(precision)
        angles = torch.arange(num_positions).to(precision).unsqueeze(1) * frequencies
        return angles.cos(), angles.sin()
