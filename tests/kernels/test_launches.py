"""What ops see to around a launch: what they refuse, what they choose, how they cut the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import relative_error, weight_on
from host_launcher import HostLauncher, NotingLauncher, served_by

from bminf.errors import ArgumentError
from bminf.ops import linear_weight_only
from bminf.ops.dequantize import dequantize_weight, row_grid
from bminf.ops.gated_linear import gated_linear
from bminf.ops.linear import linear
from bminf.ops.linear_w8a8 import (
    MAX_CODE_COLUMNS,
    kernel_product,
    library_product,
)
from bminf.ops.rows import check_codes, kernel_rows
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight, dequantize, empty
from bminf.quantization.packing import int8_rows, pack


@pytest.fixture
def noting() -> Iterator[NotingLauncher]:
    launcher = NotingLauncher()
    with served_by(launcher):
        yield launcher


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 64])
def test_sums_of_codes_that_may_not_fit_32_bits_are_refused(
    num_rows: int, noting: NotingLauncher
) -> None:
    most = empty(2, MAX_CODE_COLUMNS, INT8, "cpu")
    more = empty(2, MAX_CODE_COLUMNS + 1, INT8, "cpu")
    linear(torch.zeros(num_rows, most.in_features), most, None, "int8")
    assert noting.names[0] == "quantize_rows"
    noting.launches.clear()
    message = f"has {MAX_CODE_COLUMNS + 1} columns; .* up to {MAX_CODE_COLUMNS}; use activations="
    with pytest.raises(ArgumentError, match=message):
        linear(torch.zeros(num_rows, more.in_features), more, None, "int8")
    assert not noting.launches


def test_activations_are_rounded_by_themselves_only_where_sums_fit_32_bits() -> None:
    for columns, is_rounded in ((MAX_CODE_COLUMNS, True), (MAX_CODE_COLUMNS + 1, False)):
        launcher = NotingLauncher(capability=61)
        with served_by(launcher):
            linear(torch.zeros(17, columns), empty(2, columns, INT8, "cpu"))
        assert {*launcher.names} == (
            {"quantize_rows", "gemm_w8a8_dp4a"} if is_rounded else {"dequantize"}
        )


def misaligned(weight: PackedWeight) -> PackedWeight:
    """The same codes, one byte further on than a kernel could read them."""
    codes = weight.qweight
    moved = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes)
    return weight._replace(qweight=moved.copy_(codes))


RIGHT = pack(torch.randn(9, 70), INT8)


CALLS: list[tuple[str, Callable[[PackedWeight], object]]] = [
    ("qweight", lambda bad: linear(torch.randn(2, 70), bad)),
    ("qweight", lambda bad: linear(torch.randn(8, 70).half(), bad)),
    ("qweight", lambda bad: linear(torch.randn(140, 70).half(), bad)),
    ("qweight", lambda bad: linear(torch.randn(2, 70), bad, None, "int8")),
    ("qweight", lambda bad: linear(torch.randn(64, 70), bad, None, "int8")),
    ("qweight", lambda bad: dequantize_weight(bad, torch.float16)),
    ("gate", lambda bad: gated_linear(torch.randn(2, 70), bad, RIGHT, "silu")),
    ("up", lambda bad: gated_linear(torch.randn(2, 70), RIGHT, bad, "silu")),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_codes_that_begin_where_no_kernel_can_read_are_refused(
    name: str, call: Callable[[PackedWeight], object], noting: NotingLauncher
) -> None:
    call(RIGHT)
    assert noting.launches
    noting.launches.clear()
    with pytest.raises(ArgumentError, match=f"{name} begins at .* no multiple of 16 bytes"):
        call(misaligned(RIGHT))
    assert {*noting.names} <= {"quantize_rows"}


@pytest.mark.parametrize("call", [call for _, call in CALLS])
def test_a_weight_whose_parts_do_not_go_together_is_refused(
    call: Callable[[PackedWeight], object], noting: NotingLauncher
) -> None:
    with pytest.raises(ArgumentError, match=r"scale is torch.float32 of shape \(8,\)"):
        call(RIGHT._replace(scale=torch.ones(8)))
    assert not noting.launches


def test_what_is_wrong_is_refused_after_what_was_right(noting: NotingLauncher) -> None:
    """How a product is launched is remembered by all that a check looks at."""
    weight, bias = pack(torch.randn(9, 64), INT8), torch.randn(9)
    x = torch.randn(2, 64)
    linear(x, weight, bias)
    assert noting.names == ["linear_few_rows"]
    for message, wrong in (
        ("x has shape .2, 56., but the weight takes 64", (x[:, 8:], weight, bias)),
        ("x has shape .., but the weight takes 64", (x[0, 0], weight, bias)),
        ("x is torch.float64; accepted", (x.double(), weight, bias)),
        ("bias is torch.float32 of shape .8,.", (x, weight, bias[1:])),
        ("x is on meta, the weight on cpu", (x.to("meta"), weight, bias)),
    ):
        with pytest.raises(ArgumentError, match=message):
            linear(*wrong)
    assert len(noting.launches) == 1


def test_sizes_that_kernels_cannot_count_are_refused() -> None:
    codes = torch.empty(2**31, 16, dtype=torch.int8, device="meta")
    for check in (kernel_rows, lambda codes: check_codes("qweight", codes)):
        check(codes[1:])
        with pytest.raises(ArgumentError, match="kernels count to 2147483647"):
            check(codes)


@pytest.mark.parametrize(("capability", "tile"), [(61, 64), (80, 128)])
def test_more_rows_than_a_grid_has_are_refused(capability: int, tile: int) -> None:
    launcher, most = NotingLauncher(capability), 65535 * tile
    codes = torch.empty(most + 1, 16, dtype=torch.int8, device="meta")
    scale, weight = torch.empty(most + 1, device="meta"), empty(9, 16, INT8, "meta")
    kernel_product(launcher, codes[1:], scale[1:], weight, None, torch.float16)
    with pytest.raises(ArgumentError, match=f"x has {most + 1} rows; at most {most} at once"):
        kernel_product(launcher, codes, scale, weight, None, torch.float16)
    ((_, grid),) = launcher.launches
    assert grid == (1, 65535, 1)


# ---- how the work is cut -------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("form", [INT8, INT4, Format(4, 32, True)], ids=str)
@pytest.mark.parametrize(
    ("elements", "num_slices"), [(10 * 70, 1), (9 * 70, 2), (5 * 70 - 1, 3), (3 * 70, 4), (1, 10)]
)
def test_a_weight_is_dequantized_some_rows_at_a_time(
    elements: int, num_slices: int, form: Format, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_weight_only, "_SLICE_ELEMENTS", elements)
    x, (weight, values) = torch.randn(20, 70), weight_on("cpu", 10, 70, form)
    bias = torch.randn(10) if has_bias else None
    launcher = HostLauncher()
    with served_by(launcher):
        y = linear(x, weight, bias)
    assert launcher.names == ["dequantize"] * num_slices
    expected = x.double() @ values.T + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype and relative_error(y, expected) < 2e-6


def test_a_gradient_goes_through_a_gated_linear() -> None:
    x = torch.randn(2, 70, requires_grad=True)
    gate, up = (pack(torch.randn(9, 70), INT4) for _ in range(2))
    launcher = HostLauncher()
    with served_by(launcher):
        y = gated_linear(x, gate, up, "silu")
        assert launcher.names == ["linear_few_rows"] * 2
        (gradient,) = torch.autograd.grad(y.sum(), x)
        launcher.names.clear()
        with torch.no_grad():
            fused = gated_linear(x, gate, up, "silu")
        assert launcher.names == ["linear_few_rows"]
    again = x.detach().double().requires_grad_()
    gates, ups = (again @ dequantize(weight, torch.float64).T for weight in (gate, up))
    expected = torch.nn.functional.silu(gates) * ups
    (right,) = torch.autograd.grad(expected.sum(), again)
    assert relative_error(gradient, right) < 1e-5
    assert relative_error(y, expected.detach()) < 1e-5 > relative_error(fused, expected.detach())


@pytest.mark.parametrize("num_rows", [1, 16, 17, 20])
@pytest.mark.parametrize("out_features", [1, 7, 8, 9])
def test_the_library_is_given_the_sizes_that_it_takes(
    num_rows: int, out_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = torch._int_mm

    def as_on_a_gpu(codes: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        assert codes.shape[0] > 16 and codes.shape[1] % 8 == 0 and columns.shape[1] % 8 == 0
        return multiply(codes, columns)

    x, weight = torch.randn(num_rows, 33), pack(torch.randn(out_features, 33), INT8)
    codes, x_scale = int8_rows(x)
    expected = (codes.double() * x_scale.double()[:, None]) @ dequantize(weight, torch.float64).T
    padded = torch.nn.functional.pad(codes, (0, weight.qweight.shape[1] - 33))
    monkeypatch.setattr(torch, "_int_mm", as_on_a_gpu)
    y = library_product(HostLauncher(), padded, x_scale, weight, None, torch.float32)
    assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize(("num_processors", "is_narrow"), [(2, False), (3, True), (2, False)])
def test_a_narrow_matrix_is_cut_finer(num_processors: int, is_narrow: bool) -> None:
    """256 rows of a weight are 8 blocks of 32: four for each of two processors, not of three."""
    launcher = NotingLauncher(num_processors=num_processors)
    with served_by(launcher), torch.no_grad():
        linear(torch.zeros(8, 64).half(), empty(256, 64, INT8, "cpu"))
    ((kernel, grid),) = launcher.launches
    macros = dict(kernel.macros)
    assert kernel.name == "linear_tensor_core"
    assert (macros["W_TILES"], macros["WARPS"], grid) == (
        (1, 8, (16, 1, 1)) if is_narrow else (2, 4, (8, 1, 1))
    )


def test_rows_longer_than_a_grid_are_refused() -> None:
    most = 65535 * 1024
    assert row_grid(7, most, 1024) == (7, 65535, 1)
    with pytest.raises(ArgumentError, match=f"rows of {most + 1} elements; at most {most} at once"):
        row_grid(7, most + 1, 1024)
