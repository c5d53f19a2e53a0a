"""Appends by torch's operators; tests/kernels/fused_cases.py has the kernel."""

from __future__ import annotations

import torch

from bminf.ops.rotary_append import rotary_append_reference, rotate

B, H, T, D, N = 2, 3, 4, 8, 20


def test_tokens_go_to_their_cells_and_queries_come_back_rotated() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, B, H, T, D)
    turned = torch.rand(B, 1, T, D // 2)
    angles = turned.cos(), turned.sin()
    cells = torch.randperm(N)[: B * T]
    cells[3] = -1
    keys, values = torch.zeros(2, H, N, D)
    given = rotary_append_reference(query, key, value, angles, cells, keys, values)
    assert torch.equal(given, rotate(query, *angles))
    rotated = rotate(key, *angles)
    for token, cell in enumerate(cells.tolist()):
        row, column = divmod(token, T)
        if cell >= 0:
            assert torch.equal(keys[:, cell], rotated[row, :, column])
            assert torch.equal(values[:, cell], value[row, :, column])
    unused = sorted({*range(N)} - {*cells.tolist()})
    assert (
        len(unused) == N - B * T + 1 and not keys[:, unused].any() and not values[:, unused].any()
    )


def test_a_rotation_by_nothing_changes_nothing() -> None:
    x = torch.randn(B, H, T, D)
    assert torch.equal(rotate(x, torch.ones(B, 1, T, D // 2), torch.zeros(B, 1, T, D // 2)), x)
