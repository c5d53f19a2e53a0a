"""How a tensor is cut for the ranks of model parallelism, and tables that say so by its name.

Each architecture brings the table of its authors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bminf.checkpoint.names import listed
from bminf.checkpoint.stored import Columns, InFile, Replicated, Rows, Stored, merge_fused, slice_of
from bminf.errors import ArgumentError, CheckpointError


@dataclass(frozen=True)
class Split:
    """How a tensor was cut for the ranks: along which axis, and how many matrices it holds.

    axis: None where each rank has the whole.   num_fused: matrices one below another, such as
    Q, K and V, of each of which a rank has its slice.
    is_own: each rank has a vector of its own, of scales of its columns: the whole is a matrix with
    a column a rank.
    """

    axis: int | None
    num_fused: int = 1
    is_own: bool = False

    def merge(self, parts: tuple[InFile, ...]) -> Stored:
        """The whole tensor, from the ranks' parts in order.   Raises CheckpointError."""
        if len(parts) == 1:
            return parts[0]
        if self.axis is None:
            return Replicated(parts)
        if self.is_own:
            return Columns(tuple(_as_column(part) for part in parts))
        if self.axis == 1:
            return Columns(parts)
        return Rows(parts) if self.num_fused == 1 else merge_fused(parts, self.num_fused)

    def part(self, whole: Stored, rank: int, num_ranks: int) -> Stored:
        """What one of the ranks has of the whole tensor; merge() is the inverse.

        Raises ArgumentError where the tensor cannot be cut into as many equal parts,
        CheckpointError where it has no such axis.
        """
        if self.axis is None:
            return whole
        if self.is_own:
            raise ArgumentError(f"{whole.where} belongs to the ranks it was made for; it stays so")
        if len(whole.shape) <= self.axis:
            raise CheckpointError(
                f"{whole.where} has shape {whole.shape}; it should have {self.axis + 1} dimensions"
            )
        size, left = divmod(whole.shape[self.axis], self.num_fused * num_ranks)
        if left:
            raise ArgumentError(
                f"{whole.where} has shape {whole.shape}, whose axis {self.axis} {num_ranks} ranks "
                "cannot share equally; choose another degree"
            )
        starts = [(matrix * num_ranks + rank) * size for matrix in range(self.num_fused)]
        pieces = tuple(slice_of(whole, self.axis, start, start + size) for start in starts)
        return pieces[0] if len(pieces) == 1 else Rows(pieces)


def _as_column(vector: InFile) -> InFile:
    """(N,) as (N, 1)."""
    if len(vector.shape) != 1:
        raise CheckpointError(f"{vector.where} has shape {vector.shape}; it should be a vector")
    return replace(vector, shape=(*vector.shape, 1), stride=(*vector.stride, 1))


REPLICATED, ROWS, COLUMNS, OWN = Split(None), Split(0), Split(1), Split(1, is_own=True)


def fused_rows(num_fused: int) -> Split:
    """Rows of several matrices, one below another."""
    return Split(0, num_fused)


MEGATRON_LAYER = {
    r".*layernorm\.(weight|bias)": REPLICATED,
    r".*\.attention\.query_key_value\.(weight|bias)": fused_rows(3),
    r".*\.attention\.dense\.weight": COLUMNS,
    r".*\.attention\.dense\.bias": REPLICATED,
    r".*\.mlp\.dense_h_to_4h\.(weight|bias)": ROWS,
    r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
    r".*\.mlp\.dense_4h_to_h\.bias": REPLICATED,
}
"""A layer of Megatron-LM, which several models were trained with."""

MEGATRON_WIDTHS = {"attention.dense.weight": "attention.query_key_value.weight"}
"""Of the same; see SplitTable.widths."""


@dataclass(frozen=True)
class SplitTable:
    """How the original code of one model cuts its tensors.

    title: of its authors' models, for messages; tables of one title are read as one.
    splits: pattern of names -> split.   is_for: whether tensors of these names are of this model.
    widths: end of a name -> end of another in the same place: the first one's columns are shared
    by the ranks, and together are as many as those of the second, which each rank has whole.
    """

    title: str
    splits: Mapping[str, Split]
    is_for: Callable[[Collection[str]], bool]
    widths: Mapping[str, str] = field(default_factory=dict)

    def split(self, name: str) -> Split:
        """How the tensor of a name is cut.   Raises CheckpointError for one that is not there."""
        for pattern, split in self.splits.items():
            if re.fullmatch(pattern, name):
                return split
        raise CheckpointError(
            f"no model of {self.title} has a tensor {name!r}, so how it was cut for the ranks is "
            "not known; see whether this is a checkpoint of another model"
        )


def table_for(names: Collection[str], tables: Sequence[SplitTable]) -> SplitTable:
    """The table for tensors of these names: of several that are for them, the last.

    Raises CheckpointError where there is none.
    """
    titles = [table.title for table in tables if table.is_for(names)]
    if not titles:
        raise CheckpointError(
            f"no model that is known has the tensors {listed(names)}, so how they were cut for the "
            "ranks is not known; see whether this is a checkpoint of another model"
        )
    alike = [table for table in tables if table.title == titles[-1]]
    splits = {pattern: split for table in alike for pattern, split in table.splits.items()}
    widths = {end: other for table in alike for end, other in table.widths.items()}
    return SplitTable(titles[-1], splits, alike[-1].is_for, widths)
