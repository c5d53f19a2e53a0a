"""Folders that DeepSpeed's inference engine saved, split across ranks already.

    <folder>/ds_inference_config.json (some versions: ds-inference_config.json), which names them:
    <folder>/non-tp.pt       what all ranks share
    <folder>/tp_RR_MM.pt     part MM, a run of names, of what rank RR has

The weights of its linears are lists [tensor, scale]. In floating point that is the transpose,
(in_features, out_features), and a number without meaning. In 8 bits it is int8 codes (out_features,
in_features) and float32 scales (G, 3): read in order, the first G are of G equal runs of the rows,
weight = code * scale. The others were meant for twice as many ranks, and are not of these codes.

Source: DeepSpeed 0.7.3, module_inject/replace_module.py and load_checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from bminf.checkpoint.binary_file import file_beside, read_json
from bminf.checkpoint.model_parallel import (
    Split,
    SplitTable,
    check_agreement,
    check_complete,
    table_for,
)
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import InFile, Sliced, Stored, Transposed
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError

_INT8 = "int8"
_DTYPES = ("float16", "bfloat16", "float32", _INT8)
_RANK = re.compile(r"tp_([0-9]{1,6})_([0-9]{1,6})\.pt")


def read_presharded(index: Path, tables: Sequence[SplitTable]) -> dict[str, Stored]:
    """Name -> whole tensor, merged from all ranks as it is read; weights of int8 are Quantized.

    index: ds_inference_config.json. What it says of a folder (base_dir) is where it was once saved,
    and does not count.   tables: as for read_model_parallel.
    Raises CheckpointError where files or names of a rank are missing, do not agree with the index
    or with one another, or are damaged, and where it is not known how the tensors were split.
    """
    told = _checked(index)
    is_int8, named = told["dtype"] == _INT8, told["checkpoints"]
    shared = _tensors(_beside(index, named["non_tp"]), is_int8)
    rank_files = _by_rank(index, _beside(index, named["tp"]), told["tp_size"])
    ranks = [_tensors(paths, is_int8) for paths in rank_files]
    check_agreement([index.with_name(f"tp_{r:02d}_*.pt") for r in range(len(ranks))], ranks)
    table = table_for([*shared, *ranks[0]], tables)
    merged = {
        name: _merged(table.split(name), tuple(rank[name] for rank in ranks)) for name in ranks[0]
    }
    for name in shared.keys() & merged.keys():
        raise _twice(shared[name], merged[name])
    check_complete(merged, len(ranks), table)
    return {**shared, **merged}


# ---- the index -----------------------------------------------------------------------------------


def _checked(index: Path) -> dict[str, Any]:
    """What the index says, where that is the name of files of ranks.   Raises CheckpointError."""
    told = read_json(index)
    named, num_ranks = told.get("checkpoints"), told.get("tp_size")
    if (
        not (isinstance(named, dict) and named.keys() >= {"non_tp", "tp"})
        or not (isinstance(named["non_tp"], list) and isinstance(named["tp"], list))
        or not (type(num_ranks) is int and num_ranks > 0)
        or not isinstance(told.get("type"), str)
        or told.get("parallelization", "tp") != "tp"
        or told.get("dtype") not in _DTYPES
    ):
        raise CheckpointError(
            f'{index} should have a "type"; "checkpoints" with the lists "non_tp" and "tp" of '
            f'names of files; a number "tp_size"; "parallelization" "tp"; and a "dtype", one of '
            f"{', '.join(_DTYPES)}. It is of a model that was not split so, or of another DeepSpeed"
        )
    return told


def _beside(index: Path, names: list[object]) -> list[Path]:
    paths = [file_beside(index, name) for name in names]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise CheckpointError(f"{index} names {twice.name} twice")
    return paths


def _by_rank(index: Path, paths: list[Path], num_ranks: int) -> list[list[Path]]:
    """The parts of each rank, in order.   Raises CheckpointError where one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        match = _RANK.fullmatch(path.name)
        rank, part = (int(match[1]), int(match[2])) if match else (num_ranks, 0)
        if rank >= num_ranks or (rank, part) in found:
            raise CheckpointError(
                f"{index} names {path.name}; it should name tp_RR_MM.pt, part MM of each of "
                f"{num_ranks} ranks RR (tp_size), once"
            )
        found[rank, part] = path
    num_parts = 1 + max((part for _, part in found), default=0)
    for rank in range(num_ranks):
        for part in range(num_parts):
            if (rank, part) not in found:
                raise CheckpointError(
                    f"{index} does not name tp_{rank:02d}_{part:02d}.pt, and is of {num_ranks} "
                    f"ranks (tp_size) and {num_parts} parts; fetch it again"
                )
    return [[found[rank, part] for part in range(num_parts)] for rank in range(num_ranks)]


# ---- what the files hold -------------------------------------------------------------------------


def _tensors(paths: Iterable[Path], is_int8: bool) -> dict[str, Stored]:
    """Name -> tensor of all files together; none of them may hold what another does."""
    found: dict[str, Stored] = {}
    for path in paths:
        tensors = _tensors_in(path, is_int8)
        for name in tensors.keys() & found.keys():
            raise _twice(found[name], tensors[name])
        found |= tensors
    return found


def _tensors_in(path: Path, is_int8: bool) -> dict[str, Stored]:
    saved = read_torch_file(path)
    pairs = {k: v for k, v in saved.items() if _is_pair(v)} if isinstance(saved, dict) else {}
    tensors = {**saved, **{k: v[0] for k, v in pairs.items()}} if isinstance(saved, dict) else saved
    return {
        name: _weight(tensor, pairs[name][1], is_int8) if name in pairs else tensor
        for name, tensor in weights_of(tensors, path).items()
    }


def _is_pair(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list) and len(value) == 2


def _weight(tensor: InFile, scale: object, is_int8: bool) -> Stored:
    """(out_features, in_features), of a list [tensor, scale]."""
    if is_int8 != (tensor.dtype == torch.int8):
        raise CheckpointError(
            f"{tensor.where} is {tensor.dtype}, and the index says another dtype; the files are "
            "not of one checkpoint"
        )
    return _quantized(tensor, scale) if is_int8 else Transposed(tensor)


def _quantized(codes: InFile, scale: object) -> Quantized:
    if not isinstance(scale, InFile) or scale.dtype != torch.float32 or scale.shape[1:] != (3,):
        raise CheckpointError(
            f"{codes.where} has no scales; it should be a list of codes and scales, float32 (G, 3)"
        )
    num_rows, num_groups = (*codes.shape, 0)[0], scale.shape[0]
    if num_groups == 0 or num_rows % num_groups:
        raise CheckpointError(
            f"{codes.where} has shape {codes.shape}, whose rows are not {num_groups} equal runs "
            "with a scale each; the file is damaged"
        )
    named = replace(scale, name=f"{codes.name}[1]")
    return Quantized(codes, _ScaleOfRows(named, num_rows // num_groups, 0, num_rows))


@dataclass(frozen=True)
class _ScaleOfRows(Sliced):
    """(end - start, 1): the scales of these rows, of which `run` in a row share one.

    scales: (G, 3); the first G in order count.
    """

    scales: InFile
    run: int
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.end - self.start, 1

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def where(self) -> str:
        return self.scales.where

    def read(self) -> torch.Tensor:
        of_runs = self.scales.read().flatten()[: self.scales.shape[0]]
        return of_runs.repeat_interleave(self.run)[self.start : self.end].unsqueeze(1)

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        if axis == 1:  # the only column
            return self
        return replace(self, start=self.start + start, end=self.start + end)


def _merged(split: Split, parts: tuple[Stored, ...]) -> Stored:
    """The ranks' parts as one; codes stay codes.   Raises CheckpointError."""
    for other in parts[1:]:
        if type(other) is not type(parts[0]):
            raise CheckpointError(
                f"{parts[0].where} and {other.where} do not go together: one has a scale beside "
                "it, and the other none; the files are not of one checkpoint"
            )
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return split.merge(parts)
    codes, scales = tuple(q.codes for q in quantized), tuple(q.scale for q in quantized)
    return Quantized(split.merge(codes), split.merge(scales))


def _twice(one: Stored, other: Stored) -> CheckpointError:
    return CheckpointError(
        f"{one.where} and {other.where} are the same tensor; the files are not of one checkpoint"
    )
