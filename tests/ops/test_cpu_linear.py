"""Products with 8-bit weights by torch, on CPUs that multiply integers exactly, slowly or wrongly.

How the kernels are called is in test_cpu_kernels.py."""

from __future__ import annotations

import pytest
import torch
from quantized_models import product, relative_error

from bminf.ops import cpu_linear
from bminf.ops.linear import linear
from bminf.quantization.packed import INT8
from bminf.quantization.packing import int8_rows, pack


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "kernels", lambda: None)


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


@pytest.mark.parametrize("num_rows", [1, 5])
def test_small_weights_on_the_cpu_are_multiplied_in_float32(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = pack(torch.randn(48, 64), INT8), torch.randn(num_rows, 64)
    exact = product(x, weight)
    digits = linear(x, weight)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_linear, "kernels", lambda: None)
    small = linear(x, weight)
    assert float((small - exact).abs().max()) < 1e-5 < float((digits - exact).abs().max())
