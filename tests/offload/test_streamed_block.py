"""Uses of a wrapped model that once broke it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import Residual, Stack, make_stack, stream

import bminf
from bminf.lazy import LazyTensor
from bminf.offload import memory


def test_functional_call_computes_with_what_it_is_given() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    given = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    expected, usual = torch.func.functional_call(plain, given, (x,)), plain(x)
    assert torch.equal(torch.func.functional_call(model, given, (x,)), expected)
    assert torch.equal(model(x), usual)


def resident_bytes() -> int:
    memory.trim()
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


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


def test_recurrent_layers_compute_with_the_slot_and_let_their_weights_go() -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(width, width, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.update(type(weight) for weight in self.lstm._flat_weights)
            return self.lstm(x)[0]

    seen: set[type] = set()
    model, x = make_stack(block=Recurrent, width=256), torch.randn(2, 5, 256)
    expected = model(x).detach()  # its history would keep the weights
    before = resident_bytes()
    stream(model)
    assert resident_bytes() < before - 3 * bminf.plan_of(model).blocks[0].nbytes
    seen.clear()
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert seen and LazyTensor not in seen  # or each would be fetched once more
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)


def test_autocast_keeps_no_copies_of_streamed_weights() -> None:
    model, x = make_stack(num_blocks=12, width=512), torch.randn(3, 512)
    model.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    stream(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        before = resident_bytes()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert resident_bytes() - before < 6 * 2**20  # the copies would be 12 MiB
        assert torch.is_autocast_cache_enabled()


def test_statistics_that_a_fused_operation_updates_are_kept() -> None:
    class Fused(Residual):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return torch.nn.functional.batch_norm(x, self.mean, self.variance, training=True)

    plain, model = (make_stack(block=Fused).train() for _ in range(2))
    stream(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(8, 16)
            assert torch.equal(model(x), plain(x))
    right = plain.state_dict()
    assert right["layers.5.mean"].abs().max() > 0
    assert all(torch.equal(v, right[k]) for k, v in model.state_dict().items())


@dataclass
class Output:
    table: torch.Tensor
    rest: Any


def test_outputs_of_any_make_do_not_change_with_the_slot() -> None:
    class Table(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(9, width))

        def forward(self) -> Output:
            return Output(self.table[:4], [self.table.T])

    class Tables(Stack):
        def forward(self) -> list[Output]:
            return [layer() for layer in self.layers]

    torch.manual_seed(0)
    model = Tables(7, 16, Table)
    expected = [layer.table.detach().clone() for layer in model.layers]
    stream(model)
    with torch.no_grad():
        for given, right in zip(model(), expected, strict=True):
            assert torch.equal(given.table, right[:4]) and torch.equal(given.rest[0], right.T)


def test_an_output_without_weights_is_the_very_object() -> None:
    class Dict(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = {"x": super().forward(x)}
            return self.last

    model = stream(make_stack(block=Dict))
    assert model.layers[5](torch.randn(2, 16)) is model.layers[5].last
