"""The linear with packed weights on the CPU: against dequantise, then multiply, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import bminf
from bminf.errors import ArgumentError
from bminf.ops import cpu_linear
from bminf.ops.gated_linear import gated_linear
from bminf.ops.linear import linear
from bminf.ops.quantize_rows import quantize_rows, rms_norm_quantize
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize, int8_rows, pack

SHAPES = [
    (1, 1, 2),
    (1, 33, 66),
    (2, 33, 66),
    (3, 40, 64),
    (1, 40, 64),
    (17, 5, 130),
    (2, 300, 1030),
]
WIDE = [(1, 700, 1030), (1, 64, 70000), (2, 8, 70000)]  # several slices; sums beyond 32 bits
FORMATS = [
    INT8,
    INT4,
    Format(4, 32, True),
    Format(4),
    Format(4, None, True),
    Format(4, 64),
    Format(4, 6),
    Format(8, 34),
]
# Sums are float32; int8 alone rounds activations, to 16 bits. The rest is the rounding of the
# result.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Or a product of few numbers would cancel out, once in a hundred runs or so."""
    torch.manual_seed(0)


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double(), expected.detach()
    return float((given - expected).norm() / expected.norm())


def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return x.double() @ dequantize(weight, torch.float64).T


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES + WIDE)
def test_weight_only(m: int, n: int, k: int, form: Format, dtype: torch.dtype) -> None:
    x, weight = torch.randn(m, k).to(dtype), pack(torch.randn(n, k), form)
    bias = torch.randn(n).to(dtype)
    y = linear(x, weight, bias, "float")
    assert y.dtype == dtype and y.shape == (m, n)
    assert relative_error(y, product(x, weight) + bias.double()) < BOUNDS[dtype]
    assert torch.equal(linear(x, weight, bias), y)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES + WIDE)
def test_w8a8(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(m, k).to(dtype), pack(torch.randn(n, k), INT8)
    bias = torch.randn(n).to(dtype)
    codes, scale = int8_rows(x)
    expected = product(codes.double() * scale.double().unsqueeze(1), weight) + bias.double()
    # Integer sums are exact: what is left is the rounding of float32 scales and of the result.
    bound = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(linear(x, weight, bias, "int8"), expected) < bound


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("m", [1, 4])
def test_codes_and_activations_at_their_limits(m: int, activations: str) -> None:
    weight = pack(torch.ones(40, 4096), INT8)  # every code is 127
    x = torch.ones(m, 4096)
    assert relative_error(linear(x, weight, None, activations), product(x, weight)) < 1e-4
    assert relative_error(linear(-x, weight, None, activations), product(-x, weight)) < 1e-4


@pytest.mark.parametrize("m", [1, 3])
def test_the_digits_of_activations_are_rounded_to_the_nearest(m: int) -> None:
    """Cut off, they would all err in the same direction, and their errors add up."""
    weight, some = pack(torch.ones(8, 4096), INT8), torch.rand(m, 4096)
    for x in (some, -some, 2 * some - 1):
        step = x.abs().amax(1, keepdim=True).double() / 32512
        off = (linear(x, weight, None, "float").double() - product(x, weight)) / step
        # The error of a sum of roundings: 0.29 * sqrt(4096) steps in the mean; cut off, 2048.
        assert (off.abs() < 6 * 0.29 * 64).all()


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("m", [1, 2])
def test_sums_beyond_32_bits(m: int, activations: str) -> None:
    weight, x = pack(torch.ones(2, 140_000), INT8), torch.ones(m, 140_000)
    assert relative_error(linear(x, weight, None, activations), product(x, weight)) < 1e-4


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_autocast_does_not_round_the_sums(form: Format) -> None:
    weight, x = pack(torch.randn(9, 512), form), 2 + torch.randn(3, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), linear(x.clone(), weight))
        given = linear(x, weight)
    assert torch.equal(given, linear(x, weight))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("without", [torch.uint8, torch.int8])
@pytest.mark.parametrize("m", [1, 3])
def test_a_cpu_whose_integer_products_saturate(
    m: int, without: torch.dtype, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {torch.uint8: {torch.int8}, torch.int8: set()}[without]
    monkeypatch.setattr(cpu_linear, "is_exact", left.__contains__)
    x, weight = torch.randn(m, 70), pack(torch.randn(33, 70), INT8)
    if activations == "int8":
        codes, scale = int8_rows(x)
        expected = product(codes.double() * scale.double().unsqueeze(1), weight)
    else:
        expected = product(x, weight)
    assert relative_error(linear(x, weight, None, activations), expected) < 1e-4


@pytest.mark.parametrize("m", [1, 3, 300])
def test_a_cpu_whose_integer_products_are_slow(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits give the same bits as integers, which float64 adds without loss; in float32
    activations need not be rounded."""
    x, weight = torch.randn(m, 2000), pack(torch.randn(300, 2000), INT8)
    as_integers = linear(x, weight, None, "int8")
    monkeypatch.setattr(cpu_linear, "is_fast", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    y = linear(x, weight, None, "int8")
    assert torch.equal(y, as_integers) if m > 1 else relative_error(y, as_integers) < 1e-6
    assert relative_error(linear(x, weight, None, "float"), product(x, weight)) < 1e-6


def test_this_cpu_multiplies_integers_exactly() -> None:
    # Random codes, and the largest: what is_exact found must hold for them, too.
    codes = torch.randint(-127, 128, (40, 96), dtype=torch.int8)
    for dtype in (torch.int8, torch.uint8):
        if cpu_linear.is_exact(dtype):
            rows = torch.randint(0, 128, (3, 96), dtype=torch.uint8).to(dtype)
            expected = rows.double() @ codes.double().T
            assert torch.equal(torch._int_mm(rows, codes.t()).double(), expected)


def test_codes_sums_that_are_missing_are_made() -> None:
    x, weight = torch.randn(1, 70), pack(torch.randn(33, 70), INT8)
    for activations in ("float", "int8"):
        y = linear(x, weight, None, activations)
        assert torch.equal(linear(x, weight._replace(code_sum=None), None, activations), y)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_token_scales_do_not_disturb_each_other(activations: str) -> None:
    x, weight = torch.randn(4, 64), pack(torch.randn(9, 64), INT8)
    alone = linear(x, weight, None, activations)
    x[1] *= 1000
    assert torch.equal(linear(x, weight, None, activations)[[0, 2, 3]], alone[[0, 2, 3]])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 3])
def test_zeros_infinity_and_nan_in_the_activations(m: int, form: Format) -> None:
    weight = pack(torch.randn(9, 64), form)
    x = torch.zeros(m, 64)
    assert not linear(x, weight).any()
    for bad in (float("nan"), float("inf")):
        x[0, 3] = bad
        y = linear(x, weight)
        assert not y[0].isfinite().any() and not y[1:].any()


@pytest.mark.parametrize(
    ("form", "name", "activations"),
    [
        *((form, "scale", "float") for form in FORMATS),
        *((form, "minimum", "float") for form in FORMATS if form.has_minimum),
        (INT8, "scale", "int8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 3])
def test_infinity_and_nan_in_a_scale_stay_in_their_row(
    m: int, form: Format, name: str, activations: str
) -> None:
    x, weight = torch.randn(m, 70), pack(torch.randn(9, 70), form)
    right = linear(x, weight, None, activations)
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = getattr(weight, name).clone()
        values.view(9, -1)[2, -1] = bad  # of the last group, whose columns are fewer
        y = linear(x, weight._replace(**{name: values}), None, activations)
        others = [0, 1, *range(3, 9)]
        assert not y[:, 2].isfinite().any() and torch.equal(y[:, others], right[:, others])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_empty_and_strided_inputs(form: Format) -> None:
    weight = pack(torch.randn(6, 64), form)
    assert linear(torch.randn(0, 64), weight).shape == (0, 6)
    assert linear(torch.randn(2, 0, 64), weight).shape == (2, 0, 6)
    wide = torch.randn(3, 128)
    assert torch.equal(linear(wide[:, ::2], weight), linear(wide[:, ::2].contiguous(), weight))
    one = torch.randn(64)
    assert linear(one, weight).shape == (6,)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_no_columns_and_no_rows(activations: str) -> None:
    bias = torch.randn(6)
    y = linear(torch.randn(3, 0), pack(torch.randn(6, 0), INT8), bias, activations)
    assert torch.equal(y, bias.expand(3, 6))
    assert linear(torch.randn(3, 8), pack(torch.randn(0, 8), INT8), None, activations).shape == (
        3,
        0,
    )


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 5])
def test_the_gradient_reaches_the_input(m: int, form: Format) -> None:
    weight = pack(torch.randn(9, 70), form)
    x = torch.randn(m, 70, requires_grad=True)
    y = linear(x, weight, torch.randn(9))
    with torch.no_grad():
        assert torch.equal(
            linear(x, weight, torch.zeros(9)), linear(x.detach(), weight, torch.zeros(9))
        )
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = 2 * y.detach().double() @ dequantize(weight, torch.float64)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("m", [1, 20])
def test_gated_linear_is_two_linears(m: int, activation: str) -> None:
    x = torch.randn(m, 66)
    gate, up = pack(torch.randn(9, 66), INT4), pack(torch.randn(9, 66), INT4)
    bias = torch.randn(9)
    functions = {
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
    }
    expected = functions[activation](product(x, gate) + bias.double()) * product(x, up)
    assert relative_error(gated_linear(x, gate, up, activation, bias), expected) < 1e-5


def test_rms_norm_and_quantise_in_one() -> None:
    x, weight = torch.randn(2, 3, 70), torch.randn(70)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    codes, scale = rms_norm_quantize(x, weight, 1e-6)
    assert codes.shape == (6, 80) and not codes[:, 70:].any()
    back = codes[:, :70].float() * scale.unsqueeze(1)
    assert ((back.view_as(normal) - normal).abs() <= 0.51 * scale.view(2, 3, 1)).all()
    with pytest.raises(ArgumentError, match="x has shape"):
        rms_norm_quantize(x, weight[:-1], 1e-6)
    plain_codes, plain_scale = quantize_rows(normal)
    assert torch.equal(plain_codes, codes) and torch.allclose(plain_scale, scale)


def test_bad_arguments_are_refused_before_any_work() -> None:
    weight = pack(torch.randn(4, 6), INT8)
    x = torch.randn(2, 6)
    for call, message in [
        (lambda: linear(torch.randn(2, 5), weight), "the weight takes 6 columns"),
        (lambda: linear(torch.tensor(1.0), weight), "the weight takes 6 columns"),
        (lambda: linear(x.long(), weight), r"x is torch\.int64; accepted: float32"),
        (lambda: linear(x.double(), weight), r"x is torch\.float64; accepted: float32"),
        (lambda: linear(x.to("meta"), weight), "x is on meta, the weight on cpu"),
        (lambda: linear(x, weight, torch.randn(3)), r"bias is torch.float32 of shape \(3,\)"),
        (lambda: linear(x, weight._replace(scale=torch.ones(3))), r"scale is .* shape \(3,\)"),
        (lambda: linear(x, weight, None, "int4"), "accepted: auto, float, int8"),
        (lambda: linear(x, pack(torch.randn(4, 6), INT4), None, "int8"), "needs 8-bit weights"),
        (lambda: gated_linear(x, weight, weight, "relu"), "accepted: gelu_tanh, gelu, silu"),
        (lambda: gated_linear(x, weight, pack(torch.randn(4, 6), INT4), "silu"), "gate has form"),
        (lambda: quantize_rows(x.long()), r"x is torch\.int64"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_torch_compile_takes_it_in_one_graph(quantization: str) -> None:
    torch.compiler.reset()
    layers = [
        bminf.QuantizedLinear(torch.nn.Linear(64, 48), quantization=quantization),
        torch.nn.ReLU(),
        bminf.QuantizedLinear(Conv1D(64, 48), quantization=quantization),
    ]
    model = torch.nn.Sequential(*layers)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, requires_grad=True)
    y, expected = compiled(x), model(x)
    assert torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), x)[0] for value in (y, expected))
    assert torch.allclose(ours, theirs)
    torch.compiler.reset()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_small_weights_on_the_cpu_are_multiplied_in_float32(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(48, 64), INT8)
    x = torch.randn(num_rows, 64)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    digits = linear(x, weight)
    monkeypatch.undo()
    small = linear(x, weight)
    assert float((small - exact).abs().max()) < 1e-5 < float((digits - exact).abs().max())
