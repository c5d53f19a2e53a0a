"""kernels/cpu/bytes.h: tokens of 8 bits times codes of 8 bits, bit for bit as torch has it."""

from __future__ import annotations

import pytest
import torch
from cpu_products import DTYPES, multiply, random_weight
from guarded import guarded

from bminf.cpu import library
from bminf.cpu.library import Kernels
from bminf.ops.cpu_linear import MAX_DIGIT_COLUMNS
from bminf.quantization.packed import INT8, PackedWeight, codes_of
from bminf.quantization.packing import int8_rows, pack

pytestmark = pytest.mark.skipif(
    not library._LIBRARY.exists(), reason="the kernels are not compiled"
)
COLUMNS = (1, 2, 15, 16, 17, 66, 130, 255, 256, 400, 1030)


def definition(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """By sums in float64, which are as exact as integers."""
    codes, scale = int8_rows(x)
    sums = (codes.double() @ codes_of(weight).double().T).float()
    y = sums.mul_(scale.unsqueeze(1)).mul_(weight.scale)
    return (y if bias is None else y + bias).to(x.dtype)


def rounded(
    kernels: Kernels,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    return multiply(kernels, x, weight, bias, y, activation_bits=8)


def test_products_of_every_shape(kernels: Kernels) -> None:
    for columns in COLUMNS:
        for out_features in (1, 3, 34):
            weight = random_weight(out_features, columns, INT8)
            for num_rows in (1, 2, 3, 4, 7, 13, 16):
                for dtype in DTYPES:
                    x = torch.randn(num_rows, columns).to(dtype)
                    bias = torch.randn(out_features).to(dtype)
                    y, expected = rounded(kernels, x, weight, bias), definition(x, weight, bias)
                    assert torch.equal(y, expected), (columns, out_features, num_rows, dtype)


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_the_largest_codes_in_the_longest_sums(code: int, kernels: Kernels) -> None:
    """-128 is no code that is packed here, but one that a file may hold."""
    weight = random_weight(3, MAX_DIGIT_COLUMNS, INT8)
    weight.qweight[:, :MAX_DIGIT_COLUMNS] = code
    for x in (torch.ones(5, MAX_DIGIT_COLUMNS), -torch.ones(1, MAX_DIGIT_COLUMNS)):
        assert torch.equal(rounded(kernels, x, weight), definition(x, weight))


def test_ties_go_to_the_even_code(kernels: Kernels) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    weight = pack(127 * torch.eye(8), INT8)
    y = rounded(kernels, x, weight)
    assert torch.equal(y, definition(x, weight))
    assert torch.equal(y, 127 * x.round())


def test_numbers_of_any_size(kernels: Kernels) -> None:
    weight, x = random_weight(9, 70, INT8), torch.randn(3, 70)
    for size in (0.0, 1e-45, 1e-44, 1e-43, 1e-38, 1e-30, 1e30, 1e37):
        given = size * x
        assert torch.equal(rounded(kernels, given, weight), definition(given, weight)), size


def test_infinity_and_nan_make_nan_of_their_row_alone(kernels: Kernels) -> None:
    weight, x = random_weight(40, 96, INT8), torch.randn(6, 96)
    x[0, 3], x[2, 95], x[4, 0], x[4, 1] = (float(v) for v in ("inf", "nan", "inf", "-inf"))
    for dtype in DTYPES:
        y, expected = rounded(kernels, x.to(dtype), weight), definition(x.to(dtype), weight)
        assert y[[0, 2, 4]].isnan().all() and expected[[0, 2, 4]].isnan().all()
        assert torch.equal(y[[1, 3, 5]], expected[[1, 3, 5]])


def test_a_row_depends_neither_on_others_nor_on_threads(kernels: Kernels, threads: None) -> None:
    weight, x = random_weight(2063, 512, INT8), torch.randn(16, 512)
    expected = torch.cat([rounded(kernels, row, weight) for row in x.split(1)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in (1, 3, 7, 16):
            assert torch.equal(rounded(kernels, x[:num_rows], weight), expected[:num_rows])


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_touched_beyond_the_ends(at_end: bool, kernels: Kernels) -> None:
    for columns in COLUMNS:
        for num_rows in (1, 3, 5):
            weight, x = random_weight(5, columns, INT8), torch.randn(num_rows, columns)
            bias, y = torch.randn(5), torch.empty(num_rows, 5)
            with guarded([weight.qweight, weight.scale, x, bias, y], at_end) as given:
                codes, scale, near_x, near_bias, near_y = given
                near = PackedWeight(codes, scale, None, columns)
                kept = rounded(kernels, near_x, near, near_bias, near_y).clone()
            assert torch.equal(kept, definition(x, weight, bias))
