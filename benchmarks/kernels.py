"""The products with packed weights, and what is around them, against those of torch and others.

Groups of calls are made one after the other, so that the weights of one shape only are in memory.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import kernels_cpu, kernels_cuda
from benchmarks.calls import Call, CallResult, measure_calls
from benchmarks.harness import Settings
from benchmarks.kernels_inputs import FORMATS, Group, Setup
from benchmarks.kernels_targets import targets
from bminf.progress import progress_bar
from bminf.units import parse_bytes

_SHAPES = {
    # Of SmolLM2-135M, then of small and of larger models.
    "cpu": ("576x576", "1536x576", "576x1536", "2048x2048", "4096x4096"),
    # A usual one, CPM-2's feed-forward, GLM-130B's attention and feed-forward.
    "cuda": ("4096x4096", "10240x4096", "12288x12288", "32768x12288"),
}
_ROWS = {"cpu": (1, 16, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)}
_OPS = {"cpu": kernels_cpu.OPS, "cuda": kernels_cuda.OPS}
_DTYPES = {"cpu": "float32", "cuda": "float16"}
_LEAST_ROTATE_BYTES = 300_000_000  # on the CPU
_CACHES = 4  # on a GPU: so many times its L2 cache
_COPY_BYTES = 2**30  # on a GPU; on the CPU as much as is rotated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    ops = [*_OPS["cpu"], *_OPS["cuda"]]
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--ops", nargs="+", choices=ops, metavar="OP", help=f"of {', '.join(ops)}")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="of weights (out x in features)")
    add("--rows", nargs="+", type=int, metavar="M", help="rows of activations")
    add("--formats", nargs="+", choices=FORMATS, default=["int8", "int4"], metavar="FORMAT",
        help=f"on a GPU, of {', '.join(FORMATS)}; default: int8 int4")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations, on a GPU")
    add("--rotate-bytes", metavar="SIZE", help="that pass before weights are used again")
    add("--copy-bytes", metavar="SIZE", help="of the copy that measures the bandwidth")
    add("--seconds", type=float, default=float("inf"), metavar="S",
        help="begin no group of calls after so long; what is left out is in the file")  # fmt: skip
    add("--threads", type=int, default=1, metavar="N", help="of torch on the CPU; default: 1")
    parser.set_defaults(warmup=1, repeats=3, rounds=5)


def shape(text: str) -> tuple[int, int]:
    """NxK as two numbers. Raises ValueError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]), int(match[2])


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Iterator[Group]]]:
    """The parameters of the run, and groups of calls, each made when its turn comes."""
    setup = setup_of(arguments)
    kind = setup.device.type
    parameters = {
        "device": kind,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "ops": arguments.ops or list(_OPS[kind]),
        "shapes": [f"{n}x{k}" for n, k in setup.shapes],
        "rows": list(setup.rows),
        "formats": list(setup.formats),
        "rotate_bytes": setup.rotate_bytes,
        "copy_bytes": setup.copy_bytes,
        "threads": arguments.threads,
        "left_out": [],
    }
    unknown = set(parameters["ops"]) - set(_OPS[kind])
    if unknown:
        raise SystemExit(f"--ops {' '.join(sorted(unknown))}: not on {kind}")
    parameters["left_out"] = _names(setup, parameters["ops"])
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        end = time.monotonic() + arguments.seconds
        yield parameters, _groups(setup, parameters, end)
    finally:
        torch.set_num_threads(threads)


def measure(group: Group, settings: Settings) -> list[CallResult]:
    """A result for each call of `group`, with its share of the bandwidth of the first, the copy."""
    results = measure_calls(group.calls(), settings, group.device)
    timed = [result for result in results if result.failure is None]
    if timed and timed[0].details["op"] == "copy":
        for result in timed:
            result.details["copy_fraction"] = result.gbps() / timed[0].gbps()
    return results


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The arguments, with the defaults of the device in place of what was not given."""
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rotate_bytes = _rotate_bytes(kind)
    if arguments.rotate_bytes is not None:
        rotate_bytes = parse_bytes(arguments.rotate_bytes, "--rotate-bytes")
    copy_bytes = _COPY_BYTES if kind == "cuda" else rotate_bytes
    if arguments.copy_bytes is not None:
        copy_bytes = parse_bytes(arguments.copy_bytes, "--copy-bytes")
    return Setup(
        device=torch.device(kind),
        dtype=getattr(torch, arguments.dtype or _DTYPES[kind]),
        shapes=tuple(arguments.shapes or map(shape, _SHAPES[kind])),
        rows=tuple(sorted(arguments.rows or _ROWS[kind])),
        formats=tuple(arguments.formats),
        rotate_bytes=rotate_bytes,
        copy_bytes=copy_bytes,
    )


def _rotate_bytes(kind: str) -> int:
    """Several times the cache; on the CPU twice what the system says, which may be shared."""
    if kind == "cuda":
        return _CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    return max(_LEAST_ROTATE_BYTES, 2 * kernels_cpu.cache_bytes())


def _groups(setup: Setup, parameters: dict[str, Any], end: float) -> Iterator[Group]:
    """Each group begins with a copy, whose bandwidth the others are compared with. Those that would
    begin after `end`, a time of time.monotonic(), stay in "left_out"."""
    copy = _copy(setup)
    for op in parameters["ops"]:
        for group in progress_bar(_OPS[setup.device.type][op](setup), desc=op):
            if time.monotonic() <= end:
                yield replace(group, calls=partial(_with_copy, copy, group))
                parameters["left_out"].remove(group.name)


def _names(setup: Setup, ops: Sequence[str]) -> list[str]:
    """Of all groups. They are made anew for it, which costs nothing before their inputs are."""
    return [group.name for op in ops for group in _OPS[setup.device.type][op](setup)]


def _with_copy(copy: Call, group: Group) -> list[Call]:
    return [replace(copy, name=f"{group.name}: copy"), *group.calls()]


def _copy(setup: Setup) -> Call:
    """From memory to memory of the device: both the reading and the writing count."""
    data = torch.randint(-128, 128, (setup.copy_bytes,), dtype=torch.int8, device=setup.device)
    target = torch.empty_like(data)
    return Call(
        name="copy",
        run=lambda _: target.copy_(data),
        num_sets=1,
        error=lambda value: 0.0 if torch.equal(value, data) else float("inf"),
        bound=0.0,
        num_bytes=2 * setup.copy_bytes,
        details={"op": "copy", "variant": "copy"},
    )


def table(results: Sequence[CallResult]) -> str:
    """The results and the targets as lines of text; all of it follows from the JSON file."""
    head = f"{'call':60} {'us':>9} {'spread':>7} {'GB/s':>7} {'copy':>5} {'TOPS':>7} {'error':>8}"
    reached = targets({"results": [result.as_json() for result in results]})
    return "\n".join([head, *map(_row, results), *map(str, reached)])


def _row(result: CallResult) -> str:
    content = result.as_json()
    if content["time_s"] is None:
        return f"{result.name:60} {result.failure}"
    time_s, fraction = content["time_s"], result.details.get("copy_fraction", 1.0)
    mark = "*" if result.details.get("is_chosen") else " "
    return (
        f"{result.name:60}{mark}{time_s['median'] * 1e6:9.1f} {time_s['spread']:7.0%} "
        f"{content['gbps']:7.0f} {fraction:5.2f} {content['tops']:7.1f} {result.error:8.1e}"
    )
