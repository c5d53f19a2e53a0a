"""kernels/cpu/: every format at every level against dequantize, then multiply, in float64."""

from __future__ import annotations

import mmap
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_products import BOUNDS, COLUMNS, DTYPES, FORMATS, multiply, random_weight, unpack
from guarded import guarded
from quantized_models import product, relative_error

from bminf.cpu import library
from bminf.cpu.library import Kernels
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize
from bminf.quantization.packing import pack

pytestmark = pytest.mark.skipif(
    not library._LIBRARY.exists(), reason="the kernels are not compiled"
)


def error(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor) -> float:
    """Of the worst row, over its norm as products of so long rows have it in the mean: rows that
    come out small because all cancels are no less exact than others."""
    expected = product(x, weight) + bias.double()
    norms = x.double().norm(dim=1) * dequantize(weight, torch.float64).norm()
    norms = norms / weight.in_features**0.5 + expected.norm(dim=1) + bias.double().norm()
    return float(((y.double() - expected).norm(dim=1) / norms).max())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_every_shape(form: Format, kernels: Kernels) -> None:
    for columns in COLUMNS:
        for out_features, num_rows in ((33, 1), (34, 2), (35, 7), (1, 16)):
            weight = random_weight(out_features, columns, form)
            for dtype in DTYPES:
                x, bias = torch.randn(num_rows, columns), torch.randn(out_features)
                x, bias = x.to(dtype), bias.to(dtype)
                y = multiply(kernels, x, weight, bias)
                assert error(y, x, weight, bias) < BOUNDS[dtype], (columns, num_rows, dtype)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_weight_as_numbers_has_the_bits_of_the_definition(form: Format, kernels: Kernels) -> None:
    for columns in COLUMNS:
        weight = random_weight(5, columns, form)
        for dtype in DTYPES:
            assert torch.equal(unpack(kernels, weight, dtype), dequantize(weight, dtype))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_depends_on_no_other(form: Format, kernels: Kernels) -> None:
    weight, x = random_weight(9, 200, form), torch.randn(16, 200)
    x[3, 7], x[11] = float("nan"), 0.0
    together = multiply(kernels, x, weight)
    for num_rows in range(1, 17):
        assert torch.equal(multiply(kernels, x[:num_rows], weight)[:3], together[:num_rows][:3])
    for m in range(16):
        alone = multiply(kernels, x[m : m + 1].clone(), weight)
        torch.testing.assert_close(alone[0], together[m], rtol=0, atol=0, equal_nan=True)
    assert together[3].isnan().all() and not together[11].any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_so_many_threads_as_there_are_give_the_same_bits(
    form: Format, kernels: Kernels, threads: None
) -> None:
    weight, x = random_weight(2063, 512, form), torch.randn(3, 512)
    expected = multiply(kernels, x, weight), unpack(kernels, weight, torch.float32)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        given = multiply(kernels, x, weight), unpack(kernels, weight, torch.float32)
        assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_nothing_is_touched_beyond_the_ends(form: Format, at_end: bool, kernels: Kernels) -> None:
    for columns in (2, 66, 400):
        weight, x = random_weight(5, columns, form), torch.randn(3, columns)
        bias, y = torch.randn(5), torch.empty(3, 5)
        parts = [weight.qweight, weight.scale, weight.minimum, weight.row_scale, x, bias, y]
        with guarded(parts, at_end) as given:
            codes, scale, minimum, row_scale, *others = given
            near = weight._replace(
                qweight=codes, scale=scale, minimum=minimum, row_scale=row_scale, code_sum=None
            )
            kept = multiply(kernels, others[0], near, *others[1:]).clone()
            numbers = unpack(kernels, near, torch.float32)
        assert torch.equal(kept, multiply(kernels, x, weight, bias))
        assert torch.equal(numbers, dequantize(weight, torch.float32))


@pytest.mark.parametrize("form", [INT8, INT4, Format(8, 6), Format(4, 32, True)], ids=str)
def test_infinity_and_nan_come_through_in_their_row(form: Format, kernels: Kernels) -> None:
    weight, x = random_weight(40, 96, form), torch.randn(6, 96)
    x[0, 3], x[2, 95], x[4, 0], x[4, 1] = (float(v) for v in ("inf", "nan", "inf", "-inf"))
    expected = x @ dequantize(weight, torch.float32).T
    for dtype in DTYPES:
        y = multiply(kernels, x.to(dtype), weight).float()
        torch.testing.assert_close(y[[0, 2, 4]].isnan(), expected[[0, 2, 4]].isnan())
        assert torch.equal(y[0][y[0].isinf()], expected[0][expected[0].isinf()])
        assert y[[1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("form", [INT8, INT4, Format(4, 32, True)], ids=str)
def test_numbers_of_any_size_keep_their_digits(form: Format, kernels: Kernels) -> None:
    weight, x = random_weight(40, 96, form), torch.randn(1, 96)
    for size in (1e-38, 1e-30, 1e-20, 1e20, 1e35):
        given = (size * x).double()  # as float32 has it
        y = multiply(kernels, given.float(), weight)
        assert relative_error(y, product(given, weight)) < 2**-13, size


def test_one_large_number_does_not_drown_the_others(kernels: Kernels) -> None:
    """The step size is that of 16 columns at most: elsewhere all digits are left."""
    for form in (INT8, INT4, Format(4), Format(8, 32)):
        weight, x = pack(torch.eye(512), form), torch.randn(1, 512)
        x[0, 7] = 1e6
        y = multiply(kernels, x, weight)
        far = torch.arange(512) % 32 > 7
        assert relative_error(y[:, far], product(x, weight)[:, far]) < 2**-13


def test_more_than_2_to_the_31_codes(kernels: Kernels) -> None:
    """Pages of zeros that no memory stands for; all but the last row gives 0."""
    if kernels.level != "avx512":
        pytest.skip("one level is enough: addresses are computed in code that all share")
    rows, columns = 2**16 + 3, 2**16
    memory = mmap.mmap(-1, rows * columns // 2)
    memory.madvise(mmap.MADV_HUGEPAGE)
    codes = torch.frombuffer(memory, dtype=torch.uint8).view(rows, columns // 2)
    weight = PackedWeight(codes, torch.ones(rows).half(), None, columns)
    weight.qweight[-1] = 0x11  # every code is 1
    y = multiply(kernels, torch.ones(1, columns), weight)
    assert y[0, -1] == columns and not y[0, :-1].any()


# ---- threads and processes -----------------------------------------------------------------------


def test_two_threads_of_python_at_once(kernels: Kernels, threads: None) -> None:
    torch.set_num_threads(2)
    weights = [random_weight(1200, 1024, form) for form in (INT8, INT4)]
    x = torch.randn(2, 1024)
    expected = [multiply(kernels, x, weight) for weight in weights]

    def many(weight: PackedWeight) -> list[torch.Tensor]:
        torch.set_num_threads(2)
        return [multiply(kernels, x, weight) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(many, weights))
    for right, products in zip(expected, given, strict=True):
        assert all(torch.equal(y, right) for y in products)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_has_threads_of_its_own(kernels: Kernels, threads: None) -> None:
    torch.set_num_threads(2)
    weight, x = random_weight(1200, 1024, INT8), torch.randn(1, 1024)
    expected = multiply(kernels, x, weight)
    child = os.fork()
    if child == 0:
        is_right = all(torch.equal(multiply(kernels, x, weight), expected) for _ in range(20))
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(multiply(kernels, x, weight), expected)


def test_a_keyboard_interrupt_leaves_the_threads_in_order(kernels: Kernels, threads: None) -> None:
    torch.set_num_threads(2)
    weight, x = random_weight(1200, 1024, INT8), torch.randn(1, 1024)
    expected = multiply(kernels, x, weight)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 2e-3)
            while True:
                multiply(kernels, x, weight)
        assert torch.equal(multiply(kernels, x, weight), expected)
    signal.signal(signal.SIGALRM, before)
