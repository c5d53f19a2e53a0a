"""Guards of the scheduler and the wrapper, each alone: taken out, its test here fails."""

from __future__ import annotations

import gc
import os
import threading
import time
from concurrent.futures import thread as executors
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import (
    HANGS_S,
    Residual,
    Stack,
    make_stack,
    num_readers,
    raise_once,
    settled_readers,
    stream,
    until,
)
from tiny_models import make

import bminf
from bminf.errors import OffloadError
from bminf.offload import memory
from bminf.offload.backends import cpu


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


def test_11_the_output_head_is_not_quantised_even_as_a_block() -> None:
    model = make("llama")
    stream(model, quantization=True, blocks=["model.layers", "lm_head"])
    assert type(model.lm_head) is torch.nn.Linear
    assert isinstance(model.model.layers[3].mlp.up_proj, bminf.QuantizedLinear)


def test_11_a_module_that_stands_in_two_places_stays() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    model.also = model.layers[5].up
    up_bytes = sum(t.nbytes for t in model.also.state_dict().values())
    head_bytes = sum(t.nbytes for t in model.head.state_dict().values())
    expected = model(x)
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    assert bminf.plan_of(model).outside_bytes >= up_bytes + head_bytes
    assert type(model.also.weight) is torch.nn.Parameter
    assert torch.equal(model(x), expected)


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


@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()])
def test_an_interrupt_while_wrapping_puts_the_model_back_together(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bminf.offload.hooks import Scheduler

    model, x = make_stack(), torch.randn(3, 16)
    expected, original = model(x), Scheduler.add

    def add(self: Scheduler, name: str, *rest: Any) -> None:
        original(self, name, *rest)
        if len(self.blocks) == 4:
            raise error

    monkeypatch.setattr(Scheduler, "add", add)
    with pytest.raises(type(error)):
        stream(model, offload_dir=tmp_path)
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_unwrapping_closes_the_file_and_ends_the_reader() -> None:
    threads = settled_readers()
    open_files = len(os.listdir("/proc/self/fd"))
    model = stream(make_stack())
    assert num_readers() == threads + 1
    bminf.unwrap(model)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert num_readers() == threads


def test_a_model_may_die_while_a_thread_is_being_started() -> None:
    """The collector may run inside Thread.start, whose locks a finalizer must not ask for."""

    def collect() -> None:
        with executors._global_shutdown_lock, threading._active_limbo_lock:
            gc.collect()

    threads = settled_readers()
    open_files = len(os.listdir("/proc/self/fd"))
    model = stream(make_stack())
    model.itself = [model]  # only the collector can free it
    del model
    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    collector.join(HANGS_S)
    assert not collector.is_alive()
    until(lambda: num_readers() == threads)  # the reader ends by itself
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_copy_under_way_ends_before_its_model_is_given_back() -> None:
    model, may_end = make_stack(), threading.Event()
    backend = stream(model)._bminf_scheduler.backend
    store = backend._store
    backend._reader.submit(may_end.wait)
    copied = backend.copy(0, 0, None)
    backend.release()
    assert not copied.done() and not store._file.closed
    may_end.set()
    copied.result(HANGS_S)
    backend._reader.join()
    assert store._file.closed


def test_a_mapped_model_does_not_count_as_memory_to_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a limit: what is free, and what the model itself will let go of."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**6)
    model, mapped = make_stack(width=64), make_stack(width=64)
    nbytes = sum(t.nbytes for t in model.state_dict().values())
    for number, parameter in enumerate(mapped.parameters()):
        path = tmp_path / str(number)
        path.write_bytes(parameter.detach().numpy().tobytes())
        flat = torch.from_file(str(path), size=parameter.numel(), shared=True)
        parameter.data = flat.view(parameter.shape)
    bminf.wrapper(model, False, device="cpu")
    bminf.wrapper(mapped, False, device="cpu")
    buffer_bytes = sum(buffer.nbytes for buffer in mapped.buffers())
    assert bminf.plan_of(model).budget == int(0.9 * (10**6 + nbytes))
    assert bminf.plan_of(mapped).budget == int(0.9 * (10**6 + buffer_bytes))


def test_resident_weights_leave_a_mapped_checkpoint(tmp_path: Path) -> None:
    model = make_stack()
    path = tmp_path / "head"
    path.write_bytes(model.head.weight.detach().numpy().tobytes())
    mapped = torch.from_file(str(path), size=model.head.weight.numel(), shared=True)
    model.head.weight.data = mapped.view(model.head.weight.shape)
    stream(model)
    assert not memory.mapped_files()(model.head.weight.data_ptr())


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


def test_a_read_that_failed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, failed = make_stack(), torch.randn(3, 16), []
    expected = model.layers[5](x)
    monkeypatch.setattr(cpu, "AT_ONCE_BYTES", 0)
    stream(model)
    number = bminf.plan_of(model).streamed.index("layers.5")
    store = model._bminf_scheduler.backend._store
    original = store.read_into

    def read_into(block: int, blob: torch.Tensor) -> None:
        if block == number and not failed:
            failed.append(block)
            raise OffloadError("the disk is gone")
        original(block, blob)

    monkeypatch.setattr(store, "read_into", read_into)
    with pytest.raises(OffloadError, match="gone"):
        model(x)
    assert torch.equal(model.layers[5](x), expected)


def test_a_slow_read_that_is_not_wanted_any_more_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model.layers[1](x)
    monkeypatch.setattr(cpu, "AT_ONCE_BYTES", 0)
    stream(model)
    streamed = bminf.plan_of(model).streamed
    slow = {streamed.index("layers.4"), streamed.index("layers.5")}
    store = model._bminf_scheduler.backend._store
    original = store.read_into

    def read_into(block: int, blob: torch.Tensor) -> None:
        if block in slow:
            time.sleep(0.1)
        original(block, blob)

    monkeypatch.setattr(store, "read_into", read_into)
    model.layers[1].up.register_forward_pre_hook(lambda *_: time.sleep(0.4))
    model.layers[3](x)  # now 4 and 5 are read ahead
    assert torch.equal(model.layers[1](x), expected)
