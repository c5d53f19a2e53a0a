"""Whole models whose linears run through the kernels, compiled for the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from host_launcher import HostLauncher, served_by
from quantized_models import (
    dequantize_linears,
    quantize_and_stream,
    quantize_on_cpu,
    relative_error,
)
from tiny_models import greedy, inputs_of, make, output_of

import bminf

# float32 activations: sums in another order, and on compute capability 6.1, where half precision
# is slow, activations in 8 bits where many tokens come at once.
ROUNDING = {61: 0.05, 80: 1e-4}


def one_of_each_input(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor[:1] for key, tensor in inputs_of(name).items()}


_launchers = {capability: HostLauncher(capability=capability) for capability in (61, 80)}


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[HostLauncher]:
    launcher = _launchers[request.param]
    launcher.names.clear()
    with served_by(launcher):
        yield launcher


# One of each kind of input, and of what is a linear in one and a stack of experts in another; to
# the kernels the others are the same, and test_wrapping_architectures.py has them without.
NAMES = ("llama", "mixtral", "deepseek_v3", "gpt2", "t5", "bert", "whisper", "vit", "mamba")


@pytest.mark.parametrize("served", [80], indirect=True)
@pytest.mark.parametrize(
    ("name", "quantization"), [*zip(NAMES, itertools.cycle(("int8", "int4")), strict=False)]
)
def test_streamed_equals_resident_through_the_kernels(
    name: str, quantization: str, served: HostLauncher
) -> None:
    given = one_of_each_input(name)
    resident = quantize_on_cpu(make(name), quantization)
    expected = output_of(resident, given)
    model = quantize_and_stream(make(name), quantization)
    for _ in range(2):
        assert torch.equal(output_of(model, given), expected)
    assert served.names
    plain = dequantize_linears(bminf.unwrap(resident))
    assert relative_error(expected, output_of(plain, given)) < ROUNDING[served.capability]


@pytest.mark.parametrize(
    ("served", "quantization", "dtype"),
    [(61, "int4", torch.float16), (80, "int8", torch.float16), (80, "int4", torch.bfloat16)],
    indirect=["served"],
)
def test_a_model_in_half_precision_generates(
    served: HostLauncher, quantization: str, dtype: torch.dtype
) -> None:
    """The prompt and single tokens take different kernels; streamed and resident take the same."""
    given = one_of_each_input("llama")
    resident = quantize_on_cpu(make("llama").to(dtype), quantization)
    model = quantize_and_stream(make("llama").to(dtype), quantization)
    assert torch.equal(greedy(model, given), greedy(resident, given))
    assert torch.equal(output_of(model, given), output_of(resident, given))
    expected = output_of(dequantize_linears(bminf.unwrap(resident)), given)
    assert relative_error(output_of(model, given), expected) < 0.05
    assert "linear_few_rows" in served.names


@pytest.mark.parametrize("served", [61], indirect=True)
def test_many_tokens_at_once_are_rounded_where_half_precision_is_slow(served: HostLauncher) -> None:
    linear = bminf.QuantizedLinear(torch.nn.Linear(64, 48))
    x = torch.randn(40, 64).half()
    with torch.no_grad():
        assert relative_error(linear(x), x.float() @ linear.dequantize().T + linear.bias) < 0.02
    assert {*served.names} == {"quantize_rows", "gemm_w8a8_dp4a", "dequantize"}
    served.names.clear()
    with torch.no_grad():
        linear(x[:1])
    assert served.names == ["linear_few_rows"]


@pytest.mark.parametrize("served", [80], indirect=True)
def test_gradients_reach_the_input_through_the_kernels(served: HostLauncher) -> None:
    linear = bminf.QuantizedLinear(torch.nn.Linear(64, 48), quantization="int4")
    x = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x).sum(), x)
    assert relative_error(gradient, torch.ones(3, 48) @ linear.dequantize()) < 1e-5
    assert "dequantize" in served.names
