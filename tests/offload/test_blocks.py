from __future__ import annotations

from typing import Any

import pytest
import torch
from streaming import Residual, Stack, make_stack, stream
from tiny_models import TINY, make
from torch.nn.utils.parametrizations import weight_norm

import bminf
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.offload.blocks import find_blocks


def names(model: torch.nn.Module, wanted: list[str] | None = None) -> list[str]:
    return [block.name for block in find_blocks(model, wanted)]


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("llama", {"model.layers": 7}),
        ("t5", {"encoder.block": 6, "decoder.block": 6}),
        ("bart", {"model.encoder.layers": 5, "model.decoder.layers": 6}),
        ("mamba", {"backbone.layers": 7}),
    ],
)
def test_blocks_are_the_items_of_the_outermost_lists(name: str, lists: dict[str, int]) -> None:
    found = find_blocks(make(name))
    counts = {n: sum(block.list_name == n for block in found) for n in lists}
    assert counts == lists and len(found) == sum(lists.values())


def test_lists_that_repeat_nothing_are_passed_over() -> None:
    model = torch.nn.Module()
    model.mixed = torch.nn.ModuleList([torch.nn.Linear(2, 2), make_stack(num_blocks=3)])
    model.plain = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    assert names(model) == [f"mixed.1.layers.{i}" for i in range(3)]


def test_items_without_tensors_are_no_blocks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert names(model) == ["0", "2"]


def test_blocks_by_name_come_in_module_order_and_a_list_stands_for_its_items() -> None:
    model = make_stack(num_blocks=3)
    wanted = ["layers.2.up", "layers.0", "layers.1.down"]
    assert names(model, wanted) == ["layers.0", "layers.1.down", "layers.2.up"]
    assert {block.list_name for block in find_blocks(model, wanted)} == {"layers"}
    assert names(model, ["layers"]) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["layers.9"], "'layers.9', which is not a module.*near it: layers"),
        ([""], "not a module"),
        (["layers.1", "layers.1"], "twice"),
        (["layers.1", "layers.1.up"], r"'layers.1.up' lies inside the block 'layers.1'"),
        (["layers", "layers.1.up"], "lies inside"),
        ("layers.1", "one string"),
    ],
)
def test_bad_names_are_refused(wanted: list[str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        find_blocks(make_stack(num_blocks=3), wanted)


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), torch.nn.Sequential(Residual(4)), Stack(1), torch.nn.ReLU()]
)
def test_a_model_that_repeats_nothing_has_no_blocks(model: torch.nn.Module) -> None:
    assert find_blocks(model) == []


def test_names_of_modules_without_tensors_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"none of the modules.*holds a tensor"):
        find_blocks(model, ["1"])


@pytest.mark.parametrize("name", TINY)
def test_layers_of_language_models_are_never_cut(name: str) -> None:
    """Each is more than an eighth of all, and some hold lists (experts, parts of a layer)."""
    assert all(name.rpartition(".")[2].isdigit() for name in names(make(name)))


# Parametrised and wrapped items


class Wrapped(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._checkpoint_wrapped_module(x)


def of_own_class(width: int) -> torch.nn.Module:
    class Local(Residual):
        pass

    return Local(width)


LISTS = {
    "parametrised": lambda: [weight_norm(torch.nn.Linear(8, 8)) for _ in range(4)],
    "one of them parametrised": lambda: [
        weight_norm(torch.nn.Linear(8, 8)),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 8),
    ],
    "one of them wrapped": lambda: [Wrapped(Residual(8)), Residual(8)],
    "compiled": lambda: [torch.compile(Residual(8), backend="eager"), Residual(8)],
    "classes made in a function": lambda: [of_own_class(8) for _ in range(3)],
}


@pytest.mark.parametrize("case", LISTS)
def test_items_are_alike_whatever_was_put_around_them(case: str) -> None:
    items = LISTS[case]()
    assert names(torch.nn.ModuleList(items)) == [str(at) for at in range(len(items))]


def test_parametrised_items_stream() -> None:
    def make_model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(weight_norm(torch.nn.Linear(8, 8)) for _ in range(5))).eval()

    x = torch.randn(2, 8)
    assert torch.equal(stream(make_model())(x), make_model()(x))


class Nested(torch.nn.Module):
    """The usual shape of a model written by hand: a list of [attention, feed-forward] lists."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        pairs = [[Residual(16), Residual(16)] for _ in range(5)]
        self.layers = torch.nn.ModuleList([inner(pair) for pair in pairs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.layers:
            items = pair.values() if isinstance(pair, torch.nn.ModuleDict) else pair
            for part in items:
                x = part(x)
        return x


@pytest.mark.parametrize(
    "inner",
    [torch.nn.ModuleList, lambda pair: torch.nn.ModuleDict(dict(zip("ab", pair, strict=True)))],
)
def test_lists_of_lists_stream_by_their_items(inner: Any) -> None:
    torch.manual_seed(0)
    model, x = Nested(inner), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    plan = bminf.plan_of(model)
    assert len(plan.blocks) == 10 and {b.list_name for b in plan.blocks} == {"layers"}
    assert torch.equal(model(x), expected)
    assert bminf.stats_of(model).copies >= len(plan.streamed) >= 8
