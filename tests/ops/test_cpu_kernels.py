"""Which products bminf/ops/cpu_linear.py leaves to the kernels of kernels/cpu/, and which to torch.

What the kernels compute is in tests/kernels/test_cpu_products.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_models import product, relative_error
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bminf
from bminf.cpu.library import kernels
from bminf.ops import cpu_linear
from bminf.ops.gated_linear import gated_linear
from bminf.ops.linear import linear
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight
from bminf.quantization.packing import int8_rows, pack

BOUND = 2**-13

JIT_IS_OLD = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels are not compiled")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels' functions that are called."""
    real, called = kernels(), []
    assert real is not None

    def noted(name: str) -> Callable[..., None]:
        function = getattr(real, name)
        return lambda *given: called.append(name) or function(*given)  # type: ignore[func-returns-value]

    functions = {name: noted(name) for name in ("multiply", "multiply_gated", "unpack")}
    watched = dataclasses.replace(real, **functions)
    monkeypatch.setattr(cpu_linear, "kernels", lambda: watched)
    return called


@pytest.fixture
def weight() -> PackedWeight:
    return pack(torch.randn(24, 64), INT4)


@pytest.mark.parametrize("form", [INT8, INT4, Format(8, 6), Format(4, 32, True)], ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (16, 64), (2, 3, 64)], ids=str)
def test_few_rows_are_multiplied_by_the_kernels(
    shape: tuple[int, ...], form: Format, calls: list[str]
) -> None:
    x, weight = torch.randn(shape), pack(torch.randn(24, 64), form)
    y = linear(x, weight)
    assert calls == ["multiply"] and y.shape == (*shape[:-1], 24)
    assert relative_error(y, product(x, weight)) < BOUND


@pytest.mark.parametrize("num_rows", [1, 16, 40])
@pytest.mark.parametrize("form", [INT4, Format(4), Format(8, 32)], ids=str)
def test_nothing_is_rounded_where_a_weight_is_small(form: Format, num_rows: int) -> None:
    found = kernels()
    x = torch.randn(num_rows, 128)
    for out_features, is_small in ((256, True), (258, False)):
        weight = pack(torch.randn(out_features, 128), form)
        error = relative_error(linear(x, weight), product(x, weight))
        is_in_floats = is_small or (found is not None and found.level == "portable")
        assert (error < 1e-6) is is_in_floats and error < BOUND


@pytest.mark.parametrize("form", [INT4, Format(4), Format(8, 32)], ids=str)
def test_more_rows_are_multiplied_16_at_a_time(form: Format, calls: list[str]) -> None:
    found = kernels()
    if found is None or found.level == "portable":
        pytest.skip("the portable level has no product of integers")
    x, weight, bias = torch.randn(40, 64), pack(torch.randn(24, 64), form), torch.randn(24)
    y = linear(x, weight, bias)
    assert calls == ["multiply"] * 3
    assert relative_error(y, product(x, weight) + bias) < BOUND
    assert torch.equal(linear(x[17:18], weight, bias), y[17:18])


def test_many_rows_of_8_bits_are_multiplied_by_torch_where_it_is_fast(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = pack(torch.randn(24, 64), INT8), torch.randn(40, 64)
    for is_fast, expected in ((True, []), (False, ["multiply"] * 3)):
        monkeypatch.setattr(cpu_linear, "_has_integer_product", lambda _, fast=is_fast: fast)
        assert relative_error(linear(x, weight), product(x, weight)) < BOUND
        assert calls == expected


def test_rows_that_cannot_be_integers_are_multiplied_with_numbers(
    calls: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu_linear, "_SLICE_ELEMENTS", 640)  # ten rows at a time, then four
    for form in (Format(4, 6), Format(8, 6)):
        weight = pack(torch.randn(24, 64), form)
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
            x = torch.randn(17, 64).to(dtype)
            y = linear(x, weight, torch.ones(24).to(dtype))
            assert y.dtype == dtype
            assert relative_error(y, product(x, weight) + 1) < bound
    assert calls == ["unpack"] * 3 * 4


def test_what_is_not_in_rows_is_copied_first(calls: list[str], weight: PackedWeight) -> None:
    x, bias = torch.randn(3, 128)[:, ::2], torch.randn(48)[::2]
    for given in (x, torch.randn(64, 3).t()):
        y = linear(given, weight, bias)
        assert torch.equal(y, linear(given.contiguous(), weight, bias.contiguous()))
    assert calls == ["multiply"] * 4


def test_a_bias_of_another_type_is_converted(calls: list[str], weight: PackedWeight) -> None:
    x, bias = torch.randn(3, 64), torch.randn(24)
    assert torch.equal(linear(x, weight, bias.half()), linear(x, weight, bias.half().float()))
    assert calls == ["multiply"] * 2


@pytest.mark.parametrize("shape", [(64,), (1, 64), (16, 64), (2, 3, 64)], ids=str)
def test_few_rows_in_8_bits_have_the_bits_of_many(shape: tuple[int, ...], calls: list[str]) -> None:
    x, weight, bias = torch.randn(shape), pack(torch.randn(24, 64), INT8), torch.randn(24)
    y = linear(x, weight, bias, "int8")
    assert calls == ["multiply"] and y.shape == (*shape[:-1], 24)
    many = torch.cat([x.view(-1, 64), torch.randn(20, 64)])
    assert torch.equal(linear(many, weight, bias, "int8")[: x.numel() // 64], y.view(-1, 24))
    assert not torch.equal(linear(x, weight, bias), y)


def test_many_rows_in_8_bits_are_multiplied_by_torch_where_it_is_fast(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x, bias = pack(torch.randn(24, 64), INT8), torch.randn(40, 64), torch.randn(24)
    results = []
    for is_fast, expected in ((True, []), (False, ["multiply"] * 3)):
        monkeypatch.setattr(cpu_linear, "_has_integer_product", lambda _, fast=is_fast: fast)
        results.append(linear(x, weight, bias, "int8"))
        assert calls == expected
    assert torch.equal(*results)


def test_rows_in_8_bits_that_are_too_long_are_multiplied_by_torch(calls: list[str]) -> None:
    columns = cpu_linear.MAX_DIGIT_COLUMNS + 1
    x, weight = torch.randn(1, columns), pack(torch.randn(2, columns), INT8)
    codes, scale = int8_rows(x)
    expected = product(codes * scale.unsqueeze(1), weight)
    for given in (x, x[0]):
        assert relative_error(linear(given, weight, None, "int8"), expected) < 1e-5
    assert not calls


def test_a_strided_input_in_8_bits_is_copied_first(calls: list[str]) -> None:
    x, weight = torch.randn(3, 128)[:, ::2], pack(torch.randn(24, 64), INT8)
    y = linear(x, weight, None, "int8")
    assert calls == ["multiply"] and torch.equal(y, linear(x.contiguous(), weight, None, "int8"))


def test_a_layer_takes_one_call(calls: list[str]) -> None:
    layer = bminf.QuantizedLinear(torch.nn.Linear(64, 24))
    x = torch.randn(1, 2, 64)
    assert relative_error(layer(x), product(x, layer.packed) + layer.bias.double()) < BOUND
    assert calls == ["multiply"]


# ---- gated ---------------------------------------------------------------------------------------


@pytest.fixture
def up() -> PackedWeight:
    return pack(torch.randn(24, 64), INT4)


def gated(
    x: torch.Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    gate_bias: torch.Tensor | float = 0.0,
    up_bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    return F.silu(product(x, gate) + gate_bias) * (product(x, up) + up_bias)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (16, 64), (2, 3, 64)], ids=str)
def test_few_rows_are_gated_in_one_call(
    shape: tuple[int, ...], calls: list[str], weight: PackedWeight, up: PackedWeight
) -> None:
    x, biases = torch.randn(shape), torch.randn(2, 24)
    for given in ((None, None), (biases[0], None), (None, biases[1]), tuple(biases)):
        y = gated_linear(x, weight, up, "silu", *given)
        expected = gated(x, weight, up, *(0.0 if bias is None else bias for bias in given))
        assert y.shape == (*shape[:-1], 24) and relative_error(y, expected) < BOUND
    assert calls == ["multiply_gated"] * 4


def test_what_is_gated_in_16_bits_is_rounded_once(
    calls: list[str], weight: PackedWeight, up: PackedWeight
) -> None:
    x = torch.randn(4, 64).bfloat16()
    y = gated_linear(x, weight, up, "silu")
    exact = gated_linear(x.float(), weight, up, "silu")
    assert calls == ["multiply_gated"] * 2 and torch.equal(y, exact.bfloat16())


def test_what_cannot_be_gated_in_one_call_takes_two_products(
    calls: list[str], weight: PackedWeight, up: PackedWeight
) -> None:
    x, bias = torch.randn(4, 64), torch.randn(24)
    for given, gate_bias, up_bias in (
        (torch.randn(17, 64), None, None),
        (torch.randn(3, 128)[:, ::2], None, None),
        (x, bias.half(), None),
        (x, None, torch.randn(48)[::2]),
    ):
        calls.clear()
        y = gated_linear(given, weight, up, "silu", gate_bias, up_bias)
        biases = (0.0 if bias is None else bias for bias in (gate_bias, up_bias))
        assert relative_error(y, gated(given, weight, up, *biases)) < BOUND
        assert "multiply_gated" not in calls


def test_gradients_and_those_who_watch_are_not_passed_over(
    calls: list[str], weight: PackedWeight, up: PackedWeight
) -> None:
    x, bias = torch.randn(2, 64), torch.randn(24, requires_grad=True)
    assert gated_linear(x.clone().requires_grad_(), weight, up, "silu").requires_grad
    for biases in ((bias, None), (None, bias)):
        assert gated_linear(x, weight, up, "silu", *biases).requires_grad
    assert type(gated_linear(x.as_subclass(Marked), weight, up, "silu")) is Marked
    torch.func.vmap(lambda rows: gated_linear(rows, weight, up, "silu"))(x.unsqueeze(1))
    codes = up.qweight.as_subclass(Marked)
    gated_linear(x, weight, up._replace(qweight=codes), "silu")
    assert "multiply_gated" not in calls


# ---- what the kernels would not see --------------------------------------------------------------


def test_a_gradient_goes_its_way(weight: PackedWeight) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = linear(x, weight)
    assert y.requires_grad
    with torch.no_grad():
        assert not linear(x, weight).requires_grad and torch.equal(linear(x, weight), y)


def test_a_bias_with_a_gradient_keeps_it(weight: PackedWeight) -> None:
    bias = torch.randn(24, requires_grad=True)
    linear(torch.randn(2, 64), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 2.0))


@JIT_IS_OLD
def test_a_derivative_forwards_is_no_matter_of_the_kernels(
    calls: list[str], weight: PackedWeight
) -> None:
    x, direction = torch.randn(2, 64), torch.randn(2, 64)
    with forward_ad.dual_level():
        dual = linear(forward_ad.make_dual(x, direction), weight)
        tangent = forward_ad.unpack_dual(dual).tangent
    assert not calls
    assert relative_error(tangent, product(direction, weight)) < 1e-5


def test_functorch_sees_the_operations_of_torch(calls: list[str], weight: PackedWeight) -> None:
    x = torch.randn(5, 2, 64)
    y = torch.func.vmap(lambda rows: linear(rows, weight))(x)
    assert not calls and relative_error(y, product(x, weight)) < BOUND


@JIT_IS_OLD
def test_traces_hold_the_product(calls: list[str]) -> None:
    layer, x = bminf.QuantizedLinear(torch.nn.Linear(64, 24, bias=False)), torch.randn(2, 64)
    traced = torch.jit.trace(layer, x, check_trace=False)
    graph = make_fx(layer)(x)
    calls.clear()
    for program in (traced, graph):
        assert relative_error(program(2 * x), product(2 * x, layer.packed)) < BOUND
    assert calls == ["multiply"] * 2  # in the traces as one operation


def test_modes_are_asked(weight: PackedWeight) -> None:
    class Counting(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
            self.number += 1
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        linear(torch.randn(2, 64), weight)
    assert mode.number > 1


class Marked(torch.Tensor):
    """Whatever is computed with it is marked."""


def test_a_subclass_stays_one(calls: list[str], weight: PackedWeight) -> None:
    x = torch.randn(2, 64)
    y = linear(x.as_subclass(Marked), weight)
    assert type(y) is Marked and not calls
    assert relative_error(y.as_subclass(torch.Tensor), product(x, weight)) < BOUND


def test_parameters_are_numbers_in_memory(calls: list[str], weight: PackedWeight) -> None:
    linear(torch.nn.Parameter(torch.randn(2, 64), requires_grad=False), weight)
    assert calls == ["multiply"]


def test_a_view_of_negative_numbers(weight: PackedWeight) -> None:
    x = torch.randn(2, 64, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert torch.equal(linear(x, weight), linear(x.resolve_neg().clone(), weight))


def test_functions_of_a_mode_do_no_harm(weight: PackedWeight) -> None:
    class Through(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 64)
    with Through():
        given = linear(x, weight)
    assert torch.equal(given, linear(x, weight))
