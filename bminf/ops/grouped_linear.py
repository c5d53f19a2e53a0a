"""Products of rows with one of many packed weights each: the experts that a router chose.

One launch multiplies each row with its own weight, wherever that lies: the kernel reads addresses
from a table. A row has the bits that it has in bminf.ops.linear with its weight and no other row.
On a CPU it is one call, whose threads take parts of any of the products.
Kernels: kernels/linear_few_rows.cu with GROUPED, kernels/cpu/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bminf.cpu.library import MAX_ROWS
from bminf.cuda.launcher import Launcher, launcher_for
from bminf.cuda.source import Kernel, LaunchPlan
from bminf.errors import ArgumentError
from bminf.ops.cpu_linear import Part, few_rows_of_many
from bminf.ops.dequantize import group_arguments, weight_arguments
from bminf.ops.linear import linear
from bminf.ops.linear_weight_only import (
    FEW_ROWS_THREADS,
    few_rows_grid,
    few_rows_kernel,
    sizes_of,
)
from bminf.ops.rows import check_activations, check_codes, check_vector, kernel_rows
from bminf.quantization.packed import PackedWeight

MAX_PRODUCTS = 65535
"""Rows of one launch: as many as a grid has blocks."""


def grouped_linear(
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[p] = x[rows[p]] W^T + bias with the weight, and the bias, that slots[p] is the key of.

    x: (M, K) float32, float16 or bfloat16.   weights: (N, K) packed, alike, by numbers from 0 on.
    slots: (P,) int64.   biases: (N,) by the same keys, in the dtype of x, or None.
    rows: (P,) int64 from 0 to M - 1, or None for each p its own row.
    out: what is written to, and keeps the rows whose number has no weight; zeros unless told.
    Returns (P, N) in the dtype of x. Knows no gradients. Raises ArgumentError before any work.
    """
    _check(x, weights, slots, biases, rows)
    _check_out(out, x, len(slots), next(iter(weights.values())).out_features)
    return grouped_linear_of_checked(x, weights, slots, biases, rows, out)


def grouped_linear_of_checked(
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As grouped_linear, for weights that are known to be alike, as in a layer of ours."""
    launcher, first = launcher_for(x.device), next(iter(weights.values()))
    x = x.detach()
    y = x.new_zeros(len(slots), first.out_features) if out is None else out
    if launcher is None and few_rows_of_many(*_parts(x, weights, slots, biases, rows), y):
        return y
    if launcher is None or 0 in (len(slots), first.in_features, first.out_features):
        return grouped_linear_reference(x, weights, slots, biases, rows, y)
    return _launch(launcher, kernel_rows(x), weights, slots, biases, rows, y)


def grouped_linear_reference(
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As grouped_linear, one weight after another."""
    num_outputs = next(iter(weights.values())).out_features
    y = x.new_zeros(len(slots), num_outputs) if out is None else out
    for number, weight in weights.items():
        (chosen,) = torch.where(slots == number)
        if len(chosen):
            of_x = chosen if rows is None else rows[chosen]
            y[chosen] = linear(x[of_x], weight, None if biases is None else biases[number])
    return y


def _parts(
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Part]]:
    """The rows of x in the order of `slots`, and which of them, one after another, have the same
    weight."""
    numbers, parts, start = slots.tolist(), list[Part](), 0
    for stop in range(1, len(numbers) + 1):
        number = numbers[start]
        is_over = stop == len(numbers) or numbers[stop] != number or stop - start == MAX_ROWS
        if is_over and number in weights:
            bias = None if biases is None else biases[number]
            parts.append(Part(start, stop, weights[number], bias))
        start = stop if is_over else start
    return x if rows is None else x[rows], parts


def grouped_kernel(dtype: torch.dtype, weight: PackedWeight) -> Kernel:
    """The kernel for weights of this kind: that of one row, but for its arguments."""
    like = few_rows_kernel(dtype, weight, 1)
    return Kernel(like.file, "linear_grouped", (*like.macros, ("GROUPED", 1)))


def _launch(
    launcher: Launcher,
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None,
    rows: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    table = torch.tensor(_addresses(weights, biases, x.dtype), dtype=torch.int64).to(x.device)
    plan = _plan(x, next(iter(weights.values())), len(slots), len(table))
    launcher.run(plan, (x, table, slots, rows, y))
    return y


def _addresses(
    weights: Mapping[int, PackedWeight],
    biases: Mapping[int, torch.Tensor] | None,
    dtype: torch.dtype,
) -> list[list[int]]:
    """Rows of the table, zeros for a number that no weight has."""
    table = [[0] * 5 for _ in range(max(weights) + 1)]
    for number, weight in weights.items():
        check_codes(f"qweight of {number}", weight.qweight)
        tensors = *weight_arguments(weight), None if biases is None else biases[number]
        table[number] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return table


def _plan(x: torch.Tensor, weight: PackedWeight, num_products: int, num_slots: int) -> LaunchPlan:
    """How such products are launched, worked out once for such sizes."""
    key = (x.shape[1], x.dtype, num_products, num_slots, *sizes_of(weight))
    plan = _plans.get(key)
    if plan is None:
        kernel = grouped_kernel(x.dtype, weight)
        width, _, _ = few_rows_grid(kernel, 1, weight.out_features)
        numbers = num_slots, weight.out_features, x.shape[1], *group_arguments(weight)
        grid, block = (width, num_products, 1), (FEW_ROWS_THREADS, 1, 1)
        plan = _plans[key] = LaunchPlan(kernel, grid, block, numbers)
    return plan


_plans: dict[tuple[Any, ...], LaunchPlan] = {}


def _check(
    x: torch.Tensor,
    weights: Mapping[int, PackedWeight],
    slots: torch.Tensor,
    biases: Mapping[int, torch.Tensor] | None,
    rows: torch.Tensor | None,
) -> None:
    if not weights or min(weights) < 0:
        raise ArgumentError(f"weights have the numbers {sorted(weights)}; give some, from 0 on")
    first = next(iter(weights.values()))
    check_activations(x, first.in_features, first.qweight.device)
    for name, indices in (("slots", slots), ("rows", rows)):
        if indices is not None:
            _check_indices(name, indices, x.device)
    if x.dim() != 2 or len(slots) != (len(x) if rows is None else len(rows)):
        raise ArgumentError(
            f"x has shape {tuple(x.shape)}, and there are {len(slots)} slots and "
            f"{'no' if rows is None else len(rows)} rows; give (M, K), and one slot a row"
        )
    if len(slots) > MAX_PRODUCTS:
        raise ArgumentError(f"{len(slots)} slots; at most {MAX_PRODUCTS} at once")
    for number, weight in weights.items():
        _check_weight(number, weight, first)
        _check_bias(number, biases, weight, x.dtype)


def _check_out(out: torch.Tensor | None, x: torch.Tensor, rows: int, columns: int) -> None:
    if out is None:
        return
    if out.dtype != x.dtype or out.device != x.device or tuple(out.shape) != (rows, columns):
        raise ArgumentError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; it must be {x.dtype} "
            f"of shape ({rows}, {columns}) on {x.device}"
        )
    if not out.is_contiguous():
        raise ArgumentError("out is not contiguous")


def _check_indices(name: str, indices: torch.Tensor, device: torch.device) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1 or not indices.is_contiguous():
        raise ArgumentError(
            f"{name} are {indices.dtype} of shape {tuple(indices.shape)}; give (P,) int64, "
            "contiguous"
        )
    if indices.device != device:
        raise ArgumentError(f"{name} are on {indices.device}, x on {device}; move them together")


def _check_weight(number: int, weight: PackedWeight, first: PackedWeight) -> None:
    weight.check()
    if sizes_of(weight) != sizes_of(first) or weight.qweight.device != first.qweight.device:
        raise ArgumentError(
            f"the weight {number} has {weight.out_features} rows, {weight.in_features} columns, "
            f"{weight.form}, on {weight.qweight.device}, another one {first.out_features}, "
            f"{first.in_features}, {first.form}, on {first.qweight.device}; they must be alike"
        )


def _check_bias(
    number: int,
    biases: Mapping[int, torch.Tensor] | None,
    weight: PackedWeight,
    dtype: torch.dtype,
) -> None:
    if biases is None:
        return
    bias = biases.get(number)
    check_vector(f"bias of {number}", bias, weight.out_features, weight.qweight.device)
    if bias is None or bias.dtype != dtype or not bias.is_contiguous():
        raise ArgumentError(f"the bias of {number} must be a contiguous tensor of {dtype}")
