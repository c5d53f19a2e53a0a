"""What the machine is: versions, what was brought, page-locked memory, attention.

In half a minute, before anything else: what it finds explains what the other steps find.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_session import machine_code
from benchmarks.gpu_session.brought import MARK
from benchmarks.whole_file import write_json
from bminf.cuda.compile import cache_folder, compiler_version

_COPY_BYTES = 2**29
_NUM_COPIES = 8
_LENGTHS = range(100, 120)  # of keys; a plan is built for each that is new
_HEADS, _HEAD_SIZE = 64, 64

Found = dict[str, Any]


class MissingError(Exception):
    """Something is not there that the steps after this one need."""


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a part failed; each part is written as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session.probe")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    out: Path = parser.parse_args(argv).out
    content: Found = {"found": {}, "failures": []}
    for name, part in PARTS.items():
        try:
            content["found"][name] = part()
        except Exception as error:
            content["failures"].append(f"{name}: {type(error).__name__}: {error}")
        write_json(out, content)
    print(*content["failures"], sep="\n")
    return int(bool(content["failures"]))


def gpu() -> Found:
    """Raises MissingError where torch sees none."""
    if not torch.cuda.is_available():
        raise MissingError("torch sees no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": _capability(),
        "processors": properties.multi_processor_count,
        "free bytes": free_bytes,
        "bytes": total_bytes,
    }


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def versions() -> Found:
    found: Found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cupy-cuda12x", "cupy-cuda13x", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["CUDA of torch"] = torch.version.cuda
    found["cuDNN"] = torch.backends.cudnn.version()
    found["driver"] = _driver()
    return found


def compiler() -> Found:
    """Of the kernels. Raises KernelError where there is none."""
    return {"NVRTC": ".".join(map(str, compiler_version()))}


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def brought() -> Found:
    """Raises MissingError where jieba is not there, or the kernels have changed since prepare."""
    if importlib.util.find_spec("jieba") is None:
        raise MissingError(f"jieba is not there, models of Chinese text cannot run; {_REMEDY}")
    kernels = machine_code.kernels(_capability())
    missing = machine_code.missing(kernels, _capability(), compiler_version())
    if missing and (cache_folder().parent / MARK).is_file():
        raise MissingError(
            f"{len(missing)} of {len(kernels)} kernels are not among those brought for "
            f"{_capability()} and NVRTC {compiler_version()}, such as {missing[0]}; {_REMEDY}"
        )
    return {"kernels": len(kernels), "kernels to compile": len(missing)}


_REMEDY = "run python -m benchmarks.gpu_session prepare and bring the folder along"


# ---- page-locked memory --------------------------------------------------------------------------


def pinned() -> Found:
    """GB/s of locking pages and of copying out of them, by how the memory was mapped."""
    return {name: _rates(flags, huge) for name, (flags, huge) in _MAPPINGS.items()}


_MAPPINGS = {
    "shared": (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, False),
    "private, huge pages": (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, True),
}


def _rates(flags: int, huge: bool) -> Found:
    memory = mmap.mmap(-1, _COPY_BYTES, flags=flags)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    began = time.perf_counter()
    code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), _COPY_BYTES, 0))
    lock_s = time.perf_counter() - began
    if code != 0:
        raise OSError(f"cudaHostRegister: CUDA error {code}")
    try:
        copies_s = [_copy_s(host) for _ in range(_NUM_COPIES)]
        is_pinned = host.is_pinned()
    finally:
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    rates = {"locking": _rate(lock_s), "copying": _rate(statistics.median(copies_s))}
    return {"torch calls it pinned": is_pinned} | {f"{k}, GB/s": v for k, v in rates.items()}


def _rate(seconds: float) -> float:
    return round(_COPY_BYTES / seconds / 1e9, 2)


def _copy_s(host: torch.Tensor) -> float:
    target = torch.empty_like(host, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


# ---- attention -----------------------------------------------------------------------------------


def attention() -> Found:
    """ms of one row of queries by growing lengths of keys, with cuDNN among the ways and without.

    "taken beyond torch" is device memory that no tensor has: the plans that cuDNN keeps.
    """
    return {"with cuDNN": _growing("cuda"), "without cuDNN": _without_cudnn()}


def _without_cudnn() -> Found:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return _growing("cuda")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _growing(device: str) -> Found:
    _attend(device, 1)  # sets up what no length does
    before = _taken_bytes(device)
    first = [_ms(device, length) for length in _LENGTHS]
    again = [_ms(device, length) for length in _LENGTHS]
    q, k = _inputs(device, _LENGTHS[-1])
    return {
        "backend": torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, k, k)).name,
        "first time, ms": first,
        "again, ms": again,
        "taken beyond torch, bytes": _taken_bytes(device) - before,
    }


def _inputs(device: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    q = torch.ones(1, _HEADS, 1, _HEAD_SIZE, device=device, dtype=dtype)
    return q, torch.ones(1, _HEADS, length, _HEAD_SIZE, device=device, dtype=dtype)


def _attend(device: str, length: int) -> torch.Tensor:
    q, k = _inputs(device, length)
    return F.scaled_dot_product_attention(q, k, k)


def _ms(device: str, length: int) -> float:
    began = time.perf_counter()
    _attend(device, length).sum().item()
    return round((time.perf_counter() - began) * 1e3, 3)


def _taken_bytes(device: str) -> int:
    """Of the device, without what torch's allocator holds."""
    if device == "cpu":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes - torch.cuda.memory_reserved()


PARTS: dict[str, Callable[[], Found]] = {
    "gpu": gpu,
    "versions": versions,
    "compiler": compiler,
    "brought": brought,
    "pinned": pinned,
    "attention": attention,
}

if __name__ == "__main__":
    sys.exit(main())
