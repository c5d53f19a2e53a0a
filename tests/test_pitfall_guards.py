"""The pitfalls again, each where the guard of one could be missing unseen."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from streaming import MODES, Stack, make_stack, raise_once, stream

import bminf


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
def test_1_an_exception_that_the_model_catches_gives_the_slot_back(error: BaseException) -> None:
    class Forgiving(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                try:
                    x = layer(x)
                except type(error):
                    x = x + 1
            return self.head(x)

    torch.manual_seed(0)
    model, x = Forgiving().eval(), torch.randn(3, 16)

    def output() -> torch.Tensor:
        for layer in model.layers[1:6]:
            raise_once(layer.down, error)
        return model(x)

    expected = output()
    stream(model)
    for _ in range(2):
        assert torch.equal(output(), expected)


def test_1_interrupts_while_blocks_are_left_do_not_use_up_the_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bminf.offload.hooks import StreamedBlock

    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    original = StreamedBlock.unbind
    for name in ("layers.5", "layers.4", "layers.3", "layers.2"):
        assert name in bminf.plan_of(model).streamed

        def interrupted(self: StreamedBlock, name: str = name) -> None:
            if self.name == name and self.slot is not None:
                monkeypatch.setattr(StreamedBlock, "unbind", original)
                raise KeyboardInterrupt
            original(self)

        monkeypatch.setattr(StreamedBlock, "unbind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    assert torch.equal(model(x), expected)


def test_1_an_exception_outside_the_blocks_releases_the_model() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    raise_once(model.head, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(model(x), expected)
    assert bminf.stats_of(model).passes == 2


def test_2_a_direct_forward_streams_and_does_not_fetch_each_weight(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = stream(make_stack()), torch.randn(3, 16)
    assert "layers.5" in bminf.plan_of(model).streamed
    with caplog.at_level(logging.WARNING, "bminf"):
        model.layers[5].forward(x)
        model.state_dict()
        assert caplog.records == [] and bminf.stats_of(model).passes == 1
        model.layers[5].up(x), model.layers[5].up(x)
    assert ["layers.5" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("mode", MODES)
def test_4_unwrapped_in_one_mode_it_is_an_ordinary_model(mode: str) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    stream(model)
    with MODES[mode]():
        bminf.unwrap(model)
    model(x).sum().backward()
    assert torch.equal(model(x), expected)
    for parameter in model.parameters():
        assert parameter.is_leaf and not parameter.is_inference() and parameter.grad is not None


def test_4_a_tied_model_made_in_inference_mode_stays_tied() -> None:
    with torch.inference_mode():
        model = make_stack()
        model.head = torch.nn.Linear(16, 32)
        model.head.weight = model.layers[2].up.weight
    stream(model)
    assert model.head.weight is model.layers[2].up.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", ["", "layers.5"])
def test_6_a_state_dict_taken_while_another_thread_is_in_a_block_is_right(part: str) -> None:
    model, x, taken = make_stack(), torch.randn(3, 16), []
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    module = model.get_submodule(part)
    thread = threading.Thread(target=lambda: taken.append(module.state_dict()))

    def hook(*_: Any) -> None:
        handle.remove()
        thread.start()
        thread.join(0.3)  # it has to wait until the pass is over

    handle = model.layers[5].up.register_forward_pre_hook(hook)
    model(x), model(x)
    thread.join()
    for name, right in make_stack().get_submodule(part).state_dict().items():
        assert torch.equal(taken[0][name], right), name
