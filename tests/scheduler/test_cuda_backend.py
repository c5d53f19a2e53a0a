"""The CUDA backend's hand-overs, on fake streams and events that check their order.

Values are right here by construction (a fake copy is done at once); what is checked is that each
copy is queued behind the last use of its slot, and each use behind its copy. Real bytes on a real
GPU are for tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from streaming import least_limit, make_stack

import bminf
from bminf import wrapping
from bminf.scheduler import memory
from bminf.scheduler.backends import cuda


class FakeStream:
    """A log of what was queued."""

    def __init__(self, device: Any = None) -> None:
        self.log: list[tuple[str, Any]] = []

    def wait_event(self, event: FakeEvent) -> None:
        assert event.stream is not None, "waits for an event that was never recorded"
        self.log.append(("wait", event))

    def wait_stream(self, stream: FakeStream) -> None:
        self.log.append(("wait stream", stream))

    def synchronize(self) -> None:
        self.log.append(("synchronize", None))


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: FakeStream | None = None
        self.is_timed = enable_timing

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.log.append(("record", self))

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.is_timed and other.is_timed
        return 2.0


class FakePinned:
    def __init__(self, nbytes: int) -> None:
        self.tensor = memory.allocate(nbytes)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeStream, list[FakeStream]]:
    """The computing stream, and the copy streams that were made."""
    compute, made = FakeStream(), list[FakeStream]()

    def make(device: Any) -> FakeStream:
        made.append(FakeStream())
        return made[-1]

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        stream.log.append(("copy", None))
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(cuda, "PinnedMemory", FakePinned)
    backend = cuda.CudaBackend(torch.device("cuda"))
    backend.device = torch.device("cpu")
    monkeypatch.setattr(wrapping, "backend_for", lambda *_, **__: backend)
    return compute, made


def test_every_hand_over_of_a_slot_is_an_event(
    streams: tuple[FakeStream, list[FakeStream]],
) -> None:
    compute, made = streams
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    bminf.wrapper(model, False, least_limit(model))
    plan = bminf.plan_of(model)
    assert len(plan.streamed) == 7
    for _ in range(3):
        assert torch.equal(model(x), expected)
    (copying,) = made
    stats = bminf.stats_of(model)
    assert stats.copies == copying.log.count(("copy", None)) == 3 * 7 + 2
    assert stats.bytes_copied == stats.copies * plan.blocks[0].nbytes
    assert stats.copied_s == pytest.approx(2e-3 * stats.copies)
    assert stats.waits == 3 * 7 and stats.waited_s == pytest.approx(2e-3 * 3 * 7)
    assert ("synchronize", None) not in copying.log + compute.log
    # All copies but the first into each slot wait for an event of the computing stream...
    released = [event for kind, event in copying.log if kind == "wait"]
    assert len(released) == stats.copies - 2 and all(e.stream is compute for e in released)
    # ... and each use of a block for the end of its copy.
    awaited = [event for kind, event in compute.log if kind == "wait"]
    ends = [event for kind, event in copying.log if kind == "record"][1::2]
    assert awaited == ends[: 3 * 7]
    homes = list(model.__dict__["_bminf_scheduler"].backend._homes.values())
    assert [home.tensor.numel() for home in homes] >= [plan.blocks[0].nbytes] * 7
    bminf.unwrap(model)
    assert all(home.is_closed for home in homes) and torch.equal(model(x), expected)


def zero_the_bias(module: torch.nn.Linear, *_: Any) -> None:
    module.bias.zero_()


def test_what_a_block_changes_is_written_home(
    streams: tuple[FakeStream, list[FakeStream]],
) -> None:
    model = make_stack()
    bminf.wrapper(model, False, least_limit(model))
    model.layers[4].up.register_forward_hook(zero_the_bias)
    with torch.no_grad():
        model(torch.randn(3, 16))
    assert model.layers[4].up.bias.detach().abs().max() == 0
