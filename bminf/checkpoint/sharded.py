"""Hugging Face checkpoints in several files, with an index that says which tensor is in which.

Source: the index files that transformers writes, {"metadata": ..., "weight_map": {name: file}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.names import listed
from bminf.checkpoint.safetensors_file import read_safetensors
from bminf.checkpoint.stored import InFile
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError


def read_weights(path: Path) -> dict[str, InFile]:
    """Name -> tensor of one file, of safetensors or of torch.save, told by its suffix."""
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
        # A path out of the folder would let a downloaded index name any file of this machine.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
            raise CheckpointError(f"{index} names the file {name!r}; it should be one beside it")
    shards = {name: _read_shard(index, name) for name in dict.fromkeys(weight_map.values())}
    _check_same_names(index, weight_map, shards)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_shard(index: Path, name: str) -> dict[str, InFile]:
    path = index.with_name(name)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, which {index.name} names; fetch it too")
    return read_weights(path)


def _check_same_names(
    index: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, InFile]]
) -> None:
    for shard, tensors in shards.items():
        named = {name for name, place in weight_map.items() if place == shard}
        if missing := sorted(named - tensors.keys()):
            raise CheckpointError(f"{index.with_name(shard)} lacks {listed(missing)}")
        if extra := sorted(tensors.keys() - named):
            raise CheckpointError(
                f"{index.with_name(shard)} holds {listed(extra)}, "
                f"which {index.name} does not place there; fetch both again"
            )
