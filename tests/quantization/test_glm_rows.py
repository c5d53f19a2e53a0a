"""GLM-130B's rows of codes, against the arithmetic written out number by number."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bminf.errors import ArgumentError
from bminf.quantization.glm_rows import pack_rows, quantize_rows, row_scales
from bminf.quantization.packed import Format, codes_of, dequantize

HALF = st.floats(-60000, 60000, width=16)


def half(value: float) -> float:
    """The nearest number of half precision, ties to even."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def by_hand(row: list[float], bits: int) -> tuple[list[int], float]:
    """Codes and scale of a row of half-precision numbers."""
    most = 2 ** (bits - 1) - 1
    scale = half(max(map(abs, row)) / most)
    if scale == 0:
        return [0] * len(row), 0.0
    codes = []
    for value in row:
        quotient = value / scale
        quotient = half(quotient) if abs(quotient) < 1000 else quotient
        codes.append(max(-most, min(most, round(quotient))))  # Python's round is half to even
    return codes, scale


def numbers_of(codes: torch.Tensor, bits: int) -> list[list[int]]:
    if bits == 8:
        return codes.tolist()  # type: ignore[no-any-return]
    rows = codes.view(torch.uint8).tolist()
    signed = [n - 16 if n > 7 else n for n in range(16)]
    return [[signed[x] for byte in row for x in (byte >> 4, byte & 15)] for row in rows]


@pytest.mark.parametrize("bits", [8, 4])
@given(rows=st.lists(st.lists(HALF, min_size=6, max_size=6), min_size=1, max_size=4))
def test_codes_and_scales_are_those_of_half_precision(rows: list[list[float]], bits: int) -> None:
    codes, scale = quantize_rows(torch.tensor(rows, dtype=torch.float16), bits)
    assert codes.dtype == torch.int8 and codes.shape == (len(rows), 6 * bits // 8)
    assert scale.dtype == torch.float16
    expected = [by_hand(row, bits) for row in rows]
    assert scale.tolist() == [s for _, s in expected]
    assert numbers_of(codes, bits) == [c for c, _ in expected]
    assert torch.equal(row_scales(torch.tensor(rows, dtype=torch.float16), bits), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_result_is_near_the_weight(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    codes, scale = quantize_rows(weight, bits)
    values = torch.tensor(numbers_of(codes, bits)) * scale.float()[:, None]
    error = (values - weight.float()).abs()
    assert bool((error <= 0.57 * scale.float()[:, None]).all())  # a half, and two roundings


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_are_zeros_and_no_nan(bits: int) -> None:
    weight = torch.zeros(3, 8).half()
    weight[1] = 1.0
    codes, scale = quantize_rows(weight, bits)
    assert not codes[0].any() and not codes[2].any() and codes[1].all()
    assert scale.tolist()[::2] == [0, 0]


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_clamped_where_the_scale_has_few_digits(bits: int) -> None:
    least = 2.0**-24
    for steps in range(1, 400):
        weight = torch.tensor([[steps * least, -steps * least]], dtype=torch.float16)
        codes, scale = quantize_rows(weight, bits)
        most = 2 ** (bits - 1) - 1
        (row,) = numbers_of(codes, bits)
        assert row[0] == -row[1] and 0 <= row[0] <= most
        assert math.isfinite(float(scale))


@pytest.mark.parametrize("columns", [2, 6, 34, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_weight_has_the_same_codes_and_scales(
    bits: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bminf.quantization.packing.SLICE_ELEMENTS", 2 * columns)
    weight = torch.randn(5, columns).half()
    weight[2] = 0
    packed = pack_rows(weight, bits)
    packed.check()
    codes, scale = quantize_rows(weight, bits)
    assert packed.form == Format(bits)
    assert codes_of(packed).tolist() == numbers_of(codes, bits)
    assert torch.equal(packed.scale, scale.to(packed.scale.dtype))
    if packed.code_sum is not None:
        assert packed.code_sum.tolist() == codes.sum(1).tolist()
    values = torch.tensor(numbers_of(codes, bits)) * scale.float()[:, None]
    assert torch.equal(dequantize(packed, torch.float16), values.half())


def test_shapes_alone_are_packed_on_the_meta_device() -> None:
    packed = pack_rows(torch.empty(5, 8, device="meta"), 4)
    assert packed.qweight.is_meta and packed.form == Format(4)
    assert pack_rows(torch.empty(0, 8), 8).qweight.shape == (0, 16)


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.ones(2, 2), 5, "bits=5; accepted: 8, 4"),
        (torch.ones(2, 3), 4, "3 columns cannot be .* 4 bits"),
        (torch.tensor([[1.0, float("nan")]]), 8, "NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), 4, "NaN or infinity"),
        (torch.full((1, 2), 1e6), 4, "too large for half-precision scales"),
    ],
)
def test_what_cannot_be_quantized_says_why(weight: Any, bits: int, message: str) -> None:
    for quantize in (quantize_rows, row_scales, pack_rows):
        with pytest.raises(ArgumentError, match=message):
            quantize(weight, bits)  # type: ignore[operator]


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(2, 2, dtype=torch.int8)])
def test_what_is_no_matrix_of_floating_point_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="must be a matrix of floating point"):
        quantize_rows(weight, 8)
