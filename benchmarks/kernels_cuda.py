"""The calls of the kernel benchmark on a GPU: each path of each op, chosen or not, and torch's own.

`is_chosen` marks the path that the op takes by itself for these sizes, so that the thresholds in
bminf/ops can be set by the others' times. Paths are called by their private names for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.calls import Call, num_sets, poisoned, relative_error
from benchmarks.kernels_inputs import Group, Inputs, Packed, Setup, clones
from benchmarks.kernels_other import others
from bminf.cuda.launcher import Launcher, launcher_for
from bminf.ops import gated_linear, linear_w8a8, linear_weight_only
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.linear import linear_of_checked
from bminf.ops.quantize_rows import quantize_rows, rms_norm_quantize, rms_norm_reference
from bminf.quantization.packed import PackedWeight, int8_rows

_LEAST_INT_MM_ROWS = 17
_ACTIVATION = "gelu_tanh"
_MOST_SETS_OF_ROWS = 256  # few activations come from a cache in a model, too

# Relative norm errors: half of the last bit of the result, and of the weights where these are
# rounded to the same type for tensor cores or the library, with room for the order of the sums.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_ROUNDING_BOUND = 2e-3  # of codes: a tie that falls to the other side moves a code by one


def weight_only_groups(setup: Setup) -> Iterator[Group]:
    return _products("weight-only", setup, _weight_only_calls, setup.rows)


def w8a8_groups(setup: Setup) -> Iterator[Group]:
    return _products("w8a8", setup, _w8a8_calls, setup.rows)


def gated_groups(setup: Setup) -> Iterator[Group]:
    few = tuple(rows for rows in setup.rows if rows <= linear_weight_only.MAX_FEW_ROWS)
    return _products("gated", setup, _gated_calls, few)


def dequantize_groups(setup: Setup) -> Iterator[Group]:
    return _products("dequantize", setup, _dequantize_calls, (1,))


def rows_groups(setup: Setup) -> Iterator[Group]:
    """For each number of columns that a weight has."""
    for num_columns in sorted({in_features for _, in_features in setup.shapes}):
        for num_rows in setup.rows:
            name = f"rows {num_rows}x{num_columns}"
            calls = partial(_rows_calls, setup, num_rows, num_columns)
            yield Group(name, setup.device, calls)


OPS: dict[str, Callable[[Setup], Iterator[Group]]] = {
    "weight-only": weight_only_groups,
    "w8a8": w8a8_groups,
    "gated": gated_groups,
    "rows": rows_groups,
    "dequantize": dequantize_groups,
}


def _products(
    op: str, setup: Setup, calls: Callable[[Inputs, int], list[Call]], rows: tuple[int, ...]
) -> Iterator[Group]:
    for shape in setup.shapes:
        inputs = Inputs(setup, shape)
        for num_rows in rows:
            name = f"{op} {shape[0]}x{shape[1]} M={num_rows}"
            yield Group(name, setup.device, partial(calls, inputs, num_rows))


def _launcher(setup: Setup) -> Launcher:
    launcher = launcher_for(setup.device)
    assert launcher is not None, f"nothing runs kernels on {setup.device}"
    return launcher


# ---- float activations ---------------------------------------------------------------------------


def _weight_only_calls(inputs: Inputs, num_rows: int) -> list[Call]:
    calls = [_plain(inputs, "weight-only", num_rows)]
    for format in inputs.setup.formats:
        calls += _weight_only_paths(inputs, num_rows, format)
    return calls + others(inputs, "weight-only", num_rows)


def _plain(inputs: Inputs, op: str, num_rows: int) -> Call:
    """torch's product with a weight that is not quantised."""
    dtype = inputs.setup.dtype
    x, weights = inputs.x[:num_rows], inputs.plain(dtype)
    return inputs.call(
        op,
        num_rows,
        f"torch {str(dtype).removeprefix('torch.')}",
        lambda i: F.linear(x, weights[i]),
        len(weights),
        inputs.error(num_rows, None),
        2 * BOUNDS[dtype],
        weights[0].nbytes,
    )


def _weight_only_paths(inputs: Inputs, num_rows: int, format: str) -> list[Call]:
    x, packed = inputs.x[:num_rows], inputs.packed(format)
    capability = _launcher(inputs.setup).capability
    chosen = chosen_path(capability, num_rows, x.dtype)
    paths = [path for path in PATHS if has_path(path, capability, num_rows, x.dtype)]
    if num_rows < linear_weight_only.MAX_FEW_ROWS:
        paths.remove("dequantised")  # it reads the codes and more
    return [
        inputs.call(
            "weight-only",
            num_rows,
            f"{format} {path}",
            partial(_run_path, path, x, packed),
            len(packed),
            inputs.error(num_rows, format),
            2 * BOUNDS[x.dtype],
            packed.num_bytes,
            format=format,
            is_chosen=path == chosen,
        )
        for path in paths
    ]


def _run_path(path: str, x: torch.Tensor, packed: Packed, i: int) -> torch.Tensor:
    return run_path(path, x, packed[i])


PATHS = ("few rows", "tensor cores", "dequantised")
"""The ways in which linear_weight_only can multiply."""


def has_path(path: str, capability: int, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether that many rows can go that way, chosen or not."""
    if path == "few rows":
        return num_rows <= linear_weight_only.MAX_FEW_ROWS
    if path == "tensor cores":
        most = linear_weight_only.MAX_TENSOR_CORE_ROWS
        return capability >= 80 and dtype != torch.float32 and num_rows <= most
    return True


def chosen_path(capability: int, num_rows: int, dtype: torch.dtype) -> str:
    """The way that linear_weight_only takes."""
    if linear_weight_only.uses_tensor_cores(capability, num_rows, dtype):
        return "tensor cores"
    return "few rows" if num_rows <= linear_weight_only.MAX_FEW_ROWS else "dequantised"


def run_path(path: str, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T, that way."""
    launcher = launcher_for(x.device)
    assert launcher is not None
    if path == "few rows":
        return linear_weight_only.launch_few_rows(launcher, x, weight, None)
    if path == "tensor cores":
        return linear_weight_only._launch_tensor_cores(launcher, x, weight, None)
    return linear_weight_only._dequantized(x, weight, None)


# ---- 8-bit activations ---------------------------------------------------------------------------


def _w8a8_calls(inputs: Inputs, num_rows: int) -> list[Call]:
    """The products of codes that are there already; "whole" quantises the activations, too."""
    x, packed = inputs.x[:num_rows], inputs.packed("int8")
    launcher = _launcher(inputs.setup)
    with poisoned():
        codes, scale = quantize_rows(x)
    is_library = linear_w8a8.is_library_faster(launcher.capability, num_rows)
    runs: dict[str, tuple[Callable[[int], torch.Tensor], bool]] = {
        "own kernel": (
            partial(_codes_product, False, codes, scale, packed, x.dtype),
            not is_library,
        ),
        "library": (partial(_codes_product, True, codes, scale, packed, x.dtype), is_library),
        "whole": (lambda i: linear_w8a8.linear_w8a8(x, packed[i], None, launcher), False),
    }
    if num_rows >= _LEAST_INT_MM_ROWS:
        separate = partial(_separate_product, codes, scale, packed, x.dtype)
        runs["torch._int_mm and torch"] = (separate, False)
    return [
        _plain(inputs, "w8a8", num_rows),
        *(
            inputs.call(
                "w8a8",
                num_rows,
                variant,
                run,
                len(packed),
                inputs.error(num_rows, "int8", rounds_x=True),
                # The whole rounds x by itself; a tie may fall to the other side.
                BOUNDS[x.dtype] + (_ROUNDING_BOUND if variant == "whole" else 0.0),
                packed.num_bytes,
                format="int8",
                is_chosen=is_chosen,
            )
            for variant, (run, is_chosen) in runs.items()
        ),
        *others(inputs, "w8a8", num_rows),
    ]


def _codes_product(
    by_library: bool,
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: Packed,
    dtype: torch.dtype,
    i: int,
) -> torch.Tensor:
    launcher = launcher_for(codes.device)
    assert launcher is not None
    product = linear_w8a8.library_product if by_library else linear_w8a8.kernel_product
    return product(launcher, codes, scale, packed[i], None, dtype)


def _separate_product(
    codes: torch.Tensor, scale: torch.Tensor, packed: Packed, dtype: torch.dtype, i: int
) -> torch.Tensor:
    """As one would write it in torch."""
    sums = torch._int_mm(codes, packed[i].qweight.t())
    return (sums.float() * scale.unsqueeze(-1) * packed[i].scale).to(dtype)


# ---- the first half of a gated feed-forward ------------------------------------------------------


def _gated_calls(inputs: Inputs, num_rows: int) -> list[Call]:
    calls: list[Call] = []
    launcher = _launcher(inputs.setup)
    for format in inputs.setup.formats:
        x, packed = inputs.x[:num_rows], inputs.packed(format)
        is_fused = gated_linear._is_fused(launcher, x, x, packed[0])
        for variant, run in (("fused", _fused), ("two linears", _two_linears)):
            calls.append(
                inputs.call(
                    "gated",
                    num_rows,
                    f"{format} {variant}",
                    partial(run, x, packed),
                    len(packed),
                    _gated_error(inputs, num_rows, format),
                    # Each factor of the two linears is rounded, and the product again.
                    4 * BOUNDS[x.dtype],
                    2 * packed.num_bytes,
                    num_weights=2,
                    format=format,
                    is_chosen=is_fused == (variant == "fused"),
                )
            )
    return calls


def _fused(x: torch.Tensor, packed: Packed, i: int) -> torch.Tensor:
    launcher = launcher_for(x.device)
    assert launcher is not None
    gate, up = _gate_and_up(packed, i)
    index = list(gated_linear.ACTIVATION_FUNCTIONS).index(_ACTIVATION)
    return linear_weight_only.launch_few_rows(launcher, x, gate, None, up, None, index)


def _two_linears(x: torch.Tensor, packed: Packed, i: int) -> torch.Tensor:
    gate, up = (linear_of_checked(x, w, None, "float") for w in _gate_and_up(packed, i))
    return gated_linear.ACTIVATION_FUNCTIONS[_ACTIVATION](gate) * up


def _gate_and_up(packed: Packed, i: int) -> tuple[PackedWeight, PackedWeight]:
    """Two copies of one weight: neither is in a cache when it is read."""
    return packed[i], packed[(i + len(packed) // 2) % len(packed)]


def _gated_error(inputs: Inputs, num_rows: int, format: str) -> Callable[[torch.Tensor], float]:
    def error(value: torch.Tensor) -> float:
        y = inputs.expected(num_rows, format)
        return relative_error(value, gated_linear.ACTIVATION_FUNCTIONS[_ACTIVATION](y) * y)

    return error


# ---- what is around the products -----------------------------------------------------------------


def _dequantize_calls(inputs: Inputs, _: int) -> list[Call]:
    dtype = inputs.setup.dtype
    calls = []
    for format in inputs.setup.formats:
        packed = inputs.packed(format)
        num_weights = inputs.out_features * inputs.in_features
        calls.append(
            Call(
                name=f"dequantize {inputs.out_features}x{inputs.in_features}: {format}",
                run=partial(_dequantize, packed, dtype),
                num_sets=len(packed),
                error=_dequantize_error(packed),
                bound=BOUNDS[dtype],
                num_bytes=packed.num_bytes + num_weights * dtype.itemsize,
                details={
                    "op": "dequantize",
                    "variant": format,
                    "rows": None,
                    "out_features": inputs.out_features,
                    "in_features": inputs.in_features,
                },
            )
        )
    return calls


def _dequantize(packed: Packed, dtype: torch.dtype, i: int) -> torch.Tensor:
    return dequantize_weight(packed[i], dtype)


def _dequantize_error(packed: Packed) -> Callable[[torch.Tensor], float]:
    return lambda value: relative_error(value, packed.dequantized())


_Codes = tuple[torch.Tensor, torch.Tensor]


def _rows_calls(setup: Setup, num_rows: int, num_columns: int) -> list[Call]:
    """Activations to 8 bits, with and without an RMSNorm before, by one kernel and by torch."""
    x = torch.randn(num_rows, num_columns, device=setup.device).to(setup.dtype)
    weight = torch.rand(num_columns, device=setup.device).add_(0.5).to(setup.dtype)
    xs = clones(x, min(_MOST_SETS_OF_ROWS, num_sets(x.nbytes, setup.rotate_bytes)))
    runs: dict[str, tuple[Callable[[int], _Codes], _Codes]] = {
        "quantize_rows": (lambda i: quantize_rows(xs[i]), int8_rows(x)),
        "torch: quantize_rows": (lambda i: int8_rows(xs[i]), int8_rows(x)),
        "rms_norm_quantize": (
            lambda i: rms_norm_quantize(xs[i], weight, 1e-5),
            int8_rows(rms_norm_reference(x, weight, 1e-5)),
        ),
        "torch: rms_norm_quantize": (
            lambda i: int8_rows(rms_norm_reference(xs[i], weight, 1e-5)),
            int8_rows(rms_norm_reference(x, weight, 1e-5)),
        ),
    }
    return [
        Call(
            name=f"rows {num_rows}x{num_columns}: {variant}",
            run=run,
            num_sets=len(xs),
            error=partial(_codes_error, expected),
            bound=_ROUNDING_BOUND,
            num_bytes=x.nbytes + x.numel() + 4 * num_rows,
            details={
                "op": "rows",
                "variant": variant,
                "rows": num_rows,
                "out_features": None,
                "in_features": num_columns,
            },
        )
        for variant, (run, expected) in runs.items()
    ]


def _codes_error(expected: _Codes, given: _Codes) -> float:
    """Of what the codes stand for; they may be padded."""
    right, got = (
        codes[:, : expected[0].shape[1]].double() * scale.double().unsqueeze(-1)
        for codes, scale in (expected, given)
    )
    return relative_error(got, right)
