"""The first half of a gated feed-forward on the CPU: two linears, an activation, a product."""

from __future__ import annotations

import pytest
import torch
from quantized_models import product, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from bminf.errors import ArgumentError
from bminf.ops.gated_linear import gated_linear
from bminf.quantization.packed import INT4, INT8, Format, empty
from bminf.quantization.packing import pack


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


@pytest.mark.parametrize(
    ("gate", "activation", "said"),
    [(INT8, "relu", "accepted: gelu_tanh, gelu, silu"), (INT4, "silu", "gate has form")],
)
def test_bad_arguments_are_refused(gate: Format, activation: str, said: str) -> None:
    weight = torch.randn(4, 6)
    with pytest.raises(ArgumentError, match=said):
        gated_linear(torch.randn(2, 6), pack(weight, gate), pack(weight, INT8), activation)


def test_fake_tensors_of_a_gpu_need_none() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        weight = empty(48, 64, INT8, "cuda")
        y = gated_linear(torch.empty(2, 3, 64), weight, weight, "silu")
    assert y.shape == (2, 3, 48) and y.device.type == "cuda"
