"""The packed formats against their definition, written out plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.errors import ArgumentError
from bminf.quantization import packed as packed_module
from bminf.quantization.packed import (
    INT4,
    INT8,
    Format,
    PackedWeight,
    codes_of,
    dequantize,
    empty,
    int8_rows,
    pack,
    parse_format,
    row_bytes,
    store_codes,
)

MINIMUM = Format(4, 32, has_minimum=True)
FORMATS = [
    INT8,
    INT4,
    *(Format(4, size, low) for size in (None, 6, 32, 34, 64, 128) for low in (False, True)),
    *(Format(8, size) for size in (6, 32, 34, 128)),
]


def formats() -> st.SearchStrategy[Format]:
    return st.sampled_from(FORMATS)


def plain_values(packed: PackedWeight) -> torch.Tensor:
    """Every weight from its bytes, one by one, in float64."""
    n, k = packed.out_features, packed.in_features
    scale = packed.scale.double().reshape(n, -1)
    low = None if packed.minimum is None else packed.minimum.double().reshape(n, -1)
    values = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for column in range(k):
            group = column // (packed.group_size or k)
            if packed.bits == 8:
                code = int(packed.qweight[row, column])
            else:
                byte = int(packed.qweight[row, column // 2])
                code = byte >> 4 if column % 2 == 0 else byte & 15
                if low is None and code > 7:
                    code -= 16
            values[row, column] = code * scale[row, group] + (0 if low is None else low[row, group])
    return values


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 34), (5, 70), (2, 130), (4, 256)])
def test_dequantize_is_code_times_scale_plus_minimum(form: Format, n: int, k: int) -> None:
    packed = pack(torch.randn(n, k), form)
    packed.check()
    assert (
        packed.qweight.shape == (n, row_bytes(k, form.bits)) and row_bytes(k, form.bits) % 16 == 0
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(packed, dtype), plain_values(packed).float().to(dtype))


@settings(max_examples=60, deadline=None)
@given(form=formats(), n=st.integers(1, 5), pairs=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_rounding_costs_half_a_step_at_most(form: Format, n: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, 2 * pairs, generator=generator)
    packed = pack(weight, form)
    width = form.group_size or 2 * pairs
    step = packed.scale.float().abs().reshape(n, -1).repeat_interleave(width, 1)[:, : 2 * pairs]
    # The largest weights of a group may lie beyond the last code: by half a step in symmetric
    # 4 bits (+8 is not a code), and by what scale and minimum lost in half precision.
    slack = 1.01 if form.bits == 4 and not form.has_minimum else 0.5 + 0.02 * (form.bits == 4)
    assert ((dequantize(packed, torch.float32) - weight).abs() <= slack * step + 1e-6).all()


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
    scale = scale_of_columns(packed.scale, packed)
    wanted = weight.double()
    if packed.minimum is not None:
        wanted -= scale_of_columns(packed.minimum, packed)
    choices = torch.arange(least, most + 1).double() * scale.unsqueeze(-1)
    nearest = (choices - wanted.unsqueeze(-1)).abs().amin(-1)
    error = (codes_of(packed).double() * scale - wanted).abs()
    assert (error <= nearest + 1e-4 * scale.abs()).all()


@pytest.mark.parametrize("form", [f for f in FORMATS if f.group_size], ids=str)
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


@pytest.mark.parametrize("form", [INT4, Format(4), Format(4, 34)], ids=str)
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


@settings(max_examples=40, deadline=None)
@given(form=formats(), n=st.integers(1, 4), pairs=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_codes_survive_being_stored(form: Format, n: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    least, most = (-127, 128) if form.bits == 8 else (0, 16) if form.has_minimum else (-8, 8)
    codes = torch.randint(least, most, (n, 2 * pairs), generator=generator, dtype=torch.int8)
    packed = empty(n, 2 * pairs, form, "cpu")
    store_codes(codes, packed)
    assert torch.equal(codes_of(packed), codes)


def test_groups_of_32_with_a_minimum_hold_q4_1_blocks_exactly() -> None:
    scale = (torch.rand(8, 4, 1) * 0.01 + 1e-4).half().float()
    minimum = (torch.randn(8, 4, 1) * 0.1).half().float()
    codes = torch.randint(0, 16, (8, 4, 32)).float()
    codes[..., 3], codes[..., 17] = 0, 15
    weight = (codes * scale + minimum).flatten(1)
    assert torch.equal(dequantize(pack(weight, Format(4, 32, True)), torch.float32), weight)


def test_the_packing_of_glm_130b_is_read_as_it_is() -> None:
    # Two's complement, the even column in the high half; a half-precision scale a row.
    qweight = torch.tensor([[0x1F, 0x80] + [0] * 14], dtype=torch.uint8)
    packed = PackedWeight(qweight, torch.tensor([0.5]).half(), None, in_features=4)
    packed.check()
    assert dequantize(packed, torch.float32).tolist() == [[0.5, -0.5, -4.0, 0.0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_shards_keep_their_scales_as_column_groups(bits: int) -> None:
    shards = [pack(torch.randn(6, 48) * 10**i, Format(bits)) for i in range(3)]
    merged = empty(6, 144, Format(bits, group_size=48), "cpu")
    merged.scale.copy_(torch.stack([shard.scale for shard in shards], dim=1))
    store_codes(torch.cat([codes_of(shard) for shard in shards], dim=1), merged)
    expected = torch.cat([dequantize(shard, torch.float32) for shard in shards], dim=1)
    assert torch.equal(dequantize(merged, torch.float32), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_and_constants_are_kept(form: Format) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, :32] = 0.5, -2.0
    back = dequantize(pack(weight, form), torch.float32)
    assert back.isfinite().all()
    assert torch.equal(back[[0, 3]], weight[[0, 3]])
    assert torch.allclose(back, weight, rtol=1e-3, atol=1e-3)


def test_rows_are_packed_in_slices_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what packing needs beside a weight does not grow with the weight."""
    weight, sizes = torch.randn(37, 64), []
    whole, pack_rows = pack(weight, MINIMUM), packed_module._pack_rows

    def counted(rows: torch.Tensor, form: Format, into: PackedWeight) -> None:
        sizes.append(len(rows))
        pack_rows(rows, form, into)

    monkeypatch.setattr(packed_module, "_SLICE_ELEMENTS", 5 * 64)
    monkeypatch.setattr(packed_module, "_pack_rows", counted)
    in_slices = pack(weight, MINIMUM)
    assert sizes == [5] * 7 + [2]
    assert all(torch.equal(a, b) for a, b in zip(in_slices[:3], whole[:3], strict=True))
    assert torch.equal(dequantize(whole, torch.float16), dequantize(in_slices, torch.float16))


def test_code_sums_are_the_sums_of_the_codes() -> None:
    packed = pack(torch.randn(9, 65), INT8)
    assert packed.code_sum is not None and packed.code_sum.dtype == torch.int32
    assert torch.equal(packed.code_sum, codes_of(packed).sum(1))


def test_bits_per_weight_count_everything_that_is_stored() -> None:
    for form in FORMATS:
        packed = pack(torch.randn(3, 70), form)
        tensors = [t for t in packed if isinstance(t, torch.Tensor)]
        assert form.bits_per_weight(70) * 70 * 3 == pytest.approx(
            8 * sum(t.nbytes for t in tensors)
        )
    assert INT4.bits_per_weight(4096) == 5.0


def test_a_row_that_is_one_number_and_tiny_numbers() -> None:
    x = torch.tensor([[1e-45, 0.0], [1e-38, -1e-38], [3.0, 3.0]])
    codes, scale = int8_rows(x)
    back = codes.float() * scale.unsqueeze(1)
    assert (back - x).abs().max() <= 1e-38 and int(codes.abs().max()) <= 127


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(3), "bits=3; accepted: 8, 4"),
        (lambda: Format(4, 33), "group_size=33; accepted: an even number"),
        (lambda: Format(4, True), "group_size=True"),
        (lambda: Format(8, 32, True), "has_minimum=True goes with bits=4"),
        (lambda: pack(torch.randn(2, 5), INT4), "5 columns cannot be packed to 4 bits"),
        (lambda: pack(torch.tensor([[1.0, float("nan")]]), INT8), "NaN or infinity"),
        (lambda: pack(torch.tensor([[1.0, float("inf")]]), INT4), "NaN or infinity"),
        (lambda: pack(torch.tensor([[1e6, -1e6]]), INT4), "too large for half-precision"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p._replace(qweight=p.qweight.float()), "qweight is torch.float32"),
        (lambda p: p._replace(qweight=p.qweight[:, :16]), "rows of 16 bytes; 70 columns of 4 bits"),
        (lambda p: p._replace(qweight=p.qweight.t().contiguous().t()), "qweight is not contiguous"),
        (lambda p: p._replace(scale=p.scale[:2]), r"scale is torch.float16 of shape \(2, 3\)"),
        (lambda p: p._replace(scale=p.scale.float()), "scale is torch.float32"),
        (lambda p: p._replace(minimum=p.minimum[:, :1]), "minimum is torch.float16 of shape"),
        (lambda p: p._replace(scale=p.scale.to("meta")), "scale is on meta, qweight on cpu"),
        (lambda p: p._replace(scale=p.scale.t().contiguous().t()), "scale is not contiguous"),
        (lambda p: p._replace(group_size=31), "group_size=31"),
        (lambda p: p._replace(in_features=71), "pairs of columns"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change: object, message: str) -> None:
    packed = pack(torch.randn(3, 70), MINIMUM)
    packed.check()
    with pytest.raises(ArgumentError, match=message):
        change(packed).check()  # type: ignore[operator]


def test_a_format_is_asked_for_by_name_by_itself_or_not_at_all() -> None:
    own = {"int4": INT4, "int4-row": Format(4)}
    assert parse_format("int4") == INT4 and parse_format("int4-row", formats=own) == Format(4)
    assert parse_format(Format(8, 32)) == Format(8, 32) and parse_format(True, default=INT8) == INT8
    assert parse_format(None) is None and parse_format(False) is None
    for asked, options, said in (
        ("int4-row", {}, 'q=\'int4-row\'; accepted: "int8", "int4", a bminf.Format, or None'),
        (True, {}, 'q=True; accepted: "int8", "int4", a bminf.Format, or None'),
        (8, {"default": INT8}, 'accepted: True or "int8", "int4", a bminf.Format, or None'),
        (None, {"is_optional": False}, 'q=None; accepted: "int8", "int4", or a bminf.Format'),
    ):
        with pytest.raises(ArgumentError) as caught:
            parse_format(asked, "q", **options)
        assert said in str(caught.value)
