"""Activations as the kernels read them."""

from __future__ import annotations

import pytest
import torch

from bminf.ops.rows import kernel_rows


@pytest.mark.parametrize(("columns", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (13, 16)])
def test_rows_end_with_zeros_at_a_multiple_of_8_columns(columns: int, padded: int) -> None:
    x = torch.randn(3, columns)
    rows = kernel_rows(x)
    assert rows.shape == (3, padded) and rows.is_contiguous()
    assert torch.equal(rows[:, :columns], x) and not rows[:, columns:].any()


def test_rows_that_are_right_are_not_copied() -> None:
    x = torch.randn(4, 16)
    assert kernel_rows(x).data_ptr() == x.data_ptr()
    part = torch.randn(65)[1:].view(4, 16)  # 4 bytes behind where vectors may be read
    rows = kernel_rows(part)
    assert rows.data_ptr() % 16 == 0 and torch.equal(rows, part)
