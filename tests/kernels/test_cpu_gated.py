"""kernels/cpu/gated.h: two products and an activation, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_products import BOUNDS, COLUMNS, DTYPES, FORMATS, multiply, multiply_gated, random_weight
from guarded import guarded
from quantized_models import product

from bminf.cpu import library
from bminf.cpu.library import Kernels
from bminf.ops.gated_linear import ACTIVATION_FUNCTIONS
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import pack

pytestmark = pytest.mark.skipif(
    not library._LIBRARY.exists(), reason="the kernels are not compiled"
)
Weights = tuple[PackedWeight, PackedWeight]
Biases = tuple[torch.Tensor, torch.Tensor]


def random_weights(out_features: int, columns: int, form: Format) -> Weights:
    gate, up = (random_weight(out_features, columns, form) for _ in range(2))
    return gate, up


def error(
    y: torch.Tensor, x: torch.Tensor, weights: Weights, biases: Biases, activation: str
) -> float:
    """Of the worst row, over its norm, and over what the norms of both products make of it: where
    one of few columns cancels, the product of both errs no less."""
    gate, up = (
        product(x, weight) + bias.double() for weight, bias in zip(weights, biases, strict=True)
    )
    expected = ACTIVATION_FUNCTIONS[activation](gate) * up
    norms = [
        x.double().norm(dim=1) * dequantize(weight, torch.float64).norm() / x.shape[1] ** 0.5
        + bias.double().norm()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    norm = expected.norm(dim=1) + norms[0] * norms[1] / y.shape[1] ** 0.5
    return float(((y.double() - expected).norm(dim=1) / norm).max())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_every_shape(form: Format, kernels: Kernels) -> None:
    for columns in COLUMNS:
        for out_features, num_rows in ((33, 1), (34, 2), (1, 7), (135, 16)):
            weights = random_weights(out_features, columns, form)
            for dtype, activation in zip(DTYPES, ACTIVATION_FUNCTIONS, strict=True):
                x = torch.randn(num_rows, columns).to(dtype)
                gate, up = torch.randn(2, out_features).to(dtype)
                y = multiply_gated(kernels, x, weights, activation, (gate, up))
                found = error(y, x, weights, (gate, up), activation)
                assert found < BOUNDS[dtype], (columns, num_rows, dtype)


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_activations_of_numbers_of_any_size(activation: str, kernels: Kernels) -> None:
    """The biases of weights that are zero: nothing else is rounded."""
    sizes = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-45, 38, 500)])
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    given = torch.cat([sizes, -sizes, special])
    nothing = pack(torch.zeros(len(given), 2), INT8)
    y = multiply_gated(
        kernels, torch.ones(1, 2), (nothing, nothing), activation, (given, torch.ones_like(given))
    )[0]
    expected = ACTIVATION_FUNCTIONS[activation](given.double())
    off, finite = (y.double() - expected).abs(), given.isfinite()
    assert (off <= 3e-7 * given.abs() + 1e-44)[finite].all()  # the least float is 1.4e-45
    assert y[-3] == float("inf") and y[-2:].isnan().all()  # -infinity * 0, as the formulas say


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_depends_on_no_other(form: Format, kernels: Kernels) -> None:
    weights, x = random_weights(137, 200, form), torch.randn(16, 200)
    x[3, 7], x[11] = float("nan"), 0.0
    together = multiply_gated(kernels, x, weights, "silu")
    for num_rows in (1, 2, 3, 5, 9):
        some = multiply_gated(kernels, x[:num_rows], weights, "silu")
        assert torch.equal(some[:3], together[:num_rows][:3])
    for m in range(16):
        alone = multiply_gated(kernels, x[m : m + 1].clone(), weights, "silu")
        torch.testing.assert_close(alone[0], together[m], rtol=0, atol=0, equal_nan=True)
    assert together[3].isnan().all() and not together[11].any()


@pytest.mark.parametrize("form", [INT8, INT4, Format(8, 6), Format(4, 32, True)], ids=str)
def test_so_many_threads_as_there_are_give_the_same_bits(
    form: Format, kernels: Kernels, threads: None
) -> None:
    weights, x = random_weights(1063, 514, form), torch.randn(3, 514)
    for activation in ACTIVATION_FUNCTIONS:
        torch.set_num_threads(1)
        expected = multiply_gated(kernels, x, weights, activation)
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(multiply_gated(kernels, x, weights, activation), expected)


def test_both_products_have_the_bits_of_products_alone(kernels: Kernels) -> None:
    """Beside a gate of which SiLU is 1 or its input."""
    weight, x = random_weight(40, 96, INT4), torch.randn(3, 96)
    nothing, alone = pack(torch.zeros(40, 96), INT4), multiply(kernels, x, weight)
    thousands, ones = torch.full((40,), 1024.0), torch.ones(40)
    y = multiply_gated(kernels, x, (nothing, weight), "silu", (thousands, None))
    assert torch.equal(y, 1024 * alone)
    y = multiply_gated(kernels, x, (weight, nothing), "silu", (thousands, ones))
    assert torch.equal(y, multiply(kernels, x, weight, thousands))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_nothing_is_touched_beyond_the_ends(form: Format, at_end: bool, kernels: Kernels) -> None:
    for columns in (2, 66, 400):
        weights, x = random_weights(5, columns, form), torch.randn(3, columns)
        biases = torch.randn(5), torch.randn(5)
        tensors = [
            tensor
            for weight in weights
            for tensor in (weight.qweight, weight.scale, weight.minimum, weight.row_scale)
        ]
        with guarded([*tensors, x, *biases, torch.empty(3, 5)], at_end) as given:
            gate, up = (
                weight._replace(
                    qweight=codes, scale=scale, minimum=low, row_scale=row, code_sum=None
                )
                for weight, (codes, scale, low, row) in zip(
                    weights, (given[:4], given[4:8]), strict=True
                )
            )
            near, *near_biases, y = given[8:]
            kept = multiply_gated(kernels, near, (gate, up), "gelu", tuple(near_biases), y).clone()
        assert torch.equal(kept, multiply_gated(kernels, x, weights, "gelu", biases))


@pytest.mark.parametrize("form", [INT8, INT4, Format(8, 6), Format(4, 32, True)], ids=str)
def test_infinity_and_nan_come_through_in_their_row(form: Format, kernels: Kernels) -> None:
    weights, x = random_weights(40, 96, form), torch.randn(6, 96)
    x[0, 3], x[2, 95], x[4, 0], x[4, 1] = (float(v) for v in ("inf", "nan", "inf", "-inf"))
    gate, up = (product(x, weight) for weight in weights)
    for activation, function in ACTIVATION_FUNCTIONS.items():
        expected = (function(gate) * up).float()
        y = multiply_gated(kernels, x, weights, activation)
        torch.testing.assert_close(y[[0, 2, 4]].isnan(), expected[[0, 2, 4]].isnan())
        assert torch.equal(y[0][y[0].isinf()], expected[0][expected[0].isinf()])
        assert y[[1, 3, 5]].isfinite().all()
