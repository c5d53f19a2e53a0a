"""Hooks that keep weights in one dtype and compute in another, leaf by leaf, in each forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import LayerwiseCastingHook, add_hook_to_module
from streaming import Residual, Stack, assert_same_weights, make_stack, stream, streamed

import bminf
from bminf.errors import UnsupportedModelError


class Counted(Residual):
    """Has a buffer that it writes to while it is cast, and one module inside another."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.down = torch.nn.Sequential(self.down, self.norm)


def cast(model: Stack, storage: torch.dtype, by: str) -> Stack:
    """Kept in `storage`, computed with in float32."""
    for layer in model.layers:
        parts = {
            "leaves": [m for m in layer.modules() if isinstance(m, torch.nn.Linear)],
            "modules of several": [layer.up, layer.down],
            "blocks": [layer],
        }
        for part in parts[by]:
            add_hook_to_module(part, LayerwiseCastingHook(storage, torch.float32, False))
    return model


@pytest.mark.parametrize("by", ["leaves", "modules of several", "blocks"])
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_the_output_is_that_of_the_plain_model(by: str, storage: torch.dtype) -> None:
    plain, model = (cast(make_stack(block=Counted), storage, by) for _ in range(2))
    stream(model)
    dtypes = {key: value.dtype for key, value in plain.state_dict().items()}
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 16)
            assert torch.equal(model(x), plain(x))
    weights = model.state_dict()
    assert {key: value.dtype for key, value in weights.items()} == dtypes
    assert bminf.stats_of(model).bytes_copied > 0
    bminf.unwrap(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("by", ["leaves", "modules of several"])
def test_what_is_written_while_it_is_cast_is_kept(by: str) -> None:
    def write(module: torch.nn.Module, *_: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(0.5)

    plain, model = (cast(make_stack(block=Counted).train(), torch.bfloat16, by) for _ in range(2))
    for stack in (plain, model):
        for layer in stack.layers:
            layer.up.register_forward_pre_hook(write)  # before it is cast
            layer.norm.register_forward_hook(write)  # while it is, if it is
    stream(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 16)
            assert torch.equal(model(x), plain(x))
    assert_same_weights(model, plain)


def test_a_pass_cut_short_while_cast_leaves_the_model_right() -> None:
    plain, model = (cast(make_stack(), torch.bfloat16, "leaves") for _ in range(2))
    stream(model)
    x = torch.randn(3, 16)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    linear = model.layers[4].up
    forward, linear._old_forward = linear._old_forward, interrupt
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(x)
        linear._old_forward = forward
        for _ in range(2):
            assert torch.equal(model(x), plain(x))


def test_hooks_put_on_afterwards_are_refused() -> None:
    model, x, expected = streamed()
    with pytest.raises(UnsupportedModelError, match="before wrapping"):
        cast(model, torch.bfloat16, "leaves")
    assert torch.equal(model(x), expected)
