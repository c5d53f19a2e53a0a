"""Products on the CPU: from memory and from a cache, and by each level of the kernels beside those
of other libraries. What they take is compared with the time in which memory can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import bminf
from benchmarks.harness import Call, relative_error
from benchmarks.products import Rows, Setup
from bminf.cpu.library import Kernels, at_level, levels_of, open_library
from bminf.ops import cpu_linear
from bminf.ops.linear import linear_of_checked
from tools.other_products import OTHER_PRODUCTS

_READ_BYTES = 2**28  # at a time
_READ_PARTS = 64  # that threads share
_PLAIN_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN_BOUND = 1e-2  # bfloat16 keeps 8 bits: half of the last one is 2e-3 of a number
_BOUND = 2**-13  # of the norm, whatever the level


def thread_counts(setup: Setup) -> list[int]:
    """One, and as many as the run has."""
    return sorted({1, setup.threads})


def reads(setup: Setup) -> list[Call]:
    """Sums of what no cache holds, which is reading alone: by one thread, and by all."""
    num_bytes = min(_READ_BYTES, setup.rotate_bytes)
    count, width = -(-setup.rotate_bytes // num_bytes), num_bytes // _READ_PARTS // 8
    data = torch.ones((count, _READ_PARTS, width), dtype=torch.float64)
    right = torch.full((_READ_PARTS,), width)
    details = {"op": "read", "variant": "read", "num_sets": count, "bound": 0.0}
    details |= {"num_bytes": data[0].nbytes, "num_ops": 0}
    return [
        Call(
            f"read, {threads} thread(s)", lambda i: data[i].sum(-1),
            lambda y: relative_error(y, right), {**details, "threads": threads},
            partial(_running, threads, cpu_linear.kernels),
        )
        for threads in thread_counts(setup)
    ]  # fmt: skip


def linear_calls(rows: Rows) -> list[Call]:
    """torch's linears, and those with packed weights: from memory, and from a cache."""
    calls: list[Call] = []
    kinds = [(format, "float") for format in rows.inputs.setup.formats]
    kinds += [("int8", "int8")] if ("int8", "float") in kinds else []
    for state, count in (("rotated", None), ("cached", 1)):
        own = replace(rows, op=f"linear {state}")
        calls += [own.plain(dtype, _PLAIN_BOUND, count) for dtype in _PLAIN_DTYPES]
        for format, kind in kinds:
            name = format if kind == "float" else f"{format}, {kind} activations"
            run = partial(linear_of_checked, rows.x, bias=None, activations=kind)
            weights = rows.inputs.copies(format)[:count]
            calls.append(own.product(name, run, weights, _PLAIN_BOUND, format, kind == "int8"))
    threads = rows.inputs.setup.threads
    return [_named(call, call.details["variant"], threads=threads) for call in calls]


def level_calls(rows: Rows) -> list[Call]:
    """Each format by each level on one thread, and by the best one on all; and what others do."""
    counts = thread_counts(rows.inputs.setup)
    plain = [rows.plain(dtype, _PLAIN_BOUND) for dtype in _PLAIN_DTYPES]
    calls = [_on(call, threads) for call in plain for threads in counts]
    for format in rows.inputs.setup.formats:
        run = partial(linear_of_checked, rows.x, bias=None, activations="float")
        call = rows.product(format, run, rows.inputs.copies(format), _BOUND, format)
        for i, (level, kernels) in enumerate(levels().items()):
            by_level = _named(call, f"{format} {level}", level=level)
            calls += [_on(by_level, threads, kernels) for threads in (counts if i == 0 else [1])]
    return calls + [_on(call, 1) for call in _other_calls(rows)]


def _other_calls(rows: Rows) -> Iterator[Call]:
    """Those with the weights of the run's formats; what is not possible has a printed line."""
    for other in (other for other in OTHER_PRODUCTS if other.format in rows.inputs.setup.formats):
        if (obstacle := other.obstacle(rows.inputs.shape)) is not None:
            print(f"left out: {other.library} {other.title}, {rows.size}: {obstacle}")
            continue
        packed = rows.inputs.copies(other.format)[0]
        count = rows.inputs.num_copies(other.kept * other.copies(packed, 1)[0].nbytes)
        weights, x = other.copies(packed, count), rows.x.to(other.dtype)
        run = partial(lambda x, weight: weight.multiply(x), x)
        yield rows.product(other.name, run, weights, _PLAIN_BOUND, other.format)


@cache
def levels() -> dict[str, Callable[[], Kernels | None]]:
    """What this processor can run, the best first, and what gives it in bminf.cpu's place."""
    path, found = bminf.cpu_info().library, {}
    if path is not None:
        library = open_library(Path(path))
        found = {name: at_level(library, name) for name in levels_of(library)}
    return {name: partial(found.get, name) for name in (*found, "none")}


def _on(call: Call, threads: int, kernels: Callable[[], Kernels | None] | None = None) -> Call:
    """The call on so many threads of torch, and by those kernels."""
    variant = call.details["variant"] + (f", {threads} threads" if threads > 1 else "")
    around = partial(_running, threads, kernels or cpu_linear.kernels)
    return replace(_named(call, variant, threads=threads), around=around)


def _named(call: Call, variant: str, **details: Any) -> Call:
    name = call.name.removesuffix(call.details["variant"]) + variant
    return replace(call, name=name, details={**call.details, "variant": variant, **details})


@contextmanager
def _running(threads: int, kernels: Callable[[], Kernels | None]) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.object(cpu_linear, "kernels", kernels):
            yield
    finally:
        torch.set_num_threads(before)
