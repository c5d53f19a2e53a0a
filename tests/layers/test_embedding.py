"""Rows of a table that stays on the host, in one part or several, of numbers or bytes."""

from __future__ import annotations

import pytest
import torch

from bminf.errors import UnsupportedModelError
from bminf.layers.embedding import HostEmbedding


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("sizes", [[9], [4, 0, 5]])
def test_rows_come_from_their_part_in_the_dtype_of_the_model(
    sizes: list[int], as_bytes: bool
) -> None:
    table = torch.randn(9, 6).half()
    parts = list(table.split(sizes))
    host = HostEmbedding(9, 6, torch.float32)
    host.keep([part.view(torch.uint8) for part in parts] if as_bytes else parts, torch.float16)
    ids = torch.tensor([[8, 0, 3], [4, 4, 7]])
    assert torch.equal(host(ids), table.float()[ids])
    assert torch.equal(host(ids[:, 1:2]), table.float()[ids[:, 1:2]])  # a column, of a batch
    assert host.bfloat16()(ids).dtype == torch.bfloat16
    assert not list(host.parameters()) and not host.state_dict()


def test_a_table_that_was_not_given_is_asked_for() -> None:
    with pytest.raises(UnsupportedModelError, match=r"keep\(\)"):
        HostEmbedding(9, 6)(torch.tensor([1]))
