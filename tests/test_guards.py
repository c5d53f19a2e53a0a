"""Guards of the scheduler and the wrapper, each alone: taken out, its test here fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from streaming import (
    Residual,
    Stack,
    make_stack,
    raise_once,
    stream,
)

import bminf


def test_9_unwrapping_waits_for_the_pass_of_another_thread() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    thread = threading.Thread(target=lambda: bminf.unwrap(model))

    def hook(*_: Any) -> None:
        handle.remove()
        thread.start()
        thread.join(0.3)

    handle = model.layers[4].up.register_forward_pre_hook(hook)
    assert torch.equal(model(x), expected)
    thread.join()
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)


def test_buffers_changed_by_a_block_that_then_fails_are_kept() -> None:
    class Counting(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.shift.add_(1)
            return super().forward(x)

    def failed(model: Stack) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            model(torch.ones(3, 16))
            raise_once(model.layers[5].down, ValueError("inside"))
            with pytest.raises(ValueError, match="inside"):
                model(torch.ones(3, 16))
        return model.state_dict()

    model = make_stack(block=Counting)
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    for (name, given), right in zip(
        failed(model).items(), failed(make_stack(block=Counting)).values(), strict=True
    ):
        assert torch.equal(given, right), name


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


def test_a_block_that_changes_its_buffers_may_follow_itself() -> None:
    class Counting(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.shift.add_(1)
            return super().forward(x)

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
    assert torch.equal(model.layers[5].shift, plain.layers[5].shift)
