"""Tensors that are kept outside parameters and buffers are counted and named."""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from streaming import Residual, Stack, make_stack

import bminf
from bminf.errors import BudgetError
from bminf.offload.unregistered import find_unregistered
from bminf.wrapping import plan_for

TABLE_BYTES = 40 * 16 * 4


@dataclasses.dataclass
class Box:
    table: Any


class Holder:
    def __init__(self, table: Any) -> None:
        self.table = table


class Slotted:
    __slots__ = ("table",)

    def __init__(self, table: Any) -> None:
        self.table = table


KEPT: dict[str, Callable[[torch.Tensor], Any]] = {
    "attribute": lambda table: table,
    "list": lambda table: [None, table[:20], table[20:]],
    "dict of tuples": lambda table: {"a": (table, 3)},
    "dataclass": Box,
    "dataclass in dataclasses": lambda table: Box(Box(Box(Box(table)))),
    "object": Holder,
    "array": lambda table: table.numpy(),
    "unregistered module": lambda table: [torch.nn.Embedding.from_pretrained(table)],
    "sparse": lambda table: table.to_sparse(),
    "deque": lambda table: collections.deque([table]),
    "slots": lambda table: Slotted(table),
    "partial": lambda table: functools.partial(torch.nn.functional.embedding, weight=table),
    "closure": lambda table: lambda: table.sum(),
    "method": lambda table: torch.nn.Embedding.from_pretrained(table).forward,
    "storage": lambda table: table.untyped_storage(),
}


def prepack(table: torch.Tensor) -> Any:
    return torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(table, 0.1, 0, torch.qint8))


class Kept(Residual):
    """One that adds up a table kept as `keep` says."""

    def __init__(self, width: int, keep: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(width)
        self.extra = keep(torch.randn(40, width))


def kept(keep: Callable[[torch.Tensor], Any], num_blocks: int = 7) -> Stack:
    return make_stack(block=lambda width: Kept(width, keep), num_blocks=num_blocks)


def all_bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("kind", KEPT)
def test_they_are_counted_and_named(kind: str) -> None:
    model = kept(KEPT[kind])
    x = torch.randn(3, 16)
    expected = model(x)
    extra_bytes = 7 * TABLE_BYTES * (5 if kind == "sparse" else 1)  # two indices
    with pytest.raises(BudgetError):
        bminf.wrapper(kept(KEPT[kind]), False, extra_bytes, device="cpu")
    with pytest.warns(UserWarning, match=r"layers.0.extra, layers.1.extra, .* and 4 more") as said:
        bminf.wrapper(model, False, "1GB", device="cpu")
    assert said[0].filename == __file__ and len(said) == 1
    plan = bminf.plan_of(model)
    assert plan.total_bytes == all_bytes(model) + extra_bytes
    assert torch.equal(model(x), expected)


def test_under_a_limit_there_is_room_for_them() -> None:
    model, x = kept(KEPT["list"]), torch.randn(3, 16)
    expected = model(x)
    whole = plan_for(model, False)
    assert whole.total_bytes == all_bytes(model) + 7 * TABLE_BYTES
    limit = whole.total_bytes - whole.blocks[0].nbytes
    with pytest.warns(UserWarning, match="outside parameters and buffers"):
        bminf.wrapper(model, False, limit, device="cpu")
    assert bminf.plan_of(model).streamed and bminf.plan_of(model).total_bytes <= limit
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
def test_weights_that_torch_packs_into_objects_of_its_own_are_counted() -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.cell = torch.nn.LayerNorm(width), torch.nn.LSTM(width, width)
            self.out = torch.nn.Linear(width, width)

    kinds = {torch.nn.Linear, torch.nn.LSTM}
    model = torch.ao.quantization.quantize_dynamic(make_stack(block=Recurrent), kinds)
    found = {item.name: item for item in find_unregistered(model)}
    assert found["layers.3.out._packed_params._packed_params"].nbytes >= 16 * 16
    assert found["layers.3.cell._all_weight_values.0.param"].nbytes >= 2 * 4 * 16 * 16
    assert not any(item.is_opaque for item in found.values())


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.t()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_a_scripted_part_keeps_is_counted() -> None:
    model = make_stack()
    model.act = torch.jit.script(Table())
    model.frozen = torch.jit.freeze(torch.jit.script(Residual(16).eval()))
    found = {item.name: item.nbytes for item in find_unregistered(model)}
    assert found["act.table"] == TABLE_BYTES
    assert found["frozen.constants"] >= all_bytes(Residual(16))


@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
def test_an_object_that_cannot_be_seen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(packed: Any) -> Any:
        raise RuntimeError("no state")

    monkeypatch.setattr(torch.ScriptObject, "__getstate__", refuse, raising=False)
    with pytest.warns(UserWarning, match=r"what layers.0.extra.* hold cannot be seen"):
        bminf.wrapper(kept(prepack), False, "1GB", device="cpu")


class Aliased(Residual):
    """Other names for what is registered, for other modules, and for a little that is not."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.rows = self.up.weight[:2]
        self.parts = [self.up.weight, self.down.weight.detach(), {"shift": self.shift}]
        self.friends = [self.up]
        self.angles = torch.randn(2)


def test_other_names_for_registered_tensors_are_no_news() -> None:
    model = make_stack(block=Aliased, num_blocks=3)
    for layer in model.layers:
        layer.owner = [model]
    outer = torch.nn.Module()
    outer.model, outer.more = model, torch.nn.Linear(200, 200)
    model.outer = [outer]
    found = find_unregistered(model)
    assert {item.name: item.nbytes for item in found if item.nbytes} == {
        f"layers.{number}.angles": 8 for number in range(3)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bminf.wrapper(model, False, "1GB", device="cpu")
    assert bminf.plan_of(model).total_bytes == all_bytes(model) + 3 * 8


def test_an_array_that_two_hold_is_counted_once() -> None:
    table = numpy.ones((40, 16), numpy.float32)
    model = kept(lambda _: [table, table])
    assert sum(item.nbytes for item in find_unregistered(model)) == TABLE_BYTES
