"""TransformerBlockList, for models written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streaming import Residual, Stack, make_stack

import bminf
from bminf.errors import (
    ArgumentError,
)


class HandWritten(torch.nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(16, 16)
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(x))


def block_list(**arguments: Any) -> tuple[bminf.TransformerBlockList, Stack]:
    stack = make_stack()
    limit = 3 * sum(t.nbytes for t in stack.layers[0].state_dict().values()) + 2000
    if not torch.cuda.is_available():
        arguments["gpus"] = None
    layers = list(make_stack().layers)
    return bminf.TransformerBlockList(layers, memory_limit=limit, **arguments), stack


def test_a_block_list_is_called_iterated_and_indexed() -> None:
    layers, stack = block_list()
    x = torch.randn(3, 16)
    assert isinstance(layers, torch.nn.ModuleList) and len(layers) == 7
    assert 0 < len(bminf.plan_of(layers).resident) < 3
    model, expected = HandWritten(layers), x
    with torch.no_grad():
        for layer in stack.layers:
            expected = layer(expected)
        assert torch.equal(layers(x), expected)
        given = x
        for layer in layers:
            given = layer(given)
        assert torch.equal(given, expected)
        assert torch.equal(layers[3](x), stack.layers[3](x))
        model(x)
    assert bminf.stats_of(layers).bytes_copied > 0
    right = stack.layers.state_dict()
    assert all(torch.equal(v, right[k]) for k, v in layers.state_dict().items())


def test_a_block_list_hands_on_the_first_of_a_tuple() -> None:
    class Tuple(Residual):
        def forward(self, x: torch.Tensor, *, add: float) -> tuple[torch.Tensor, float]:
            return super().forward(x) + add, add

    torch.manual_seed(0)
    layers = bminf.TransformerBlockList([Tuple(16) for _ in range(3)], memory_limit="1GB")
    x = torch.randn(2, 16, device=next(layers.parameters()).device)
    expected = x
    for layer in layers:
        expected = layer(expected, add=2.0)[0]
    assert torch.equal(layers(x, add=2.0)[0], expected) and layers(x, add=2.0)[1] == 2.0


@pytest.mark.parametrize("gpus", [[], [0, 1], "0", 0])
def test_a_block_list_runs_on_one_gpu(gpus: Any) -> None:
    with pytest.raises(ArgumentError, match="one index"):
        bminf.TransformerBlockList([Residual(4) for _ in range(3)], gpus=gpus)
