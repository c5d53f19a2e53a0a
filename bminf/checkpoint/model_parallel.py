"""The folders of the original code: a file a rank, each with its slice of every matrix.

    <folder>/latest_checkpointed_iteration.txt, <folder>/<iteration>/mp_rank_NN_model_states.pt
    <folder>/iter_XXXXXXX/mp_rank_NN/model_optim_rng.pt      where DeepSpeed was not used

Source: CPM-1-Generate/change_mp.py and EVA/src/change_mp.py, which cut and join such files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.names import listed
from bminf.checkpoint.stored import Columns, InFile, Replicated, Rows, Stored, Striped
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_MOST_TRACKER_BYTES = 64
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_RANK_FOLDER = re.compile(r"mp_rank_(\d+)")
FILE_IN_RANK_FOLDER = "model_optim_rng.pt"


@dataclass(frozen=True)
class Split:
    """How a tensor was cut for the ranks: along which axis, and how many matrices it holds.

    axis: None where each rank has the whole.   num_stripes: matrices one below another, such as
    Q, K and V, of each of which a rank has its slice.
    """

    axis: int | None
    num_stripes: int = 1

    def merge(self, parts: tuple[Stored, ...]) -> Stored:
        """The whole tensor, from the ranks' parts in order.   Raises CheckpointError."""
        if len(parts) == 1:
            return parts[0]
        if self.axis is None:
            return Replicated(parts)
        if self.axis == 1:
            return Columns(parts)
        return Rows(parts) if self.num_stripes == 1 else Striped(parts, self.num_stripes)


REPLICATED, ROWS, COLUMNS = Split(None), Split(0), Split(1)


def STRIPED(num_stripes: int) -> Split:
    """Rows of several matrices, one below another."""
    return Split(0, num_stripes)


_SPLITS = {
    # CPM-1
    r"word_embeddings\.weight": ROWS,
    r"position_embeddings\.weight": REPLICATED,
    r".*layernorm\.(weight|bias)": REPLICATED,
    r".*\.attention\.query_key_value\.(weight|bias)": STRIPED(3),
    r".*\.attention\.dense\.weight": COLUMNS,
    r".*\.attention\.dense\.bias": REPLICATED,
    r".*\.mlp\.dense_h_to_4h\.(weight|bias)": ROWS,
    r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
    r".*\.mlp\.dense_4h_to_h\.bias": REPLICATED,
    # CPM-2 and EVA
    r"(.*\.)?word_embeds\.weight": ROWS,
    r"lm_head\.weight": ROWS,
    r"(.*\.)?(role|prompt)_embeds\.weight": REPLICATED,
    r".*\.layer_norm\.weight": REPLICATED,
    r".*\.self_attn\.project\.weight": STRIPED(3),
    r".*\.(self|cross)_attn\.dense\.weight": COLUMNS,
    r".*\.self_attn\.relative_attention_bias\.weight": COLUMNS,
    r".*\.cross_attn\.project_q\.weight": ROWS,
    r".*\.cross_attn\.project_kv\.weight": STRIPED(2),
    r".*\.dense_relu_dense\.wi_[01]\.weight": ROWS,
    r".*\.dense_relu_dense\.wo\.weight": COLUMNS,
}


def cpm_split(name: str) -> Split:
    """How the original code of CPM-1, CPM-2 and EVA cuts the tensor `name`.

    Raises CheckpointError for a name that none of them has.
    """
    for pattern, split in _SPLITS.items():
        if re.fullmatch(pattern, name):
            return split
    raise CheckpointError(
        f"no model of the CPM family has a tensor {name!r}, so how it was cut for the ranks is not "
        "known; see whether this is a checkpoint of another model"
    )


def read_model_parallel(folder: Path, split: Callable[[str], Split]) -> dict[str, Stored]:
    """Name -> whole tensor, merged from all ranks as it is read.

    folder: the one with latest_checkpointed_iteration.txt, or that of one iteration.
    split: how a tensor was cut, by its name; asked where there are two ranks or more.
    Raises CheckpointError where ranks are missing, do not agree, or hold no weights.
    """
    paths = rank_files(folder)
    ranks = [_read_rank(path, len(paths)) for path in paths]
    _check_agreement(paths, ranks)
    if len(ranks) == 1:
        return dict(ranks[0])
    return {name: split(name).merge(tuple(rank[name] for rank in ranks)) for name in ranks[0]}


def is_model_parallel(folder: Path) -> bool:
    """Whether the folder is one that read_model_parallel is for."""
    return (folder / TRACKER).is_file() or bool(_numbered(folder))


def rank_files(folder: Path) -> list[Path]:
    """The file of each rank, in order.   Raises CheckpointError where one is missing."""
    if (folder / TRACKER).is_file() and not _numbered(folder):
        folder = _latest(folder)
    found = _numbered(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt and no mp_rank_00/"
            f"{FILE_IN_RANK_FOLDER}; give the folder of one iteration, or the one around it"
        )
    numbers = sorted(number for number, _ in found)
    for expected, number in enumerate(numbers):
        if number < expected:
            raise CheckpointError(f"{folder} holds rank {number:02d} twice; keep one of them")
        if number > expected:
            raise CheckpointError(
                f"{folder} lacks the file of rank {expected:02d} "
                f"(it holds {', '.join(f'{n:02d}' for n in numbers)}); fetch all ranks"
            )
    return [path for _, path in sorted(found)]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(rank, file) of all files of ranks that lie directly in the folder."""
    found = []
    for path in folder.iterdir():
        if match := _RANK_FILE.fullmatch(path.name):
            found.append((int(match[1]), path))
        elif match := _RANK_FOLDER.fullmatch(path.name):
            found.append((int(match[1]), path / FILE_IN_RANK_FOLDER))
    return found


def _latest(folder: Path) -> Path:
    """The folder of the iteration that the tracker file names."""
    with BinaryFile(folder / TRACKER) as file:
        text = file.at(0, min(file.nbytes, _MOST_TRACKER_BYTES), "the iteration").strip()
    if not text.isdigit():
        raise CheckpointError(
            f"{folder / TRACKER} holds {text!r}; it should be the number of an iteration"
        )
    iteration = int(text)
    for name in (text.decode(), f"iter_{iteration:07d}"):
        if (folder / name).is_dir():
            return folder / name
    raise CheckpointError(
        f"{folder / TRACKER} names the iteration {iteration}, but the folder holds neither "
        f"{text.decode()}/ nor iter_{iteration:07d}/; fetch it, or correct the number"
    )


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
    return weights


def _check_agreement(paths: list[Path], ranks: list[dict[str, InFile]]) -> None:
    """Equal names, dtypes and shapes: every tensor is cut into equal parts, or not at all."""
    first = ranks[0]
    for path, rank in zip(paths[1:], ranks[1:], strict=True):
        if rank.keys() != first.keys():
            raise CheckpointError(
                f"{paths[0]} and {path} do not hold the same tensors: "
                f"{listed(sorted(rank.keys() ^ first.keys()))} in one of them only"
            )
        for name, tensor in rank.items():
            _check_alike(first[name], tensor)


def _check_alike(first: InFile, other: InFile) -> None:
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        raise CheckpointError(
            f"{first.where} is {first.dtype} {first.shape}, but {other.where} is {other.dtype} "
            f"{other.shape}; ranks of different checkpoints, or degrees, cannot be merged"
        )
