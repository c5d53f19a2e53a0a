"""What this machine can do, measured in seconds: its link, its memory, its disk, and its calls.

Everything is the median of some rounds, because what else runs on a machine slows a model as it
slows these. Where there is no GPU the link is the page cache, from which the CPU streams blocks.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from bminf.cli.gpus import Speeds
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.offload.disk import offload_folder

Clock = Callable[[], float]
"""Seconds since any time; time.thread_time leaves out what others have of the processor."""

Work = Callable[[], object]

PROBE_BYTES = 2**27
"""More than the caches of processors hold, but for those of large servers."""

SHAPES = ((576, 1024), (2048, 2048), (4096, 4096))
"""(in_features, out_features) of products, as of models of 0.1, 1 and 8 billion weights."""

PACKED = ("int8", "int4")
"""The formats that are measured, by their words."""

_ROUNDS = 5
_DISK_BYTES = 2**26
_DISK_ROUNDS = 3
_DISK_S = 1.0  # that one round reads for, at most
_PIECE_BYTES = 2**23
_NORMS = 200


@dataclass(frozen=True)
class Rate:
    """Bytes of weights a second in products with one token.

    form: how they are stored: a dtype, "int8" or "int4".   weights: of one product.
    """

    form: str
    weights: int
    bytes_per_s: float


def speeds_of_machine(clock: Clock = time.perf_counter) -> Speeds:
    """The link and the memory of the GPU; without one, the page cache and RAM."""
    return _of_gpu(clock) if torch.cuda.is_available() else _of_cpu(clock)


def _of_gpu(clock: Clock) -> Speeds:
    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8).pin_memory()
    copy_s = _median_s(lambda: target.copy_(source), clock)
    link_s = _median_s(lambda: target.copy_(host, non_blocking=True), clock)
    # A copy on the device reads and writes each byte.
    return Speeds(int(PROBE_BYTES / link_s), int(2 * PROBE_BYTES / copy_s))


def _of_cpu(clock: Clock) -> Speeds:
    buffer = memoryview(bytearray(PROBE_BYTES))
    with _cached_file(buffer) as file:

        def read() -> None:
            file.seek(0)
            file.readinto(buffer)

        file_s = _median_s(read, clock)
    return Speeds(int(PROBE_BYTES / file_s), host_memory_speed(clock))


@contextmanager
def _cached_file(content: memoryview) -> Iterator[Any]:
    """In the page cache; where the disk is full, a file in memory, which is in the same cache."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.TemporaryFile(buffering=0))
            _write(file, content)
        except OSError:
            if not hasattr(os, "memfd_create"):
                raise
            file = opened.enter_context(os.fdopen(os.memfd_create("bminf"), "wb+", 0))
            _write(file, content)
        yield file


def _write(file: IO[bytes], content: memoryview) -> None:
    """All of it: a disk that fills up takes a part, and tells with the next call."""
    while content:
        content = content[file.write(content) :]


def host_memory_speed(clock: Clock = time.perf_counter) -> int:
    """Bytes of RAM that all threads of torch together read in a second."""
    numbers = torch.ones(PROBE_BYTES // 4)
    return int(PROBE_BYTES / _median_s(numbers.sum, clock))


# ---- the disk ------------------------------------------------------------------------------------


def disk_speed(offload_dir: str | Path | None, clock: Clock = time.perf_counter) -> int | None:
    """Bytes a second that the disk of the file of streamed blocks reads, with nothing of it cached.

    offload_dir: as of bminf.wrapper(). The file has no name, or is deleted as it is closed, so that
        nothing is left of it whatever ends this.
    None where the system has no way to empty its cache of one file.   Raises OSError.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with probe_file(offload_folder(offload_dir)) as file:
        return int(statistics.median(_cold_speed(file, clock) for _ in range(_DISK_ROUNDS)))


@contextmanager
def probe_file(folder: Path) -> Iterator[IO[bytes]]:
    """_DISK_BYTES on the disk of `folder`."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        piece = memoryview(os.urandom(_PIECE_BYTES))  # which no file system compresses
        for _ in range(_DISK_BYTES // _PIECE_BYTES):
            _write(file, piece)
        os.fsync(file.fileno())  # what is not written yet stays in the cache
        yield file


def _cold_speed(file: IO[bytes], clock: Clock) -> float:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    piece = memoryview(bytearray(_PIECE_BYTES))
    file.seek(0)
    start_s, num_read = clock(), 0
    while num_read < _DISK_BYTES and clock() - start_s < _DISK_S:
        num_read += file.readinto(piece)  # type: ignore[attr-defined]
    return num_read / _since(start_s, clock)


# ---- calls and products --------------------------------------------------------------------------


@torch.no_grad()
def call_seconds(clock: Clock = time.perf_counter) -> float:
    """Seconds that one of torch's operations takes when there is next to nothing to compute.

    On a GPU that is the launch of a kernel; either way with what Python does around it.
    """
    norm = TinyNorm().to(_device())
    x = torch.ones(1, 1, 64, device=_device())

    def calls() -> None:
        for _ in range(_NORMS):
            norm(x)

    return _median_s(calls, clock) / (_NORMS * TinyNorm.NUM_CALLS)


class TinyNorm(torch.nn.Module):
    """Operators as the modules of transformers call them, one by one."""

    NUM_CALLS = 6
    """Operations that torch dispatches for one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def product_rates(clock: Clock = time.perf_counter) -> tuple[Rate, ...]:
    """Of each way to store weights that a model can have here, in products of SHAPES."""
    return tuple(
        Rate(form, shape[0] * shape[1], _product_speed(form, shape, clock))
        for form in (str(plain_dtype()).removeprefix("torch."), "float32", *PACKED)
        for shape in SHAPES
    )


def plain_dtype() -> torch.dtype:
    """Of weights in 16 bits, as checkpoints have them: what a GPU, and what a CPU multiplies."""
    return torch.float16 if torch.cuda.is_available() else torch.bfloat16


@torch.inference_mode()
def _product_speed(form: str, shape: tuple[int, int], clock: Clock) -> float:
    linear = _linear(form, shape)
    one_bytes = sum(t.nbytes for t in (*linear.parameters(), *linear.buffers()))
    linears = [linear, *(copy.deepcopy(linear) for _ in range(PROBE_BYTES // one_bytes))]
    x = torch.ones(1, 1, shape[0], dtype=_input_dtype(form), device=_device())

    def multiply() -> None:
        for one in linears:
            one(x)

    return len(linears) * one_bytes / _median_s(multiply, clock)


def _input_dtype(form: str) -> torch.dtype:
    """Packed weights are multiplied with what models compute in: on a CPU float32."""
    if form in PACKED:
        return torch.float16 if torch.cuda.is_available() else torch.float32
    dtype: torch.dtype = getattr(torch, form)
    return dtype


def _linear(form: str, shape: tuple[int, int]) -> torch.nn.Module:
    linear = torch.nn.Linear(*shape, bias=False, device="meta").to_empty(device="cpu")
    torch.nn.init.uniform_(linear.weight, -1, 1)
    if form in PACKED:
        return QuantizedLinear(linear, quantization=form).to(_device())
    return linear.to(_device(), getattr(torch, form))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- time ----------------------------------------------------------------------------------------


def _median_s(work: Work, clock: Clock) -> float:
    """Seconds of `work`, once it has been done."""
    wait: Any = torch.cuda.synchronize if torch.cuda.is_available() else _nothing
    work()
    times = []
    for _ in range(_ROUNDS):
        wait()
        start_s = clock()
        work()
        wait()
        times.append(_since(start_s, clock))
    return statistics.median(times)


def _since(start_s: float, clock: Clock) -> float:
    return max(clock() - start_s, 1e-9)


def _nothing() -> None: ...
