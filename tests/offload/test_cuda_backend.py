"""The hand-overs of bminf/offload/backends/cuda.py, on fake streams and events.

Of two kinds. FakeStream checks the order: values are right by construction (a copy is done at
once), and each copy must be queued behind the last use of its slot, and each use behind its copy.
LateStream checks values: a thread does the copies some time after they were queued, so bytes are
wrong wherever an order is not kept. Real bytes on a real GPU are for tests/gpu.
"""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from streaming import (
    HANGS_S,
    Stack,
    assert_same_weights,
    least_limit,
    make_stack,
    num_readers,
    settled_readers,
    timed_copy_bytes,
    until,
)
from tiny_models import inputs_of, make, output_of

import bminf
from bminf import wrapping
from bminf.errors import BudgetError, OffloadError, UnsupportedModelError
from bminf.offload import memory
from bminf.offload.backends import allocated_bytes_on, cuda
from bminf.offload.disk import FileStore
from bminf.offload.recording import Recording
from bminf.wrapping import plan_for

MIB = 2**20


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
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.stream: FakeStream | None = None
        self.is_timed = enable_timing

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.log.append(("record", self))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.stream is not None, "waits for an event that was never recorded"

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.is_timed and other.is_timed
        return 2.0


class FakePinned:
    made: list[FakePinned]

    def __init__(self, nbytes: int) -> None:
        self.tensor = memory.allocate(nbytes)
        self.is_closed = False
        self.made.append(self)

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


RECORDED: list[tuple[int, Any]] = []
"""Address and stream: under which streams memory was said to be used."""


def put_fakes_in_place(
    monkeypatch: pytest.MonkeyPatch, compute: Any, make_stream: Any, use: Any, event: type
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    RECORDED.clear()
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: RECORDED.append((t.data_ptr(), stream))
    )
    monkeypatch.setattr(cuda, "PinnedMemory", FakePinned)
    monkeypatch.setattr(FakePinned, "made", [], raising=False)

    def backend_for(*_: Any, **__: Any) -> cuda.CudaBackend:
        backend = cuda.CudaBackend(torch.device("cuda"))
        backend.device = torch.device("cpu")
        return backend

    monkeypatch.setattr(wrapping, "backend_for", backend_for)


Streams = tuple[FakeStream, list[FakeStream]]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """The computing stream, and the copy streams that were made."""
    compute, made = FakeStream(), list[FakeStream]()

    def make(device: Any) -> FakeStream:
        made.append(FakeStream())
        return made[-1]

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        stream.log.append(("copy", None))
        yield

    put_fakes_in_place(monkeypatch, compute, make, use, FakeEvent)
    return compute, made


def test_every_hand_over_of_a_slot_is_an_event(streams: Streams) -> None:
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
    homes = list(model.__dict__["_bminf_scheduler"].backend._host_copies.values())
    assert [home.tensor.numel() for home in homes] >= [plan.blocks[0].nbytes] * 7
    bminf.unwrap(model)
    assert all(home.is_closed for home in homes) and torch.equal(model(x), expected)


def test_slots_are_not_let_go_before_each_stream_that_used_them_is_done(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, made = streams
    model, x, other = make_stack(), torch.randn(3, 16), FakeStream()
    bminf.wrapper(model, False, least_limit(model))
    slots = [slot.data_ptr() for slot in backend_of(model).slots]
    model(x)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    model(x)
    model(x)
    expected = [(slot, stream) for stream in (*made, compute, other) for slot in slots]
    assert expected == RECORDED  # once for each: it is asked for in every pass


def test_the_copies_of_timed_passes_are_counted_as_they_come(streams: Streams) -> None:
    """What is copied and waited for between two events around some passes."""
    compute, made = streams
    model, x = make_stack(), torch.randn(3, 16)
    bminf.wrapper(model, False, least_limit(model))
    plan = bminf.plan_of(model)
    model(x)
    before = len(compute.log), len(made[0].log)
    for _ in range(6):
        model(x)
    begun = {event for kind, event in made[0].log[before[1] :] if kind == "record"}
    awaited = [event for kind, event in compute.log[before[0] :] if kind == "wait"]
    timed = [event for event in awaited if event in begun]
    assert len(awaited) == 6 * 7 and len(timed) < len(awaited)
    assert timed_copy_bytes(plan, 6) == len(timed) * plan.blocks[0].nbytes


def test_a_streamed_model_is_not_captured_into_a_graph(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, made = streams
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    bminf.wrapper(model, False, least_limit(model))
    model(x)
    before = list(compute.log), list(made[0].log)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for part in (model, model.layers[3]):
            with pytest.raises(UnsupportedModelError, match=r"CUDA graph.*bminf\.unwrap"):
                part(x[:, :16])
    assert (compute.log, made[0].log) == before  # refused before anything was queued
    assert torch.equal(model(x), expected)


def test_rows_of_a_table_are_gathered_on_the_host(streams: Streams) -> None:
    model, given = make("llama"), inputs_of("llama")
    expected = output_of(model, given)
    bminf.wrapper(model, False, least_limit(model))
    assert bminf.plan_of(model).tables == ("model.embed_tokens.weight",)
    assert torch.equal(output_of(model, given), expected)
    table, right = model.model.embed_tokens, make("llama").model.embed_tokens
    for ids in (torch.tensor(5), torch.tensor([[3, 3, 9]]), torch.zeros(2, 0, dtype=torch.int64)):
        assert torch.equal(table(ids), right(ids))
    for wrong in (96, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))
    with torch.no_grad():
        table.weight[3] = 1.0
    assert torch.equal(table(torch.tensor([3])), torch.ones(1, 32))


# Blobs that host memory has no room for


def wrap_with_half_on_disk(
    monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, **arguments: Any
) -> Any:
    """Wrap `model` with two slots and nothing else; about half of its blobs wait on disk."""
    whole = plan_for(model, quantization=False)
    nbytes = max(block.nbytes for block in whole.blocks)
    host_bytes = (len(whole.blocks) // 2 + 2) * nbytes
    monkeypatch.setattr(wrapping, "host_budget", lambda *_: host_bytes)
    bminf.wrapper(model, False, least_limit(model), **arguments)
    plan = bminf.plan_of(model)
    assert len(plan.on_disk) == len(plan.streamed) - len(whole.blocks) // 2 >= 3
    return model


def backend_of(model: Any) -> cuda.CudaBackend:
    return model.__dict__["_bminf_scheduler"].backend


def test_copies_are_queued_in_the_order_asked_for_also_from_disk(
    streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compute, made = streams
    model, x, threads = make_stack(), torch.randn(3, 16), settled_readers()
    expected = model(x)
    with caplog.at_level(logging.WARNING, "bminf"):
        wrap_with_half_on_disk(monkeypatch, model, offload_dir=tmp_path)
    assert "4 of 7 streamed blocks" in caplog.text and "wait on disk" in caplog.text
    plan, backend = bminf.plan_of(model), backend_of(model)
    assert len(FakePinned.made) == 3 + 2  # homes of the others, and the staging buffers
    for _ in range(3):
        assert torch.equal(model(x), expected)
    stats = bminf.stats_of(model)
    assert stats.passes == 3 and 3 * 7 <= stats.copies <= 3 * 7 + 2
    assert stats.bytes_copied == stats.copies * plan.blocks[0].nbytes
    (copying,) = made
    assert ("synchronize", None) not in copying.log + compute.log
    awaited = [event for kind, event in compute.log if kind == "wait"]
    ends = [event for kind, event in copying.log if kind == "record"][1::2]
    assert awaited == ends[: 3 * 7]
    assert_same_weights(model, make_stack())
    bminf.unwrap(model)
    assert all(pinned.is_closed for pinned in FakePinned.made) and backend.slots == []
    assert torch.equal(model(x), expected)
    assert_same_weights(model, make_stack())
    assert list(tmp_path.iterdir()) == [] and settled_readers() == threads


def add_to_the_bias(module: torch.nn.Linear, *_: Any) -> None:
    module.bias.add_(1)


def test_a_disk_that_fails_is_told_and_the_next_pass_is_right(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into, broken = FileStore.read_into, []

    def failing(store: FileStore, block: int, blob: torch.Tensor) -> None:
        if block in broken:
            raise OffloadError("reading a streamed block failed: the disk is gone")
        read_into(store, block, blob)

    monkeypatch.setattr(FileStore, "read_into", failing)
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    wrap_with_half_on_disk(monkeypatch, model)
    assert torch.equal(model(x), expected)
    broken[:] = [0, 1, 2, 3]
    with pytest.raises(OffloadError, match="the disk is gone"):
        for _ in range(2):  # what was read ahead is right still
            model(x)
    broken.clear()
    for _ in range(2):  # an error of a copy that was begun while the disk was gone may be left
        try:
            assert torch.equal(model(x), expected)
            break
        except OffloadError:
            continue
    for _ in range(3):
        assert torch.equal(model(x), expected)
    bminf.unwrap(model)


def test_a_home_that_cannot_be_made_leaves_the_model_as_it_was(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(OffloadError, match="cannot be kept"):
        wrap_with_half_on_disk(monkeypatch, model, offload_dir=tmp_path / "missing")
    monkeypatch.setattr(cuda, "Reader", refuse)
    with pytest.raises(OffloadError, match="no thread"):
        wrap_with_half_on_disk(monkeypatch, model)
    assert len(FakePinned.made) == 2 and all(pinned.is_closed for pinned in FakePinned.made)
    assert bminf.plan_of(model) is None and torch.equal(model(x), expected)


def refuse(*_: Any) -> None:
    raise OffloadError("no thread")


def test_a_model_that_nobody_holds_gives_its_memory_back(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = settled_readers()
    model = wrap_with_half_on_disk(monkeypatch, make_stack())
    model(torch.randn(3, 16))
    pinned = list(FakePinned.made)
    del model
    gc.collect()
    until(lambda: num_readers() == threads)
    assert pinned and all(memory.is_closed for memory in pinned)


# Copies that happen later


class LateEvent:
    """As torch's: a wait for one that was never recorded returns at once."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.reached = threading.Event()
        self.reached.set()
        self.at_s = 0.0

    def record(self, stream: LateStream) -> None:
        self.reached = reached = threading.Event()

        def reach() -> None:
            self.at_s = time.perf_counter()
            reached.set()

        stream.queue(reach)

    def query(self) -> bool:
        return self.reached.is_set()

    def synchronize(self) -> None:
        assert self.reached.wait(HANGS_S)

    def elapsed_time(self, other: LateEvent) -> float:
        assert self.at_s and other.at_s
        return (other.at_s - self.at_s) * 1e3


class LateStream:
    """Does in a thread, one after another and some time later, what was queued."""

    def __init__(self, device: Any = None) -> None:
        self.work: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self.pause = random.Random(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            if self.pause.random() < 0.3:
                time.sleep(0.002)
            work()

    def queue(self, work: Callable[[], Any]) -> None:
        self.work.put(work)

    def wait_event(self, event: LateEvent) -> None:
        reached = event.reached  # as it is now
        self.queue(lambda: reached.wait(HANGS_S))

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        event = LateEvent()
        event.record(self)
        event.synchronize()


class HostStream:
    """The computing stream: computation here is done when it is called."""

    def queue(self, work: Callable[[], None]) -> None:
        work()

    def wait_event(self, event: LateEvent) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


@pytest.fixture
def late_stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copies are done by LateStream, reads of the disk are slow now and then."""
    current, made = threading.local(), list[LateStream]()

    @contextmanager
    def use(stream: LateStream) -> Iterator[None]:
        current.stream = stream
        yield
        current.stream = None

    def make(device: Any) -> LateStream:
        made.append(LateStream())
        return made[-1]

    copy_, read_into = torch.Tensor.copy_, FileStore.read_into

    def copy_later(target: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy_(target, source)
        current.stream.queue(partial(copy_, target, source))
        return target

    pause = random.Random(1)

    def read_slowly(store: FileStore, block: int, blob: torch.Tensor) -> None:
        blob.fill_(255)  # whoever still uses the buffer shall see it
        if pause.random() < 0.3:
            time.sleep(0.004)
        read_into(store, block, blob)

    put_fakes_in_place(monkeypatch, HostStream(), make, use, LateEvent)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
    monkeypatch.setattr(FileStore, "read_into", read_slowly)
    yield
    for stream in made:
        stream.work.put(None)
        stream.thread.join(HANGS_S)


@pytest.mark.parametrize("num_blocks", [7, 8, 13])
def test_late_copies_and_slow_reads_give_the_right_values(
    late_stream: None, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    model, x = make_stack(num_blocks=num_blocks), torch.randn(3, 16)
    expected = model(x)
    wrap_with_half_on_disk(monkeypatch, model)
    for _ in range(12):
        assert torch.equal(model(x), expected)
    stats = bminf.stats_of(model)
    assert stats.copies <= 12 * num_blocks + 2
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("num_slots", [2, 12])
def test_late_experts_give_the_right_values(
    late_stream: None, monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    """In host memory and on disk, beside dense blocks that stream, too."""
    model, given = make("mixtral"), inputs_of("mixtral")
    expected = output_of(model, given)
    whole = plan_for(model, False, device="cuda")
    planned = plan_for(model, False, whole.least_limit, device="cuda")
    limit = planned.least_limit + (num_slots - 2) * planned.experts.slot_bytes
    monkeypatch.setattr(wrapping, "host_budget", lambda *_: planned.experts.nbytes // 2)
    bminf.wrapper(model, False, limit, device="cuda")
    plan = bminf.plan_of(model)
    assert plan.experts.on_disk and (plan.streamed or num_slots > 2)
    for number in range(6):
        assert torch.equal(output_of(model, given), expected), number
    with torch.no_grad():
        for stack in (model, other := make("mixtral")):
            stack.model.layers[3].mlp.experts.down_proj.mul_(2)
    assert torch.equal(output_of(model, given), output_of(other, given))
    bminf.unwrap(model)
    assert torch.equal(output_of(model, given), output_of(other, given))


@pytest.mark.parametrize("written", ["nowhere", "from outside", "inside"])
def test_late_copies_in_any_order_give_the_right_values(
    late_stream: None, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """In host memory and on disk, read ahead or not, written between passes or within one."""
    reference, model = make_stack(num_blocks=9), make_stack(num_blocks=9)
    wrap_with_half_on_disk(monkeypatch, model)
    stacks, x, order = (reference, model), torch.randn(3, 16), random.Random(3)
    for layer in (layer for stack in stacks for layer in stack.layers):
        if written == "inside":
            layer.up.register_forward_hook(add_to_the_bias)
    with torch.no_grad():
        for number in range(60):
            block, other = order.randrange(9), order.randrange(9)
            for stack in stacks:
                if written == "from outside":
                    stack.layers[other].up.weight[number % 32].mul_(3)
            given, expected = model.layers[block](x), reference.layers[block](x)
            assert torch.equal(given, expected), (number, block)
            if number % 4 == 0:
                assert torch.equal(model(x), reference(x)), number
    assert_same_weights(bminf.unwrap(model), reference)


@pytest.mark.parametrize(
    ("nbytes", "taken"),
    [
        (0, 0),
        (1, 1),
        (9 * MIB + 1, 9 * MIB + 1),
        (10 * MIB - 512, 10 * MIB - 512),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 1),  # almost 2 MiB are left: enough for another buffer
        (11 * MIB - 1, 11 * MIB - 1),
        (11 * MIB, 12 * MIB),
        (11 * MIB + 1, 12 * MIB),
        (100 * MIB - 1, 100 * MIB),
    ],
)
def test_a_buffer_takes_what_torchs_allocator_keeps_for_it(nbytes: int, taken: int) -> None:
    assert cuda.allocated_bytes(nbytes) == taken
    assert (
        allocated_bytes_on("cuda")(nbytes) == taken and allocated_bytes_on("cpu")(nbytes) == nbytes
    )


class OneMatrix(torch.nn.Module):
    """A block of 11.3 MiB."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2887, 1024))


HEAD_BYTES = 5 * 4 + 5 * 16 * 4  # of Stack(6, 16), which lies outside the blocks


def test_the_plan_of_a_gpu_counts_what_its_allocator_takes() -> None:
    with torch.device("meta"):
        model = Stack(6, 16, OneMatrix)
    on_cpu = bminf.plan_for(model, False, device="cpu")
    on_gpu = bminf.plan_for(model, False, device="cuda")
    assert {block.nbytes for block in on_cpu.blocks} == {2887 * 4096}
    assert {block.nbytes for block in on_gpu.blocks} == {12 * MIB}
    assert on_gpu.resident_bytes == 6 * 12 * MIB + HEAD_BYTES and on_gpu.streamed == ()
    limit = on_gpu.total_bytes - 1
    assert bminf.plan_for(model, False, limit, device="cuda").streamed
    assert not bminf.plan_for(model, False, limit, device="cpu").streamed
    assert on_gpu.least_limit == 2 * 12 * MIB + HEAD_BYTES
    with pytest.raises(BudgetError, match=str(on_gpu.least_limit)):
        bminf.plan_for(model, False, on_gpu.least_limit - 1, device="cuda")


@torch.no_grad()
def test_a_recording_takes_its_times_from_events(streams: Streams) -> None:
    model, x = make_stack(), torch.randn(3, 16)
    bminf.wrapper(model, False, least_limit(model))
    names, before = [block.name for block in bminf.plan_of(model).blocks], bminf.stats_of(model)
    with Recording(model) as recording:
        model(x)
    trace, copied = recording.trace, bminf.stats_of(model).copies - before.copies
    assert [span.name for span in trace.computed] == names
    assert len(trace.copies) == copied == 7 and {copy.name for copy in trace.copies} == set(names)
    # As far as a fake event tells: each is 2 ms behind any other.
    assert {s.end_s for s in (*trace.copies, *trace.computed)} == {2e-3}
    assert backend_of(model).copy_log is None
