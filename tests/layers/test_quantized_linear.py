from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import bminf
from bminf.errors import ArgumentError
from bminf.layers.quantize import skeleton
from bminf.ops.linear_int8 import linear_w8a8, linear_w8a16
from bminf.quantization.int8 import dequantize_rows, quantize_rows

SHAPES = [(1, 1, 1), (1, 33, 65), (3, 40, 64), (17, 5, 129), (2, 300, 1030)]


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double(), expected.detach()
    return float((given - expected).norm() / expected.norm())


def test_rows_keep_their_maximum_and_zeros() -> None:
    x = torch.randn(6, 50)
    x[2], x[3, 4], x[4] = 0, 1e4, 1e-30
    q, scale = quantize_rows(x)
    back = dequantize_rows(q, scale, torch.float32)
    assert q.dtype == torch.int8 and int(q.min()) >= -127
    assert torch.allclose(back.abs().amax(1), x.abs().amax(1), rtol=1e-6)
    # Half a step of the row's scale is all that rounding may cost.
    assert ((back - x).abs() <= 0.5001 * scale.unsqueeze(1)).all()
    assert back[2].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linears_equal_dequantise_then_multiply(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, k).to(dtype)
    q, scale = quantize_rows(torch.randn(n, k))
    bias = torch.randn(n).to(dtype)
    weight = q.double() * scale.double().unsqueeze(1)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    expected = x.double() @ weight.T + bias.double()
    assert relative_error(linear_w8a16(x, q, scale, bias), expected) < bound, (m, n, k)
    qx, x_scale = quantize_rows(x)
    expected = (qx.double() * x_scale.double().unsqueeze(1)) @ weight.T + bias.double()
    given = linear_w8a8(x, q, scale, bias)
    assert given.dtype == dtype and given.shape == (m, n)
    assert relative_error(given, expected) < bound, (m, n, k)


def test_token_scales_do_not_disturb_each_other() -> None:
    x = torch.randn(4, 64)
    q, scale = quantize_rows(torch.randn(9, 64))
    alone = linear_w8a8(x, q, scale)
    x[1] *= 1000
    assert torch.equal(linear_w8a8(x, q, scale)[[0, 2, 3]], alone[[0, 2, 3]])


@pytest.mark.parametrize("activations", ["auto", "float", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_stands_in_for_a_linear(activations: str, bias: bool) -> None:
    linear = torch.nn.Linear(64, 48, bias=bias)
    quantized = bminf.QuantizedLinear(linear, activations=activations)
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = quantized(x)
    assert y.shape == (2, 3, 48) and relative_error(y, linear(x).double()) < 0.02
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert relative_error(gradient, torch.autograd.grad(linear(x).sum(), x)[0].double()) < 0.02
    assert not any(p.requires_grad for p in quantized.parameters())
    again = bminf.QuantizedLinear(torch.nn.Linear(64, 48, bias=bias), activations=activations)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(x), y)


def test_it_stands_in_for_conv1d() -> None:
    conv = Conv1D(48, 64)
    torch.nn.init.normal_(conv.bias)
    quantized = bminf.QuantizedLinear(conv)
    x = torch.randn(5, 64)
    assert (quantized.in_features, quantized.out_features) == (64, 48)
    assert relative_error(quantized(x), conv(x).double()) < 0.02


def test_weight_answers_as_the_linear_would() -> None:
    linear = torch.nn.Linear(64, 48).bfloat16()
    weight = bminf.QuantizedLinear(linear).weight
    assert (weight.dtype, weight.shape, weight.device) == (
        torch.bfloat16,
        (48, 64),
        linear.weight.device,
    )
    assert relative_error(weight.detach(), linear.weight.detach().double()) < 0.02


def test_a_cast_changes_the_activations_and_not_the_scales() -> None:
    quantized = bminf.QuantizedLinear(torch.nn.Linear(64, 48))
    scale = quantized.scale.clone()
    quantized.to(torch.bfloat16)
    assert quantized.weight.dtype == torch.bfloat16 and quantized.bias.dtype == torch.bfloat16
    assert torch.equal(quantized.scale, scale) and quantized.qweight.dtype == torch.int8
    assert quantized(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "linear", [torch.nn.Linear(6, 4), Conv1D(4, 6), torch.nn.Linear(6, 4, False)]
)
def test_the_skeleton_has_the_shape_of_the_real_one(linear: torch.nn.Module) -> None:
    expected = bminf.QuantizedLinear(linear).state_dict()
    given = skeleton(linear).state_dict()
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert (given[name].shape, given[name].dtype) == (tensor.shape, tensor.dtype)
        assert given[name].is_meta and given[name].stride() == tensor.stride()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="Conv2d"):
        bminf.QuantizedLinear(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ArgumentError, match="accepted: auto, float, int8"):
        bminf.QuantizedLinear(torch.nn.Linear(2, 2), activations="int4")
    q, scale = quantize_rows(torch.randn(4, 6))
    for linear in (linear_w8a16, linear_w8a8):
        with pytest.raises(ArgumentError, match="takes 6 columns"):
            linear(torch.randn(2, 5), q, scale)
        with pytest.raises(ArgumentError, match=r"scale is torch.float32 of shape \(3,\)"):
            linear(torch.randn(2, 6), q, scale[:3])
        with pytest.raises(ArgumentError, match=r"qweight is torch\.float32"):
            linear(torch.randn(2, 6), q.float(), scale)
        with pytest.raises(ArgumentError, match=r"x is torch\.int64"):
            linear(torch.ones(2, 6, dtype=torch.int64), q, scale)
