"""What every kernel must get right, whoever runs it: the host build in CI, or a real device.

A case draws its inputs, calls the op that launches the kernel, and compares with plain torch in
float64 on the CPU: dequantize, then multiply. Shapes are awkward on purpose: one, odd, no multiple
of any tile, the longest rows and the most rows of the zoo's models.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from itertools import product

import torch
from attention_cases import attention_cases, few_attention_cases
from case import BOUNDS, DTYPES, Case, case, relative_error
from fused_cases import few_fused, fused_cases
from grouped_cases import few_grouped, grouped_cases

from bminf.cuda.launcher import launcher_for
from bminf.ops import linear_w8a8
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.gated_linear import ACTIVATION_FUNCTIONS, gated_linear
from bminf.ops.linear import linear
from bminf.ops.quantize_rows import quantize_rows, rms_norm_quantize, rms_norm_reference
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import int8_rows, pack

# Tensor cores take dequantized weights rounded to 16 bits, as the library's product does.
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}

# With 16 bytes of codes in one group or two, and in any number of them.
MINIMUM = Format(4, 32, has_minimum=True)
WHOLE = (
    INT8, Format(8, 32), INT4, MINIMUM, Format(4, 64), Format(4), Format(4, 48, True),
    Format(4, 16), Format(4, 32, False, 8), Format(4, 32, True, 8),
)  # fmt: skip
CUT = (Format(8, 34), Format(8, 6), Format(4, 6), Format(4, 34, True), Format(4, 34, True, 8))
MOST_COLUMNS, MOST_ROWS = 32768, 150528  # of GLM-130B: its feed-forward, its vocabulary


def weight_on(device: str, n: int, k: int, form: Format) -> tuple[PackedWeight, torch.Tensor]:
    """A packed random weight, and its values in float64 on the CPU."""
    packed = pack(torch.randn(n, k), form)
    moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in packed]
    return PackedWeight(*moved), dequantize(packed, torch.float64)


@case
def linear_case(
    device: str,
    form: Format,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    activations: str = "float",
    has_bias: bool = True,
) -> None:
    m, n, k = shape
    x = torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    weight, values = weight_on(device, n, k, form)
    y = linear(x.to(device), weight, None if bias is None else bias.to(device), activations)
    expected = _seen(x, activations) @ values.T
    if bias is not None:
        expected += bias.double()
    assert y.dtype == dtype and y.device.type == device
    assert relative_error(y, expected) < ROUNDED[dtype], shape


def _seen(x: torch.Tensor, activations: str) -> torch.Tensor:
    """The activations as the product sees them, in float64."""
    if activations == "float":
        return x.double()
    codes, scale = int8_rows(x)
    return codes.double() * scale.double().unsqueeze(-1)


@case
def product_case(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], product: str
) -> None:
    """The two ways of an 8-bit product: "kernel_product" and "library_product"."""
    m, n, k = shape
    x = torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    weight, values = weight_on(device, n, k, INT8)
    launcher = launcher_for(torch.device(device))
    codes, scale = quantize_rows(x.to(device))
    call = getattr(linear_w8a8, product)
    y = call(launcher, codes, scale, weight, bias.to(device), dtype)
    expected = _seen(x, "int8") @ values.T + bias.double()
    assert relative_error(y, expected) < BOUNDS[dtype], shape


@case
def gated_case(
    device: str,
    form: Format,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    activation: str,
    bias: bool,
) -> None:
    m, n, k = shape
    x = torch.randn(m, k).to(dtype)
    (gate, gate_values), (up, up_values) = (weight_on(device, n, k, form) for _ in range(2))
    gate_bias, up_bias = (torch.randn(n).to(dtype) if bias else None for _ in range(2))
    on_device = [b if b is None else b.to(device) for b in (gate_bias, up_bias)]
    y = gated_linear(x.to(device), gate, up, activation, *on_device)
    gates, ups = x.double() @ gate_values.T, x.double() @ up_values.T
    if bias:
        gates, ups = gates + gate_bias.double(), ups + up_bias.double()
    expected = ACTIVATION_FUNCTIONS[activation](gates) * ups
    assert relative_error(y, expected) < 2 * BOUNDS[dtype], shape


@case
def dequantize_case(device: str, form: Format, dtype: torch.dtype, n: int, k: int) -> None:
    weight, values = weight_on(device, n, k, form)
    given = dequantize_weight(weight, dtype).cpu()
    # A multiplication and an addition, rounded once together or one by one.
    assert torch.equal(given, values.float().to(dtype)) or (
        form.has_minimum and relative_error(given, values) < BOUNDS[dtype]
    )


@case
def quantize_case(device: str, dtype: torch.dtype, m: int, k: int) -> None:
    x = torch.randn(m, k).to(dtype)
    x[0, k // 2] = 100
    x[m // 2] = 0 if m > 1 else x[0]
    codes, scale = (t.cpu() for t in quantize_rows(x.to(device)))
    expected_codes, expected_scale = int8_rows(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes[:, :k], expected_codes) and not codes[:, k:].any()


@case
def rms_norm_case(device: str, dtype: torch.dtype, m: int, k: int) -> None:
    x, weight = torch.randn(m, k).to(dtype), torch.randn(k).to(dtype)
    codes, scale = (t.cpu() for t in rms_norm_quantize(x.to(device), weight.to(device), 1e-5))
    normal = rms_norm_reference(x, weight, 1e-5)
    assert torch.allclose(scale, normal.abs().amax(-1) / 127, rtol=1e-5)
    # Where a number lies between two codes, sums in another order may take the other one.
    error = codes[:, :k].float() * scale.unsqueeze(1) - normal
    assert (error.abs() <= 0.501 * scale.unsqueeze(1)).all() and not codes[:, k:].any()


@case
def bad_numbers_case(device: str, form: Format, m: int, dtype: torch.dtype = torch.float16) -> None:
    """NaN and infinity in x stay in their row; zeros give zeros."""
    weight, _ = weight_on(device, 9, 64, form)
    x = torch.zeros(m, 64, device=device, dtype=dtype)
    for activations in ("float", "int8") if form == INT8 else ("float",):
        assert not linear(torch.zeros_like(x), weight, None, activations).any()
        for bad in (float("nan"), float("inf")):
            x[0, 3] = bad
            y = linear(x, weight, None, activations)
            assert not y[0].isfinite().any() and not y[1:].any()


# Infinity, and NaN with the digits that a GPU gives it, which a careless rounding carries over.
BAD_BITS = {torch.float16: (0x7C00, 0x7FFF), torch.float32: (0x7F800000, 0x7FFFFFFF)}


def bad_weights(weight: PackedWeight) -> Iterator[PackedWeight]:
    """`weight` with a bad scale in row 2, and with a bad minimum; in groups, that of the last.
    Where these are integers, with a bad scale of the row."""
    for name in ("scale", "minimum") if weight.row_scale is None else ("row_scale",):
        values = getattr(weight, name)
        for bits in () if values is None else BAD_BITS[values.dtype]:
            words = values.view(torch.int16 if values.dtype == torch.float16 else torch.int32)
            words = words.reshape(weight.out_features, -1).clone()
            words[2, -1] = bits
            yield weight._replace(**{name: words.view(values.dtype).view_as(values)})


@case
def bad_scales_case(
    device: str,
    form: Format,
    m: int,
    dtype: torch.dtype = torch.float16,
    activations: str = "float",
) -> None:
    """NaN and infinity in a scale or a minimum stay in their row of the weight."""
    x = torch.randn(m, 70, device=device).to(dtype)
    weight, _ = weight_on(device, 9, 70, form)
    right = linear(x, weight, None, activations)
    for bad in bad_weights(weight):
        check_row_2(linear(x, bad, None, activations).t(), right.t())


@case
def bad_gated_scales_case(device: str, form: Format, m: int) -> None:
    """The same in either weight of the first half of a gated feed-forward."""
    x = torch.randn(m, 70, device=device, dtype=torch.float16)
    gate, up = (weight_on(device, 9, 70, form)[0] for _ in range(2))
    right = gated_linear(x, gate, up, "silu")
    for bad in bad_weights(up):
        check_row_2(gated_linear(x, gate, bad, "silu").t(), right.t())
    for bad in bad_weights(gate):  # silu(-infinity) is -infinity / infinity
        check_row_2(gated_linear(x, bad, up, "silu").t(), right.t())


@case
def bad_dequantize_case(device: str, form: Format, dtype: torch.dtype) -> None:
    """The same in a weight that is dequantized, where other groups of the row are right, too."""
    weight, _ = weight_on(device, 9, 70, form)
    right = dequantize_weight(weight, dtype)
    first = 0 if form.group_size is None else (weight.num_groups - 1) * form.group_size
    for bad in bad_weights(weight):
        y = dequantize_weight(bad, dtype)
        check_row_2(y[:, first:], right[:, first:])
        assert torch.equal(y[:, :first], right[:, :first])


def check_row_2(given: torch.Tensor, right: torch.Tensor) -> None:
    others = [0, 1, *range(3, len(right))]
    assert not given[2].isfinite().any() and torch.equal(given[others], right[others])


@case
def tiny_numbers_case(device: str) -> None:
    """Where a scale has few digits itself, the largest numbers would be more than 127 of it."""
    x = torch.tensor([[190.0, -190.0, 3.0], [-180.0, 90.0, 0.0], [50.0, -1.0, 2.0]]) * 2.0**-149
    codes, scale = (t.cpu() for t in quantize_rows(x.to(device)))
    assert torch.equal(scale, int8_rows(x)[1])
    assert codes[:, :3].tolist() == [[127, -127, 3], [-127, 90, 0], [0, 0, 0]]


@case
def awkward_inputs_case(device: str, form: Format, m: int) -> None:
    """Strided, misaligned and empty activations give what ordinary ones give."""
    weight, _ = weight_on(device, 9, 70, form)
    wide = torch.randn(m, 141, device=device, dtype=torch.float16)
    plain = wide[:, 1::2].contiguous()
    assert torch.equal(linear(wide[:, 1::2], weight), linear(plain, weight))
    shifted = torch.empty(m * 70 + 1, device=device, dtype=torch.float16)[1:].view(m, 70)
    assert torch.equal(linear(shifted.copy_(plain), weight), linear(plain, weight))
    assert linear(plain[:0], weight).shape == (0, 9)
    whole, _ = weight_on(device, 9, 64, form)  # no padding that would copy it anyway
    shifted = torch.empty(m * 64 + 1, device=device, dtype=torch.float16)[1:].view(m, 64)
    assert torch.equal(linear(shifted.copy_(plain[:, :64]), whole), linear(plain[:, :64], whole))
    bias = torch.randn(18, device=device).half()[::2]
    assert torch.equal(linear(plain, weight, bias), linear(plain, weight, bias.contiguous()))


# ---- the lists -----------------------------------------------------------------------------------


def few_rows_cases() -> Iterator[Case]:
    """kernels/linear_few_rows.cu: each type, format and number of rows, though not all together."""
    for dtype in DTYPES:
        for form in WHOLE + CUT:
            yield linear_case(form, dtype, (1, 9, 70))
        yield linear_case(MINIMUM, dtype, (3, 33, 130))
        yield linear_case(INT8, dtype, (3, 33, 130), has_bias=False)
    for m in (2, 5, 7, 16):
        yield linear_case(INT8, torch.float16, (m, 9, 200))
        yield linear_case(Format(4, 34, True), torch.bfloat16, (m, 6, 70))
    yield linear_case(INT4, torch.float32, (16, 7, 66))
    yield linear_case(INT8, torch.float16, (1, 1, 1))
    yield linear_case(INT4, torch.float16, (1, 3, MOST_COLUMNS))
    yield linear_case(INT8, torch.bfloat16, (1, 3, MOST_COLUMNS))
    for form in (INT8, INT4):
        yield bad_numbers_case(form, 2)
        yield bad_numbers_case(form, 2, torch.bfloat16)
        yield awkward_inputs_case(form, 2)
    for dtype in DTYPES:
        yield bad_scales_case(INT8, 2, dtype)
        yield bad_scales_case(MINIMUM, 2, dtype)
    for form in (Format(8, 32), Format(8, 34), INT4, Format(4), Format(4, 34, True), Format(4, 16)):
        yield bad_scales_case(form, 2)


def gated_cases() -> Iterator[Case]:
    """The same with GATED."""
    for activation in ACTIVATION_FUNCTIONS:
        yield gated_case(INT4, torch.float16, (1, 5, 70), activation, bias=True)
    for dtype, form in zip(DTYPES, (INT8, Format(4, 64), Format(4, 6)), strict=True):
        yield gated_case(form, dtype, (1, 9, 130), "silu", bias=False)
    yield gated_case(MINIMUM, torch.float16, (2, 5, 64), "silu", bias=True)
    yield gated_case(Format(4, 34, True), torch.float16, (12, 5, 70), "gelu", bias=False)
    yield gated_case(INT4, torch.bfloat16, (4, 33, 64), "gelu", bias=True)
    yield gated_case(INT8, torch.float16, (7, 5, 96), "gelu_tanh", bias=True)
    for form in (INT8, INT4):
        yield bad_gated_scales_case(form, 2)


def tensor_core_cases() -> Iterator[Case]:
    """kernels/linear_tensor_core.cu: 3 to 64 rows, from compute capability 8.0 on."""
    for dtype in DTYPES[:2]:
        for form in WHOLE + CUT:
            yield linear_case(form, dtype, (9, 37, 200))
    for m, form in (
        (4, INT8),
        (5, MINIMUM),
        (8, INT4),
        (17, INT8),
        (40, INT4),
        (64, INT8),
        (50, Format(4, 6)),
    ):
        yield linear_case(form, torch.float16, (m, 33, 136), has_bias=m != 8)
    yield linear_case(INT4, torch.bfloat16, (8, 3, MOST_COLUMNS))
    for form, dtype in product((INT8, INT4, MINIMUM, Format(4)), DTYPES[:2]):  # 32 rows a block
        yield linear_case(form, dtype, (9, 260, 200))
    for form in (INT8, MINIMUM):  # several steps of each warp, and columns left
        yield linear_case(form, torch.float16, (8, 3, 1160))
    yield bad_numbers_case(INT8, 8)
    yield bad_numbers_case(INT4, 8, torch.bfloat16)
    yield awkward_inputs_case(INT4, 8)
    for form in (INT8, Format(8, 32), Format(8, 34), INT4, Format(4), Format(4, 34, True)):
        yield bad_scales_case(form, 8)
    yield bad_scales_case(INT8, 8, torch.bfloat16)
    yield bad_scales_case(MINIMUM, 8, torch.bfloat16)


def w8a8_cases() -> Iterator[Case]:
    """kernels/gemm_w8a8_*.cu and scale_int32.cu."""
    for dtype in DTYPES:
        yield product_case(dtype, (5, 70, 90), "kernel_product")
        yield product_case(dtype, (18, 9, 33), "library_product")
    for shape in ((1, 1, 1), (33, 65, 130), (70, 130, 200), (130, 30, 64)):
        yield product_case(torch.float16, shape, "kernel_product")
    yield product_case(torch.float16, (2, 3, MOST_COLUMNS), "kernel_product")
    yield linear_case(INT8, torch.bfloat16, (3, 40, 96), "int8")
    yield linear_case(INT8, torch.float16, (70, 21, 70), "int8", has_bias=False)
    yield bad_numbers_case(INT8, 3)
    yield bad_numbers_case(INT8, 3, torch.bfloat16)
    for m, dtype in ((3, torch.float16), (3, torch.bfloat16), (70, torch.bfloat16)):
        yield bad_scales_case(INT8, m, dtype, "int8")


def other_cases() -> Iterator[Case]:
    """kernels/quantize_rows.cu, rms_norm_quantize.cu, dequantize.cu; many rows with float ones."""
    for dtype in DTYPES:
        for m, k in ((1, 1), (3, 70), (2, 4100), (1, MOST_COLUMNS)):
            yield quantize_case(dtype, m, k)
        for m, k in ((1, 3), (3, 70), (2, 4100)):
            yield rms_norm_case(dtype, m, k)
        for form in WHOLE + CUT:
            yield dequantize_case(form, dtype, 5, 70)
            yield dequantize_case(form, dtype, 3, 72)  # in whole stores
        for form in (INT8, Format(8, 34), MINIMUM, Format(4)):
            yield bad_dequantize_case(form, dtype)
    yield dequantize_case(INT8, torch.float16, 3, 33)
    yield dequantize_case(INT4, torch.bfloat16, 2, MOST_COLUMNS)
    yield linear_case(INT4, torch.float32, (40, 9, 70))
    yield linear_case(INT8, torch.float32, (140, 9, 33))
    yield bad_scales_case(INT8, 140)
    yield bad_scales_case(INT4, 140)
    yield tiny_numbers_case()


def largest_cases() -> Iterator[Case]:
    """As many outputs as a vocabulary has: grids that no other case reaches."""
    yield linear_case(INT4, torch.float16, (1, MOST_ROWS, 32), has_bias=False)
    yield linear_case(INT8, torch.float16, (8, MOST_ROWS, 16), has_bias=False)
    yield product_case(torch.float16, (1, MOST_ROWS, 16), "kernel_product")
    yield dequantize_case(Format(4), torch.float16, MOST_ROWS, 32)


# What to run for each compute capability: the branches of a source by architecture.
CASES = {
    61: [
        *few_rows_cases(),
        *gated_cases(),
        *grouped_cases(),
        *w8a8_cases(),
        *other_cases(),
        *fused_cases(),
        *attention_cases(),
    ],
    75: [*w8a8_cases()],
    80: [*tensor_core_cases(), *w8a8_cases()],
}
LARGEST = list(largest_cases())


def few_of_each() -> dict[int, list[Case]]:
    """A small choice that reaches every line of every kernel: for sanitizers, which take long."""
    half, bfloat16, single = DTYPES
    return {
        61: [
            linear_case(INT8, half, (1, 5, 70)),
            linear_case(INT4, bfloat16, (3, 5, 70)),
            linear_case(MINIMUM, half, (2, 5, 70)),
            linear_case(Format(4, 34), single, (5, 3, 70), has_bias=False),
            linear_case(Format(8, 34), half, (1, 5, 70)),
            gated_case(INT4, half, (1, 3, 70), "gelu_tanh", bias=True),
            gated_case(INT4, half, (1, 3, 70), "gelu", bias=False),
            gated_case(INT4, half, (1, 3, 70), "silu", bias=True),
            product_case(half, (5, 70, 90), "kernel_product"),
            product_case(bfloat16, (18, 9, 33), "library_product"),
            quantize_case(half, 2, 70),
            quantize_case(single, 2, 2100),
            rms_norm_case(bfloat16, 2, 70),
            dequantize_case(INT4, half, 5, 70),
            dequantize_case(INT4, half, 5, 72),
            dequantize_case(MINIMUM, single, 5, 72),
            dequantize_case(Format(8, 34), bfloat16, 5, 70),
            bad_numbers_case(INT8, 2),
            *few_grouped(),
            *few_fused(),
            *few_attention_cases(),
        ],
        75: [product_case(half, (5, 70, 90), "kernel_product")],
        80: [
            linear_case(INT8, half, (9, 37, 200)),
            linear_case(INT8, bfloat16, (9, 5, 200)),
            linear_case(INT4, bfloat16, (9, 37, 200)),
            linear_case(INT4, half, (9, 5, 200)),
            linear_case(Format(4), bfloat16, (9, 5, 200)),
            linear_case(MINIMUM, half, (9, 37, 200)),
            linear_case(Format(4, 32, True, 8), half, (9, 5, 200)),
            linear_case(Format(4, 6), half, (40, 21, 136), has_bias=False),
            linear_case(Format(8, 34), bfloat16, (8, 5, 70)),
            product_case(half, (33, 70, 200), "kernel_product"),
            product_case(single, (70, 30, 64), "kernel_product"),
        ],
    }


def main(device: str) -> int:
    """0 if few_of_each() give the right result, otherwise 1: a program for NVIDIA's tools."""
    torch.manual_seed(0)
    is_wrong = False
    for one in (one for group in few_of_each().values() for one in group):
        print(one.name, flush=True)
        try:
            one.run(device)
        except Exception:  # which does not keep the next one from running
            traceback.print_exc()
            is_wrong = True
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
