"""How weights become codes and scales: rounding, the choice of scales, slices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import FORMATS, MINIMUM, formats

from bminf.errors import ArgumentError
from bminf.quantization import packing
from bminf.quantization.packed import (
    INT4,
    INT8,
    Format,
    PackedWeight,
    codes_of,
    dequantize,
    group_minima,
    group_scales,
)
from bminf.quantization.packing import int8_rows, pack, pack_rows

HALF = [form for form in FORMATS if form.scale_bits == 16]
INTEGER = [form for form in FORMATS if form.scale_bits == 8]


@settings(max_examples=60, deadline=None)
@given(form=formats(), n=st.integers(1, 5), pairs=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_rounding_costs_half_a_step_at_most(form: Format, n: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, 2 * pairs, generator=generator)
    packed = pack(weight, form)
    width = form.group_size or 2 * pairs
    step = group_scales(packed).abs().repeat_interleave(width, 1)[:, : 2 * pairs]
    # The largest weights of a group may lie beyond the last code: by half a step in symmetric
    # 4 bits (+8 is not a code), and by what scale and minimum lost in half precision.
    slack = 1.01 if form.bits == 4 and not form.has_minimum else 0.5 + 0.02 * (form.bits == 4)
    error = (dequantize(packed, torch.float32) - weight).abs() - slack * step
    if packed.row_scale is not None:  # half a unit a code, and 8 where a minimum is rounded
        error -= (8 + 8 * form.has_minimum) * packed.row_scale.unsqueeze(1)
    assert (error <= 1e-6).all()


def scale_of_columns(values: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """A scale or minimum of each weight, in float64."""
    width = packed.group_size or packed.in_features
    columns = values.double().reshape(packed.out_features, -1).repeat_interleave(width, 1)
    return columns[:, : packed.in_features]


@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_each_code_is_the_nearest_for_the_scale_and_minimum_that_are_stored(
    form: Format, offset: float
) -> None:
    """They are rounded to half precision first; far from 0 that moves a minimum by many steps."""
    weight = 0.01 * torch.randn(4, 70) + offset
    packed = pack(weight, form)
    least, most = (-127, 127) if form.bits == 8 else (0, 15) if form.has_minimum else (-8, 7)
    scale = scale_of_columns(group_scales(packed), packed)
    wanted = weight.double()
    if (minima := group_minima(packed)) is not None:
        wanted -= scale_of_columns(minima, packed)
    choices = torch.arange(least, most + 1).double() * scale.unsqueeze(-1)
    nearest = (choices - wanted.unsqueeze(-1)).abs().amin(-1)
    error = (codes_of(packed).double() * scale - wanted).abs()
    assert (error <= nearest + 1e-4 * scale.abs()).all()


@pytest.mark.parametrize("form", [f for f in HALF if f.group_size], ids=str)
@pytest.mark.parametrize("k", [64, 70])
def test_a_group_is_packed_as_if_it_stood_alone(form: Format, k: int) -> None:
    """The last one too, where it is short: what fills it up must not count."""
    weight = 5 + torch.rand(3, k)  # no zeros in sight
    weight[:, 0] = 1000
    weight[:, -3] = 5
    packed = pack(weight, form)
    assert form.group_size is not None
    for group, start in enumerate(range(0, k, form.group_size)):
        columns = slice(start, start + form.group_size)
        alone = pack(weight[:, columns], Format(form.bits, None, form.has_minimum))
        assert torch.equal(packed.scale[:, group], alone.scale)
        assert torch.equal(codes_of(packed)[:, columns], codes_of(alone))
        if packed.minimum is not None and alone.minimum is not None:
            assert torch.equal(packed.minimum[:, group], alone.minimum)


@pytest.mark.parametrize("form", [Format(4, 16), Format(4), Format(4, 34)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_gets_the_code_that_has_no_twin(sign: int, form: Format) -> None:
    weight = torch.rand(3, 70) - 0.5
    starts = list(range(0, 70, form.group_size or 70))
    weight[:, starts] = 2.0 * sign
    packed = pack(weight, form)
    assert (codes_of(packed)[:, starts] == -8).all()
    assert (packed.scale == -0.25 * sign).all()
    assert (dequantize(packed, torch.float32)[:, starts] == 2.0 * sign).all()


def test_a_minimum_is_the_smallest_weight_and_15_steps_end_at_the_largest() -> None:
    weight = torch.rand(3, 70) + 1
    weight[:, 5::32], weight[:, 3::32] = 0.5, 4.25
    packed = pack(weight, MINIMUM)
    assert packed.minimum is not None
    assert (packed.minimum == 0.5).all() and (packed.scale == 0.25).all()
    codes = codes_of(packed)
    assert not codes[:, 5::32].any() and (codes[:, 3::32] == 15).all()


def test_groups_of_32_with_a_minimum_hold_q4_1_blocks_exactly() -> None:
    scale = (torch.rand(8, 4, 1) * 0.01 + 1e-4).half().float()
    minimum = (torch.randn(8, 4, 1) * 0.1).half().float()
    codes = torch.randint(0, 16, (8, 4, 32)).float()
    codes[..., 3], codes[..., 17] = 0, 15
    weight = (codes * scale + minimum).flatten(1)
    assert torch.equal(dequantize(pack(weight, Format(4, 32, True)), torch.float32), weight)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_and_constants_are_kept(form: Format) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, :32] = 0.5, -2.0
    back = dequantize(pack(weight, form), torch.float32)
    assert back.isfinite().all()
    assert torch.equal(back[[0, 3]], weight[[0, 3]])
    assert torch.allclose(back, weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", [MINIMUM, *INTEGER], ids=str)
def test_rows_are_packed_in_slices_without_a_seam(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what packing needs beside a weight does not grow with the weight."""
    weight, sizes = torch.randn(37, 64), []
    whole = pack(weight, form)

    def counted(rows: torch.Tensor, form: Format, into: PackedWeight) -> None:
        sizes.append(len(rows))
        pack_rows(rows, form, into)

    held = packing._CHOOSING if form.scale_bits == 8 else 1
    monkeypatch.setattr(packing, "SLICE_ELEMENTS", 5 * 64 * held)
    in_slices = pack(weight, form, counted)
    assert sizes == [5] * 7 + [2]
    assert_same(in_slices, whole)


def assert_same(one: PackedWeight, other: PackedWeight) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packing_twice_gives_the_same_bytes(form: Format) -> None:
    """On any number of threads."""
    weight, num_threads = torch.randn(300, 330), torch.get_num_threads()
    once = pack(weight, form)
    try:
        torch.set_num_threads(3 - min(num_threads, 2))
        assert_same(pack(weight.clone(), form), once)
    finally:
        torch.set_num_threads(num_threads)


# ---- integer scales ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", INTEGER, ids=str)
def test_the_largest_weights_of_a_row_fill_its_integers(form: Format) -> None:
    packed = pack(torch.randn(9, 330) * torch.logspace(-20, 20, 9).unsqueeze(1), form)
    assert packed.scale.dtype == torch.uint8 and packed.row_scale is not None
    assert (packed.scale.amax(1) >= 222).all()  # 255 * 7 / 8, where 8 is the better divisor
    assert (packed.minimum is None) or (packed.minimum.amax(1) > 60).all()


def errors(weight: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """Of each group, as the choice of scales counts them."""
    assert packed.group_size is not None
    squares = (dequantize(packed, torch.float64) - weight).square() * weight.double().abs()
    return squares.view(len(weight), -1, packed.group_size).sum(-1)


def test_each_group_has_the_best_scale_of_those_tried() -> None:
    """But for what two scales make of it that are as good as each other."""
    form, weight = replace(INT4, group_size=32), torch.randn(40, 320)
    chosen = pack(weight, form)
    singles = [
        pack(weight, form, partial(pack_rows, divisors=(packing.DIVISORS[0], divisor)))
        for divisor in packing.DIVISORS
    ]
    least = torch.stack([errors(weight, single) for single in singles]).amin(0)
    assert torch.allclose(errors(weight, chosen), least, rtol=1e-4)
    first = pack(weight, form, partial(pack_rows, divisors=packing.DIVISORS[:1]))
    assert float(errors(weight, chosen).sum()) < 0.98 * float(errors(weight, first).sum())


@pytest.mark.parametrize("form", INTEGER, ids=str)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_integer_scales_hold_weights_of_any_size(form: Format, size: float) -> None:
    """Where float16 has none, and where squares of weights are infinite or 0."""
    weight = size * torch.tensor([[1.0, -0.5, 0.25, 0.0] * 16, [0.0] * 64, [1.0] * 64])
    back = dequantize(pack(weight, form), torch.float32)
    assert back.isfinite().all() and not back[1].any()
    if size >= 1e-38:
        assert torch.allclose(back / size, weight / size, atol=0.09)
        assert torch.allclose(back[2] / size, weight[2] / size, rtol=2e-3)


def test_a_group_that_is_small_beside_its_row_is_rounded_to_what_its_row_can_hold() -> None:
    weight = torch.full((1, 64), 1e-6)
    weight[0, :32] = torch.linspace(-7, 7, 32)
    packed = pack(weight, Format(4, 32, scale_bits=8))
    assert packed.scale[0, 0] > 222 and packed.scale[0, 1] == 0
    assert not dequantize(packed, torch.float32)[0, 32:].any()


def test_integer_minima_end_at_zero() -> None:
    weight = torch.rand(4, 64) + 5
    packed = pack(weight, Format(4, 32, True, 8))
    assert packed.minimum is not None and not packed.minimum.any()
    assert (codes_of(packed) > 10).all()


def test_code_sums_are_the_sums_of_the_codes() -> None:
    packed = pack(torch.randn(9, 65), INT8)
    assert packed.code_sum is not None and packed.code_sum.dtype == torch.int32
    assert torch.equal(packed.code_sum, codes_of(packed).sum(1))


def test_a_row_that_is_one_number_and_tiny_numbers() -> None:
    x = torch.tensor([[1e-45, 0.0], [1e-38, -1e-38], [3.0, 3.0]])
    codes, scale = int8_rows(x)
    back = codes.float() * scale.unsqueeze(1)
    assert (back - x).abs().max() <= 1e-38 and int(codes.abs().max()) <= 127


@pytest.mark.parametrize(
    ("weight", "form", "message"),
    [
        (torch.randn(2, 5), INT4, "5 columns cannot be packed to 4 bits"),
        *(
            (torch.tensor([[1.0, bad]]), form, "NaN or infinity")
            for bad in (torch.nan, torch.inf, -torch.inf)
            for form in (INT8, INT4, MINIMUM)
        ),
        (torch.tensor([[1e6, -1e6]]), Format(4, 16), 'half-precision scales .* use .*"int4"'),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused(
    weight: torch.Tensor, form: Format, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        pack(weight, form)
