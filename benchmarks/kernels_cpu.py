"""The calls of the kernel benchmark on the CPU: linears, weights from memory and from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.calls import Call
from benchmarks.kernels_inputs import Group, Inputs, Setup
from bminf.ops.linear import linear_of_checked

_BOUND = 1e-2  # bfloat16 keeps 8 bits: half of the last one is 2e-3 of a number
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# variant, format, activations
_PACKED = (
    ("int8", "int8", "float"),
    ("int8, int8 activations", "int8", "int8"),
    ("int4", "int4", "float"),
)


def linear_groups(setup: Setup) -> Iterator[Group]:
    """For each shape and number of rows: torch's linears, and those with packed weights."""
    for shape in setup.shapes:
        inputs = Inputs(setup, shape)
        for num_rows in setup.rows:
            name = f"linear {shape[0]}x{shape[1]} M={num_rows}"
            yield Group(name, setup.device, partial(_linear_calls, inputs, num_rows))


OPS: dict[str, Callable[[Setup], Iterator[Group]]] = {"linear": linear_groups}


def _linear_calls(inputs: Inputs, num_rows: int) -> list[Call]:
    calls: list[Call] = []
    for op in ("linear rotated", "linear cached"):
        for dtype in (torch.float32, torch.bfloat16):
            calls.append(_plain(inputs, op, num_rows, dtype))
        calls += [_packed(inputs, op, num_rows, *kind) for kind in _PACKED]
    return calls


def _plain(inputs: Inputs, op: str, num_rows: int, dtype: torch.dtype) -> Call:
    x, weights = inputs.x[:num_rows].to(dtype), inputs.plain(dtype)
    return inputs.call(
        op,
        num_rows,
        f"torch {str(dtype).removeprefix('torch.')}",
        lambda i: F.linear(x, weights[i]),
        len(weights) if op == "linear rotated" else 1,
        inputs.error(num_rows, None),
        _BOUND,
        weights[0].nbytes,
    )


def _packed(
    inputs: Inputs, op: str, num_rows: int, variant: str, format: str, activations: str
) -> Call:
    x, packed = inputs.x[:num_rows], inputs.packed(format)
    return inputs.call(
        op,
        num_rows,
        variant,
        lambda i: linear_of_checked(x, packed[i], None, activations),
        len(packed) if op == "linear rotated" else 1,
        inputs.error(num_rows, format, rounds_x=activations == "int8"),
        _BOUND,
        packed.num_bytes,
    )


def cache_bytes() -> int:
    """The largest cache of the first core; 0 where the system does not say."""
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=0)
