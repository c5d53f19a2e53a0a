"""TransformerBlockList, for models written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from streaming import Residual, Stack, assert_same_weights, make_stack

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
    assert_same_weights(layers, stack.layers)


def test_a_block_list_hands_on_the_first_of_a_tuple() -> None:
    class Tuple(Residual):
        def forward(self, x: torch.Tensor, *, add: float) -> tuple[torch.Tensor, float]:
            return super().forward(x) + add, add

    torch.manual_seed(0)
    layers = bminf.TransformerBlockList([Tuple(16) for _ in range(3)], memory_limit="1GB")
    x = torch.randn(2, 16)
    expected = x
    for layer in layers:
        expected = layer(expected, add=2.0)[0]
    assert torch.equal(layers(x, add=2.0)[0], expected) and layers(x, add=2.0)[1] == 2.0


@pytest.mark.parametrize("gpus", [[], [0, 1], "0", 0])
def test_a_block_list_runs_on_one_gpu(gpus: Any) -> None:
    with pytest.raises(ArgumentError, match="one index"):
        bminf.TransformerBlockList([Residual(4) for _ in range(3)], gpus=gpus)


def small_list(limit: int | str) -> tuple[bminf.TransformerBlockList, list[torch.nn.Module]]:
    """A list under `limit`, "least" for one that streams, and equal blocks that are not wrapped."""
    blocks = list(make_stack().layers)
    size = sum(t.nbytes for t in blocks[0].state_dict().values())
    limit = 3 * size if limit == "least" else limit
    return bminf.TransformerBlockList(list(make_stack().layers), memory_limit=limit), blocks


def run(blocks: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    return x


@pytest.mark.parametrize("limit", ["1GB", "least"])
@pytest.mark.parametrize(
    "part",
    [
        lambda layers: layers[:3],
        lambda layers: layers[::-2],
        lambda layers: layers[5:5],
        copy.copy,
        lambda layers: layers + layers[1:],
        lambda layers: torch.nn.ModuleList(layers),
    ],
)
def test_a_part_of_a_block_list_is_a_plain_list_of_the_same_blocks(
    limit: str, part: Callable[[Any], Any]
) -> None:
    layers, plain = small_list(limit)
    is_streamed = bool(bminf.plan_of(layers).streamed)
    assert is_streamed is (limit == "least")
    x = torch.randn(3, 16)
    pieces = part(layers)
    assert type(pieces) is torch.nn.ModuleList and bminf.plan_of(pieces) is None
    expected = part(torch.nn.ModuleList(plain))
    assert [list(layers).index(b) for b in pieces] == [plain.index(b) for b in expected]
    before = bminf.stats_of(layers).bytes_copied
    assert torch.equal(run(pieces, x), run(expected, x))
    assert (bminf.stats_of(layers).bytes_copied > before) is (is_streamed and len(pieces) > 1)
    del pieces
    assert torch.equal(layers(x), run(plain, x)) and bminf.plan_of(layers) is not None


@pytest.mark.parametrize("limit", ["1GB", "least"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layers, more: layers.append(more),
        lambda layers, more: layers.extend([more, layers[1]]),
        lambda layers, more: layers.insert(2, more),
        lambda layers, more: layers.__setitem__(4, more),
        lambda layers, more: layers.__delitem__(slice(1, 4)),
        lambda layers, more: layers.pop(5),
        lambda layers, more: layers.pop(slice(0, 2)),
        lambda layers, more: layers.__iadd__([more]),
    ],
)
def test_a_block_list_that_is_changed_runs_what_is_in_it(
    limit: str, change: Callable[[Any, torch.nn.Module], Any]
) -> None:
    layers, plain = small_list(limit)
    expected = torch.nn.ModuleList(plain)
    more = Residual(16).eval()
    x = torch.randn(3, 16)
    for changed in (layers, expected):
        change(changed, more)
    assert len(layers) == len(expected)
    for _ in range(2):
        assert torch.equal(layers(x), run(expected, x))
    bminf.unwrap(layers)
    assert torch.equal(layers(x), run(expected, x))
