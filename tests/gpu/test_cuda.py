"""The CUDA backend on a real GPU: right bytes, the full bus, and no more memory than promised."""

from __future__ import annotations

import gc
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import (
    Residual,
    Stack,
    make_stack,
    num_readers,
    settled_readers,
    timed_copy_bytes,
    until,
)
from tiny_models import TINY, greedy, inputs_of, make, output_of

import bminf
from bminf import wrapping
from bminf.errors import UnsupportedModelError
from bminf.wrapping import plan_for

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty_gpu() -> Any:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()


def on_gpu(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in given.items()}


def stream(model: torch.nn.Module, num_resident: int = 0, **arguments: Any) -> Any:
    """Wrap `model` for the GPU, with room for two slots and `num_resident` large blocks."""
    settings = {"quantization": False, **arguments}
    chosen = {k: v for k, v in settings.items() if k in ("quantization", "blocks")}
    whole = plan_for(model, **chosen)
    largest = max(block.nbytes for block in whole.blocks)
    limit = whole.fixed_bytes + (2 + num_resident) * largest
    bminf.wrapper(model, memory_limit=limit, device="cuda", **settings)
    plan = bminf.plan_of(model)
    assert plan.streamed and plan.total_bytes <= limit
    return model


@pytest.mark.parametrize("name", TINY)
def test_streamed_equals_the_model_on_the_gpu(name: str) -> None:
    given = on_gpu(inputs_of(name))
    resident = make(name).cuda()
    expected = output_of(resident, given)
    ids = greedy(resident, given) if TINY[name].generates else None
    model = stream(make(name), num_resident=1)
    for _ in range(2):
        assert torch.equal(output_of(model, given), expected)
    if ids is not None:
        assert torch.equal(greedy(model, given), ids)
    stats, plan = bminf.stats_of(model), bminf.plan_of(model)
    assert stats.bytes_copied >= 2 * plan.streamed_bytes and stats.passes >= 2
    assert next(model.parameters()).device.type == "cuda"


@pytest.mark.parametrize("quantization", [False, "int4"])
def test_rows_of_an_embedding_come_from_the_host(quantization: Any) -> None:
    model = stream(make("llama"), quantization=quantization)
    assert bminf.plan_of(model).tables == ("model.embed_tokens.weight",)
    table, right = model.model.embed_tokens, make("llama").model.embed_tokens.weight
    ids = torch.randint(96, (3, 50))
    for of in (ids, ids[0, 0], ids[:0]):
        given = table(of.cuda())
        assert given.is_cuda and torch.equal(given.cpu(), torch.nn.functional.embedding(of, right))
    held = torch.cuda.memory_allocated()
    rows = [table(ids[i % 3].cuda()) for i in range(300)]  # each from page-locked memory of its own
    expected = [torch.nn.functional.embedding(ids[i % 3], right) for i in range(300)]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(rows, expected, strict=True))
    del rows, given
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held
    assert not model.state_dict()["model.embed_tokens.weight"].is_cuda
    bminf.unwrap(model)
    assert torch.equal(model.model.embed_tokens.weight, right)


@pytest.mark.parametrize("num_blocks", [3, 4, 7, 8])
@pytest.mark.parametrize("source", ["cpu", "cuda"])
def test_many_passes_without_waiting_for_the_device(num_blocks: int, source: str) -> None:
    """Odd and even numbers of streamed blocks; the host queues passes far ahead of the GPU."""
    reference = make_stack(num_blocks=num_blocks, width=512).cuda()
    xs = torch.randn(20, 4, 512, device="cuda")
    with torch.no_grad():
        expected = [reference(x) for x in xs]
        model = stream(make_stack(num_blocks=num_blocks, width=512).to(source))
        model(xs[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            given = [model(x) for x in xs]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_w8a8_on_the_gpu_multiplies_exactly(dtype: torch.dtype) -> None:
    for m, n, k in [(1, 5, 33), (17, 64, 128), (3, 130, 1000)]:
        linear = torch.nn.Linear(k, n).to(dtype)
        on_cpu = bminf.QuantizedLinear(linear, activations="int8")
        x = torch.randn(m, k).to(dtype)
        expected = on_cpu(x).float()
        given = on_cpu.cuda()(x.cuda()).float().cpu()
        assert (given - expected).norm() / expected.norm() < 1e-2, (m, n, k)


def test_the_weights_can_be_read_saved_and_taken_back(tmp_path: Path) -> None:
    model, right = stream(make_stack()), make_stack().state_dict()
    x = torch.randn(3, 16, device="cuda")
    with torch.no_grad():
        expected = make_stack().cuda()(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.layers[5].up(x), make_stack().cuda().layers[5].up(x))
    weights = model.state_dict()
    assert all(torch.equal(weights[k].cpu(), v) for k, v in right.items())
    torch.save(weights, tmp_path / "weights.pt")
    assert all(torch.equal(p.cpu(), right[n]) for n, p in model.named_parameters())
    bminf.unwrap(model)
    assert all(t.device.type == "cpu" for t in model.state_dict().values())
    assert all(torch.equal(v, right[k]) for k, v in model.state_dict().items())


def test_gradients_through_frozen_streamed_blocks_are_right() -> None:
    x = torch.randn(3, 16, device="cuda")
    expected = torch.autograd.functional.jacobian(make_stack().requires_grad_(False).cuda(), x)
    model = stream(make_stack().requires_grad_(False))
    assert torch.equal(torch.autograd.functional.jacobian(model, x), expected)


def test_buffers_that_a_block_changes_are_kept() -> None:
    class Norm(Residual):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.norm = torch.nn.BatchNorm1d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(super().forward(x))

    plain, model = make_stack(block=Norm).train().cuda(), stream(make_stack(block=Norm).train())
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, 16, device="cuda")
            assert torch.equal(model(x), plain(x))
    right = plain.state_dict()
    assert all(torch.equal(v.cpu(), right[k].cpu()) for k, v in model.state_dict().items())


def test_two_threads_on_streams_of_their_own() -> None:
    import threading

    reference = make_stack(width=256).cuda()
    model = stream(make_stack(width=256))
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for number in range(30):
                x = torch.randn(4, 256, device="cuda", generator=generator)
                if not torch.equal(model(x), reference(x)):
                    failures.append(f"thread {seed}, pass {number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Big(torch.nn.Module):
    """A block of one 128 MiB matrix whose computation takes far less than its copy."""

    rows: int | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        rows = self.rows or 4 * width
        self.weight = torch.nn.Parameter(torch.empty(rows, width, dtype=torch.float16))
        torch.nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x @ self.weight.T)[:, : x.shape[1]]


class Odd(Big):
    """A block that is 11.3 MiB where it is 2048 wide, for which torch's allocator keeps 12."""

    rows = 2893


def seconds(work: Any) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def page_locked_bytes_per_s(nbytes: int) -> float:
    """One copy of `nbytes` after another, from memory that is page-locked as the homes are."""
    from bminf.cuda.pinned import PinnedMemory

    host = PinnedMemory(nbytes)
    host.tensor.random_(0, 255)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copies() -> None:
        for _ in range(12):
            target.copy_(host.tensor, non_blocking=True)

    copies()
    rate = 12 * nbytes / statistics.median(seconds(copies) for _ in range(5))
    host.close()
    return rate


@pytest.mark.parametrize("num_blocks", [7, 8])
def test_the_bus_is_used_to_95_percent_over_whole_passes(num_blocks: int) -> None:
    torch.manual_seed(0)
    model = Stack(num_blocks, 4096, Big)
    model.head = torch.nn.Identity()
    stream(model, num_resident=1)
    plan = bminf.plan_of(model)
    assert len(plan.streamed) == num_blocks - 1
    assert min(b.nbytes for b in plan.blocks) >= 100e6
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    num_passes = 6
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        rates = []
        for _ in range(3):
            spent_s = seconds(lambda: [model(x) for _ in range(num_passes)])
            rates.append(timed_copy_bytes(plan, num_passes) / spent_s)
    assert statistics.median(rates) >= 0.95 * page_locked_bytes_per_s(plan.blocks[0].nbytes)
    stats = bminf.stats_of(model)
    assert stats.waits > 0 and 0 < stats.waited_s and stats.link_gbps > 1


@pytest.mark.parametrize(("num_blocks", "block"), [(6, Big), (48, Odd)])
def test_device_memory_keeps_to_the_limit(num_blocks: int, block: type) -> None:
    torch.manual_seed(0)
    model = Stack(num_blocks, 2048, block)
    x = torch.randn(64, 2048, device="cuda", dtype=torch.float16)
    model.head = torch.nn.Identity()

    def run() -> None:
        with torch.no_grad():
            for _ in range(3):
                model(x)
        torch.cuda.synchronize()

    bminf.wrapper(model, quantization=False, memory_limit="4GB", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    weights_bytes = torch.cuda.memory_allocated()
    run()
    beyond_weights = torch.cuda.max_memory_allocated() - weights_bytes
    bminf.unwrap(model)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    at_start = torch.cuda.memory_allocated()
    stream(model, num_resident=num_blocks - 4)
    limit = bminf.plan_of(model).budget
    assert torch.cuda.max_memory_allocated() - at_start <= limit  # while wrapping, too
    run()
    assert torch.cuda.max_memory_allocated() - at_start <= limit + beyond_weights


def test_page_locked_memory_is_of_exact_size() -> None:
    from bminf.cuda.pinned import PinnedMemory

    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    nbytes = MIB + 1
    before = anonymous_bytes()
    homes = [PinnedMemory(nbytes) for _ in range(200)]
    assert anonymous_bytes() - before <= 1.01 * 200 * nbytes + MIB
    assert all(home.tensor.is_pinned() and home.tensor.numel() == nbytes for home in homes)
    for home in homes:
        home.close()
    del homes, home
    assert anonymous_bytes() - before <= 2 * MIB


def test_a_refused_lock_leaves_no_error_for_the_next_kernel() -> None:
    from cupy.cuda import runtime

    from bminf.cuda.pinned import PinnedMemory

    home = PinnedMemory(MIB)
    with pytest.raises(runtime.CUDARuntimeError):
        runtime.hostRegister(home.tensor.data_ptr(), MIB, 1)  # it is locked already
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert home.tensor.is_pinned()
    home.close()


def test_a_capture_into_a_graph_is_refused() -> None:
    model = stream(make_stack())
    x = torch.randn(3, 16, device="cuda")
    with torch.no_grad():
        expected = model(x)
        with (
            pytest.raises(UnsupportedModelError, match="CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x)
        assert torch.equal(model(x), expected)


def test_without_a_limit_nothing_that_fits_is_streamed() -> None:
    model = bminf.wrapper(make_stack(), quantization=False)
    plan = bminf.plan_of(model)
    free, _ = torch.cuda.mem_get_info()
    assert plan.streamed == () and 0.5 * free < plan.budget < free
    assert model.head.weight.device.type == "cuda"
    bminf.unwrap(model)
    assert model.head.weight.device.type == "cpu"


# Blobs that host memory has no room for


def stream_with_half_on_disk(
    monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, **arguments: Any
) -> Any:
    """Wrap `model` with two slots and nothing else; at least half of its blobs wait on disk."""
    chosen = {"quantization": arguments.get("quantization", False)}
    whole = plan_for(model, **chosen)
    nbytes = max(block.nbytes for block in whole.blocks)
    in_host = len(whole.blocks) // 2
    monkeypatch.setattr(wrapping, "host_budget", lambda *_: (in_host + 2) * nbytes)
    stream(model, **arguments)
    assert len(bminf.plan_of(model).on_disk) >= len(whole.blocks) - in_host >= 3
    return model


@pytest.mark.parametrize("num_blocks", [6, 7, 12])
def test_blocks_on_disk_give_the_same_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_blocks: int
) -> None:
    """Many passes, of which the host queues as much as it may; odd and even numbers of blocks."""
    threads = settled_readers()
    reference = make_stack(num_blocks=num_blocks, width=512).cuda()
    model = make_stack(num_blocks=num_blocks, width=512)
    stream_with_half_on_disk(monkeypatch, model, offload_dir=tmp_path)
    xs = torch.randn(20, 4, 512, device="cuda")
    with torch.no_grad():
        expected = [reference(x) for x in xs]
        given = [model(x) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    stats, plan = bminf.stats_of(model), bminf.plan_of(model)
    assert stats.passes == 20 and stats.bytes_copied >= 20 * plan.streamed_bytes
    right = make_stack(num_blocks=num_blocks, width=512).state_dict()
    assert all(torch.equal(v.cpu(), right[k]) for k, v in model.state_dict().items())
    bminf.unwrap(model)
    assert all(torch.equal(v, right[k]) for k, v in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [] and num_readers() == threads


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_quantized_model_streamed_or_half_on_disk_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, is_on_disk: bool
) -> None:
    given = on_gpu(inputs_of("llama"))
    resident = bminf.wrapper(make("llama"), memory_limit="1GB", device="cuda")
    expected, ids = output_of(resident, given), greedy(resident, given)
    wrap = partial(stream_with_half_on_disk, monkeypatch) if is_on_disk else stream
    model = wrap(make("llama"), quantization=True)
    for _ in range(3):
        assert torch.equal(output_of(model, given), expected)
    assert torch.equal(greedy(model, given), ids)


def test_blocks_on_disk_in_any_order_and_changed_give_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = make_stack(num_blocks=9, width=256).cuda()
    model = stream_with_half_on_disk(monkeypatch, make_stack(num_blocks=9, width=256))
    order = random.Random(0)
    x = torch.randn(4, 256, device="cuda")
    for stack in (reference, model):
        stack.layers[4].up.register_forward_hook(lambda module, *_: module.bias.add_(1))
    with torch.no_grad():
        for number in range(100):
            block = order.randrange(9)
            assert torch.equal(model.layers[block](x), reference.layers[block](x)), number
    bias = model.state_dict()["layers.4.up.bias"]
    assert torch.equal(bias.cpu(), reference.layers[4].up.bias.detach().cpu())


def test_large_blobs_on_disk_keep_to_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 128 MiB, so that a buffer overwritten too early would be seen."""
    torch.manual_seed(0)
    threads = settled_readers()
    model = Stack(8, 4096, Big)
    model.head = torch.nn.Identity()
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = x
        for layer in model.layers:
            matrix = layer.weight.cuda()
            expected = expected + (expected @ matrix.T)[:, : x.shape[1]]
        stream_with_half_on_disk(monkeypatch, model)
        for _ in range(4):
            assert torch.equal(model(x), expected)
    del model
    gc.collect()
    until(lambda: num_readers() == threads)


@torch.no_grad()
def test_a_recording_has_the_times_of_both_streams() -> None:
    model, x = (
        stream(make_stack(num_blocks=9, width=512), num_resident=2),
        torch.randn(64, 512, device="cuda"),
    )
    model(x)
    with bminf.plot.Recording(model) as recording:
        model(x)
        model(x)
    trace, plan = recording.trace, bminf.plan_of(model)
    assert [span.name for span in trace.computed] == 2 * [block.name for block in plan.blocks]
    assert all(span.start_s <= span.end_s for span in (*trace.copies, *trace.computed))
    copied = [span for span in trace.copies if span.start_s >= 0]
    # What was copied ahead before, and what is copied ahead at the end, is in neither.
    assert 2 * len(plan.streamed) - 4 <= len(copied) <= 2 * len(plan.streamed)
    assert {span.name for span in copied} <= set(plan.streamed) and trace.end_s > 0
