"""A checkpoint of any layout: which one it is, and its tensors, not read yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.bminf1_file import read_bminf1
from bminf.checkpoint.model_parallel import (
    FILE_IN_RANK_FOLDER,
    TRACKERS,
    has_tracker,
    is_model_parallel,
    rank_files,
    read_model_parallel,
)
from bminf.checkpoint.names import listed
from bminf.checkpoint.sharded import read_sharded, read_weights
from bminf.checkpoint.splits import SplitTable
from bminf.checkpoint.stored import Stored
from bminf.checkpoint.wrappers import unwrapped
from bminf.errors import CheckpointError

Kind = Literal["bminf", "original", "bminf1", "modelcenter", "huggingface"]

# In the order of preference where a folder holds several of one kind.
_FILES: dict[str, Kind] = {
    "model.safetensors": "huggingface",
    "model.safetensors.index.json": "huggingface",
    "pytorch_model.bin": "huggingface",
    "pytorch_model.bin.index.json": "huggingface",
    "pytorch_model.pt": "modelcenter",
    "checkpoint.pt": "bminf1",
}
_CONFIG = "config.json"
_LAYOUTS = (
    "a folder of bminf convert (config.json, model.safetensors), "
    f"of the original code ({', '.join(TRACKERS)} or mp_rank_NN_model_states.pt), "
    "of BMInf 1.x (checkpoint.pt), of ModelCenter (pytorch_model.pt), "
    "of Hugging Face (model.safetensors, pytorch_model.bin, or their .index.json)"
)


@dataclass(frozen=True)
class Checkpoint:
    """kind: the layout.   path: the folder.   tensors: under the names of that layout, without
    what training code had wrapped around the model."""

    kind: Kind
    path: Path
    tensors: Mapping[str, Stored]


def open_checkpoint(path: Path, tables: Sequence[SplitTable]) -> Checkpoint:
    """The checkpoint in a folder, or that of one file in it; nothing is read but what names it.

    tables: how tensors were cut for ranks, in all models that it may be of.
    Where a folder holds both, safetensors come before pytorch_model.bin.
    Raises CheckpointError where there is none, one of an unknown layout, several of different
    layouts, or a file of it is damaged.
    """
    try:
        if path.is_dir():
            return _open_folder(path, tables)
        if path.is_file():
            return _open_file(path, tables)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(f"{path} does not exist; accepted: {_LAYOUTS}")


def _open_folder(folder: Path, tables: Sequence[SplitTable]) -> Checkpoint:
    if _is_ours(folder):
        return _open_named(folder / "model.safetensors", "bminf", tables)
    kinds: dict[Kind, Path] = {}
    for name, kind in _FILES.items():
        if (folder / name).is_file():
            kinds.setdefault(kind, folder / name)
    if is_model_parallel(folder) or (not kinds and has_tracker(folder)):
        kinds["original"] = folder
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints of several layouts ({', '.join(kinds)}); "
            f"give the path of one file: {listed(path.name for path in kinds.values())}"
        )
    for kind, path in kinds.items():
        return _open_named(path, kind, tables)
    names = sorted(path.name for path in folder.iterdir())
    holds = f"holds no checkpoint, but {listed(names)}" if names else "is empty"
    raise CheckpointError(f"{folder} {holds}; accepted: {_LAYOUTS}")


def _open_file(path: Path, tables: Sequence[SplitTable]) -> Checkpoint:
    folder = path.parent
    if path.name == _CONFIG:
        return _open_folder(folder, tables)
    if path.name == FILE_IN_RANK_FOLDER:
        return _open_named(folder.parent, "original", tables)
    if path.name in TRACKERS or (is_model_parallel(folder) and path in rank_files(folder)):
        return _open_named(folder, "original", tables)
    if path.name not in _FILES:
        raise CheckpointError(f"{path} is not the file of a checkpoint; accepted: {_LAYOUTS}")
    if path.name == "model.safetensors" and _is_ours(folder):
        return _open_named(path, "bminf", tables)
    return _open_named(path, _FILES[path.name], tables)


def _is_ours(folder: Path) -> bool:
    config = folder / _CONFIG
    return config.is_file() and read_json(config).get("format") == "bminf"


def _open_named(path: Path, kind: Kind, tables: Sequence[SplitTable]) -> Checkpoint:
    folder = path if kind == "original" else path.parent
    return Checkpoint(kind, folder, _tensors(path, kind, tables))


def _tensors(path: Path, kind: Kind, tables: Sequence[SplitTable]) -> Mapping[str, Stored]:
    if kind == "original":
        return read_model_parallel(path, tables)
    if kind == "bminf1":
        return read_bminf1(path)
    tensors = read_sharded(path) if path.name.endswith(".index.json") else read_weights(path)
    return tensors if kind == "bminf" else unwrapped(tensors)
