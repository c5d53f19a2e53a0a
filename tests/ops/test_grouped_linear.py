"""Rows times one of many packed weights each: by the kernel, on the CPU, and by the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from case import BOUNDS, DTYPES, relative_error
from cases import CUT, WHOLE
from grouped_cases import NOWHERE, Group, grouped_cases, make_group
from guarded import guarded
from host_launcher import HostLauncher, NotingLauncher, served_by
from host_memory import HostKernelError

from bminf.cuda.source import Kernel, source_of
from bminf.errors import ArgumentError
from bminf.ops.grouped_linear import MAX_PRODUCTS, grouped_linear
from bminf.ops.linear import linear
from bminf.quantization.packed import INT4, INT8, Format, PackedWeight

ORDERS = ("forward", "reverse", 1)
HALF = torch.float16


@pytest.fixture
def served() -> Iterator[HostLauncher]:
    launcher = HostLauncher()
    with served_by(launcher):
        yield launcher


def computed(group: Group) -> torch.Tensor:
    return grouped_linear(group.x, group.weights, group.slots, group.biases, group.rows)


def one_by_one(group: Group) -> torch.Tensor:
    """Each product by itself, by the kernel for few rows."""
    slots = group.slots.tolist()
    rows = range(len(slots)) if group.rows is None else group.rows.tolist()
    nothing = group.x.new_zeros(1, next(iter(group.weights.values())).out_features)
    return torch.cat(
        [
            linear(group.x[m : m + 1], group.weights[n], group.biases and group.biases[n], "float")
            if n in group.weights
            else nothing
            for n, m in zip(slots, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("form", WHOLE + CUT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_has_the_bits_of_its_product_alone(
    form: Format, dtype: torch.dtype, served: HostLauncher
) -> None:
    for shape in ((5, 9, 70), (1, 1, 2), (4, 6, 200)):
        group = make_group(form, dtype, shape)
        served.names.clear()
        y = computed(group)
        assert served.names == ["linear_grouped"]
        assert torch.equal(y, one_by_one(group)), shape


def test_without_a_launcher_the_reference_serves() -> None:
    for form in (INT8, INT4, Format(4, 34, True, 8)):
        for dtype in DTYPES:
            group = make_group(form, dtype, (5, 9, 70))
            assert relative_error(computed(group), group.expected) < BOUNDS[dtype] + 2**-12


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("form", [*WHOLE[:4], *CUT], ids=str)
def test_nothing_beyond_a_weight_is_read(form: Format, at_end: bool, served: HostLauncher) -> None:
    """What the table points to lies between forbidden pages, each tensor by itself."""
    for columns in (70, 256, 258):
        group = make_group(form, HALF, (3, 7, columns))
        expected = computed(group)
        names = [n for n, t in group.weights[0]._asdict().items() if isinstance(t, torch.Tensor)]
        tensors = [getattr(w, n) for w in group.weights.values() for n in names]
        assert group.biases is not None
        with guarded([*tensors, *group.biases.values()], at_end) as copies:
            held = iter(copies)
            weights = {
                k: w._replace(**{n: next(held) for n in names}) for k, w in group.weights.items()
            }
            biases = {k: next(held) for k in group.biases}
            y = grouped_linear(group.x, weights, group.slots, biases, group.rows)
        assert torch.equal(y, expected)


def test_rows_of_no_weight_are_zeros_and_nothing_gives_nothing(served: HostLauncher) -> None:
    group = make_group(INT4, HALF, (5, 9, 70))
    nobody = torch.full_like(group.slots, NOWHERE)
    assert not grouped_linear(group.x, group.weights, nobody, group.biases, group.rows).any()
    assert grouped_linear(group.x[:0], group.weights, nobody[:0]).shape == (0, 9)
    assert served.names == ["linear_grouped"]


@pytest.mark.parametrize("is_served", [True, False])
def test_what_is_written_to_keeps_the_rows_of_no_weight(is_served: bool) -> None:
    """Experts that are at hand now, and later the others: as all at once."""
    group = make_group(INT4, HALF, (5, 9, 70))
    out = torch.full((9, 9), 7.0, dtype=HALF)
    with served_by(HostLauncher()) if is_served else nullcontext():
        together = computed(group)
        for numbers in ((3,), (4, 0), (1,)):
            weights = {n: group.weights[n] for n in numbers}
            y = grouped_linear(group.x, weights, group.slots, group.biases, group.rows, out)
            assert y is out
    is_there = torch.tensor([slot in group.weights for slot in group.slots.tolist()])
    assert torch.equal(out[is_there], together[is_there]) and (out[~is_there] == 7).all()
    for bad in (out[:8], out.float(), out.t()):
        with pytest.raises(ArgumentError, match="out is"):
            grouped_linear(group.x, group.weights, group.slots, None, group.rows, bad)


# ---- what is refused -----------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused() -> None:
    group = make_group(INT8, HALF, (5, 9, 70))
    other, weights = make_group(INT4, HALF, (5, 9, 70)), group.weights
    assert group.biases is not None and group.rows is not None
    given, bad = (group.x, weights, group.slots, group.biases, group.rows), NotingLauncher()
    wrong: list[tuple[str, int, object]] = [
        ("numbers \\[\\]; give some", 1, {}),
        ("numbers \\[-1\\]; give some", 1, {-1: weights[0]}),
        ("must be alike", 1, {**weights, 1: other.weights[0]}),
        ("slots are torch.int32", 2, group.slots.int()),
        ("rows are torch.int64 of shape", 4, group.rows[None]),
        ("one slot a row", 2, group.slots[:-1]),
        ("takes 70 columns", 0, group.x[:, :64]),
        ("bias of 0 must be a contiguous", 3, {n: b.float() for n, b in group.biases.items()}),
        ("bias of 0 must be a contiguous", 3, {}),
    ]
    with served_by(bad):
        grouped_linear(*given)
        for message, place, value in wrong:
            arguments = (*given[:place], value, *given[place + 1 :])
            with pytest.raises(ArgumentError, match=message):
                grouped_linear(*arguments)  # type: ignore[arg-type]
        slots = torch.zeros(MAX_PRODUCTS + 1, dtype=torch.int64)
        with pytest.raises(ArgumentError, match="65536 slots; at most 65535 at once"):
            grouped_linear(group.x, weights, slots, None, slots)
    assert bad.names == ["linear_grouped"]


def test_codes_that_no_kernel_can_read_are_refused() -> None:
    group = make_group(INT8, HALF, (5, 9, 70))
    codes = group.weights[0].qweight
    moved = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes)
    weights: dict[int, PackedWeight] = {0: group.weights[0]._replace(qweight=moved)}
    with (
        served_by(NotingLauncher()),
        pytest.raises(ArgumentError, match="qweight of 0 begins at"),
    ):
        grouped_linear(group.x, weights, group.slots, None, group.rows)


# ---- bugs that are put into the kernel -----------------------------------------------------------

BUGS = {
    "all have the first weight": ("table + 5 * slot;", "table;"),
    "a weight less": ("slot >= num_slots", "slot + 1 >= num_slots"),
    "a number that is beyond": ("slot < 0 || slot >= num_slots", "slot < 0"),
    "a number that is below": ("slot < 0 || slot >= num_slots", "slot >= num_slots"),
    "an empty place": ("    if (own[0] == 0) return;\n", ""),
    "rows are forgotten": ("rows ? rows[pair] : pair", "pair"),
    "all rows of the result are one": ("size_t(pair) * N", "0"),
    "the scale is that of others": ("global<u8>(own[1])", "global<u8>(table[1])"),
    "the minimum is the scale": ("global<u8>(own[2])", "global<u8>(own[1])"),
    "the scale of a row is the first's": ("global<float>(own[3])", "global<float>(table[3])"),
    "no bias": ("global<Element>(own[4])", "nullptr"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_the_kernel_is_seen(bug: str) -> None:
    def planted(kernel: Kernel) -> str:
        text, (old, new) = source_of(kernel), BUGS[bug]
        assert text.count(old) == 1
        return text.replace(old, new)

    seen = []
    with served_by(HostLauncher(source_of=planted)):
        for case in grouped_cases():
            torch.manual_seed(0)
            try:
                case.run("cpu")
            except (AssertionError, HostKernelError):
                seen.append(case)
    assert seen
