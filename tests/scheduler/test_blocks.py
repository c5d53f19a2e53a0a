from __future__ import annotations

import pytest
import torch
from streaming import Residual, Stack, make_stack
from tiny_models import make

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.scheduler.blocks import find_blocks


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
    "model", [torch.nn.Linear(2, 2), torch.nn.Sequential(Residual(4)), Stack(1)]
)
def test_a_model_that_repeats_nothing_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no list of repeated modules.*blocks="):
        find_blocks(model)
