"""What is made of stored tensors: values, and shapes that are checked before a byte is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import Given, check
from tiny_zoo import save

from bminf.checkpoint.stored import (
    Averaged,
    Columns,
    Replicated,
    Rows,
    Scaled,
    Stored,
    Transposed,
    merge_fused,
    pieces,
)
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import ArgumentError, CheckpointError


class Unread(Given):
    def read(self) -> torch.Tensor:
        raise AssertionError("read before it was asked for")


def given(*shape: int, dtype: torch.dtype = torch.float32) -> Given:
    return Given(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_rows_and_columns_are_joined(dtype: torch.dtype) -> None:
    a, b, c = given(2, 3, dtype=dtype), given(1, 3, dtype=dtype), given(2, 4, dtype=dtype)
    check(Rows((a, b)), torch.cat([a.tensor, b.tensor]))
    check(Columns((a, c)), torch.cat([a.tensor, c.tensor], 1))
    both = Rows((Columns((a, c)), Transposed(Given(torch.ones(7, 1, dtype=dtype)))))
    check(both, torch.cat([torch.cat([a.tensor, c.tensor], 1), torch.ones(1, 7, dtype=dtype)]))
    vector = given(4, dtype=dtype)
    check(Rows((vector, vector)), torch.cat([vector.tensor, vector.tensor]))


@pytest.mark.parametrize("num_stripes", [1, 2, 3])
@pytest.mark.parametrize("columns", [(), (5,), (0,)])
def test_stripes_are_the_inverse_of_cutting(num_stripes: int, columns: tuple[int, ...]) -> None:
    num_ranks, rows = 4, 2
    whole = torch.randn(num_stripes * num_ranks * rows, *columns)
    matrices = whole.chunk(num_stripes) if whole.numel() else [whole] * num_stripes
    parts = tuple(
        Given(torch.cat([matrix[rank * rows : (rank + 1) * rows] for matrix in matrices]))
        for rank in range(num_ranks)
    )
    check(merge_fused(parts, num_stripes), whole)


def test_a_transposed_matrix_is_a_view() -> None:
    part = given(2, 5)
    check(Transposed(part), part.tensor.t())
    assert Transposed(part).read().data_ptr() == part.tensor.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scaling_does_not_round_to_half_precision(dtype: torch.dtype, result: torch.dtype) -> None:
    part = given(3, 4, dtype=dtype)
    check(Scaled(part, 1 / 3), part.tensor.to(result) * (1 / 3))


def test_replicated_tensors_are_compared() -> None:
    a = torch.tensor([1.0, float("nan")])
    check(Replicated((Given(a[:1]), Given(a[:1].clone()))), a[:1])
    assert Replicated((Given(a), Given(a.clone()))).read() is a
    other = Given(torch.tensor([1.0, 2.0]), "'w' in another file")
    with pytest.raises(CheckpointError, match=r"'w' in a file and 'w' in another file .* differ"):
        Replicated((Given(a), other)).read()


def test_large_replicated_tensors_are_not_compared() -> None:
    large = torch.zeros(2**22 + 1)
    assert Replicated((Given(large), Unread(large))).read() is large


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_mean_is_not_rounded_to_half_precision(dtype: torch.dtype, result: torch.dtype) -> None:
    parts = [given(3, 2, dtype=dtype) for _ in range(3)]
    whole = sum(part.tensor.to(result) for part in parts) / 3
    check(Averaged(tuple(parts)), torch.as_tensor(whole))


def test_the_deviation_from_a_mean_is_the_largest_of_any_part() -> None:
    parts = [torch.zeros(4), torch.tensor([0.0, 3, 0, 0]), torch.tensor([0.0, 0, 0, -1.5])]
    assert Averaged(tuple(map(Given, parts))).deviation() == 2.0
    assert Averaged((Given(parts[1]), Given(parts[1].clone()))).deviation() == 0
    assert Averaged((Given(torch.ones(0, 3)),) * 2).deviation() == 0


OTHER: dict[str, Any] = {"where": "'v' in another file"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: Rows((a, Unread(torch.ones(2, 4), **OTHER))), "'w' in a file .*'v' in another"),
        (lambda a: Rows((a, Unread(torch.ones(2, 3).half(), **OTHER))), "float16"),
        (lambda a: Rows((a, Unread(torch.ones(3), **OTHER))), "'v' in another file"),
        (lambda a: Rows((Unread(torch.tensor(1.0)),)), "1 dimensions or more"),
        (lambda a: Columns((a, Unread(torch.ones(3, 3), **OTHER))), "'v' in another file"),
        (lambda a: Columns((Unread(torch.ones(3)),)), "2 dimensions or more"),
        (lambda a: merge_fused((a, a), 3), r"shape \(2, 3\); its rows should be 3 equal pieces"),
        (lambda a: Replicated((a, Unread(torch.ones(4, 3), **OTHER))), "'v' in another file"),
        (lambda a: Averaged((a, Unread(torch.ones(4, 3), **OTHER))), "'v' in another file"),
        (lambda a: Averaged((a, Unread(torch.ones(2, 3).half(), **OTHER))), "float16"),
        (lambda a: Averaged((Unread(torch.ones(3).int()),) * 2), "floating point"),
        (lambda a: Transposed(Unread(torch.ones(3))), "should be a matrix"),
        (lambda a: Scaled(Unread(torch.ones(3).int()), 2.0), "floating point"),
    ],
)
def test_shapes_that_do_not_fit_are_named_before_anything_is_read(make: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make(Unread(torch.ones(2, 3)))


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        Rows(())
    with pytest.raises(ArgumentError, match="at least one"):
        merge_fused((), 2)


def in_files(path: Path) -> dict[str, Stored]:
    """Tensors of a file: in C order, transposed, with gaps, and not aligned (in the old form)."""
    whole = torch.randn(8, 10)
    saved = {"whole": whole, "transposed": whole.t(), "gaps": torch.randn(7, 6)[1::2, ::2]}
    found: dict[str, Stored] = {}
    for form, text in (("zip", ""), ("old", "x"), ("old", "xx")):
        file = save({"text": text, "module": saved}, path / f"{form}{text}.pt", form)
        read: Any = read_torch_file(file)
        weights = weights_of(read["module"], file)
        found |= {f"{name} {form}{text}": tensor for name, tensor in weights.items()}
    return found


MADE: dict[str, Callable[[], Stored]] = {
    "rows": lambda: Rows((given(2, 4), given(1, 4), given(3, 4))),
    "columns": lambda: Columns((given(4, 2), given(4, 1), given(4, 3))),
    "columns of rows": lambda: Columns((Rows((given(2, 3), given(3, 3))), given(5, 2))),
    "rows of columns": lambda: Rows((Columns((given(2, 3), given(2, 1))), given(3, 4))),
    "striped": lambda: merge_fused((given(4, 3), given(6, 3), given(2, 3)), 2),
    "striped columns": lambda: Columns((merge_fused((given(6, 2), given(6, 2)), 3), given(12, 1))),
    "replicated": lambda: Replicated((given(5, 4),) * 2),
    "averaged": lambda: Averaged((given(5, 4), given(5, 4), given(5, 4))),
    "transposed": lambda: Transposed(Rows((given(2, 4), given(3, 4)))),
    "scaled": lambda: Scaled(Columns((given(4, 2), given(4, 3))), 1 / 3),
    "vectors": lambda: Rows((given(3), given(4))),
    "three axes": lambda: Rows((given(2, 3, 4), given(1, 3, 4))),
}


def check_slices(stored: Stored) -> None:
    """Every range of rows and of columns, and some of both."""
    whole = stored.read().clone()
    num_rows, num_columns = (*whole.shape, 1)[:2]
    for begin in range(num_rows):
        for end in range(begin + 1, num_rows + 1):
            check(stored.rows(begin, end), whole[begin:end])
    if whole.dim() == 1:
        return
    for begin in range(num_columns):
        for end in range(begin + 1, num_columns + 1):
            check(stored.columns(begin, end), whole[:, begin:end])
            both = stored.rows(1, num_rows).columns(begin, end)
            check(both, whole[1:, begin:end])
            check(stored.columns(begin, end).rows(1, num_rows), whole[1:, begin:end])
            check(both.columns(0, 1), whole[1:, begin : begin + 1])


@pytest.mark.parametrize("kind", MADE)
def test_slices_of_what_is_made_of_tensors_are_slices_of_what_is_read(kind: str) -> None:
    check_slices(MADE[kind]())


def test_slices_of_tensors_in_files_are_slices_of_what_is_read(tmp_path: Path) -> None:
    found = in_files(tmp_path)
    assert len(found) == 9
    for stored in found.values():
        check_slices(stored)


@pytest.mark.parametrize("kind", MADE)
def test_nothing_is_read_where_a_slice_is_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "read", Unread.read)
    assert MADE[kind]().rows(1, 2).shape[0] == 1


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("ends", [(0, 0), (-1, 1), (2, 1), (0, 10**9), (10**9, 10**9 + 1)])
def test_a_range_outside_is_an_error(kind: str, ends: tuple[int, int]) -> None:
    stored = MADE[kind]()
    with pytest.raises(ArgumentError, match=rf"rows {ends[0]} to {ends[1]} of 'w' in a file"):
        stored.rows(*ends)
    if len(stored.shape) > 1:
        with pytest.raises(ArgumentError, match=rf"columns {ends[0]} to {ends[1]} of 'w'"):
            stored.columns(*ends)
    else:
        with pytest.raises(ArgumentError, match=r"shape \(7,\), and so no columns"):
            stored.columns(*ends)


def test_a_number_has_no_rows(tmp_path: Path) -> None:
    path = save({"w": torch.tensor(1.5)}, tmp_path / "a.pt", "zip")
    stored = weights_of(read_torch_file(path), path)["w"]
    with pytest.raises(ArgumentError, match=r"shape \(\), and so no rows"):
        stored.rows(0, 1)
    assert [(first, float(piece)) for first, piece in pieces(stored)] == [(0, 1.5)]


def test_a_slice_reads_only_the_parts_it_overlaps() -> None:
    part = torch.randn(3, 2)
    joined = Rows((Unread(part), Given(part), Unread(part)))
    check(joined.rows(3, 6), part)
    check(joined.rows(4, 5).columns(1, 2), part[1:2, 1:2])
    check(Columns((Unread(part), Given(part))).columns(2, 3), part[:, :1])
    check(merge_fused((Unread(part[:2]), Given(part[:2])), 2).rows(1, 2), part[:1])


def test_slices_of_replicated_tensors_are_compared_as_the_whole_is() -> None:
    a, b = torch.zeros(4), torch.tensor([0.0, 0, 1, 0])
    both = Replicated((Given(a), Given(b, "'w' in another file")))
    check(both.rows(0, 2), a[:2])
    with pytest.raises(CheckpointError, match=r"'w' in another file .* differ"):
        both.rows(1, 3).read()
    large = torch.zeros(2**22 + 1)
    check(Replicated((Given(large), Unread(large))).rows(5, 7), large[5:7])


@pytest.mark.parametrize("most_bytes", [1, 12, 13, 30, 10**6])
def test_pieces_together_are_the_tensor(most_bytes: int) -> None:
    stored = Rows((given(2, 3), given(5, 3)))
    whole, at = stored.read(), 0
    for first, piece in pieces(stored, most_bytes):
        assert first == at and (piece.nbytes <= most_bytes or len(piece) == 1)
        assert torch.equal(piece, whole[at : at + len(piece)])
        at += len(piece)
    assert at == 7
    assert not [*pieces(Given(torch.empty(0, 3)))]
