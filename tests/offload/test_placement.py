"""Every tensor to its place and back, or all as it was: also by bminf/offload/start.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import assert_same_weights, make_stack, stream, streamed

import bminf
from bminf.errors import ArgumentError, BudgetError, OffloadError
from bminf.offload import memory
from bminf.offload.disk import FileStore
from bminf.offload.hooks import Scheduler
from bminf.offload.streamed_block import StreamedBlock


@pytest.mark.parametrize(
    "error", [OffloadError("the disk is gone"), MemoryError("none left"), KeyboardInterrupt()]
)
@pytest.mark.parametrize(("owner", "step"), [(FileStore, "write"), (Scheduler, "add")])
def test_an_error_while_wrapping_puts_the_model_back_together(
    owner: type, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected, original, numbers = model(x), getattr(owner, step), itertools.count(1)

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        if next(numbers) == 4:
            raise error

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(type(error)):
        stream(model, offload_dir=tmp_path)
    assert bminf.plan_of(model) is None and "forward" not in model.layers[0].__dict__
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert torch.equal(model(x), expected) and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert torch.equal(stream(model)(x), expected)


@pytest.mark.parametrize("quantization", [False, True])
def test_unwrap_restores_an_ordinary_model(quantization: bool) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    before = {name: sorted(module.__dict__) for name, module in make_stack().named_modules()}
    stream(model, quantization=quantization)
    expected = model(x)
    assert bminf.unwrap(model) is model
    assert torch.equal(model(x), expected)
    if not quantization:
        after = {name: sorted(module.__dict__) for name, module in model.named_modules()}
        assert after == before
        assert_same_weights(model, make_stack())
        assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in model.parameters())
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    stream(model, quantization=False)
    assert torch.equal(model(x), expected)
    with pytest.raises(ArgumentError, match="not wrapped"):
        bminf.unwrap(make_stack())


def test_attributes_of_parameters_survive() -> None:
    model = make_stack()
    model.layers[5].up.weight.mark = "kept"
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    seen = []
    model.layers[5].up.register_forward_pre_hook(lambda m, _: seen.append(m.weight.mark))
    model(torch.randn(1, 16))
    bminf.unwrap(model)
    assert seen == ["kept"] and model.layers[5].up.weight.mark == "kept"


def test_unwrapping_can_be_interrupted_and_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, expected = streamed()
    original, numbers = StreamedBlock.restore, itertools.count(1)

    def restore(self: StreamedBlock, blob: torch.Tensor) -> None:
        original(self, blob)
        if next(numbers) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StreamedBlock, "restore", restore)
    with pytest.raises(KeyboardInterrupt):
        bminf.unwrap(model)
    bminf.unwrap(model)
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_unwrapping_without_the_memory_for_it_leaves_the_model_streaming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, expected = streamed()

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "private_pages", refuse)
    with pytest.raises(BudgetError, match="cannot allocate"):
        memory.allocate(100)
    with pytest.raises(BudgetError, match="cannot allocate"):
        bminf.unwrap(model)
    monkeypatch.undo()
    copies = bminf.stats_of(model).copies
    assert torch.equal(model(x), expected) and bminf.stats_of(model).copies > copies
    bminf.unwrap(model)


def test_resident_weights_leave_a_mapped_checkpoint(tmp_path: Path) -> None:
    model = make_stack()
    path = tmp_path / "head"
    path.write_bytes(model.head.weight.detach().numpy().tobytes())
    mapped = torch.from_file(str(path), size=model.head.weight.numel(), shared=True)
    model.head.weight.data = mapped.view(model.head.weight.shape)
    stream(model)
    assert not memory.mapped_files()(model.head.weight.data_ptr())
