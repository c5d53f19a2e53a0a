"""The folders of the original code: a file a rank, each with its slice of every matrix.

    <folder>/latest_checkpointed_iteration.txt, <folder>/<iteration>/mp_rank_NN_model_states.pt
    <folder>/latest,                            <folder>/<iteration>/mp_rank_NN_model_states.pt
    <folder>/iter_XXXXXXX/mp_rank_NN/model_optim_rng.pt      where DeepSpeed was not used

The iteration is a number, or the word "release".
Megatron-LM made this layout; what its users split and merge such files with says how. How a tensor
is split stands in a table by its name, which each architecture brings from its authors.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.names import listed, unwrapped
from bminf.checkpoint.stored import (
    Averaged,
    Columns,
    InFile,
    Replicated,
    Rows,
    Stored,
    check_alike,
    merge_fused,
    slice_of,
)
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import ArgumentError, CheckpointError

TRACKER, DEEPSPEED_TRACKER = "latest_checkpointed_iteration.txt", "latest"
TRACKERS = (TRACKER, DEEPSPEED_TRACKER)
RELEASE = "release"
"""What stands in the place of a number in trackers of some released checkpoints."""

_MAX_TRACKER_BYTES = 64
_RANK = re.compile(r"mp_rank_(\d+)(_model_states\.pt)?")
_ITERATION = re.compile(b"[0-9]+|" + RELEASE.encode())
FILE_IN_RANK_FOLDER = "model_optim_rng.pt"


# ---- how tensors are split -----------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How a tensor was split across ranks: along which axis, and how many matrices it holds.

    axis: None where each rank has the whole.   num_fused: matrices one below another, such as
    Q, K and V, of each of which a rank has its slice.
    is_per_rank: each rank has a vector of its own, of scales of its columns: the whole is a matrix
    with a column a rank.   is_averaged: what each rank has of the whole drifted apart from the
    others' in training, and their mean is meant.
    """

    axis: int | None
    num_fused: int = 1
    is_per_rank: bool = False
    is_averaged: bool = False

    def merge(self, parts: tuple[Stored, ...]) -> Stored:
        """The whole tensor, from the ranks' parts in order.   Raises CheckpointError."""
        if len(parts) == 1:
            return parts[0]
        if self.axis is None:
            return Averaged(parts) if self.is_averaged else Replicated(parts)
        if self.is_per_rank:
            return Columns(tuple(_as_column(part) for part in parts))
        if self.axis == 1:
            return Columns(parts)
        return Rows(parts) if self.num_fused == 1 else merge_fused(parts, self.num_fused)

    def part(self, whole: Stored, rank: int, num_ranks: int) -> Stored:
        """What one of the ranks has of the whole tensor; merge() is the inverse.

        Raises ArgumentError where the tensor cannot be split into as many equal parts,
        CheckpointError where it has no such axis.
        """
        if self.axis is None:
            return whole
        if self.is_per_rank:
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


def _as_column(vector: Stored) -> InFile:
    """(N,) as (N, 1)."""
    if not isinstance(vector, InFile) or len(vector.shape) != 1:
        raise CheckpointError(f"{vector.where} has shape {vector.shape}; it should be a vector")
    return replace(vector, shape=(*vector.shape, 1), stride=(*vector.stride, 1))


REPLICATED, ROWS, COLUMNS, PER_RANK = Split(None), Split(0), Split(1), Split(1, is_per_rank=True)
AVERAGED = Split(None, is_averaged=True)


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
    """How the original code of one model splits its tensors.

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
        """How the tensor of a name is split.   Raises CheckpointError for one that is not there."""
        for pattern, split in self.splits.items():
            if re.fullmatch(pattern, name):
                return split
        raise CheckpointError(
            f"no model of {self.title} has a tensor {name!r}, so how it was split across ranks is "
            "not known; see whether this is a checkpoint of another model"
        )


def table_for(names: Collection[str], tables: Sequence[SplitTable]) -> SplitTable:
    """The table for tensors of these names: of several that are for them, the last.

    Raises CheckpointError where there is none.
    """
    titles = [table.title for table in tables if table.is_for(names)]
    if not titles:
        raise CheckpointError(
            f"no model that is known has the tensors {listed(names)}, so how they were split "
            "across ranks is not known; see whether this is a checkpoint of another model"
        )
    alike = [table for table in tables if table.title == titles[-1]]
    splits = {pattern: split for table in alike for pattern, split in table.splits.items()}
    widths = {end: other for table in alike for end, other in table.widths.items()}
    return SplitTable(titles[-1], splits, alike[-1].is_for, widths)


# ---- the folders ---------------------------------------------------------------------------------


def read_model_parallel(folder: Path, tables: Sequence[SplitTable]) -> dict[str, Stored]:
    """Name -> whole tensor, merged from all ranks as it is read.

    folder: the one with latest_checkpointed_iteration.txt or latest, or that of one iteration.
    tables: how tensors were split across ranks, in all models that it may be of.
    Raises CheckpointError where ranks are missing, do not agree, or hold no weights, and where
    there are two or more of a model whose tensors were split in an unknown way.
    """
    paths = rank_files(folder)
    ranks = [_read_rank(path, len(paths)) for path in paths]
    check_agreement(paths, ranks)
    table = table_for(ranks[0].keys(), tables)
    merged: dict[str, Stored] = dict(ranks[0])
    if len(ranks) > 1:
        splits = {name: table.split(name) for name in merged}
        merged = {name: splits[name].merge(tuple(rank[name] for rank in ranks)) for name in splits}
    check_complete(merged, len(ranks), table)
    return merged


def is_model_parallel(folder: Path) -> bool:
    """Whether the folder is one that read_model_parallel is for.

    A file "latest" alone shows it only where it names an iteration: Hugging Face's trainers leave
    one beside their weights, which names a folder of DeepSpeed's.
    """
    latest = folder / DEEPSPEED_TRACKER
    if (folder / TRACKER).is_file() or _numbered(folder):
        return True
    return latest.is_file() and _ITERATION.fullmatch(tracker_text(latest)) is not None


def rank_files(folder: Path) -> list[Path]:
    """The file of each rank, in order.   Raises CheckpointError where one is missing."""
    if trackers_in(folder) and not _numbered(folder):
        folder = _latest(folder)
    found = _numbered(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt and no mp_rank_00/"
            f"{FILE_IN_RANK_FOLDER}; give the folder of one iteration, or the one around it"
        )
    ranks = sorted(rank for rank, _ in found)
    for expected, rank in enumerate(ranks):
        if rank < expected:
            raise CheckpointError(f"{folder} holds rank {rank:02d} twice; keep one of them")
        if rank > expected:
            raise CheckpointError(
                f"{folder} lacks the file of rank {expected:02d} "
                f"(it holds {', '.join(f'{n:02d}' for n in ranks)}); fetch all ranks"
            )
    return [path for _, path in sorted(found)]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(rank, file) of all files of ranks that lie directly in the folder."""
    found = []
    for path in folder.iterdir():
        if match := _RANK.fullmatch(path.name):
            found.append((int(match[1]), path if match[2] else path / FILE_IN_RANK_FOLDER))
    return found


def trackers_in(folder: Path) -> list[Path]:
    """The files of a folder that should name an iteration."""
    return [folder / name for name in TRACKERS if (folder / name).is_file()]


def _latest(folder: Path) -> Path:
    """The folder of the iteration that the tracker files name."""
    trackers = trackers_in(folder)
    words = [_iteration(path) for path in trackers]
    if len({word.lstrip("0") for word in words}) > 1:
        raise CheckpointError(
            f"{trackers[0]} names the iteration {words[0]}, but {trackers[1].name} beside it "
            f"{words[1]}; correct one of them, or give the folder of one iteration"
        )
    names = list(dict.fromkeys(words))
    if names[0] != RELEASE:
        names.append(f"iter_{int(names[0]):07d}")
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise CheckpointError(
        f"{trackers[0]} names the iteration {words[0]}, but the folder holds no "
        f"{'/ and no '.join(names)}/; fetch it, or correct the number"
    )


def _iteration(tracker: Path) -> str:
    """The iteration that one tracker file names, as it is written there."""
    text = tracker_text(tracker)
    if not _ITERATION.fullmatch(text):
        raise CheckpointError(
            f"{tracker} holds {text!r}; it should be the number of an iteration, or {RELEASE!r} "
            "(or global_stepN, where that is a folder beside it with files "
            "layer_XX-model_YY-model_states.pt)"
        )
    return text.decode()


def tracker_text(tracker: Path) -> bytes:
    """What a tracker file holds, without what stands around it."""
    file = BinaryFile(tracker)
    text = file.at(0, min(file.nbytes, _MAX_TRACKER_BYTES), "the iteration")
    return text.removeprefix(codecs.BOM_UTF8).strip()


def _read_rank(path: Path, num_ranks: int) -> dict[str, InFile]:
    key = "model" if path.name == FILE_IN_RANK_FOLDER else "module"
    saved = read_torch_file(path)
    if not isinstance(saved, dict) or key not in saved:
        keys = listed(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"{path} has no weights under the key {key!r}; it holds {keys}")
    degree = saved.get("mp_world_size")
    if isinstance(degree, int) and degree != num_ranks:
        raise CheckpointError(
            f"{path} is one of {degree} ranks (mp_world_size), but the folder holds {num_ranks}; "
            "give a folder with all ranks of one checkpoint"
        )
    weights = weights_of(saved[key], path)
    if not weights:
        raise CheckpointError(f"{path} holds no weights under the key {key!r}: it is empty")
    return unwrapped(weights)


def check_agreement(paths: Sequence[Path], ranks: Sequence[Mapping[str, Stored]]) -> None:
    """Raise CheckpointError where names, dtypes or shapes differ: every tensor is split into equal
    parts, or not at all."""
    first = ranks[0]
    for path, rank in zip(paths[1:], ranks[1:], strict=True):
        if rank.keys() != first.keys():
            raise CheckpointError(
                f"{paths[0]} and {path} do not hold the same tensors: "
                f"{listed(sorted(rank.keys() ^ first.keys()))} in one of them only"
            )
        for name, tensor in rank.items():
            check_alike(first[name], tensor)


def check_complete(tensors: Mapping[str, Stored], num_ranks: int, table: SplitTable) -> None:
    """Raise CheckpointError where the last ranks are missing, which no number of a file tells."""
    for end, other in table.widths.items():
        for name, shared in tensors.items():
            whole = tensors.get(name.removesuffix(end) + other)
            if (
                name.endswith(end)
                and whole is not None
                and len(shared.shape) == len(whole.shape) == 2
            ):
                _check_width(shared, whole.shape[1], num_ranks)


def _check_width(shared: Stored, wanted: int, num_ranks: int) -> None:
    """shared: a matrix whose columns the ranks share, which should be `wanted` in all."""
    num_columns = shared.shape[1]
    if num_columns < wanted and wanted % max(1, num_columns // num_ranks) == 0:
        raise CheckpointError(
            f"{shared.where} has {num_columns} columns in all, and should have {wanted}; see "
            f"whether the files of all ranks are there, of which {num_ranks} were found"
        )
