"""A checkpoint of any layout: which one it is, and its tensors, not read yet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bminf.checkpoint.binary_file import check_beside, file_beside, read_json
from bminf.checkpoint.bminf1_file import read_bminf1
from bminf.checkpoint.model_parallel import (
    FILE_IN_RANK_FOLDER,
    TRACKERS,
    SplitTable,
    is_model_parallel,
    rank_files,
    read_model_parallel,
    trackers_in,
)
from bminf.checkpoint.names import listed, unwrapped
from bminf.checkpoint.pipeline_layers import has_layers, is_layer_file, read_layers
from bminf.checkpoint.presharded import read_presharded
from bminf.checkpoint.safetensors_file import names_of, read_safetensors, write_safetensors
from bminf.checkpoint.stored import InFile, Stored
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import ArgumentError, CheckpointError
from bminf.layout import Chunk, Layout
from bminf.progress import progress_bar

Progress = Callable[[int], object]
"""To be called with how many more bytes are written."""

Kind = Literal[
    "bminf", "original", "layers", "presharded", "bminf1", "modelcenter", "huggingface"
]  # fmt: skip

# In the order of preference where a folder holds several of one kind.
_FILES: dict[str, Kind] = {
    "model.safetensors": "huggingface",
    "model.safetensors.index.json": "huggingface",
    "pytorch_model.bin": "huggingface",
    "pytorch_model.bin.index.json": "huggingface",
    "pytorch_model.pt": "modelcenter",
    "checkpoint.pt": "bminf1",
    "ds_inference_config.json": "presharded",
    "ds-inference_config.json": "presharded",
}
_CONFIG = "config.json"
_OURS = "model.safetensors"
_INDEX = ".index.json"
_LAYOUTS = (
    "a folder of bminf convert (config.json, model.safetensors), "
    f"of the original code ({', '.join(TRACKERS)} or mp_rank_NN_model_states.pt), "
    "of Megatron-DeepSpeed (layer_XX-model_YY-model_states.pt), "
    "of DeepSpeed's inference (ds_inference_config.json), "
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

    tables: how tensors were split across ranks, in all models that it may be of.
    Where a folder holds both, safetensors come before pytorch_model.bin.
    Raises CheckpointError where there is none, one of an unknown layout, several of different
    layouts, or a file of it is damaged.
    """
    try:
        if path.is_dir():
            return _open(*_layout_of_folder(path), tables)
        if path.is_file():
            return _open(*_layout_of_file(path), tables)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(f"{path} does not exist; accepted: {_LAYOUTS}")


def _layout_of_folder(folder: Path) -> tuple[Kind, Path]:
    """The layout in a folder, and what to open."""
    if _is_ours(folder):
        index = folder / f"{_OURS}{_INDEX}"
        return "bminf", index if index.is_file() else folder / _OURS
    kinds: dict[Kind, Path] = {}
    for name, kind in _FILES.items():
        if (folder / name).is_file():
            kinds.setdefault(kind, folder / name)
    if has_layers(folder):
        kinds["layers"] = folder
    elif is_model_parallel(folder) or (not kinds and trackers_in(folder)):
        kinds["original"] = folder
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints of several layouts ({', '.join(kinds)}); "
            f"give the path of one file: {listed(path.name for path in kinds.values())}"
        )
    if kinds:
        return kinds.popitem()
    names = sorted(path.name for path in folder.iterdir())
    holds = f"holds no checkpoint, but {listed(names)}" if names else "is empty"
    raise CheckpointError(f"{folder} {holds}; accepted: {_LAYOUTS}")


def _layout_of_file(path: Path) -> tuple[Kind, Path]:
    """The layout of a file by its name, and what to open."""
    folder = path.parent
    if path.name == _CONFIG:
        return _layout_of_folder(folder)
    if path.name in _FILES:
        is_ours = path.name in (_OURS, f"{_OURS}{_INDEX}") and _is_ours(folder)
        return "bminf" if is_ours else _FILES[path.name], path
    if path.name == FILE_IN_RANK_FOLDER:
        return "original", folder.parent
    if is_layer_file(path):
        return "layers", folder
    if path.name in TRACKERS or (is_model_parallel(folder) and path in rank_files(folder)):
        return "layers" if has_layers(folder) else "original", folder
    raise CheckpointError(f"{path} is not the file of a checkpoint; accepted: {_LAYOUTS}")


def _is_ours(folder: Path) -> bool:
    config = folder / _CONFIG
    return config.is_file() and read_json(config).get("format") == "bminf"


def _open(kind: Kind, path: Path, tables: Sequence[SplitTable]) -> Checkpoint:
    if kind == "original":
        return Checkpoint(kind, path, read_model_parallel(path, tables))
    if kind == "layers":
        return Checkpoint(kind, path, read_layers(path, tables))
    if kind == "presharded":
        return Checkpoint(kind, path.parent, read_presharded(path, tables))
    if kind == "bminf1":
        return Checkpoint(kind, path.parent, read_bminf1(path))
    tensors = read_sharded(path) if path.name.endswith(_INDEX) else read_weights(path)
    return Checkpoint(kind, path.parent, tensors if kind == "bminf" else unwrapped(tensors))


# Hugging Face's files: one, or several and an index, {"metadata": ..., "weight_map": {name: file}}.


def read_weights(path: Path) -> dict[str, InFile]:
    """Name -> tensor of one file, of safetensors or of torch.save, by its suffix."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return weights_of(read_torch_file(path), path)


def read_sharded(index: Path) -> dict[str, InFile]:
    """Name -> tensor of all files that an index names, in the order of the index.

    Raises CheckpointError for an index that is none, for a file or a tensor that is missing, and
    for a tensor that the index does not know.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" of tensor names and files')
    for name in weight_map.values():
        check_beside(index, name)
    found: dict[str, InFile] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = file_beside(index, shard)
        tensors = read_weights(path)
        named = {name for name, place in weight_map.items() if place == shard}
        if missing := sorted(named - tensors.keys()):
            raise CheckpointError(
                f"{path} lacks {listed(missing)}, which {index.name} places there; fetch both again"
            )
        if extra := sorted(tensors.keys() - named):
            raise CheckpointError(
                f"{path} holds {listed(extra)}, which {index.name} does not place there; "
                "fetch both again"
            )
        found |= tensors
    return {name: found[name] for name in weight_map}


# A folder that is written.


def write_weights(
    path: Path,
    layouts: Mapping[str, Layout],
    tensors: Callable[[str], Iterable[Chunk]],
    metadata: Mapping[str, str],
    max_bytes: int,
) -> None:
    """Write one file of safetensors or, above max_bytes, several beside it of whole blocks and the
    index of them, as Hugging Face calls them.   The rest is as for write_safetensors()."""
    shards = list(_shards(layouts, max_bytes))
    if len(shards) == 1:
        write_safetensors(path, layouts, tensors, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{path.stem}-{number:05}-of-{len(shards):05}{path.suffix}"
        write_safetensors(path.with_name(file), shard, tensors, metadata)
        weight_map |= dict.fromkeys(names_of(shard), file)
    total = sum(layout.nbytes for layout in layouts.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=1) + "\n"
    path.with_name(f"{path.name}{_INDEX}").write_text(text, encoding="utf-8")


def _shards(layouts: Mapping[str, Layout], max_bytes: int) -> Iterator[dict[str, Layout]]:
    """As many of the blocks, in order, as go into one file: one at least."""
    shard: dict[str, Layout] = {}
    for block, layout in layouts.items():
        if shard and sum(x.extent for x in shard.values()) + layout.extent > max_bytes:
            yield shard
            shard = {}
        shard[block] = layout
    yield shard


def require_empty(path: Path) -> Path:
    """`path`, if a folder can be made there.   Raises ArgumentError where there is anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError(f"{path} exists already; name a folder that does not, or is empty")
    return path


@contextmanager
def atomic_folder(target: Path, nbytes: int, title: str) -> Iterator[tuple[Path, Progress]]:
    """A folder to write to, which becomes `target` at the end, or vanishes.

    nbytes: of all that is written.   title: of the progress bar over them.
    Raises ArgumentError where the folder cannot be written.
    """
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
        with progress_bar(total=nbytes, desc=title, unit="B", unit_scale=True, delay=1) as bar:
            yield partial, bar.update
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ArgumentError(
            f"{target} cannot be written: {error}; name a folder on a disk with room for it"
        ) from error
