"""QuantizedLinear in the place of torch.nn.Linear and Conv1D."""

from __future__ import annotations

import pytest
import torch
from quantized_models import relative_error
from transformers.pytorch_utils import Conv1D

import bminf
from bminf.errors import ArgumentError
from bminf.layers.quantize import meta_linear
from bminf.quantization.packed import INT4, INT8, Format, dequantize
from bminf.quantization.packing import pack

WAYS = [("int8", "auto"), ("int8", "float"), ("int8", "int8"), ("int4", "auto"), ("int4", "float")]
ERROR = {"int8": 0.02, "int4": 0.15}


@pytest.mark.parametrize(("quantization", "activations"), WAYS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_stands_in_for_a_linear(quantization: str, activations: str, bias: bool) -> None:
    linear = torch.nn.Linear(64, 48, bias=bias)
    quantized = bminf.QuantizedLinear(linear, activations, quantization)
    bound = ERROR[quantization]
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = quantized(x)
    assert y.shape == (2, 3, 48) and relative_error(y, linear(x)) < bound
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert relative_error(gradient, torch.autograd.grad(linear(x).sum(), x)[0]) < bound
    assert not any(p.requires_grad for p in quantized.parameters())
    again = bminf.QuantizedLinear(torch.nn.Linear(64, 48, bias=bias), activations, quantization)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_it_stands_in_for_conv1d(quantization: str) -> None:
    conv = Conv1D(48, 64)
    torch.nn.init.normal_(conv.bias)
    quantized = bminf.QuantizedLinear(conv, quantization=quantization)
    x = torch.randn(5, 64)
    assert (quantized.in_features, quantized.out_features) == (64, 48)
    assert relative_error(quantized(x), conv(x)) < ERROR[quantization]


@pytest.mark.parametrize("form", [INT8, INT4, Format(4), Format(8, 6)])
def test_weight_answers_as_the_linear_would(form: Format) -> None:
    linear = torch.nn.Linear(66, 48).bfloat16()
    weight = bminf.QuantizedLinear(linear, quantization=form).weight
    assert (weight.dtype, weight.shape, weight.device) == (
        torch.bfloat16,
        (48, 66),
        linear.weight.device,
    )
    assert torch.equal(weight.detach() + 0, dequantize(pack(linear.weight, form), torch.bfloat16))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_cast_changes_the_activations_and_not_the_scales(quantization: str) -> None:
    quantized = bminf.QuantizedLinear(torch.nn.Linear(64, 48), quantization=quantization)
    before = {name: tensor.clone() for name, tensor in quantized.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        quantized.to(dtype)
        assert quantized.weight.dtype == dtype and quantized.bias.dtype == dtype
        assert quantized(torch.randn(2, 64).to(dtype)).dtype == dtype
        for name, tensor in quantized.named_buffers():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("form", [INT8, INT4, Format(4), Format(8, 4)])
@pytest.mark.parametrize(
    "linear", [torch.nn.Linear(6, 4), Conv1D(4, 6), torch.nn.Linear(6, 4, False)]
)
def test_the_one_on_the_meta_device_has_the_shape_of_the_real_one(
    linear: torch.nn.Module, form: Format
) -> None:
    expected = bminf.QuantizedLinear(linear, quantization=form).state_dict()
    given = meta_linear(linear, form).state_dict()
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert (given[name].shape, given[name].dtype) == (tensor.shape, tensor.dtype)
        assert given[name].is_meta and given[name].stride() == tensor.stride()


def test_bad_arguments_are_refused() -> None:
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="Conv2d"):
        bminf.QuantizedLinear(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ArgumentError, match="accepted: auto, float, int8"):
        bminf.QuantizedLinear(linear, activations="int4")
    with pytest.raises(ArgumentError, match='needs quantization="int8"'):
        bminf.QuantizedLinear(linear, activations="int8", quantization="int4")
    with pytest.raises(ArgumentError, match="3 columns cannot be packed to 4 bits"):
        bminf.QuantizedLinear(torch.nn.Linear(3, 2), quantization="int4")


def test_buffers_that_do_not_fit_are_refused_when_loaded() -> None:
    quantized = bminf.QuantizedLinear(torch.nn.Linear(64, 48))
    state = quantized.state_dict()
    state["scale"] = state["scale"].bfloat16()
    with pytest.raises(ArgumentError, match=r"scale is torch\.bfloat16"):
        quantized.load_state_dict(state, assign=True)


@pytest.mark.parametrize("quantization", [None, False, True, "int5", 8])
def test_a_packed_linear_is_packed_in_some_format(quantization: object) -> None:
    with pytest.raises(ArgumentError, match=r'accepted: "int8", "int4", or a bminf\.Format$'):
        bminf.QuantizedLinear(torch.nn.Linear(4, 4), quantization=quantization)
