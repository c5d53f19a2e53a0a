"""The packed formats against their definition, written out plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.errors import ArgumentError
from bminf.quantization.packed import (
    INT4,
    INT8,
    Format,
    PackedWeight,
    codes_of,
    dequantize,
    empty,
    group_minima,
    group_scales,
    parse_format,
    row_bytes,
)
from bminf.quantization.packing import pack, store_codes

MINIMUM = Format(4, 32, has_minimum=True)
FORMATS = [
    INT8,
    INT4,
    *(Format(4, size, low) for size in (None, 6, 32, 34, 64, 128) for low in (False, True)),
    *(Format(8, size) for size in (6, 32, 34, 128)),
    *(Format(4, size, low, 8) for size in (6, 32, 34, 128) for low in (False, True)),
]


def formats() -> st.SearchStrategy[Format]:
    return st.sampled_from(FORMATS)


def plain_values(packed: PackedWeight) -> torch.Tensor:
    """Every weight from its bytes, one by one, in float64."""
    n, k = packed.out_features, packed.in_features
    scale = packed.scale.double().reshape(n, -1)
    low = None if packed.minimum is None else packed.minimum.double().reshape(n, -1)
    of_row = torch.ones(n) if packed.row_scale is None else packed.row_scale
    if low is not None and packed.row_scale is not None:
        low *= -16
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
    return values * of_row.double().unsqueeze(1)


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


@settings(max_examples=40, deadline=None)
@given(form=formats(), n=st.integers(1, 4), pairs=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_codes_survive_being_stored(form: Format, n: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    least, most = (-127, 128) if form.bits == 8 else (0, 16) if form.has_minimum else (-8, 8)
    codes = torch.randint(least, most, (n, 2 * pairs), generator=generator, dtype=torch.int8)
    packed = empty(n, 2 * pairs, form, "cpu")
    store_codes(codes, packed)
    assert torch.equal(codes_of(packed), codes)


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


@settings(deadline=None)
@given(formats(), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))
def test_columns_are_the_same_codes_and_scales(
    form: Format, n: int, first: int, number: int
) -> None:
    step = form.group_size or 2
    packed = pack(torch.randn(n, 6 * step), form)
    part = packed.columns(first * step, (first + number) * step)
    part.check()
    assert part.form == form
    whole = dequantize(packed, torch.float32)[:, first * step : (first + number) * step]
    assert torch.equal(dequantize(part, torch.float32), whole)
    if part.code_sum is not None:
        assert torch.equal(part.code_sum, codes_of(part).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("form", [INT4, Format(8, 6), Format(4)])
def test_columns_that_share_a_scale_or_a_byte_are_not_parted(form: Format) -> None:
    packed = pack(torch.randn(2, 48), form)
    with pytest.raises(ArgumentError, match="columns 0 to 9 are cut inside"):
        packed.columns(0, 9)


def test_bits_per_weight_count_everything_that_is_stored() -> None:
    for form in FORMATS:
        packed = pack(torch.randn(3, 70), form)
        tensors = [t for t in packed if isinstance(t, torch.Tensor)]
        assert form.bits_per_weight(70) * 70 * 3 == pytest.approx(
            8 * sum(t.nbytes for t in tensors)
        )
    assert Format(4, 16).bits_per_weight(4096) == 5.0
    assert INT4.bits_per_weight(4096) == 4.5 + 32 / 4096  # a float32 a row
    assert Format(4, 32, scale_bits=8).bits_per_weight(4096) == 4.25 + 32 / 4096


def test_group_scales_and_minima_are_what_codes_are_multiplied_with_and_added_to() -> None:
    for form in FORMATS:
        packed = pack(torch.randn(5, 140), form)
        width = form.group_size or 140
        scale = group_scales(packed).repeat_interleave(width, 1)[:, :140]
        values = codes_of(packed) * scale
        if (minima := group_minima(packed)) is not None:
            values += minima.repeat_interleave(width, 1)[:, :140]
        assert torch.allclose(values, dequantize(packed, torch.float32), rtol=1e-6, atol=1e-6)


def test_a_format_is_shown_as_one_would_write_it() -> None:
    shown = {"Format(bits=8)": INT8, "Format(bits=4, group_size=16, scale_bits=8)": INT4}
    assert [str(form) for form in shown.values()] == list(shown)
    assert all(eval(repr(form)) == form for form in FORMATS)


def test_a_file_says_of_a_format_only_what_older_versions_know_where_that_is_all() -> None:
    for form in FORMATS:
        assert Format(**form.to_json()) == form
        assert ("scale_bits" in form.to_json()) is (form.scale_bits == 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(3), "bits=3; accepted: 8, 4"),
        (lambda: Format(4, 33), "group_size=33; accepted: an even number"),
        (lambda: Format(4, True), "group_size=True"),
        (lambda: Format(8, 32, True), "has_minimum=True goes with bits=4"),
        (lambda: Format(4, 32, scale_bits=4), "scale_bits=4; accepted: 16, 8"),
        (lambda: Format(8, 32, scale_bits=8), "scale_bits=8 goes with bits=4 and a group_size"),
        (lambda: Format(4, scale_bits=8), "scale_bits=8 goes with bits=4 and a group_size"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p._replace(scale=p.scale.half()), "scale is torch.float16"),
        (lambda p: p._replace(minimum=p.minimum.half()), "minimum is torch.float16"),
        (lambda p: p._replace(row_scale=None), "scale is torch.uint8"),
        (lambda p: p._replace(row_scale=p.row_scale[:2]), r"row_scale is .* of shape \(2,\)"),
        (lambda p: p._replace(row_scale=p.row_scale.half()), "row_scale is torch.float16"),
        (lambda p: p._replace(group_size=None), "scale_bits=8 goes with"),
    ],
)
def test_integer_scales_without_what_they_count_in_are_refused(
    change: object, message: str
) -> None:
    packed = pack(torch.randn(3, 70), Format(4, 32, True, 8))
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
