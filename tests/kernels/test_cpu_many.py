"""kernels/cpu/library.cpp: several products in one call are those of as many calls."""

from __future__ import annotations

import pytest
import torch
from cpu_products import DTYPES, FORMATS, multiply, multiply_many, random_weight
from guarded import guarded

from bminf.cpu import library
from bminf.cpu.library import Kernels
from bminf.ops.cpu_linear import Part, few_rows_linear, few_rows_of_many
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight

pytestmark = pytest.mark.skipif(
    not library._LIBRARY.exists(), reason="the kernels are not compiled"
)
Products = list[tuple[torch.Tensor, PackedWeight, torch.Tensor | None]]


def products_of(forms: list[Format], out_features: int, columns: int) -> Products:
    """Some of every form: rows, sizes, types and biases differ."""
    found: Products = []
    for i, form in enumerate(forms):
        rows, dtype, width = (1, 2, 7, 16)[i % 4], DTYPES[i % 3], columns + 2 * i
        weight = random_weight(out_features + i, width, form)
        bias = torch.randn(out_features + i).to(dtype) if i % 2 else None
        found.append((torch.randn(rows, width).to(dtype), weight, bias))
    return found


def alone(kernels: Kernels, products: Products) -> list[torch.Tensor]:
    return [multiply(kernels, *one) for one in products]


def all_equal(given: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_products_of_any_kinds_have_the_bits_of_each_alone(kernels: Kernels) -> None:
    for columns in (2, 66, 400):
        products = products_of(FORMATS, 5, columns)
        assert all_equal(multiply_many(kernels, products), alone(kernels, products))


@pytest.mark.parametrize("number", [0, 1, 63, 64, 65, 130])
def test_any_number_of_products(number: int, kernels: Kernels) -> None:
    """Which are as many as share their parts, fewer, and more."""
    products = products_of([INT4, INT8] * (number // 2) + [INT4] * (number % 2), 3, 34)
    assert all_equal(multiply_many(kernels, products), alone(kernels, products))


def test_so_many_threads_as_there_are_give_the_same_bits(kernels: Kernels, threads: None) -> None:
    forms = [INT8, INT4, Format(8, 6), Format(4, 32, True), INT4]
    torch.set_num_threads(1)
    products = products_of(forms, 1063, 514)
    products += products_of([INT4], 2, 30)  # less than a part
    expected = alone(kernels, products)
    for num_threads in (1, 2, 3, 16):
        torch.set_num_threads(num_threads)
        assert all_equal(multiply_many(kernels, products), expected), num_threads


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_nothing_beyond_is_read_or_written(at_end: bool, kernels: Kernels) -> None:
    x, weights = torch.randn(5, 66), [random_weight(7, 66, INT4) for _ in range(3)]
    names = [n for n, t in weights[0]._asdict().items() if isinstance(t, torch.Tensor)]
    tensors = [getattr(w, n) for w in weights for n in names]
    with guarded([x, torch.zeros(5, 7), *tensors], at_end) as copies:
        given, y, *rest = copies
        held = iter(rest)
        moved = [w._replace(**{n: next(held) for n in names}) for w in weights]
        spans = [(0, 1), (1, 3), (3, 5)]
        parts = [Part(*span, w, None) for span, w in zip(spans, moved, strict=True)]
        assert given is not None and y is not None
        assert few_rows_of_many(given, parts, y)
        alone = [few_rows_linear(x[a:b], w, None) for (a, b), w in zip(spans, weights, strict=True)]
        assert torch.equal(y, torch.cat(alone))


def test_what_the_kernels_do_not_take_is_left_as_it_is() -> None:
    x, weight = torch.randn(2, 66), random_weight(7, 66, INT4)
    y = torch.full((2, 7), 3.0)
    right, bad = Part(0, 1, weight, None), Part(1, 2, weight, torch.randn(7).half())
    assert not few_rows_of_many(x, [right, bad], y) and (y == 3).all()
    assert few_rows_of_many(x, [], y) and (y == 3).all()
    assert few_rows_of_many(x, [right], y) and (y[1] == 3).all() and (y[0] != 3).all()
