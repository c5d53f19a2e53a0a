"""What is around a kernel on the CPU: builds, guarded arguments, recordings, coverage."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import host_build
import line_coverage
import pytest
import recording
import replay
import torch
from host_build import Build, BuildError, build, build_all
from host_launcher import HostLauncher
from host_memory import HostKernelError
from host_run import LaunchError, load

from bminf.cuda.source import Kernel

ADD = """#line 1 "kernels/add.cu"
extern "C" __global__ void __launch_bounds__(64)
add(const float* x, const float* bias, float* y, int n, float factor) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (bias != nullptr)
        y[i] = factor * x[i] + bias[i];
    else
        y[i] = factor * x[i];
}
extern "C" __global__ void never(float* y) {
    __shared__ float much[4096];
    much[threadIdx.x] = 0;
    __syncthreads();
    y[threadIdx.x] = much[threadIdx.x];
}
"""
KERNEL = Kernel("add.cu", "add")


def launcher(source: str = ADD, **options: object) -> HostLauncher:
    return HostLauncher(source_of=lambda kernel: source, **options)  # type: ignore[arg-type]


def add(
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    host: HostLauncher | None = None,
) -> None:
    """y = 2 x + bias, over all that `x` spans."""
    blocks = (x.numel() + 63) // 64
    arguments = [x, bias, y, x.numel(), 2.0]
    (host or launcher()).launch(KERNEL, (blocks, 1, 1), (64, 1, 1), arguments)


# ---- Arguments ----


@pytest.mark.parametrize("size", [1, 63, 64, 65, 5000])
def test_results_are_in_the_tensors(size: int) -> None:
    x, bias, y = torch.randn(3, size).unbind()
    add(x, y, bias)
    assert torch.equal(y, 2 * x + bias)
    add(x, y)
    assert torch.equal(y, 2 * x)


def test_one_tensor_may_be_several_arguments() -> None:
    x = torch.randn(64)
    expected = 3 * x
    add(x, x, x)
    assert torch.equal(x, expected)


def test_views_of_one_tensor_keep_their_places() -> None:
    both = torch.randn(128)
    x, y = both[:70], both[60:]  # ten elements are in both
    expected = 2 * x[:60]
    add(x[:60], y[:60], x[:60])
    assert torch.equal(both[60:120], expected + both[:60])
    columns = torch.randn(10, 4)
    before = columns.clone()
    add(columns[:, 1], columns.view(-1)[30:])  # a span of 37, of which 10 are used
    assert torch.equal(columns.view(-1)[30:40], 2 * before.view(-1)[1:11])


def test_empty_tensors_are_pointers_to_nothing() -> None:
    with pytest.raises(HostKernelError, match="byte 0 of the 0 of argument 0"):
        launcher().launch(
            KERNEL, (1, 1, 1), (1, 1, 1), [torch.empty(0), None, torch.empty(1), 1, 1.0]
        )


def test_bytes_beyond_an_odd_size_are_watched() -> None:
    # 62 floats end 8 bytes before a multiple of 16, so the page that nobody may touch is not near.
    x, y = torch.randn(64), torch.randn(62)
    with pytest.raises(HostKernelError, match="wrote at byte 248 of the 248 bytes of argument 2"):
        add(x, y)
    with pytest.raises(HostKernelError, match="byte 256 of the 248 of argument 2"):
        add(torch.randn(65), y)
    y = torch.zeros(64)
    launcher().launch(KERNEL, (1, 1, 1), (64, 1, 1), [torch.randn(62), None, y, 64, 1.0])
    assert y.isnan().tolist() == [False] * 62 + [True] * 2


def test_alignment_is_that_of_the_tensor() -> None:
    source = """extern "C" __global__ void modulo(const void* x, const void* y, int* z) {
        z[0] = size_t(x) % 16, z[1] = size_t(y) % 16;
    }"""
    whole, z = torch.zeros(100), torch.zeros(2, dtype=torch.int32)
    arguments = [whole[3:8], torch.zeros(100)[1:], z]
    launcher(source).launch(Kernel("m.cu", "modulo"), (1, 1, 1), (1, 1, 1), arguments)
    assert whole.data_ptr() % 16 == 0 and z.tolist() == [12, 4]


def test_memory_is_untouched_by_a_launch_that_fails() -> None:
    x, y = torch.randn(64), torch.zeros(32)
    with pytest.raises(HostKernelError, match=r"add\.cu:\d"):
        add(x, y)
    assert y.tolist() == [0.0] * 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes 5 arguments, not 0"),
        ([1, None, None, 1, 1.0], "argument 0 is 1, not a pointer"),
        ([None, None, None, 1.0, 1.0], "argument 3 is 1.0, not an integer"),
        ([None, None, None, None, 1.0], "argument 3 is None, not an integer"),
        ([None, None, None, 1, 1], "argument 4 is 1, not a float"),
        ([None, None, None, 2**32, 1.0], "argument 3 is 4294967296, beyond 32 bits"),
    ],
)
def test_arguments_must_be_those_of_the_kernel(arguments: list[Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        launcher().launch(KERNEL, (1, 1, 1), (1, 1, 1), arguments)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        ((0, 1, 1), (1, 1, 1), 0, r"grid \(0, 1, 1\)"),
        ((1, 65536, 1), (1, 1, 1), 0, r"grid \(1, 65536, 1\)"),
        ((1, 1, 65536), (1, 1, 1), 0, r"grid \(1, 1, 65536\)"),
        ((1, 1, 1), (1025, 1, 1), 0, r"block \(1025, 1, 1\)"),
        ((1, 1, 1), (1, 1, 65), 0, r"block \(1, 1, 65\)"),
        ((1, 1, 1), (33, 2, 1), 0, "66 threads a block; at most 64"),
        ((1, 1, 1), (1, 1, 1), 49153, r"0 \+ 49153 bytes of shared memory"),
        ((1, 1, 1), (1, 1, 1), -1, "bytes of shared memory"),
    ],
)
def test_launches_that_cuda_refuses(
    grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        launcher().launch(KERNEL, grid, block, [None, None, None, 0, 1.0], shared_bytes)


def test_blocks_have_at_most_1024_threads() -> None:
    with pytest.raises(LaunchError, match="1536 threads a block; at most 1024"):
        launcher().launch(Kernel("add.cu", "never"), (1, 1, 1), (512, 3, 1), [None])


def test_static_shared_memory_counts_for_the_kernel_that_has_it() -> None:
    never = Kernel("add.cu", "never")
    launcher().launch(never, (1, 1, 1), (1, 1, 1), [torch.ones(1)], 32 * 1024)
    with pytest.raises(LaunchError, match=r"16384 \+ 32769 bytes"):
        launcher().launch(never, (1, 1, 1), (1, 1, 1), [torch.ones(1)], 32 * 1024 + 1)


def test_tensors_of_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="a tensor on meta"):
        add(torch.empty(1, device="meta"), torch.empty(1))


# ---- Builds ----


def test_macros_and_capability_reach_the_kernel() -> None:
    source = 'extern "C" __global__ void f(int* y) { y[0] = VALUE, y[1] = __CUDA_ARCH__; }'
    y = torch.zeros(2, dtype=torch.int32)
    kernel = Kernel("f.cu", "f", (("VALUE", 7),))
    launcher(source, capability=61).launch(kernel, (1, 1, 1), (1, 1, 1), [y])
    assert y.tolist() == [7, 610]


def test_a_build_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(Build(ADD, ("add",)))
    monkeypatch.setattr(host_build, "_run", lambda *_, **__: pytest.fail("compiles again"))
    assert build(Build(ADD, ("add",))) == first
    assert build_all([Build(ADD, ("add",))] * 3) == [first] * 3


def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(BuildError, match=r"kernels/add\.cu:5:.*bais"):
        build(Build(ADD.replace("bias !=", "bais !="), ("add",)))


def test_fibers_of_other_processors() -> None:
    source = """extern "C" __global__ void sums(const float* x, float* y) {
        __shared__ float all[2];
        float sum = x[threadIdx.x];
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        all[threadIdx.x / 32] = sum;
        __syncthreads();
        y[threadIdx.x] = all[0] + all[1];
    }"""
    x, y = torch.arange(64.0), torch.zeros(64)
    host = launcher(source)
    kernel = Kernel("sums.cu", "sums")
    portable = dataclasses.replace(host.build_of(kernel), portable_fibers=True)
    host._libraries[kernel] = load(build(portable))
    for _ in range(2):
        host.launch(kernel, (2, 1, 1), (64, 1, 1), [x, y])
        assert y.tolist() == [64 * 63 / 2] * 64
        with pytest.raises(HostKernelError, match="byte 128 of the 128"):
            host.launch(kernel, (2, 1, 1), (64, 1, 1), [x[:32], y])


def test_the_cache_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(Build(ADD, ("add",))).parent.parent
    assert folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(host_build, "_owner", lambda _: os.getuid() + 1)
    with pytest.raises(BuildError, match="belongs to user"):
        build(Build(ADD, ("add",)))


# ---- Recordings ----


def recorded(folder: Path) -> recording.Record:
    x, bias, y = torch.randn(3, 100).unbind()
    add(x[3:], y, bias, launcher(record=folder))
    (record,) = recording.read_all(folder)
    return record


@pytest.mark.parametrize("order", ["forward", "reverse", "5"])
def test_a_recording_gives_the_same_again(tmp_path: Path, order: str) -> None:
    recorded(tmp_path)
    assert replay.main([str(tmp_path), "--order", order, "--capability", "80"]) == 0


def test_other_results_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path)
    changed = tuple(bytes(reversed(piece)) for piece in record.after)
    recording.write(tmp_path, dataclasses.replace(record, after=changed))
    assert replay.main([str(tmp_path)]) == 1
    assert "2 launches, 1 wrong" in capsys.readouterr().out


def test_nothing_to_replay_is_an_error(tmp_path: Path) -> None:
    recorded(tmp_path)
    assert replay.main([str(tmp_path), "--capability", "61"]) == 1
    assert replay.main([str(tmp_path / "no folder")]) == 2


def test_lines_that_ran_are_counted(tmp_path: Path) -> None:
    x, y = torch.randn(2, 64).unbind()
    # One of the two branches, then both; the other kernel of the file never.
    for bias, missed in ((None, [6, 10, 12, 13, 14, 15]), (x, [10, 12, 13, 14, 15])):
        add(x, y, bias, launcher(record=tmp_path))
        done = replay.run(tmp_path, "--coverage", str(tmp_path / "lines"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert line_coverage.missed(tmp_path / "lines") == {"kernels/add.cu": missed}
