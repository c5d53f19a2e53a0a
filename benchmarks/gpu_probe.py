"""`python -m benchmarks.gpu_probe machine FILE`: what the machine of a GPU session is.

In half a minute, before anything else: what it finds explains what the other steps find.
`cases` and `products` in place of `machine FILE` are for compute-sanitizer and for ncu.
"""

from __future__ import annotations

import importlib.util
import mmap
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_session import MARK, ROOT

sys.path.append(str(ROOT / "tests" / "kernels"))

from cases import few_of_each
from variants import every_variant

from benchmarks.harness import Settings, document, write_json
from bminf.cuda.compile import cache_folder, compiler_version, kept_file, read_kept
from bminf.ops.linear import linear
from bminf.quantization.packed import INT4, INT8, pack

_DEVICE = "cuda"
_COPY_BYTES = 2**29
_LENGTHS = range(100, 120)  # of keys; cuDNN makes a plan for each that is new

Found = dict[str, Any]


def machine(out: str) -> int:
    """0, or 1 where a part failed; each part is written as soon as it is known."""
    content = document("probe", {}, Settings()) | {"found": {}, "failures": []}
    for part in PARTS:
        try:
            content["found"][part.__name__] = part()
        except Exception as error:
            traceback.print_exc()
            content["failures"].append(f"{part.__name__}: {type(error).__name__}: {error}")
        write_json(Path(out), content)
    for name in ("versions", "hardware", "found", "failures"):
        print(f"{name}: {content[name]}")
    return int(bool(content["failures"]))


def gpu() -> Found:
    """What the head of the file does not say of it."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    return {
        "capability": _capability(),
        "processors": torch.cuda.get_device_properties(0).multi_processor_count,
        "free bytes": torch.cuda.mem_get_info()[0],
        "cuDNN": torch.backends.cudnn.version(),
        "NVRTC": compiler_version(),
    }


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def brought() -> Found:
    """Raises RuntimeError where jieba is not there, or kernels have changed since prepare."""
    remedy = "run python -m benchmarks.gpu_session prepare and bring the folder along"
    if importlib.util.find_spec("jieba") is None:
        raise RuntimeError(f"jieba is not there, models of Chinese text cannot run; {remedy}")
    capability, compiler = _capability(), compiler_version()
    wanted = every_variant(capability)
    missing = [k for k in wanted if read_kept(kept_file(k, capability, compiler)) is None]
    if missing and (cache_folder().parent / MARK).is_file():
        raise RuntimeError(
            f"{len(missing)} of {len(wanted)} kernels are not among those brought for {capability} "
            f"and NVRTC {compiler}, such as {missing[0]}; {remedy}"
        )
    return {"kernels": len(wanted), "kernels to compile": len(missing)}


def pinned() -> Found:
    """GB/s of locking pages and of copying out of them, by how the memory was mapped."""
    shared = mmap.mmap(-1, _COPY_BYTES, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    private = mmap.mmap(-1, _COPY_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE)
    return {"shared": _rates(shared), "private, huge pages": _rates(private)}


def _rates(memory: mmap.mmap) -> Found:
    from cupy.cuda import runtime

    host = torch.frombuffer(memory, dtype=torch.uint8)
    target = torch.empty_like(host, device=_DEVICE)
    lock_s = _seconds(lambda: runtime.hostRegister(host.data_ptr(), len(host), 0))
    try:
        copies_s = [_seconds(lambda: target.copy_(host, non_blocking=True)) for _ in range(8)]
        is_pinned = host.is_pinned()
    finally:
        runtime.hostUnregister(host.data_ptr())
    return {
        "torch calls it pinned": is_pinned,
        "locking, GB/s": round(len(host) / lock_s / 1e9, 2),
        "copying, GB/s": round(len(host) / statistics.median(copies_s) / 1e9, 2),
    }


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def attention() -> Found:
    """ms of one row of queries by growing lengths of keys, with cuDNN among the ways and without.

    "taken beyond torch" is device memory that no tensor has: the plans that cuDNN keeps.
    """
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    found = {"with cuDNN": _growing()}
    with sdpa_kernel(others):
        return found | {"without cuDNN": _growing()}


def _growing() -> Found:
    q = torch.ones(1, 64, 1, 64, device=_DEVICE, dtype=torch.float16)
    keys = [q.expand(-1, -1, length, -1).contiguous() for length in _LENGTHS]
    _attend_ms(q, q)  # sets up what no length does
    before = _taken_bytes()
    return {
        "backend": SDPBackend(torch._fused_sdp_choice(q, keys[-1], keys[-1])).name,
        "first time, ms": [_attend_ms(q, k) for k in keys],
        "again, ms": [_attend_ms(q, k) for k in keys],
        "taken beyond torch, bytes": _taken_bytes() - before,
    }


def _attend_ms(q: torch.Tensor, k: torch.Tensor) -> float:
    return round(_seconds(lambda: F.scaled_dot_product_attention(q, k, k)) * 1e3, 3)


def _taken_bytes() -> int:
    """Of the device, without what torch's allocator holds."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes - torch.cuda.memory_reserved()


PARTS = (gpu, brought, pinned, attention)

# ---- under NVIDIA's tools ------------------------------------------------------------------------


def cases() -> int:
    """Those that reach every line of every kernel; 0 if all give the right result, otherwise 1."""
    torch.manual_seed(0)
    is_wrong = False
    for case in (case for group in few_of_each().values() for case in group):
        print(case.name, flush=True)
        try:
            case.run(_DEVICE)
        except Exception:  # which does not keep the next one from running
            traceback.print_exc()
            is_wrong = True
    return int(is_wrong)


def products(size: int = 12288) -> int:
    """One row and 16 rows, 8 and 4 bits, of a matrix that no cache holds; 0.

    A profiler that is told so sees the second time of each product only.
    """
    torch.manual_seed(0)
    int8, int4 = (pack(torch.randn(size, size, device=_DEVICE), form) for form in (INT8, INT4))
    one_row, rows = (torch.randn(m, size, device=_DEVICE).half() for m in (1, 16))
    calls = [(one_row, int8), (one_row, int4), (rows, int4)]
    for x, weight in calls:
        linear(x, weight)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        for x, weight in calls:
            linear(x, weight)
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    commands = {"machine": machine, "cases": cases, "products": products}
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
