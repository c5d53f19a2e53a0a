"""Calls of a model with streamed blocks: cut short, from threads, compiled, in any mode.

Files that begin with this one's name hold what else bminf/offload/hooks.py does.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streaming import (
    HANGS_S,
    MODES,
    Stack,
    assert_same_weights,
    make_stack,
    raise_once,
    stream,
    streamed,
)
from tiny_models import greedy, inputs_of, make

import bminf
from bminf.offload import hooks
from bminf.offload.streamed_block import StreamedBlock

# Errors


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "place", ["layers.0.down", "layers.3.down", "layers.6.down", "layers.4", "head"]
)
def test_a_pass_that_is_cut_short_leaves_the_model_usable(place: str, error: BaseException) -> None:
    model, x, expected = streamed()
    for _ in range(3):
        raise_once(model.get_submodule(place), error)
        with pytest.raises(type(error)):
            model(x)
        assert torch.equal(model(x), expected)
    assert bminf.stats_of(model).passes == 6
    is_entered = threading.Event()  # by another thread: nobody holds the lock
    threading.Thread(target=lambda: (model(x), is_entered.set()), daemon=True).start()
    assert is_entered.wait(HANGS_S)


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
def test_an_exception_that_the_model_catches_gives_the_slot_back(error: BaseException) -> None:
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


def test_interrupts_while_blocks_are_left_are_mended_by_the_next_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, expected = streamed()
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
        assert_same_weights(model, make_stack())
    assert torch.equal(model(x), expected)


# Threads


def run_in_two_threads(work: Callable[[], Any]) -> list[Any]:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_two_threads_generate_the_same_as_one(name: str) -> None:
    model, given = make(name), inputs_of(name)
    expected = greedy(model, given)
    stream(model)
    results = run_in_two_threads(lambda: [greedy(model, given) for _ in range(3)])
    assert sum(len(ids) for ids in results) == 6
    assert all(torch.equal(ids, expected) for many in results for ids in many)


def test_two_threads_in_single_blocks_do_not_disturb_each_other() -> None:
    model = make_stack(num_blocks=9)
    xs = torch.randn(40, 3, 16)
    expected = [model.layers[i % 9](x) for i, x in enumerate(xs)]
    stream(model)

    def work() -> bool:
        given = [model.layers[i % 9](x) for i, x in enumerate(xs)]
        return all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))

    assert run_in_two_threads(lambda: all(work() for _ in range(5))) == [True, True]


def begun_inside(module: torch.nn.Module, work: Callable[[], Any]) -> threading.Thread:
    """A thread that begins `work` in the next call of `module`, and has to wait for its end."""
    thread = threading.Thread(target=work)

    def hook(*_: Any) -> None:
        handle.remove()
        thread.start()
        thread.join(0.3)

    handle = module.register_forward_pre_hook(hook)
    return thread


def test_unwrapping_waits_for_the_pass_of_another_thread() -> None:
    model, x, expected = streamed()
    thread = begun_inside(model.layers[4].up, lambda: bminf.unwrap(model))
    assert torch.equal(model(x), expected)
    thread.join()
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)


@pytest.mark.parametrize("part", ["", "layers.5"])
def test_a_state_dict_taken_while_another_thread_is_in_a_block_is_right(part: str) -> None:
    model, x, _ = streamed()
    assert "layers.5" in bminf.plan_of(model).streamed
    module, taken = model.get_submodule(part), []
    thread = begun_inside(model.layers[5].up, lambda: taken.append(module.state_dict()))
    model(x), model(x)
    thread.join()
    for name, right in make_stack().get_submodule(part).state_dict().items():
        assert torch.equal(taken[0][name], right), name


# Calls of parts


def test_a_direct_forward_streams_and_reading_a_weight_is_slow_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, (model, x, _) = make_stack(), streamed()
    assert len(bminf.plan_of(model).streamed) == 7
    with caplog.at_level(logging.WARNING, "bminf"):
        for layer, right in zip(model.layers, plain.layers, strict=True):
            assert torch.equal(layer.forward(x), right.forward(x))
        model.state_dict()
        assert caplog.records == [] and bminf.stats_of(model).passes == 7
        for _ in range(2):
            assert torch.equal(model.layers[5].up(x), plain.layers[5].up(x))
        assert torch.equal(model.layers[5].shift + 1, plain.layers[5].shift + 1)
    assert ["layers.5" in record.getMessage() for record in caplog.records] == [True]


# torch.compile


def test_a_compiled_model_gives_the_same_output() -> None:
    model, x, expected = streamed()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
    assert bminf.stats_of(model).passes == 2


def test_compiling_does_not_walk_through_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which grow while others are imported: here all the time."""
    model, x, expected = streamed()
    modules: dict[str, Any] = {**sys.modules, **dict.fromkeys(map(str, range(3000)))}
    monkeypatch.setattr(hooks, "sys", SimpleNamespace(modules=modules))
    is_over = threading.Event()

    def grow() -> None:
        while not is_over.wait(1e-4):
            modules[f"module {len(modules)}"] = None

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)
    finally:
        is_over.set()
        thread.join()


# Modes of autograd


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap_mode", MODES)
def test_wrapped_in_one_mode_runs_in_all(wrap_mode: str, mode: str) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    with MODES[wrap_mode]():
        stream(model)
    for used in (mode, "grad", mode):
        with MODES[used]():
            assert torch.equal(model(x), expected)


def test_a_model_made_in_inference_mode_runs_in_all_and_stays_tied() -> None:
    with torch.inference_mode():
        model = make_stack()
        model.head = torch.nn.Linear(16, 32)
        model.head.weight = model.layers[2].up.weight
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
    stream(model)
    assert model.head.weight is model.layers[2].up.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    for mode in MODES.values():
        with mode():
            assert torch.equal(model(x), expected)
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_unwrapped_in_one_mode_it_is_an_ordinary_model(mode: str) -> None:
    model, x, expected = streamed()
    with MODES[mode]():
        bminf.unwrap(model)
    model(x).sum().backward()
    assert torch.equal(model(x), expected)
    for parameter in model.parameters():
        assert parameter.is_leaf and not parameter.is_inference() and parameter.grad is not None
