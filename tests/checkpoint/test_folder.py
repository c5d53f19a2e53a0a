"""Every layout is recognised from its files; nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from saved_files import FORMS
from tiny_zoo import bminf1_bytes, save, write_ranks

from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.folder import atomic_folder
from bminf.errors import CheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}


def bminf(folder: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text('{"format": "bminf"}')


def original(folder: Path) -> None:
    write_ranks(folder, [WEIGHTS], 12)


def iteration(folder: Path) -> None:
    weights = {"module": WEIGHTS, "rng": torch.Generator()}
    save(weights, folder / "mp_rank_00_model_states.pt", "old")


def bminf1(folder: Path) -> None:
    tree = {name[0]: {"weight": tensor.half()} for name, tensor in WEIGHTS.items()}
    (folder / "checkpoint.pt").write_bytes(bminf1_bytes(tree))


def modelcenter(folder: Path) -> None:
    save(WEIGHTS, folder / "pytorch_model.pt", "zip")
    (folder / "config.json").write_text("{}")


def huggingface_bin(folder: Path) -> None:
    save(WEIGHTS, folder / "pytorch_model.bin", "zip")
    (folder / "config.json").write_text("{}")


def huggingface_safetensors(folder: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "eva"}')


def write_index(folder: Path, name: str, weight_map: object) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded_safetensors(folder: Path) -> None:
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        safetensors.torch.save_file({name: tensor}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{n}.safetensors" for n, name in enumerate(WEIGHTS)}
    write_index(folder, "model.safetensors.index.json", places)


def sharded_bin(folder: Path) -> None:
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        save({name: tensor}, folder / f"pytorch_model-{number}.bin", FORMS[number % 2])
    places = {name: f"pytorch_model-{n}.bin" for n, name in enumerate(WEIGHTS)}
    write_index(folder, "pytorch_model.bin.index.json", places)


LAYOUTS: list[tuple[Callable[[Path], object], str, list[str]]] = [
    (bminf, "bminf", ["config.json", "model.safetensors"]),
    (original, "original", ["latest_checkpointed_iteration.txt"]),
    (iteration, "original", ["mp_rank_00_model_states.pt"]),
    (
        lambda f: save({"model": WEIGHTS}, f / "mp_rank_00" / "model_optim_rng.pt"),
        "original",
        ["mp_rank_00/model_optim_rng.pt"],
    ),
    (bminf1, "bminf1", ["checkpoint.pt"]),
    (modelcenter, "modelcenter", ["pytorch_model.pt", "config.json"]),
    (huggingface_bin, "huggingface", ["pytorch_model.bin", "config.json"]),
    (huggingface_safetensors, "huggingface", ["model.safetensors", "config.json"]),
    (sharded_safetensors, "huggingface", ["model.safetensors.index.json"]),
    (sharded_bin, "huggingface", ["pytorch_model.bin.index.json"]),
]


@pytest.mark.parametrize(("make", "kind", "files"), LAYOUTS)
def test_each_layout_is_recognised(
    make: Callable[[Path], object], kind: str, files: list[str], tmp_path: Path
) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    make(tmp_path)
    for path in (tmp_path, *(tmp_path / name for name in files)):
        checkpoint = checkpoint_in(path)
        assert (checkpoint.kind, checkpoint.path) == (kind, tmp_path)
        assert list(checkpoint.tensors) == list(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            stored = checkpoint.tensors[name]
            assert stored.shape == tuple(tensor.shape)
            assert torch.equal(stored.read().float(), tensor)


def test_the_file_of_a_rank_stands_for_all(tmp_path: Path) -> None:
    original(tmp_path)
    checkpoint = checkpoint_in(tmp_path / "12" / "mp_rank_00_model_states.pt")
    assert (checkpoint.kind, checkpoint.path) == ("original", tmp_path / "12")
    save({"module": WEIGHTS}, tmp_path / "12" / "mp_rank_02_model_states.pt", "zip")
    with pytest.raises(CheckpointError, match="lacks the file of rank 01"):
        checkpoint_in(tmp_path / "12" / "mp_rank_00_model_states.pt")


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    huggingface_safetensors(tmp_path)
    save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin", "zip")
    assert list(checkpoint_in(tmp_path).tensors) == list(WEIGHTS)
    assert list(checkpoint_in(tmp_path / "pytorch_model.bin").tensors) == ["other"]


def test_two_layouts_in_one_folder_are_an_error_that_a_file_resolves(tmp_path: Path) -> None:
    bminf1(tmp_path)
    huggingface_bin(tmp_path)
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin', 'checkpoint\.pt'"):
        checkpoint_in(tmp_path)
    assert checkpoint_in(tmp_path / "checkpoint.pt").kind == "bminf1"
    assert checkpoint_in(tmp_path / "pytorch_model.bin").kind == "huggingface"


def test_our_own_folder_is_known_by_its_config(tmp_path: Path) -> None:
    bminf(tmp_path)
    bminf1(tmp_path)
    assert checkpoint_in(tmp_path).kind == "bminf"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: no such"):
        checkpoint_in(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "is empty; accepted: a folder of bminf convert"),
        (lambda f: (f / "notes.txt").touch(), r"but 'notes\.txt'; accepted: .*BMInf 1\.x"),
        (lambda f: (f / "12").mkdir(), "but '12'; accepted"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "a JSON object is needed"),
        (lambda f: save(WEIGHTS, f / "checkpoint.pt"), r"written by torch\.save, not by"),
        (lambda f: (f / "pytorch_model.bin").touch(), "it is empty"),
        (lambda f: (f / "model.safetensors").touch(), "truncated"),
    ],
)
def test_what_is_no_checkpoint_says_what_is_there(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_in(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_path_to_nothing_and_to_another_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; accepted"):
        checkpoint_in(tmp_path / "nothing")
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(CheckpointError, match=r"vocab\.txt is not the file of a checkpoint"):
        checkpoint_in(tmp_path / "vocab.txt")


@pytest.mark.parametrize("make", [sharded_safetensors, sharded_bin])
def test_a_missing_shard_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    shard = next(path for path in tmp_path.iterdir() if "-1." in path.name)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        checkpoint_in(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "model-0.safetensors"}, "map|place"),
        (
            {**dict.fromkeys(WEIGHTS, "model-0.safetensors")},
            r"model-0\.safetensors lacks 'b\.weight'",
        ),
        (
            {"b.weight": "model-0.safetensors"},
            r"lacks 'b\.weight', which .*\.index\.json places there; fetch both",
        ),
        ({"x": "../model-0.safetensors"}, "should be one beside it"),
        ({"x": "/etc/passwd"}, "should be one beside it"),
        ({"x": ".."}, "should be one beside it"),
        ({"x": ["model-0.safetensors"]}, "should be one beside it"),
        ({"x": 3}, "should be one beside it"),
        ({"x": ""}, "should be one beside it"),
        ({}, 'no "weight_map"'),
        (None, 'no "weight_map"'),
    ],
)
def test_an_index_that_is_wrong_is_an_error(
    weight_map: object, message: str, tmp_path: Path
) -> None:
    sharded_safetensors(tmp_path)
    both = {**WEIGHTS} if weight_map == {"a.weight": "model-0.safetensors"} else None
    if both:  # a tensor that the index does not name
        safetensors.torch.save_file(both, tmp_path / "model-0.safetensors")
    write_index(tmp_path, "model.safetensors.index.json", weight_map)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_in(tmp_path)


def test_a_folder_that_was_written_can_be_read_by_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made", 1, "writing") as (folder, _):
        (folder / "a").touch()
    assert (tmp_path / "made" / "a").is_file()
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755
