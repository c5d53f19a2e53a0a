"""The linear with packed weights on the CPU: against dequantize, then multiply, in float64.

It takes its rows by bminf/ops/rows.py and goes by bminf/ops/linear_weight_only.py or
bminf/ops/linear_w8a8.py. How these launch kernels, and bminf/ops/dequantize.py, is in
tests/kernels/test_launches.py.
"""

from __future__ import annotations

import pytest
import torch
from quantized_models import product, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import bminf
from bminf.errors import ArgumentError
from bminf.ops import cpu_linear
from bminf.ops import linear as linear_module
from bminf.ops.linear import linear
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import int8_rows, pack

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
    Format(4, 32, True, 8),
    Format(4, 16),
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


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu_linear, "kernels", lambda: None)


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
@pytest.mark.parametrize(("n", "k"), [(40, 4096), (2, 140_000)])
@pytest.mark.parametrize("m", [1, 4])
def test_codes_and_activations_at_their_limits_and_sums_beyond_32_bits(
    m: int, n: int, k: int, activations: str
) -> None:
    weight, ones = pack(torch.ones(n, k), INT8), torch.ones(m, k)  # every code is 127
    for x in (ones, -ones):
        assert relative_error(linear(x, weight, None, activations), product(x, weight)) < 1e-4


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_autocast_does_not_round_the_sums(form: Format) -> None:
    weight, x = pack(torch.randn(9, 512), form), 2 + torch.randn(3, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), linear(x.clone(), weight))
        given = linear(x, weight)
    assert torch.equal(given, linear(x, weight))


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
        *((form, "scale", "float") for form in FORMATS if form.scale_bits == 16),
        *((form, "row_scale", "float") for form in FORMATS if form.scale_bits == 8),
        *((f, "minimum", "float") for f in FORMATS if f.has_minimum and f.scale_bits == 16),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_the_gradient_of_a_large_weight_is_summed_by_rows(
    form: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an output head is, so that not all of it is dequantized at once."""
    weight, shapes = pack(torch.randn(50, 64), form), []
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, 50, dtype=dtype)

    def dequantized(part: PackedWeight, of: torch.dtype) -> torch.Tensor:
        shapes.append(tuple(part.qweight.shape))
        return dequantize(part, of)

    monkeypatch.setattr(linear_module, "dequantize_weight", dequantized)
    monkeypatch.setattr(linear_module, "_SLICE_BYTES", 16 * 64 * dtype.itemsize)
    linear(x, weight).backward(grad)
    assert [rows for rows, _ in shapes] == [16, 16, 16, 2]
    expected = grad.double() @ dequantize(weight, torch.float64)
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, expected) < (1e-6 if dtype == torch.float32 else 6e-3)


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


def test_fake_tensors_of_a_gpu_need_none() -> None:
    """As those who work out shapes, or memory, of a model for another machine have them."""
    with FakeTensorMode(), torch.device("cuda"):
        codes, scale = torch.empty(6, 16, dtype=torch.int8), torch.empty(6)
        x = torch.empty(2, 3, 16)
        y = linear(x, PackedWeight(codes, scale, None, 16))
    assert y.shape == (2, 3, 6) and y.device.type == "cuda"
