"""Rotary positions, against numbers of two parts that are turned by multiplying them."""

from __future__ import annotations

import pytest
import torch

from bminf.layers.rotary import Rotary
from bminf.ops.rotary_append import rotate

HEAD_DIM = 8


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x: (B, H, T, D), each column of its first half taken with the same one of its second."""
    numbers = torch.complex(*x.chunk(2, dim=-1))
    speeds = 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angles = positions[:, None, :, None] * speeds
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


@pytest.mark.parametrize("positions", [[[0, 1, 2], [7, 3, 3]], [[31, 0, 30], [1, 1, 1]]])
def test_rows_are_turned_by_their_positions(positions: list[list[int]]) -> None:
    ids, x = torch.tensor(positions), torch.randn(2, 4, 3, HEAD_DIM)
    given = rotate(x, *Rotary(HEAD_DIM, 32, torch.float32)(ids))
    assert torch.allclose(given, turned(x, ids), atol=1e-5)


def test_half_precision_stays_where_only_the_angles_are_in_float32() -> None:
    x = torch.randn(1, 1, 2, HEAD_DIM).half()
    assert rotate(x, *Rotary(HEAD_DIM, 4, torch.float32)(torch.tensor([[0, 3]]))).dtype == x.dtype
