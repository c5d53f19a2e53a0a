"""The checkpoints that the authors' own programs wrote (BMINF_GOLDEN names their folder).

A set has a folder a model; what a folder holds makes the tests, so that a set with other degrees,
sizes and iterations, or without some layout, needs no change here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import same
from tiny_zoo import save

from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.model_parallel import rank_files
from bminf.checkpoint.torch_file import read_torch_file

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = (ROOT / os.environ.get("BMINF_GOLDEN", "../shared/golden")).resolve()
MODELS = ("cpm1", "cpm2", "eva")

# Folder -> the layout it is recognised as.
LAYOUTS = {
    "bminf1": "bminf1",
    "modelcenter": "modelcenter",
    "hf_eva": "huggingface",
    "hf_gpt2": "huggingface",
}


def present() -> list[Path]:
    return [GOLDEN / model for model in MODELS if (GOLDEN / model).is_dir()]


def originals() -> list[Path]:
    return [path for folder in present() for path in sorted(folder.glob("original_mp*"))]


def others() -> list[Path]:
    return [f / name for f in present() for name in LAYOUTS if (f / name).is_dir()]


def torch_files() -> list[Path]:
    ranks = [path for folder in originals() for path in rank_files(folder)]
    return ranks + [path for f in others() for path in sorted(f.glob("pytorch_model.*"))]


def keys_of(folder: Path) -> Path:
    """The file that lists the tensors of a layout; all degrees of the original give the same."""
    name = "mp1" if folder in originals() else folder.name
    return folder.with_name(f"keys_{name}.json")


def one_rank(folder: Path) -> Path:
    return folder.with_name("original_mp1")


def golden(argument: str, paths: list[Path]) -> Callable[[Callable[..., None]], Any]:
    """One test a path, none where there is no path; a skip for a model that is not there at all."""
    absent = [
        pytest.param(None, id=model, marks=pytest.mark.skip(reason=f"no {GOLDEN / model}"))
        for model in MODELS
        if not (GOLDEN / model).is_dir()
    ]
    given = [pytest.param(path, id="-".join(path.relative_to(GOLDEN).parts)) for path in paths]
    if not given and not absent:
        return lambda test: None
    return pytest.mark.parametrize(argument, [*given, *absent])


def listed_in(path: Path) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Name -> (shape, dtype) of a keys file; some of these files give no dtypes."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for name, entry in json.loads(path.read_text()).items():
        if entry and isinstance(entry[-1], str):
            found[name] = tuple(entry[0]), entry[1].removeprefix("torch.")
        else:
            found[name] = tuple(entry), None
    return found


@golden("folder", [path for path in [*originals(), *others()] if keys_of(path).is_file()])
def test_golden_checkpoints_hold_the_listed_tensors(folder: Path) -> None:
    tensors, expected = checkpoint_in(folder).tensors, listed_in(keys_of(folder))
    assert set(tensors) == set(expected)
    for name, (shape, dtype) in expected.items():
        assert tensors[name].shape == shape == tuple(tensors[name].read().shape), name
        if dtype is not None:
            assert str(tensors[name].dtype).removeprefix("torch.") == dtype, name


@golden(
    "folder", [path for path in originals() if path != one_rank(path) and one_rank(path).is_dir()]
)
def test_golden_ranks_merge_to_the_values_of_one_rank(folder: Path) -> None:
    whole, merged = checkpoint_in(one_rank(folder)).tensors, checkpoint_in(folder).tensors
    assert set(merged) == set(whole)
    for name, stored in merged.items():
        assert torch.equal(stored.read(), whole[name].read()), name


@golden("folder", [*originals(), *others()])
def test_golden_layouts_are_recognised(folder: Path) -> None:
    kind = LAYOUTS.get(folder.name, "original")
    for path in (folder, *folder.glob("checkpoint.pt"), *folder.glob("pytorch_model.*")):
        checkpoint = checkpoint_in(path)
        assert (checkpoint.kind, checkpoint.path) == (kind, folder)
        assert checkpoint.tensors


@golden("path", torch_files())
def test_golden_torch_files_hold_what_torch_loads(path: Path, tmp_path: Path) -> None:
    theirs = torch.load(path, weights_only=False)
    num_tensors = same(read_torch_file(path), theirs)
    assert num_tensors > 0
    old = save(theirs, tmp_path / "old.pt", "old")
    assert same(read_torch_file(old), theirs) == num_tensors
