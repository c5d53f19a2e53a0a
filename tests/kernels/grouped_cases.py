"""Rows times one of many weights each, as a router of experts has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from case import BOUNDS, DTYPES, Case, case, relative_error
from host_launcher import reaching

from bminf.ops.grouped_linear import grouped_linear
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import pack

NUMBERS = (0, 1, 3, 4)
"""Of the weights: a table has empty places, since not all experts are at hand."""
NOWHERE = 2


@dataclass(frozen=True)
class Group:
    """What grouped_linear takes, and what it shall give, in float64 on the CPU."""

    x: torch.Tensor
    weights: dict[int, PackedWeight]
    slots: torch.Tensor
    biases: dict[int, torch.Tensor] | None
    rows: torch.Tensor | None
    expected: torch.Tensor


def make_group(
    form: Format,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: str = "cpu",
    has_bias: bool = True,
    has_rows: bool = True,
) -> Group:
    """Of 9 products; without rows, of as many as x has. Some are of weights that are not there:
    below, in, and far beyond the table."""
    m, n, k = shape
    x, packed = torch.randn(m, k).to(dtype), {i: pack(torch.randn(n, k), form) for i in NUMBERS}
    biases = {i: torch.randn(n).to(dtype) for i in NUMBERS}
    rows = torch.randint(m, (9,)) if has_rows else torch.arange(m)
    slots = torch.tensor([4, 0, 3, NOWHERE, 1, 3, -1, 9, 2**40])[: len(rows)]
    expected = torch.zeros(len(rows), n, dtype=torch.float64)
    for p, slot in enumerate(slots.tolist()):
        if slot in packed:
            expected[p] = dequantize(packed[slot], torch.float64) @ x[rows[p]].double()
            expected[p] += biases[slot].double() if has_bias else 0
    return Group(
        x.to(device),
        {i: _moved(weight, device) for i, weight in packed.items()},
        slots.to(device),
        {i: bias.to(device) for i, bias in biases.items()} if has_bias else None,
        rows.to(device) if has_rows else None,
        expected,
    )


def _behind_table(group: Group) -> Iterator[torch.Tensor]:
    """What the kernel reads from addresses in a table; nothing on a GPU."""
    for packed in group.weights.values():
        yield from (t for t in packed if isinstance(t, torch.Tensor) and t.device.type == "cpu")
    yield from (t for t in (group.biases or {}).values() if t.device.type == "cpu")


def few_grouped() -> list[Case]:
    """A choice that reaches every line of the kernel, for sanitizers."""
    return [
        grouped_case(INT8, torch.float16, (5, 5, 70)),
        grouped_case(INT4, torch.bfloat16, (9, 3, 70), has_rows=False),
        grouped_case(Format(4, 32, True, 8), torch.float32, (5, 3, 70), has_bias=False),
    ]


def _moved(weight: PackedWeight, device: str) -> PackedWeight:
    return PackedWeight(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight))


@case
def grouped_case(
    device: str,
    form: Format,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    has_bias: bool = True,
    has_rows: bool = True,
) -> None:
    group = make_group(form, dtype, shape, device, has_bias, has_rows)
    with reaching(list(_behind_table(group))):
        y = grouped_linear(group.x, group.weights, group.slots, group.biases, group.rows)
    assert y.dtype == dtype and y.device.type == device
    assert relative_error(y, group.expected) < BOUNDS[dtype], shape


def grouped_cases() -> Iterator[Case]:
    """kernels/linear_few_rows.cu with GROUPED: awkward shapes, each type, each kind of format."""
    for dtype in DTYPES:
        for form in (INT8, INT4, Format(8, 34), Format(4, 32, True), Format(4, 34, True, 8)):
            yield grouped_case(form, dtype, (5, 9, 70))
    for form in (Format(4), Format(8, 32), Format(4, 16), Format(4, 6), Format(4, 32, True, 8)):
        yield grouped_case(form, torch.float16, (5, 33, 200))
    yield grouped_case(INT4, torch.bfloat16, (9, 1, 2), has_rows=False)
    yield grouped_case(INT8, torch.float16, (1, 1, 1), has_bias=False)
    yield grouped_case(INT4, torch.float16, (2, 3, 8192), has_bias=False)
    yield grouped_case(INT8, torch.bfloat16, (7, 5, 2056), has_rows=False)
