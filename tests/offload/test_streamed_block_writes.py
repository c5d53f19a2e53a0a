"""Writes in place to the weights of a streamed block, from outside its forward, take effect."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from streaming import MODES, Stack, assert_same_weights, make_stack, stream

import bminf
from bminf.errors import UnsupportedModelError

WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "whole": lambda weight: weight.div_(2),
    "row": lambda weight: weight[1].fill_(3.0),
    "item": lambda weight: weight.__setitem__((0, 2), 3.0),
    "column of the transpose": lambda weight: weight.t()[2:4].mul_(3),
    "chunk": lambda weight: weight.chunk(2)[1].zero_(),
    "flat": lambda weight: weight.detach().view(-1)[5:9].copy_(torch.arange(4.0)),
    "data": lambda weight: weight.data.add_(1),
    "data set": lambda weight: setattr(weight, "data", weight.data * 2),
    "itself": lambda weight: weight.mul_(weight),
    "out": lambda weight: torch.mul(weight, 2, out=weight),
    "foreach": lambda weight: torch._foreach_mul_([weight, torch.ones(3)], 2.0),
    "initialised": lambda weight: torch.nn.init.normal_(
        weight, generator=torch.Generator().manual_seed(3)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_takes_effect(write: str, mode: str) -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    context = MODES[mode] if mode != "grad" else torch.no_grad
    with context():
        model(x)  # the first blocks of the next pass are being copied already
        for stack in (plain, model):
            for layer in stack.layers:
                WRITES[write](layer.up.weight)
        for _ in range(2):
            assert torch.equal(model(x), plain(x))
    assert_same_weights(model, plain)
    bminf.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_a_write_returns_the_weight_itself() -> None:
    weight = stream(make_stack()).layers[5].up.weight
    with torch.no_grad():
        assert weight.mul_(2) is weight and weight.data[:2].zero_().shape == (2, 16)


def scale(weight: torch.Tensor, *_: Any) -> None:
    weight.data.mul_(2)


def test_a_weight_written_while_its_block_runs_is_written_in_the_slot_too() -> None:
    plain, model, x = make_stack(), make_stack(), torch.randn(3, 16)
    stream(model)
    weights = {stack: stack.layers[5].down.weight for stack in (plain, model)}
    for stack, weight in weights.items():
        write = functools.partial(scale, weight)
        stack.layers[5].up.register_forward_hook(write)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))


def test_a_weight_that_outlives_the_wrapping_is_read_and_written_where_it_is_then() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    weight = model.layers[5].up.weight
    bminf.unwrap(model)
    assert torch.equal(weight, plain.layers[5].up.weight)
    with torch.no_grad():
        for written in (weight, plain.layers[5].up.weight):
            written[2].mul_(3)
        assert torch.equal(model(x), plain(x))


def test_weights_set_by_the_first_pass_are_set() -> None:
    config = transformers.RwkvConfig(
        vocab_size=96, hidden_size=32, attention_hidden_size=32, intermediate_size=48,
        num_hidden_layers=8, context_length=64,
    )  # fmt: skip
    ids = torch.arange(12).view(2, 6)

    def made() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.RwkvForCausalLM(config).eval()

    right, model = made(), stream(made())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits, right(ids).logits)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.t_(),
        lambda weight: weight.data.resize_(3),
        lambda weight: setattr(weight, "data", torch.zeros(3)),
        lambda weight: setattr(weight, "data", weight.data.double()),
    ],
)
def test_a_write_that_changes_more_than_values_is_refused(write: Callable[[Any], Any]) -> None:
    model, x = stream(make_stack()), torch.randn(3, 16)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"before wrapping|unwrap"):
        write(model.layers[5].up.weight)
    assert torch.equal(model(x), make_stack()(x))


@pytest.mark.parametrize("limit", ["1GB", None])
def test_a_write_to_a_quantized_weight_says_what_works(limit: str | None) -> None:
    model: Stack = make_stack()
    if limit is None:
        stream(model, quantization=True)
    else:
        bminf.wrapper(model, memory_limit=limit, device="cpu")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match=r"before wrapping.*quantization=False"),
    ):
        model.layers[5].up.weight.div_(2)


def exchange(up: torch.nn.Module, down: torch.nn.Module) -> None:
    up.bias.data, down.bias.data = down.bias.data, up.bias.data


def cast_twice(up: torch.nn.Module, down: torch.nn.Module) -> None:
    up.bfloat16().float()


INSIDE: dict[str, Callable[[Any, Any], Any]] = {
    "data in place": lambda up, down: up.weight.data.div_(2),
    "data copied to": lambda up, down: up.weight.data.copy_(up.weight.data * 3),
    "data set": lambda up, down: setattr(up.weight, "data", up.weight.data * 3),
    "data exchanged": exchange,
    "rounded by a cast": cast_twice,
    "swapped": lambda up, down: torch.utils.swap_tensors(
        up.bias, torch.nn.Parameter(torch.ones(16))
    ),
}


class Initial(torch.nn.Module):
    """Changes its weights in its first pass, in a way that torch counts no versions of."""

    write = "data in place"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.is_first = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            self.is_first = False
            INSIDE[Initial.write](self.up, self.down)
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("write", INSIDE)
def test_a_write_inside_the_forward_is_kept(write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Initial, "write", write)
    plain, model = make_stack(block=Initial), stream(make_stack(block=Initial))
    x = torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
        assert_same_weights(model, plain)
        bminf.unwrap(model)
        assert torch.equal(model(x), plain(x))


def test_data_may_be_set_to_itself() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    for stack in (plain, model):
        for p in stack.parameters():
            p.data = p.data.to("cpu").contiguous()
        stack.layers[2].up.weight.data = stack.layers[3].up.weight.data
    assert torch.equal(model(x), plain(x))


def test_a_parameter_taken_away_stays_away() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    for stack in (plain, model):
        torch.manual_seed(0)
        torch.nn.utils.spectral_norm(stack.layers[2].up)  # a hook computes its weight from now on
        stack.eval().layers[3].up.bias = None
    for _ in range(2):
        assert torch.equal(model(x), plain(x))


def test_a_tensor_that_was_swapped_in_is_used() -> None:
    """The object that stands there is the one of before, with another tensor's values and class."""
    reference, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    other = torch.nn.Parameter(torch.randn(32, 16))
    with torch.no_grad():
        reference.layers[3].up.weight.copy_(other)
        torch.utils.swap_tensors(model.layers[3].up.weight, other)
        for _ in range(3):
            assert torch.equal(model(x), reference(x))


def test_weights_set_anew_outside_a_forward_are_used() -> None:
    plain, model, x = make_stack(), stream(make_stack()), torch.randn(3, 16)
    weight, shift = torch.randn(32, 16), torch.randn(16)
    for changed in (plain, model):
        changed.layers[5].up.weight = torch.nn.Parameter(weight)
        changed.layers[4].shift = shift
    for _ in range(2):
        assert torch.equal(model(x), plain(x))
    bminf.unwrap(model)
    assert torch.equal(model(x), plain(x)) and torch.equal(model.layers[5].up.weight, weight)
