"""The checkpoints that the authors' own programs wrote: what a set holds makes the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from golden import GoldenSet, for_each, golden
from saved_files import same
from tiny_zoo import save

from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.torch_file import read_torch_file

MODELS = ("cpm1", "cpm2", "eva")
ONE_RANK = "original_mp1"


def kind_of(layout: str) -> str:
    """What a folder of this name is recognised as."""
    if layout.startswith("original"):
        return "original"
    return "huggingface" if layout.startswith("hf") else layout


def keys_of(given: GoldenSet, layout: str) -> Path:
    """The file that lists the tensors of a layout; all degrees of the original give the same."""
    return given.path / f"keys_{'mp1' if kind_of(layout) == 'original' else layout}.json"


def listed(given: GoldenSet) -> list[str]:
    return [layout for layout in given.layouts() if keys_of(given, layout).is_file()]


def several_ranks(given: GoldenSet) -> list[str]:
    names = [name for name in given.layouts() if kind_of(name) == "original" and name != ONE_RANK]
    return names if (given.path / ONE_RANK).is_dir() else []


def torch_files(given: GoldenSet) -> Iterator[list[str]]:
    for layout in given.layouts():
        found = [*(given.path / layout).rglob("*.pt"), *(given.path / layout).glob("*.bin")]
        for path in sorted(path for path in found if path.name != "checkpoint.pt"):
            yield [layout, str(path.relative_to(given.path / layout))]


def listed_in(path: Path) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Name -> (shape, dtype) of a keys file; some of these files give no dtypes."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for name, entry in json.loads(path.read_text()).items():
        if entry and isinstance(entry[-1], str):
            found[name] = tuple(entry[0]), entry[1].removeprefix("torch.")
        else:
            found[name] = tuple(entry), None
    return found


@for_each(MODELS, listed)
def test_golden_checkpoints_hold_the_listed_tensors(name: str, case: str) -> None:
    given = golden(name)
    tensors, expected = checkpoint_in(given.path / case).tensors, listed_in(keys_of(given, case))
    assert set(tensors) == set(expected)
    for key, (shape, dtype) in expected.items():
        assert tensors[key].shape == shape == tuple(tensors[key].read().shape), key
        if dtype is not None:
            assert str(tensors[key].dtype).removeprefix("torch.") == dtype, key


@for_each(MODELS, several_ranks)
def test_golden_ranks_merge_to_the_values_of_one_rank(name: str, case: str) -> None:
    path = golden(name).path
    whole, merged = (checkpoint_in(path / layout).tensors for layout in (ONE_RANK, case))
    assert set(merged) == set(whole)
    for key, stored in merged.items():
        assert torch.equal(stored.read(), whole[key].read()), key


@for_each(MODELS, GoldenSet.layouts)
def test_golden_layouts_are_recognised(name: str, case: str) -> None:
    folder = golden(name).path / case
    for path in (folder, *folder.glob("checkpoint.pt"), *folder.glob("pytorch_model.*")):
        checkpoint = checkpoint_in(path)
        assert (checkpoint.kind, checkpoint.path) == (kind_of(case), folder)
        assert checkpoint.tensors


@for_each(MODELS, torch_files)
def test_golden_torch_files_hold_what_torch_loads(
    name: str, case: list[str], tmp_path: Path
) -> None:
    path = golden(name).path.joinpath(*case)
    theirs = torch.load(path, weights_only=False)
    num_tensors = same(read_torch_file(path), theirs)
    assert num_tensors > 0
    assert same(read_torch_file(save(theirs, tmp_path / "old.pt", "old")), theirs) == num_tensors
