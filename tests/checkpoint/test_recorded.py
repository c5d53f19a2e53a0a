"""Tensors whose operations are recorded: the results read as those of the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bminf.checkpoint.recorded import Computed, InMemory, Recorded
from bminf.checkpoint.safetensors_file import read_safetensors, write_safetensors
from bminf.checkpoint.stored import InFile, Stored, pieces
from bminf.errors import UnsupportedModelError
from bminf.layout import Layout, specs_of


@dataclass(frozen=True)
class Counted(InMemory):
    """reads: how many rows were read each time."""

    reads: list[int] = field(default_factory=list)

    def read(self) -> torch.Tensor:
        self.reads.append(self.shape[0])
        return super().read()


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator) for _ in range(4)]


OPERATIONS: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "nothing": lambda given: given[0],
    "all of it": lambda given: given[0][...],
    "its own type": lambda given: given[0].to(device="cpu", dtype=torch.float32),
    "a cast": lambda given: given[0].to(torch.bfloat16),
    "a cast and back": lambda given: given[0].to(torch.float16).to(torch.float32),
    "stacked and joined": lambda given: torch.cat(
        [torch.stack(given[:2], dim=0), torch.stack(given[2:], dim=0)], dim=1
    ),
    "a chunk": lambda given: torch.chunk(given[0], 3, dim=0)[1].contiguous(),
    "the last of a split": lambda given: torch.split(given[0], [1, 2, 3])[2],
    "transposed": lambda given: torch.transpose(given[0], 0, 1).contiguous(),
    "transposed, not copied": lambda given: given[0].t(),
    "interleaved": lambda given: (
        given[0].reshape(3, 2, 4).transpose(0, 1).reshape(6, 4).contiguous()
    ),
    "a view of a cast": lambda given: given[0].half().view(2, 3, 4).transpose(1, 2),
    "with another": lambda given: given[0] + torch.ones(4),
    "one of a chunk": lambda given: torch.chunk(given[0], 6)[4].squeeze(0),
    "a parameter": lambda given: torch.nn.Parameter(given[0], requires_grad=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_recorded_reads_as_what_is_computed(name: str) -> None:
    operation, given = OPERATIONS[name], matrices()
    stored = [Counted(matrix) for matrix in given]
    recorded, expected = operation([Recorded(one) for one in stored]), operation(given)
    assert type(recorded) is Recorded and not any(one.reads for one in stored)
    assert (recorded.shape, recorded.dtype) == (expected.shape, expected.dtype)
    assert recorded.stride() == expected.stride()
    assert recorded.requires_grad == expected.requires_grad
    assert torch.equal(recorded.stored.read(), expected)
    assert any(one.reads for one in stored)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_of_what_is_recorded_are_rows_of_what_is_computed(name: str) -> None:
    operation, given = OPERATIONS[name], matrices()
    stored = operation([Recorded(InMemory(one)) for one in given]).stored
    expected = operation(given)
    assert torch.equal(stored.rows(1, 2).read(), expected[1:2])
    if expected.dim() > 1:
        assert torch.equal(stored.columns(1, 3).read(), expected[:, 1:3])
    parts = [part for _, part in pieces(stored, max_bytes=1)]
    assert [len(part) for part in parts] == [1] * len(expected)
    assert torch.equal(torch.cat(parts), expected)


def test_a_cast_is_read_by_rows() -> None:
    stored = Counted(matrices()[0])
    cast = Recorded(stored).to(torch.float16).to(torch.float64).stored
    assert cast.is_read_by_rows
    assert cast.rows(2, 3).read().shape == (1, 4)
    assert stored.reads == [1]


def test_experts_are_stacked_some_at_a_time() -> None:
    stored = [Counted(matrix) for matrix in matrices()]
    halves = [[Recorded(one) for one in stored[i : i + 2]] for i in (0, 2)]
    experts = torch.cat([torch.stack(half) for half in halves], dim=-1).half().stored
    assert experts.is_read_by_rows
    _, first, _, second = matrices()
    expected = torch.cat([first, second], dim=1).half().unsqueeze(0)
    assert torch.equal(experts.rows(1, 2).read(), expected)
    assert [len(one.reads) for one in stored] == [0, 1, 0, 1]


def test_what_is_joined_is_computed_once_for_all_its_rows() -> None:
    stored = [Counted(matrix) for matrix in matrices()]
    joined = torch.cat([Recorded(one) for one in stored]).to(torch.float16).stored
    assert [(i, part.shape) for i, part in pieces(joined, 1)] == [(i, (1, 4)) for i in range(24)]
    assert [one.reads for one in stored] == [[6]] * 4


def test_what_gives_no_tensor_is_computed_at_once() -> None:
    first, second = (Recorded(InMemory(matrix)) for matrix in matrices()[:2])
    assert torch.equal(first, first) and not torch.equal(first, second)
    assert first.sum().item() == matrices()[0].sum().item()


def test_tied_weights_are_compared_some_rows_at_a_time() -> None:
    """Those that a file holds twice; casts of them, too."""
    matrix = torch.randn(400_000, 2)
    other = matrix.clone()
    other[399_999, 1] += 1
    stored = [Counted(one) for one in (matrix, matrix.clone(), other)]
    first, second, third = (Recorded(one).to(torch.float64) for one in stored)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert all(len(one.reads) > 1 and max(one.reads) <= 2**16 for one in stored)
    assert not torch.equal(first, Recorded(Counted(matrix[:5])).to(torch.float64))


def test_writing_is_refused() -> None:
    recorded = Recorded(InMemory(matrices()[0]))
    with pytest.raises(UnsupportedModelError, match=r"writes to a weight that is not read yet"):
        recorded.zero_()
    assert torch.equal(recorded.stored.read(), matrices()[0])


def test_what_is_only_renamed_stays_what_it_was_in_the_file(tmp_path: Path) -> None:
    matrix = matrices()[0]
    layout = Layout.of(specs_of({"a": matrix}), keep_addresses=False)
    write_safetensors(tmp_path / "one.safetensors", {"": layout}, lambda _: [("a", matrix)], {})
    stored: Stored = read_safetensors(tmp_path / "one.safetensors")["a"]
    kept = torch.nn.Parameter(Recorded(stored)[...].to(torch.float32)).stored
    assert type(kept) is InFile and kept is stored
    cast = Recorded(stored).half().stored
    assert type(cast) is Computed and cast.where == stored.where
