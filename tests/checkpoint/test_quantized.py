"""Matrices of codes and scales: their values, their slices, and packed exactly as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saved_files import Given, check

from bminf.checkpoint.quantized import ColumnsOf, Packed, Quantized, quantized_rows
from bminf.checkpoint.recorded import InMemory
from bminf.checkpoint.stored import Columns, Rows
from bminf.errors import ArgumentError, CheckpointError
from bminf.quantization.packed import INT4, PACKED_FIELDS, Format, codes_of, dequantize
from bminf.quantization.packing import pack

DTYPES = [torch.float32, torch.float16]


def numbers(bits: int, *shape: int) -> torch.Tensor:
    most = 2 ** (bits - 1) - 1
    return torch.randint(-most - 1, most + 1, shape, dtype=torch.int8)


def stored_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As files hold them: two of 4 bits a byte, the even column in the high half."""
    if bits == 8:
        return codes
    pairs = [
        [(int(a) & 15) << 4 | (int(b) & 15) for a, b in zip(r[::2], r[1::2], strict=True)]
        for r in codes
    ]
    return torch.tensor(pairs, dtype=torch.uint8).view(torch.int8)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(shape) + 0.01).to(dtype)


def make(
    bits: int, num_groups: int | None, dtype: torch.dtype, num_rows: int = 5, width: int = 6
) -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    """With its codes as numbers and the scale of each of them; None is a vector of scales."""
    codes = numbers(bits, num_rows, width * (num_groups or 1))
    shape = (num_rows,) if num_groups is None else (num_rows, num_groups)
    scale = scales(*shape)
    wide = scale.view(num_rows, -1).repeat_interleave(width, 1)
    return Quantized(Given(stored_codes(codes, bits)), Given(scale), bits, dtype), codes, wide


GROUPS = [None, 1, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_values_are_codes_times_scale_rounded_once(
    bits: int, num_groups: int | None, dtype: torch.dtype
) -> None:
    stored, codes, scale = make(bits, num_groups, dtype)
    check(stored, (codes.double() * scale.double()).to(dtype))
    assert stored.form == Format(bits, None if num_groups in (None, 1) else 6)


@pytest.mark.parametrize("num_groups", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_packed_without_another_rounding(bits: int, num_groups: int | None) -> None:
    stored, codes, scale = make(bits, num_groups, torch.float32)
    packed = stored.packed()
    packed.check()
    assert packed.form == stored.form and packed.in_features == stored.shape[1]
    assert torch.equal(codes_of(packed), codes)
    assert torch.equal(dequantize(packed, torch.float64), (codes.float() * scale).double())
    assert not packed.qweight[:, stored.codes.shape[1] :].any()
    if packed.form == Format(8):
        assert packed.code_sum is not None
        assert packed.code_sum.tolist() == codes.sum(1).tolist()
    else:
        assert packed.code_sum is None


def test_many_rows_are_the_same_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _, _ = make(4, 3, torch.float16)
    values, packed = stored.read(), stored.packed()
    monkeypatch.setattr("bminf.checkpoint.quantized._SLICE_ELEMENTS", 40)  # two rows
    assert torch.equal(stored.read(), values)
    assert torch.equal(stored.packed().qweight, packed.qweight)


@pytest.mark.parametrize("num_groups", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_slices_are_slices_of_the_values(bits: int, num_groups: int | None) -> None:
    stored, codes, _ = make(bits, num_groups, torch.float16)
    whole = stored.read()
    for begin in range(5):
        for end in range(begin + 1, 6):
            check(stored.rows(begin, end), whole[begin:end])
            assert torch.equal(codes_of(stored.rows(begin, end).packed()), codes[begin:end])
    step = 6 if num_groups == 3 else 8 // bits
    for begin in range(0, whole.shape[1], step):
        for end in range(begin + step, whole.shape[1] + 1, step):
            part: Any = stored.columns(begin, end)
            check(part, whole[:, begin:end])
            check(part.rows(1, 3), whole[1:3, begin:end])
            assert torch.equal(dequantize(part.packed(), torch.float16), whole[:, begin:end])


@pytest.mark.parametrize(
    ("bits", "num_groups", "ends"),
    [(8, 3, (0, 8)), (8, 3, (2, 7)), (4, 3, (4, 10)), (4, None, (0, 3)), (4, 1, (1, 4))],
)
def test_columns_that_share_a_byte_or_a_scale_stay_together(
    bits: int, num_groups: int | None, ends: tuple[int, int]
) -> None:
    stored, _, _ = make(bits, num_groups, torch.float32)
    with pytest.raises(ArgumentError, match=rf"columns {ends[0]} to {ends[1]} .* go together"):
        stored.columns(*ends)


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_of_one_group_have_its_scale(bits: int) -> None:
    """A rank may have a part of what one rank had on disk."""
    stored, codes, scale = make(bits, 3, torch.float32)
    part: Any = stored.columns(8, 12)
    assert part.form == Format(bits)
    values = (codes.float() * scale.float())[:, 8:12]
    check(part, values)
    assert torch.equal(dequantize(part.packed(), torch.float32), values)


def test_columns_of_whole_rows_are_packed_with_their_maxima() -> None:
    weight = torch.randn(6, 32)
    cut: Any = ColumnsOf(InMemory(weight, "a matrix"), 16, 32).rows(1, 5)
    assert (cut.shape, cut.dtype, cut.where) == ((4, 16), torch.float32, "a matrix")
    assert torch.equal(cut.read(), weight[1:5, 16:])
    assert torch.equal(cut.columns(2, 6).read(), weight[1:5, 18:22])


@pytest.mark.parametrize("form", [Format(8), Format(4), INT4, Format(4, 8, has_minimum=True)])
def test_what_is_packed_tensor_by_tensor_is_cut_as_one(form: Format) -> None:
    weight = torch.randn(6, 32)
    packed = pack(weight, form)
    held = {name: getattr(packed, name) for name in PACKED_FIELDS}
    fields = {n: InMemory(t, n) for n, t in held.items() if t is not None}
    stored: Any = Packed(fields, 32, form)
    assert (stored.shape, stored.where) == ((6, 32), "qweight")
    assert torch.equal(stored.read(), dequantize(packed, torch.float32))
    rows = dequantize(stored.rows(2, 4).packed(), torch.float32)
    assert torch.equal(rows, dequantize(packed, torch.float32)[2:4])
    cut: Any = stored.columns(16, 32)
    assert (cut.start, cut.end) == (16, 32)


@pytest.mark.parametrize("ends", [(0, 0), (-6, 6), (6, 24)])
def test_a_range_outside_is_an_error(ends: tuple[int, int]) -> None:
    stored, _, _ = make(8, 3, torch.float32)
    for take in (stored.rows, stored.columns):
        with pytest.raises(ArgumentError, match=f"{ends[0]} to {ends[1]}"):
            take(*ends)


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_below_another_still_offer_their_codes(bits: int) -> None:
    a, b = (make(bits, None, torch.float32, num_rows=n)[0] for n in (2, 3))
    joined = quantized_rows([a, b])
    check(joined, torch.cat([a.read(), b.read()]))
    check(Rows((a, b)), joined.read())
    assert torch.equal(dequantize(joined.packed(), torch.float32), joined.read())
    check(joined.rows(1, 4), joined.read()[1:4])


def test_the_scales_of_ranks_side_by_side_are_those_of_their_columns() -> None:
    ranks = [make(4, 1, torch.float16)[0] for _ in range(3)]
    joined = Quantized(
        Columns(tuple(r.codes for r in ranks)),
        Columns(tuple(r.scale for r in ranks)),
        4,
        torch.float16,
    )
    check(joined, torch.cat([rank.read() for rank in ranks], 1))
    check(joined.columns(6, 12), ranks[1].read())
    assert joined.form == Format(4, 6)


def int8(*shape: int) -> Given:
    return Given(torch.zeros(shape, dtype=torch.int8))


@pytest.mark.parametrize(
    ("codes", "scale", "bits", "message"),
    [
        (Given(torch.ones(2, 3)), Given(torch.ones(2)), 8, "int8"),
        (int8(2, 3), Given(torch.ones(3), "'s' in another"), 8, "'w' in a file.*'s' in another"),
        (int8(2, 3), Given(torch.ones(2).int()), 8, "floating point"),
        (int8(2), Given(torch.ones(2)), 8, "int8"),
        (int8(2, 3), Given(torch.ones(2, 1, 1)), 8, "groups"),
        (int8(2, 3), Given(torch.ones(2)), 4, "float16"),
        (int8(2, 3), Given(torch.ones(2, 2)), 8, "2 groups of .* do not divide"),
    ],
)
def test_what_does_not_go_together_is_named(
    codes: Given, scale: Given, bits: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Quantized(codes, scale, bits)


def test_scales_that_are_no_numbers_are_not_packed() -> None:
    stored = Quantized(int8(2, 4), Given(torch.tensor([1.0, float("nan")]), "'s' in a file"))
    with pytest.raises(CheckpointError, match="'s' in a file holds NaN"):
        stored.packed()


def test_groups_of_an_odd_width_are_read_but_not_packed() -> None:
    stored, codes, scale = make(8, 3, torch.float32, width=5)
    check(stored, codes.float() * scale)
    with pytest.raises(ArgumentError, match="group_size=5"):
        stored.packed()
