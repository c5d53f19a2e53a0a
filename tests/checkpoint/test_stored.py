"""What is made of stored tensors: values, and shapes that are checked before a byte is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bminf.checkpoint.stored import (
    Columns,
    QuantizedRows,
    Replicated,
    Rows,
    Scaled,
    Stored,
    Striped,
    Transposed,
    quantized_rows,
)
from bminf.errors import ArgumentError, CheckpointError


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor in memory, in the place of one in a file."""

    tensor: torch.Tensor
    where: str = "'w' in a file"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor


class Unread(Given):
    def read(self) -> torch.Tensor:
        raise AssertionError("read before it was asked for")


def check(stored: Stored, expected: torch.Tensor) -> None:
    read = stored.read()
    assert stored.shape == tuple(expected.shape) == tuple(read.shape)
    assert stored.dtype == expected.dtype == read.dtype
    assert torch.equal(read, expected)


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
    check(Striped(parts, num_stripes), whole)


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


def quantized(num_rows: int) -> QuantizedRows:
    codes = torch.randint(-127, 128, (num_rows, 4), dtype=torch.int8)
    return QuantizedRows(Given(codes), Given(torch.rand(num_rows).half()))


def test_quantized_rows_are_codes_times_scale_and_stay_both_when_joined() -> None:
    a, b = quantized(2), quantized(3)
    expected = [q.codes.read().float() * q.scale.read().float()[:, None] for q in (a, b)]
    check(a, expected[0])
    check(Rows((a, b)), torch.cat(expected))
    joined = quantized_rows([a, b])
    check(joined, torch.cat(expected))
    check(joined.codes, torch.cat([a.codes.read(), b.codes.read()]))
    check(joined.scale, torch.cat([a.scale.read(), b.scale.read()]))


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
        (lambda a: Striped((a, a), 3), r"shape \(2, 3\); its rows should be 3 equal pieces"),
        (lambda a: Replicated((a, Unread(torch.ones(4, 3), **OTHER))), "'v' in another file"),
        (lambda a: Transposed(Unread(torch.ones(3))), "should be a matrix"),
        (lambda a: Scaled(Unread(torch.ones(3).int()), 2.0), "floating point"),
        (lambda a: QuantizedRows(a, a), "should be int8"),
        (
            lambda a: QuantizedRows(
                Unread(torch.ones(2, 3).to(torch.int8)), Unread(torch.ones(3), **OTHER)
            ),
            "'w' in a file.*'v' in another file",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named_before_anything_is_read(make: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make(Unread(torch.ones(2, 3)))


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        Rows(())
