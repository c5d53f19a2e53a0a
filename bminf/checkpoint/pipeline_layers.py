"""Folders of Megatron-DeepSpeed's pipelines: a file for each layer and each rank.

    <folder>/latest, which holds the name global_stepN
    <folder>/global_stepN/layer_XX-model_YY-model_states.pt

XX is the place in the pipeline, YY the rank. A file is a dict of tensors, which are called here
"3.input_layernorm.weight", with their place before the name in the file. The places behind the
first and before the last belong to functions without weights, which have no files. What else lies
there, the arguments in mp_rank_* and the state of the optimizer, is not needed.

Source: DeepSpeed, runtime/pipe/module.py, save_state_dict and ckpt_layer_path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bminf.checkpoint.model_parallel import (
    DEEPSPEED_TRACKER,
    SplitTable,
    check_agreement,
    check_complete,
    table_for,
    tracker_text,
)
from bminf.checkpoint.stored import Averaged, InFile, Stored
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError

logger = logging.getLogger("bminf")

_FILE = re.compile(r"layer_([0-9]+)-model_([0-9]+)-model_states\.pt")
_STEP = re.compile(b"global_step[0-9]+")


def is_layer_file(path: Path) -> bool:
    """Whether a file is one of a layer, by its name."""
    return _FILE.fullmatch(path.name) is not None


def has_layers(folder: Path) -> bool:
    """Whether files of layers lie in the folder, or in that of the step that "latest" names."""
    return any(map(is_layer_file, _step_folder(folder).iterdir()))


def read_layers(folder: Path, tables: Sequence[SplitTable]) -> dict[str, Stored]:
    """Name -> whole tensor, merged from all ranks as it is read.

    folder: the one with "latest", or that of one step.   tables: as for read_model_parallel.
    Where ranks differ in what is to be averaged, that is logged once, with the tensor that differs
    most. Raises CheckpointError where files of layers or ranks are missing, do not agree, or hold
    no weights, and where it is not known how the tensors were split.
    """
    parts: dict[str, tuple[InFile, ...]] = {}
    num_ranks = 1
    for layer, paths in _layer_files(_step_folder(folder)).items():
        ranks = [weights_of(read_torch_file(path), path) for path in paths]
        check_agreement(paths, ranks)
        parts |= {f"{layer}.{key}": tuple(rank[key] for rank in ranks) for key in ranks[0]}
        num_ranks = len(paths)
    if not parts:
        raise CheckpointError(f"{folder} has files of layers, but no weights in them")
    table = table_for(parts, tables)
    merged = {name: table.split(name).merge(of_ranks) for name, of_ranks in parts.items()}
    check_complete(merged, num_ranks, table)
    _report_deviation(merged, folder)
    return merged


def _step_folder(folder: Path) -> Path:
    """The folder of the step that "latest" names, where that is beside it; else the given one."""
    latest = folder / DEEPSPEED_TRACKER
    if not latest.is_file():
        return folder
    text = tracker_text(latest)
    step = folder / text.decode() if _STEP.fullmatch(text) else folder
    return step if step.is_dir() else folder


def _layer_files(folder: Path) -> dict[int, list[Path]]:
    """Place in the pipeline -> the file of each rank, both in order.   Raises CheckpointError."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            of_layer = found.setdefault(int(match[1]), {})
            other = of_layer.setdefault(int(match[2]), path)
            if other is not path:
                raise CheckpointError(
                    f"{other} and {path.name} are of the same layer and rank; keep one of them"
                )
    _check_layers(folder, found)
    _check_ranks(folder, found)
    return {layer: [path for _, path in sorted(found[layer].items())] for layer in sorted(found)}


def _check_layers(folder: Path, found: Mapping[int, Mapping[int, Path]]) -> None:
    """Raise CheckpointError where the first is missing, or one between two others."""
    first, last = min(found), max(found)
    if first > 1:  # before the embedding there is at most a cast, which has no file
        raise _missing(folder, 1, 0)
    for layer in range(first + 2, last - 1):
        if layer not in found:
            raise _missing(folder, layer, 0)


def _check_ranks(folder: Path, found: Mapping[int, Mapping[int, Path]]) -> None:
    """Raise CheckpointError where one is missing, or layers have several numbers of them."""
    for layer, of_layer in found.items():
        for rank in range(max(of_layer)):
            if rank not in of_layer:
                raise _missing(folder, layer, rank)
    first = min(found)
    for layer, of_layer in found.items():
        if len(of_layer) != len(found[first]):
            raise CheckpointError(
                f"{folder} has layer {first:02d} of {len(found[first])} ranks, but layer "
                f"{layer:02d} of {len(of_layer)}; fetch the files that are missing, or take out "
                "those of another checkpoint"
            )


def _missing(folder: Path, layer: int, rank: int) -> CheckpointError:
    name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
    return CheckpointError(f"{folder} lacks {name}; fetch it, too")


def _report_deviation(merged: Mapping[str, Stored], folder: Path) -> None:
    found = {name: x.deviation() for name, x in merged.items() if isinstance(x, Averaged)}
    name = max(found, key=found.__getitem__, default=None)
    if name is not None and found[name] > 0:
        logger.warning(
            "%s: tensors that each rank holds whole differ between ranks, by up to %.3g from their "
            "mean (%r), as they drift apart in training; the mean is taken",
            folder, found[name], name,
        )  # fmt: skip
