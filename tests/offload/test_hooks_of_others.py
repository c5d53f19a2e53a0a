"""What others put on the modules of a streamed model: hooks and forwards of their own."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from streaming import Residual, Stack, make_stack, stream, streamed
from tiny_models import inputs_of, make

import bminf


def attach(model: Stack) -> None:
    for layer in model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def detach(model: Stack) -> None:
    for layer in model.layers:
        remove_hook_from_module(layer)


STEPS: dict[str, Callable[[Stack], Any]] = {
    "attach": attach,
    "detach": detach,
    "wrap": stream,
    "unwrap": bminf.unwrap,
}


ORDERS = [
    order
    for order in itertools.permutations(STEPS)
    if order.index("attach") < order.index("detach") and order.index("wrap") < order.index("unwrap")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_hooks_go_on_and_off_in_any_order(order: tuple[str, ...]) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    ends_streaming = order == ("attach", "wrap", "detach", "unwrap")
    for step in order:
        STEPS[step](model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(model(x), expected), step
        ended = [str(w.message) for w in said]
        assert len(ended) == (ends_streaming and step == "detach"), ended
        assert all("layers.0, layers.1, layers.2 and 4 more" in text for text in ended)
    assert not any(name.startswith("_old") for name in model.layers[5].__dict__)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    stream(model)
    copies = bminf.stats_of(model).copies
    assert torch.equal(model(x), expected) and bminf.stats_of(model).copies == copies + 7


def test_a_forward_that_is_removed_is_told_once_with_what_to_do() -> None:
    model, x, expected = streamed()
    del model.layers[5].forward
    with pytest.warns(UserWarning, match=r"streamed layers\.5 was removed.*unwrap") as said:
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert len(said) == 1
    bminf.unwrap(model)
    stream(model)
    assert torch.equal(model(x), expected)


def test_a_forward_wrapped_by_hand_goes_on_streaming() -> None:
    model, x, expected = streamed()
    layer = model.layers[5]
    inner, layer.forward = layer.forward, lambda x: inner(x) + 0
    assert torch.equal(model(x), expected)
    assert layer.up.weight.sum() == make_stack().layers[5].up.weight.sum()  # read, and no warning
    bminf.unwrap(model)
    assert torch.equal(model(x), expected) and torch.equal(layer(x), make_stack().layers[5](x))


def test_a_forward_of_its_own_on_a_block_is_kept() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    for layer in model.layers:
        layer.forward = lambda x, original=layer.forward: original(x) + 1
    own, expected = [layer.forward for layer in model.layers], model(x)
    stream(model)
    assert torch.equal(model(x), expected)
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)
    assert [layer.forward for layer in model.layers] == own


def test_hidden_states_are_captured_once_each() -> None:
    model, given = make("llama"), inputs_of("llama")
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True).hidden_states
        stream(model)
        hidden_states = model(**given, output_hidden_states=True).hidden_states
    assert len(hidden_states) == len(expected) == 8
    assert all(torch.equal(a, b) for a, b in zip(hidden_states, expected, strict=True))


def test_an_activation_shared_by_all_models_belongs_to_none() -> None:
    gelu = torch.nn.GELU()

    class Shared(Residual):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = gelu

    first, second = make_stack(block=Shared), make_stack(block=Shared)
    stream(first)
    assert "_apply" not in gelu.__dict__
    copy.deepcopy(second)
    stream(second)
