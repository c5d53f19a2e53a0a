"""What ops see to around a launch: what they refuse, what they choose, how they cut the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from bminf.cuda.launcher import Grid, served_by
from bminf.cuda.source import Kernel
from bminf.errors import ArgumentError
from bminf.ops.linear import linear
from bminf.ops.linear_w8a8 import MOST_CODE_COLUMNS, linear_of_codes
from bminf.quantization.packed import INT8, Format, empty, pack, row_bytes


class Noting:
    """A launcher that notes the launches and runs none of them."""

    num_processors = 1

    def __init__(self, capability: int = 80) -> None:
        self.capability = capability
        self.launches: list[tuple[Kernel, Grid, list[Any]]] = []

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        block: Grid,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        self.launches.append((kernel, grid, list(arguments)))


@pytest.fixture
def noting() -> Iterator[Noting]:
    launcher = Noting()
    with served_by(launcher):
        yield launcher


# ---- what is refused -----------------------------------------------------------------------------


def codes_of_x(num_rows: int = 3, in_features: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(num_rows, row_bytes(in_features, 8), dtype=torch.int8)
    return codes, torch.ones(num_rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, 70, dtype=torch.int8)}, r"shape \(3, 70\); .*\(M, 80\)"),
        ({"codes": torch.zeros(3, 80, dtype=torch.uint8)}, "codes are torch.uint8"),
        ({"codes": torch.zeros(80, dtype=torch.int8)}, r"shape \(80,\)"),
        ({"codes": torch.zeros(3, 160, dtype=torch.int8)[:, ::2]}, "not contiguous"),
        ({"codes": torch.zeros(0, 80, dtype=torch.int8)}, "codes are empty"),
        ({"codes": torch.zeros(241, dtype=torch.int8)[1:].view(3, 80)}, "codes begins at"),
        (
            {"codes": torch.zeros(3, 80, dtype=torch.int8, device="meta")},
            "codes are on meta, the weight",
        ),
        ({"x_scale": torch.ones(4)}, r"x_scale is torch.float32 of shape \(4,\)"),
        ({"x_scale": torch.ones(3, 1)}, r"x_scale is torch.float32 of shape \(3, 1\)"),
        ({"x_scale": torch.ones(3).half()}, "x_scale is torch.float16 with strides"),
        ({"x_scale": torch.ones(6)[::2]}, r"x_scale is torch.float32 with strides \(2,\)"),
        ({"x_scale": torch.ones(3, device="meta")}, "x_scale is on meta"),
        ({"bias": torch.ones(8)}, r"bias is torch.float32 of shape \(8,\)"),
        ({"bias": torch.ones(9).int()}, "bias is torch.int32"),
        ({"bias": torch.ones(9, device="meta")}, "bias is on meta"),
        ({"weight": pack(torch.randn(9, 160), Format(4))}, "one scale a row, not .*bits=4"),
        ({"weight": pack(torch.randn(9, 70), Format(8, 34))}, "one scale a row, not .*size=34"),
        ({"weight": pack(torch.randn(9, 70), INT8)._replace(scale=torch.ones(8))}, "scale is"),
        ({"dtype": torch.float64}, "dtype=torch.float64; accepted: float32"),
    ],
)
def test_a_product_of_codes_checks_what_it_is_given(
    change: dict[str, Any], message: str, noting: Noting
) -> None:
    codes, x_scale = codes_of_x()
    right = {"weight": pack(torch.randn(9, 70), INT8), "bias": None, "dtype": torch.float16}
    arguments = {"codes": codes, "x_scale": x_scale, **right, **change}
    with pytest.raises(ArgumentError, match=message):
        linear_of_codes(**arguments)
    assert not noting.launches


def test_a_product_of_codes_needs_a_launcher() -> None:
    with pytest.raises(ArgumentError, match="codes are on cpu, which runs no kernels"):
        linear_of_codes(*codes_of_x(), pack(torch.randn(9, 70), INT8), None, torch.float16)


def test_the_bias_of_a_product_of_codes_is_as_a_kernel_reads_it(noting: Noting) -> None:
    bias, weight = torch.randn(18)[::2], pack(torch.randn(9, 70), INT8)
    for given in (bias, bias.half(), torch.randn(18).half()[::2]):
        linear_of_codes(*codes_of_x(), weight, given, torch.float16)
        seen = noting.launches.pop()[2][4]
        assert torch.equal(seen, given.half()) and seen.is_contiguous()


@pytest.mark.parametrize("num_rows", [1, 64])
def test_sums_of_codes_that_may_not_fit_32_bits_are_refused(num_rows: int, noting: Noting) -> None:
    most = empty(2, MOST_CODE_COLUMNS, INT8, "cpu")
    more = empty(2, MOST_CODE_COLUMNS + 1, INT8, "cpu")
    linear_of_codes(*codes_of_x(num_rows, most.in_features), most, None, torch.float16)
    linear(torch.zeros(num_rows, most.in_features), most, None, "int8")
    assert [kernel.name for kernel, _, _ in noting.launches][1] == "quantize_rows"
    noting.launches.clear()
    message = f"has {MOST_CODE_COLUMNS + 1} columns; .* up to {MOST_CODE_COLUMNS}; use activations="
    with pytest.raises(ArgumentError, match=message):
        linear_of_codes(*codes_of_x(num_rows, more.in_features), more, None, torch.float16)
    with pytest.raises(ArgumentError, match=message):
        linear(torch.zeros(num_rows, more.in_features), more, None, "int8")
    assert not noting.launches


def test_activations_are_rounded_by_themselves_only_where_sums_fit_32_bits() -> None:
    for columns, is_rounded in ((MOST_CODE_COLUMNS, True), (MOST_CODE_COLUMNS + 1, False)):
        launcher = Noting(capability=61)
        with served_by(launcher):
            linear(torch.zeros(17, columns), empty(2, columns, INT8, "cpu"))
        names = {kernel.name for kernel, _, _ in launcher.launches}
        assert names == ({"quantize_rows", "gemm_w8a8_dp4a"} if is_rounded else {"dequantize"})
