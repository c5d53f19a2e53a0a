"""The products with packed weights against those of torch.

Groups of calls are made one after the other, so that the weights of one shape only are in memory.
On a GPU each path of an op is timed, chosen or not: `is_chosen` marks the one that the op takes by
itself for these sizes, so that the thresholds in bminf/ops can be set by the others' times. Paths
are called by their private names for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import (
    Call,
    Group,
    Result,
    Settings,
    measure_calls,
    poisoned,
    relative_error,
)  # fmt: skip
from bminf.cuda.launcher import launcher_for
from bminf.ops import linear_w8a8, linear_weight_only
from bminf.ops.linear import linear_of_checked
from bminf.ops.quantize_rows import quantize_rows
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import int8_rows, pack
from bminf.units import parse_bytes

FORMATS = {
    "int8": INT8,
    "int8-g128": Format(8, 128),
    "int4": INT4,  # groups of 16
    "int4-g32-integers": Format(4, 32, scale_bits=8),
    "int4-g16": Format(4, 16),
    "int4-g32": Format(4, 32),
    "int4-g32-minimum": Format(4, 32, has_minimum=True),
    "int4-g64": Format(4, 64),
    "int4-g128": Format(4, 128),
    "int4-row": Format(4),
}
_SHAPES = {
    # Of SmolLM2-135M, then of small and of larger models.
    "cpu": ("576x576", "1536x576", "576x1536", "2048x2048", "4096x4096"),
    # A usual one, CPM-2's feed-forward, GLM-130B's attention and feed-forward.
    "cuda": ("4096x4096", "10240x4096", "12288x12288", "32768x12288"),
}
_ROWS = {"cpu": (1, 16, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)}
_DTYPES = {"cpu": "float32", "cuda": "float16"}
_NUM_CACHES = {"cpu": 2, "cuda": 4}  # so many times the cache is rotated
_LEAST_ROTATE_BYTES = {"cpu": 300_000_000, "cuda": 0}  # a CPU's cache may be shared
_COPY_BYTES = 2**30

# Relative norm errors: half of the last bit of the result, and of the weights where these are
# rounded to the same type for tensor cores or the library, with room for the order of the sums.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_SLICE_ELEMENTS = 2**26  # of a weight in float64 at a time
_LEAST_INT_MM_ROWS = 17
_CPU_BOUND = 1e-2  # bfloat16 keeps 8 bits: half of the last one is 2e-3 of a number
_ROUNDING_BOUND = 2e-3  # of codes: a tie that falls to the other side moves a code by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--ops", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="of weights (out x in features)")
    add("--rows", nargs="+", type=int, metavar="M", help="rows of activations")
    add("--formats", nargs="+", choices=FORMATS, default=["int8", "int4"], metavar="FORMAT",
        help=f"of {', '.join(FORMATS)}; default: int8 int4")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations, on a GPU")
    add("--rotate-bytes", metavar="SIZE", help="that pass before weights are used again")
    parser.set_defaults(warmup=1, repeats=3, rounds=5)


def shape(text: str) -> tuple[int, int]:
    """NxK as two numbers. Raises ValueError."""
    n, k = map(int, text.split("x"))
    return n, k


@dataclass(frozen=True)
class Setup:
    """What all calls of a run have in common.

    dtype: of activations.   shapes: (out_features, in_features) of weights.   rows: of activations,
    in ascending order.   rotate_bytes: of other inputs are read before a set comes again.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    formats: tuple[str, ...]
    rotate_bytes: int


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and groups of calls, each made when its turn comes."""
    setup = setup_of(arguments)
    kind = setup.device.type
    known = [op for op in OPS if (op == "linear") == (kind == "cpu")]
    ops = arguments.ops or known
    if not {*ops} <= {*known}:
        raise SystemExit(f"--ops: on {kind} these are {', '.join(known)}")
    parameters = vars(setup) | {
        "device": kind,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "ops": ops,
        "shapes": [f"{n}x{k}" for n, k in setup.shapes],
    }
    torch.manual_seed(0)
    bandwidth = cache(partial(_read if kind == "cpu" else _copy, setup))
    return parameters, [
        (name, partial(measure, name, bandwidth, calls, setup.device))
        for op in ops
        for name, calls in calls_by_group(setup, op)
    ]


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The arguments, with the defaults of the device in place of what was not given."""
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rotate_bytes = max(_LEAST_ROTATE_BYTES[kind], _NUM_CACHES[kind] * _cache_bytes(kind))
    if arguments.rotate_bytes is not None:
        rotate_bytes = parse_bytes(arguments.rotate_bytes, "--rotate-bytes")
    return Setup(
        device=torch.device(kind),
        dtype=getattr(torch, arguments.dtype or _DTYPES[kind]),
        shapes=tuple(arguments.shapes or map(shape, _SHAPES[kind])),
        rows=tuple(sorted(arguments.rows or _ROWS[kind])),
        formats=tuple(arguments.formats),
        rotate_bytes=rotate_bytes,
    )


def _cache_bytes(kind: str) -> int:
    """The L2 of the GPU, or the largest cache of the first core; 0 where the system is silent."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # such as 32768K
    return max((int(file.read_text().strip("K\n")) * 2**10 for file in files), default=0)


# ---- weights in several copies, and the right results --------------------------------------------


class Inputs:
    """A random weight (N, K) and random activations, and all that is made of them, once."""

    def __init__(self, setup: Setup, shape: tuple[int, int]) -> None:
        self.setup, self.shape = setup, shape
        self._copies: dict[str | torch.dtype, list[Any]] = {}
        self._products: dict[tuple[str | None, bool], torch.Tensor] = {}

    @cached_property
    def weight(self) -> torch.Tensor:
        """(N, K) float32."""
        return torch.randn(self.shape, device=self.setup.device).div_(self.shape[1] ** 0.5)

    @cached_property
    def x(self) -> torch.Tensor:
        """(most rows, K)."""
        shape = (max(self.setup.rows), self.shape[1])
        return torch.randn(shape, device=self.setup.device).to(self.setup.dtype)

    def num_copies(self, num_bytes: int) -> int:
        """So many that, between two uses of one, `rotate_bytes` of others are read."""
        return 1 + -(-self.setup.rotate_bytes // max(1, num_bytes))

    def copies(self, kind: str | torch.dtype) -> Sequence[Any]:
        """Of the weight in FORMATS[kind], or as it is in a type of torch."""
        if kind not in self._copies:
            packs = isinstance(kind, str)
            weight = pack(self.weight, FORMATS[kind]) if packs else self.weight.to(kind)
            count = self.num_copies(bytes_of(weight))
            self._copies[kind] = [deepcopy(weight) for _ in range(count)]
        return self._copies[kind]

    def product(self, format: str | None, rounds_x: bool) -> torch.Tensor:
        """(most rows, N) float64: the right one with a format, or with the weight as it is.

        rounds_x: each token of x is rounded to 8 bits first.
        """
        if (format, rounds_x) not in self._products:
            x, weight = self.x.double(), self.weight
            if format is not None:
                weight = dequantize(self.copies(format)[0], torch.float32)
            if rounds_x:
                codes, scale = int8_rows(self.x)
                x = codes.double() * scale.double().unsqueeze(-1)
            parts = weight.split(max(1, _SLICE_ELEMENTS // weight.shape[1]))
            right = torch.cat([x @ part.double().t() for part in parts], dim=1)
            self._products[format, rounds_x] = right
        return self._products[format, rounds_x]


@dataclass(frozen=True)
class Rows:
    """Some rows of activations for one op; makes its calls."""

    inputs: Inputs
    op: str
    num_rows: int

    @property
    def x(self) -> torch.Tensor:
        return self.inputs.x[: self.num_rows]

    @property
    def size(self) -> str:
        """The shape and the number of rows, as names have it."""
        n, k = self.inputs.shape
        return f"{n}x{k} M={self.num_rows}"

    def product(
        self,
        variant: str,
        run: Callable[[Any], torch.Tensor],
        weights: Sequence[Any],
        bound: float,
        format: str | None = None,
        rounds_x: bool = False,
        **details: Any,
    ) -> Call:
        """A product of the rows with one of `weights` after the other.

        format, rounds_x: see Inputs.product(), which is the right result.
        The bytes it moves are those of the weights, of the activations and of the result.
        """
        num_rows, (n, k), nbytes = self.num_rows, self.inputs.shape, bytes_of(weights[0])

        def error(y: torch.Tensor) -> float:
            return relative_error(y, self.inputs.product(format, rounds_x)[:num_rows])

        details |= {
            "op": self.op,
            "variant": variant,
            "format": format,
            "rows": num_rows,
            "out_features": n,
            "in_features": k,
            "weight_bytes": nbytes,
            "num_bytes": nbytes + num_rows * (n + k) * self.x.element_size(),
            "num_ops": 2 * num_rows * n * k,
            "num_sets": len(weights),
            "bound": bound,
        }
        return Call(f"{self.op} {self.size}: {variant}", lambda i: run(weights[i]), error, details)


def bytes_of(weight: torch.Tensor | PackedWeight) -> int:
    """That a product with float activations has to read: of a packed weight codes, scales and
    minima, of groups and of rows."""
    parts = [weight] if isinstance(weight, torch.Tensor) else [*weight[:3], weight.row_scale]
    return sum(part.nbytes for part in parts if part is not None)


# ---- groups --------------------------------------------------------------------------------------


def measure(
    name: str, bandwidth: Callable[[], Call], calls: Callable[[], list[Call]],
    device: torch.device, settings: Settings,
) -> Iterator[list[Result]]:  # fmt: skip
    """A result for each call of a group, with its share of the bandwidth of the first, which copies
    on a GPU and reads on the CPU."""
    first = bandwidth()
    results = measure_calls(
        [replace(first, name=f"{name}: {first.name}"), *calls()], settings, device
    )
    for result in results:
        if result["gbps"] is not None and results[0]["gbps"] is not None:
            share = result["gbps"] / results[0]["gbps"]
            result["details"][f"{first.name}_fraction"] = share
    yield results


def _read(setup: Setup) -> Call:
    """All of memory that no cache holds, by all threads of torch: the fastest of its sums."""
    data = torch.empty(setup.rotate_bytes // 4, device=setup.device).fill_(0)
    details = {"op": "read", "variant": "read", "num_sets": 1, "bound": 0.0}
    details |= {"num_bytes": data.nbytes, "num_ops": 0}
    return Call("read", lambda _: data.sum(), lambda y: float(y.abs()), details)


def _copy(setup: Setup) -> Call:
    """From memory to memory of the device: both the reading and the writing count."""
    data = torch.randint(-128, 128, (_COPY_BYTES,), dtype=torch.int8, device=setup.device)
    target = torch.empty_like(data)
    details = {"op": "copy", "variant": "copy", "num_sets": 1, "bound": 0.0}
    details |= {"num_bytes": 2 * data.nbytes, "num_ops": 0}
    return Call(
        "copy", lambda _: target.copy_(data), lambda y: float(not torch.equal(y, data)), details
    )


def calls_by_group(setup: Setup, op: str) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
    """The name of each group of an op, and what makes its calls."""
    for sides in setup.shapes:
        inputs = Inputs(setup, sides)
        for rows in (Rows(inputs, op, num_rows) for num_rows in setup.rows):
            yield f"{op} {rows.size}", partial(OPS[op], rows)


# ---- on the CPU ----------------------------------------------------------------------------------


def _linear_calls(rows: Rows) -> list[Call]:
    """torch's linears, and those with packed weights: from memory, and from a cache."""
    calls: list[Call] = []
    for state, count in (("rotated", None), ("cached", 1)):
        own = replace(rows, op=f"linear {state}")
        calls += [
            _plain(own, dtype, _CPU_BOUND, count) for dtype in (torch.float32, torch.bfloat16)
        ]
        rounded = [("int8", "int8")] if "int8" in rows.inputs.setup.formats else []
        for format, kind in [*((f, "float") for f in rows.inputs.setup.formats), *rounded]:
            name = format if kind == "float" else f"{format}, {kind} activations"
            run = partial(linear_of_checked, rows.x, bias=None, activations=kind)
            weights = rows.inputs.copies(format)[:count]
            calls.append(own.product(name, run, weights, _CPU_BOUND, format, kind == "int8"))
    return calls


def _plain(rows: Rows, dtype: torch.dtype, bound: float, count: int | None = None) -> Call:
    """torch's product with a weight that is not quantized.   count: of copies, None is all."""
    x, variant = rows.x.to(dtype), f"torch {str(dtype).removeprefix('torch.')}"
    weights = rows.inputs.copies(dtype)[:count]
    return rows.product(variant, lambda weight: F.linear(x, weight), weights, bound)


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
    calls = [_plain(rows, x.dtype, bound)]
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
    few, cores = linear_weight_only.launch_few_rows, linear_weight_only._launch_tensor_cores
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
    calls = [_plain(rows, x.dtype, 2 * bound)]
    for name, run in runs.items():
        # The whole rounds x by itself; a tie may fall to the other side.
        most = bound + _ROUNDING_BOUND if name == "whole" else bound
        calls.append(rows.product(name, run, packed, most, "int8", True, is_chosen=name == chosen))
    return calls


OPS: dict[str, Callable[[Rows], list[Call]]] = {
    "linear": _linear_calls,
    "weight-only": _weight_only_calls,
    "w8a8": _w8a8_calls,
}
