"""A block in its slot: what it computes with, what it changes and what it gives away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from streaming import Residual, Stack, assert_same_weights, make_stack, raise_once, stream

import bminf
from bminf.cli.measure import rss_anon_bytes
from bminf.lazy import LazyTensor
from bminf.offload import memory

# Which blocks are called, and with what


def test_blocks_out_of_order_and_twice_and_not_at_all() -> None:
    class Shuffled(Stack):
        order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in self.order:
                x = self.layers[number](x)
            return x

    torch.manual_seed(0)
    model, x = Shuffled(), torch.randn(3, 16)
    orders = [(6, 5, 4, 3), (0, 0, 0, 1), (2, 6, 2, 6, 2), (0, 1, 2, 3, 4, 5, 6), ()]
    expected = {}
    for model.order in orders:
        expected[model.order] = model(x)
    stream(model)
    for model.order in orders * 3:
        assert torch.equal(model(x), expected[model.order])


def test_a_block_may_call_itself_and_another() -> None:
    class Calling(Residual):
        other: Any = None

        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            if depth < 2:
                x = self(x, depth + 1)
            if depth == 0 and self.other is not None:
                x = self.other[0](x, 2)
            return super().forward(x)

    def calling() -> Stack:
        model = make_stack(block=Calling)
        model.layers[1].other = [model.layers[5]]  # in a list: not a child
        return model

    model, x = calling(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    for _ in range(2):
        assert torch.equal(model(x), expected)


def test_functional_call_computes_with_what_it_is_given() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    given = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    expected, usual = torch.func.functional_call(plain, given, (x,)), plain(x)
    assert torch.equal(torch.func.functional_call(model, given, (x,)), expected)
    assert torch.equal(model(x), usual)


def test_integer_parameters_stream() -> None:
    class Packed(Residual):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            packed = torch.randint(-9, 9, (width,), dtype=torch.int8)
            self.packed = torch.nn.Parameter(packed, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.packed

    model, x = make_stack(block=Packed), torch.randn(3, 16)
    expected = model(x)
    assert torch.equal(stream(model)(x), expected)
    assert model.layers[5].packed.dtype == torch.int8


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
    before = settled_bytes()
    stream(model)
    assert settled_bytes() < before - 3 * bminf.plan_of(model).blocks[0].nbytes
    seen.clear()
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert seen and LazyTensor not in seen  # or each would be fetched once more
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)


def settled_bytes() -> int:
    memory.trim()
    return rss_anon_bytes()


def test_autocast_keeps_no_copies_of_streamed_weights() -> None:
    model, x = make_stack(num_blocks=12, width=512), torch.randn(3, 512)
    model.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    stream(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        before = settled_bytes()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert settled_bytes() - before < 6 * 2**20  # the copies would be 12 MiB
        assert torch.is_autocast_cache_enabled()


# What a block changes


class Counting(Residual):
    """Counts its calls in a buffer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shift.add_(1)
        return super().forward(x)


class Replacing(Residual):
    """Puts another tensor in the place of its buffer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        self.shift = x.mean(0)
        return x


class Fused(Residual):
    """Has statistics that an operation updates without a trace."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return torch.nn.functional.batch_norm(x, self.mean, self.variance, training=True)


@pytest.mark.parametrize(
    ("block", "is_training"), [(Counting, False), (Replacing, False), (Fused, True)]
)
def test_buffers_that_a_block_changes_are_kept(block: type, is_training: bool) -> None:
    plain, model = (make_stack(block=block).train(is_training) for _ in range(2))
    before = make_stack(block=block).state_dict()
    stream(model)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, 16)
            assert torch.equal(model(x), plain(x))
    after = plain.layers[5].state_dict()
    assert any(not torch.equal(after[name], before[f"layers.5.{name}"]) for name in after)
    assert_same_weights(model, plain)
    assert_same_weights(bminf.unwrap(model), plain)


def test_buffers_changed_by_a_block_that_then_fails_are_kept() -> None:
    plain, model = make_stack(block=Counting), stream(make_stack(block=Counting))
    assert "layers.5" in bminf.plan_of(model).streamed
    with torch.no_grad():
        for stack in (plain, model):
            stack(torch.ones(3, 16))
            raise_once(stack.layers[5].down, ValueError("inside"))
            with pytest.raises(ValueError, match="inside"):
                stack(torch.ones(3, 16))
    assert_same_weights(model, plain)


def test_a_block_that_changes_its_buffers_may_follow_itself() -> None:
    class Repeating(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = self.layers[5](x)
            return x

    plain, model = (Repeating(block=Counting) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 16)
            assert torch.equal(model(x), plain(x))
    assert_same_weights(model, plain)


# What a block gives away


@dataclass
class Output:
    table: torch.Tensor
    rest: Any


class Table(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, width))

    def forward(self, kind: type) -> Any:
        return kind(table=self.table[:4], rest=[self.table.T])


class Tables(Stack):
    def forward(self, kind: type) -> list[Any]:
        return [layer(kind) for layer in self.layers]


@pytest.mark.parametrize("kind", [dict, Output])
def test_an_output_that_is_a_weight_does_not_change_with_the_slot(kind: type) -> None:
    model = Tables(7, 16, Table)
    expected = [layer.table.detach().clone() for layer in model.layers]
    stream(model)
    with torch.no_grad():
        for output, right in zip(model(kind), expected, strict=True):
            given = output if kind is dict else vars(output)
            assert torch.equal(given["table"], right[:4])
            assert torch.equal(given["rest"][0], right.T)


def test_an_output_without_weights_is_the_very_object() -> None:
    class Dict(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = {"x": super().forward(x)}
            return self.last

    model = stream(make_stack(block=Dict))
    assert model.layers[5](torch.randn(2, 16)) is model.layers[5].last


def test_a_block_may_hand_out_a_weight_of_another() -> None:
    class Lending(Residual):
        other: Any = None

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.other and self.other[0].shift

    model = make_stack(block=Lending)
    model.layers[1].other = [model.layers[5]]
    expected = model.layers[5].shift.clone()
    stream(model)
    assert torch.equal(model.layers[1](torch.randn(3, 16))[1], expected)
