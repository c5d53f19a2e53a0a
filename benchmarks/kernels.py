"""The products with packed weights against those of torch.

Groups of calls are made one after the other, so that the weights of one shape only are in memory.
On a GPU each path of an op is timed, chosen or not: `is_chosen` marks the one that the op takes by
itself for these sizes, so that the thresholds in bminf/ops can be set by the others' times. Paths
are called by their private names for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu_products
from benchmarks.by_size import bytes_per_s
from benchmarks.harness import Call, Group, Result, Settings, measure_calls, poisoned
from benchmarks.products import BOUNDS, FORMATS, Inputs, Rows, Setup
from bminf.cuda.launcher import launcher_for
from bminf.ops import linear_w8a8, linear_weight_only
from bminf.ops.quantize_rows import quantize_rows
from bminf.quantization.packed import PackedWeight
from bminf.units import parse_bytes

_SHAPES = {
    # Of small and of large models. The largest first: what malloc keeps of it serves the others.
    "levels": ("8192x8192", "4096x4096", "2048x2048", "1024x1024"),
    # Of SmolLM2-135M, then of small and of larger models.
    "linear": ("576x576", "1536x576", "576x1536", "2048x2048", "4096x4096"),
    # A usual one, CPM-2's feed-forward, GLM-130B's attention and feed-forward.
    "cuda": ("4096x4096", "10240x4096", "12288x12288", "32768x12288"),
}
_ROWS = {"levels": (1,), "linear": (1, 16, 128)}
_GPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
_FORMATS = {"levels": ("int8", "int4", "int4-g32", "int4-g32-integers", "int4-g32-minimum")}
_DTYPES = {"cpu": "float32", "cuda": "float16"}
_NUM_CACHES = {"cpu": 2, "cuda": 4}  # so many times the cache is rotated
_LEAST_ROTATE_BYTES = {"cpu": 10**9, "cuda": 0}  # a CPU's cache may be shared

_LEAST_INT_MM_ROWS = 17
_ROUNDING_BOUND = 2e-3  # of codes: a tie that falls to the other side moves a code by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--ops", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="of weights (out x in features)")
    add("--rows", nargs="+", type=int, metavar="M", help="rows of activations")
    add("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations, on a GPU")
    add("--rotate-bytes", metavar="SIZE", help="that pass before weights are used again")
    parser.set_defaults(warmup=1, repeats=3, rounds=5)


def shape(text: str) -> tuple[int, int]:
    """NxK as two numbers. Raises ValueError."""
    n, k = map(int, text.split("x"))
    return n, k


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and groups of calls, each made when its turn comes."""
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = [op for op in OPS if (op in CPU_OPS) == (kind == "cpu")]
    ops = arguments.ops or (["levels"] if kind == "cpu" else known)
    if not {*ops} <= {*known}:
        raise SystemExit(f"--ops: on {kind} these are {', '.join(known)}")
    setup = setup_of(arguments, kind, ops[0] if kind == "cpu" else kind)
    parameters = vars(setup) | {
        "device": kind,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "ops": ops,
        "shapes": [f"{n}x{k}" for n, k in setup.shapes],
    }
    torch.manual_seed(0)
    firsts = cache(partial(cpu_products.reads if kind == "cpu" else _copies, setup))
    return parameters, [
        (name, partial(measure, name, firsts, calls, setup.device))
        for op in ops
        for name, calls in calls_by_group(setup, op)
    ]


def setup_of(arguments: argparse.Namespace, kind: str, defaults: str) -> Setup:
    """The arguments, with defaults in place of what was not given.   kind: of device."""
    rotate_bytes = max(_LEAST_ROTATE_BYTES[kind], _NUM_CACHES[kind] * _cache_bytes(kind))
    if arguments.rotate_bytes is not None:
        rotate_bytes = parse_bytes(arguments.rotate_bytes, "--rotate-bytes")
    return Setup(
        device=torch.device(kind),
        dtype=getattr(torch, arguments.dtype or _DTYPES[kind]),
        shapes=tuple(arguments.shapes or map(shape, _SHAPES[defaults])),
        rows=tuple(sorted(arguments.rows or _ROWS.get(defaults, _GPU_ROWS))),
        formats=tuple(arguments.formats or _FORMATS.get(defaults, ("int8", "int4"))),
        rotate_bytes=rotate_bytes,
        threads=torch.get_num_threads(),
    )


def _cache_bytes(kind: str) -> int:
    """The L2 of the GPU, or the largest cache of the first core; 0 where the system is silent."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # such as 32768K
    return max((int(file.read_text().strip("K\n")) * 2**10 for file in files), default=0)


# ---- groups --------------------------------------------------------------------------------------


def measure(
    name: str, firsts: Callable[[], list[Call]], calls: Callable[[], list[Call]],
    device: torch.device, settings: Settings,
) -> Iterator[list[Result]]:  # fmt: skip
    """A result for each call of a group, with its share of the bandwidth of the first: the copy, or
    on the CPU the reading of as many threads."""
    first = [replace(call, name=f"{name}: {call.name}") for call in firsts()]
    results = measure_calls([*first, *calls()], settings, device)
    known = {r["details"].get("threads"): r for r in results[: len(first)] if r["time_s"]}
    for result in (result for result in results if result["time_s"]):
        if (own := known.get(result["details"].get("threads"))) is not None:
            key = f"{own['details']['op']}_fraction"
            result["details"][key] = bytes_per_s(result) / bytes_per_s(own)
    yield results


def _copies(setup: Setup) -> list[Call]:
    """From memory to memory of the GPU: both the reading and the writing count."""
    data = torch.randint(-128, 128, (2**30,), dtype=torch.int8, device=setup.device)
    target = torch.empty_like(data)
    details = {"op": "copy", "variant": "copy", "num_sets": 1, "bound": 0.0}
    details |= {"num_bytes": 2 * data.nbytes, "num_ops": 0}
    run, error = (lambda _: target.copy_(data)), (lambda y: float(not torch.equal(y, data)))
    return [Call("copy", run, error, details)]


def calls_by_group(setup: Setup, op: str) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
    """The name of each group of an op, and what makes its calls."""
    for sides in setup.shapes:
        inputs = Inputs(setup, sides)
        for rows in (Rows(inputs, op, num_rows) for num_rows in setup.rows):
            yield f"{op} {rows.size}", partial(OPS[op], rows)


# ---- float activations ---------------------------------------------------------------------------

PATHS = ("few rows", "tensor cores", "dequantized")
"""The ways in which linear_weight_only can multiply."""


def _weight_only_calls(rows: Rows) -> list[Call]:
    x, num_rows = rows.x, len(rows.x)
    capability, bound = launcher_for(x.device).capability, 2 * BOUNDS[x.dtype]
    paths = [path for path in PATHS if has_path(path, capability, num_rows, x.dtype)]
    if num_rows < linear_weight_only.MAX_FEW_ROWS:
        paths.remove("dequantized")  # it reads the codes and more
    chosen = "few rows" if num_rows <= linear_weight_only.MAX_FEW_ROWS else "dequantized"
    if linear_weight_only.uses_tensor_cores(capability, num_rows, x.dtype):
        chosen = "tensor cores"
    calls = [rows.plain(x.dtype, bound)]
    for format in rows.inputs.setup.formats:
        for path in paths:
            run, weights = partial(run_path, path, x), rows.inputs.copies(format)
            name, is_chosen = f"{format} {path}", path == chosen
            calls.append(rows.product(name, run, weights, bound, format, is_chosen=is_chosen))
    return calls


def has_path(path: str, capability: int, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether that many rows can go that way, chosen or not."""
    if path == "few rows":
        return num_rows <= linear_weight_only.MAX_FEW_ROWS
    is_few = num_rows <= linear_weight_only.MAX_TENSOR_CORE_ROWS
    return path != "tensor cores" or (capability >= 80 and dtype != torch.float32 and is_few)


def run_path(path: str, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T, that way."""
    if path == "dequantized":
        return linear_weight_only._dequantized(x, weight, None)
    few, cores = linear_weight_only.launch_few_rows, linear_weight_only.launch_tensor_cores
    return (few if path == "few rows" else cores)(launcher_for(x.device), x, weight, None)


# ---- 8-bit activations ---------------------------------------------------------------------------


def _w8a8_calls(rows: Rows) -> list[Call]:
    """The products of codes that are there already; "whole" quantizes the activations, too."""
    x, packed = rows.x, rows.inputs.copies("int8")
    launcher, bound = launcher_for(x.device), BOUNDS[x.dtype]
    with poisoned():
        codes, scale = quantize_rows(x)

    def of_codes(product: Callable[..., torch.Tensor]) -> Callable[[PackedWeight], torch.Tensor]:
        return lambda weight: product(launcher, codes, scale, weight, None, x.dtype)

    def separate(weight: PackedWeight) -> torch.Tensor:
        """As one would write it in torch."""
        sums = torch._int_mm(codes, weight.qweight.t())
        return (sums.float() * scale.unsqueeze(-1) * weight.scale).to(x.dtype)

    runs = {
        "own kernel": of_codes(linear_w8a8.kernel_product),
        "library": of_codes(linear_w8a8.library_product),
        "whole": lambda weight: linear_w8a8.linear_w8a8(x, weight, None, launcher),
    }
    if len(x) >= _LEAST_INT_MM_ROWS:
        runs["torch._int_mm and torch"] = separate
    is_library = linear_w8a8.is_library_faster(launcher.capability, len(x))
    chosen = "library" if is_library else "own kernel"
    calls = [rows.plain(x.dtype, 2 * bound)]
    for name, run in runs.items():
        # The whole rounds x by itself; a tie may fall to the other side.
        most = bound + _ROUNDING_BOUND if name == "whole" else bound
        calls.append(rows.product(name, run, packed, most, "int8", True, is_chosen=name == chosen))
    return calls


CPU_OPS = ("levels", "linear")
OPS: dict[str, Callable[[Rows], list[Call]]] = {
    "levels": cpu_products.level_calls,
    "linear": cpu_products.linear_calls,
    "weight-only": _weight_only_calls,
    "w8a8": _w8a8_calls,
}
