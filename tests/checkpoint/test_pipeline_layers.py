"""bminf/checkpoint/pipeline_layers.py: files of layers and ranks are one model, none of which may
be missing, whatever lies beside them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import save

from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.folder import Checkpoint, open_checkpoint
from bminf.checkpoint.model_parallel import AVERAGED, COLUMNS, ROWS, Split, SplitTable
from bminf.errors import CheckpointError

SPLITS = {
    r"1\.embeddings\.weight": ROWS,
    r"\d+\.norm\.(weight|bias)": AVERAGED,
    r"\d+\.qkv\.(weight|bias)": ROWS,
    r"\d+\.dense\.weight": COLUMNS,
    r"\d+\.dense\.bias": AVERAGED,
    r"\d+\.weight": AVERAGED,
}
TABLE = SplitTable(
    "a toy's kind", SPLITS, lambda names: "1.embeddings.weight" in names,
    {"dense.weight": "qkv.weight"},
)  # fmt: skip
STEP = "global_step7"


def whole_layers(num_layers: int = 3) -> dict[int, dict[str, torch.Tensor]]:
    """Place -> tensors, in the order of the places."""

    def layer() -> dict[str, torch.Tensor]:
        shapes = {"norm.weight": [8], "norm.bias": [8], "qkv.weight": [24, 8], "qkv.bias": [24]}
        shapes |= {"dense.weight": [8, 8], "dense.bias": [8]}
        return {name: torch.randn(shape).half() for name, shape in shapes.items()}

    middle = {place: layer() for place in range(3, 3 + num_layers)}
    first, last = {"embeddings.weight": torch.randn(16, 8).half()}, {"weight": torch.ones(8).half()}
    return {1: first, **middle, 4 + num_layers: last}


def part(split: Split, whole: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """What a rank has; where the mean counts, something that no other rank has."""
    if split == AVERAGED:
        return whole + (rank - (num_ranks - 1) / 2) * 2
    axis = 0 if split == ROWS else 1
    return whole.chunk(num_ranks, axis)[rank].clone()


def path_of(folder: Path, place: int, rank: int) -> Path:
    return folder / STEP / f"layer_{place:02d}-model_{rank:02d}-model_states.pt"


def write(
    folder: Path, num_ranks: int, layers: dict[int, dict[str, torch.Tensor]], form: str = "zip"
) -> Path:
    """With what a training leaves beside the files of layers, which is damaged here."""
    (folder / STEP).mkdir(parents=True)
    (folder / "latest").write_text(STEP)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / STEP / name).write_bytes(b"no torch file")
    for place, tensors in layers.items():
        for rank in range(num_ranks):
            of_rank = {
                key: part(TABLE.split(f"{place}.{key}"), tensor, rank, num_ranks)
                for key, tensor in tensors.items()
            }
            save(of_rank, path_of(folder, place, rank), form)
    return folder


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, [TABLE])


def expect(found: Checkpoint, layers: dict[int, dict[str, torch.Tensor]]) -> None:
    whole = {f"{place}.{key}": x for place, tensors in layers.items() for key, x in tensors.items()}
    assert found.kind == "layers" and list(found.tensors) == list(whole)
    for name, tensor in whole.items():
        stored = found.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        torch.testing.assert_close(stored.read().double(), tensor.double(), atol=4e-3, rtol=0)
        if TABLE.split(name) != AVERAGED:
            assert torch.equal(stored.read(), tensor), name


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_ways_to_name_the_folder_give_the_whole_model(
    num_ranks: int, form: str, tmp_path: Path
) -> None:
    layers = whole_layers()
    step = write(tmp_path, num_ranks, layers, form) / STEP
    above = (tmp_path, tmp_path / "latest", tmp_path / "latest_checkpointed_iteration.txt")
    inside = (step, step / "mp_rank_00_model_states.pt", path_of(tmp_path, 4, num_ranks - 1))
    for path in (*above, *inside):
        found = opened(path)
        assert found.path == (tmp_path if path in above else step)
        expect(found, layers)


def test_places_and_ranks_are_numbers_however_they_are_written(tmp_path: Path) -> None:
    layers = whole_layers(num_layers=99)
    write(tmp_path / "1", 1, layers)
    expect(opened(tmp_path / "1"), layers)
    layers = whole_layers()
    write(tmp_path / "4", 4, layers)
    path_of(tmp_path / "4", 3, 1).rename(tmp_path / "4" / STEP / "layer_3-model_1-model_states.pt")
    expect(opened(tmp_path / "4"), layers)


def test_latest_may_lie_beside_the_files_of_layers(tmp_path: Path) -> None:
    layers = whole_layers()
    (write(tmp_path, 2, layers) / "latest").rename(tmp_path / STEP / "latest")
    for path in (tmp_path / STEP, tmp_path / STEP / "latest"):
        expect(opened(path), layers)


def test_a_folder_without_latest_is_that_of_the_step(tmp_path: Path) -> None:
    layers = whole_layers()
    (write(tmp_path, 2, layers) / "latest").unlink()
    expect(opened(tmp_path / STEP), layers)
    with pytest.raises(CheckpointError, match="names the iteration 7, but the folder holds no 7/"):
        opened(tmp_path)


def test_a_mean_is_of_all_ranks_and_exact(tmp_path: Path) -> None:
    layers = whole_layers()
    layers[4]["norm.weight"] = torch.arange(8).half()  # which all ranks hold exactly
    stored = opened(write(tmp_path, 4, layers)).tensors["4.norm.weight"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored.read(), torch.arange(8.0))
    assert torch.equal(stored.rows(2, 3).read(), torch.tensor([2.0]))


def change(path: Path, **changes: Any) -> None:
    given = torch.load(path)
    given.update({key.replace("__", "."): value for key, value in changes.items()})
    torch.save({key: value for key, value in given.items() if value is not None}, path)


def test_ranks_that_differ_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = whole_layers()
    write(tmp_path, 4, layers)
    for rank in range(4):
        change(path_of(tmp_path, 4, rank), dense__bias=torch.full([8], 6.0 * rank).half())
    opened(tmp_path)
    (record,) = caplog.records
    assert record.name == "bminf" and record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{tmp_path}: ")
    assert "by up to 9 from their mean ('4.dense.bias')" in record.getMessage()


def test_ranks_that_agree_are_not_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(write(tmp_path / "1", 1, whole_layers()))
    write(tmp_path / "2", 2, {1: whole_layers()[1], 3: {"norm.weight": torch.ones(8)}})
    shutil.copy(path_of(tmp_path / "2", 3, 0), path_of(tmp_path / "2", 3, 1))
    opened(tmp_path / "2")
    assert not caplog.records


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank 0 missing": (
        lambda f: path_of(f, 4, 0).unlink(), "lacks layer_04-model_00-model_states.pt",
    ),
    "a layer missing": (
        lambda f: [path_of(f, 4, r).unlink() for r in (0, 1)], "lacks layer_04-model_00",
    ),
    "the embedding missing": (
        lambda f: [path_of(f, 1, r).unlink() for r in (0, 1)], "lacks layer_01-model_00",
    ),
    "the first layer missing": (
        lambda f: [path_of(f, 3, r).unlink() for r in (0, 1)], "lacks layer_03-model_00",
    ),
    "the last layer missing": (
        lambda f: [path_of(f, 5, r).unlink() for r in (0, 1)], "lacks layer_05-model_00",
    ),
    "the last rank of a layer": (
        lambda f: path_of(f, 4, 1).unlink(), "has layer 01 of 2 ranks, but layer 04 of 1",
    ),
    "one rank too many": (
        lambda f: shutil.copy(path_of(f, 7, 1), path_of(f, 7, 2)),
        "has layer 01 of 2 ranks, but layer 07 of 3",
    ),
    "the last rank of all": (
        lambda f: [path.unlink() for path in (f / STEP).glob("layer_*-model_01*")],
        "has 4 columns in all, and should have 8",
    ),
    "a rank far away": (
        lambda f: path_of(f, 4, 1).rename(path_of(f, 4, 10**30)),
        "lacks layer_04-model_01-model_states.pt",
    ),
    "a layer far away": (
        lambda f: path_of(f, 4, 1).rename(path_of(f, 10**30, 1)),
        "lacks layer_06-model_00-model_states.pt",
    ),
    "twice": (
        lambda f: shutil.copy(path_of(f, 4, 1), f / STEP / "layer_4-model_1-model_states.pt"),
        "of the same layer and rank",
    ),
    "degrees mixed": (
        lambda f: change(path_of(f, 4, 1), qkv__weight=torch.ones(6, 8).half()),
        r"'qkv\.weight' in .*layer_04-model_00.*layer_04-model_01.*different degrees",
    ),
    "another dtype": (
        lambda f: change(path_of(f, 4, 1), norm__weight=torch.ones(8)), "do not go together",
    ),
    "a tensor missing": (
        lambda f: change(path_of(f, 4, 1), qkv__bias=None),
        r"layer_04-model_00.*layer_04-model_01.*'qkv\.bias' in one",
    ),
    "an unknown tensor": (
        lambda f: [change(path_of(f, 4, r), mystery=torch.ones(1)) for r in (0, 1)],
        r"no model of a toy's kind has a tensor '4\.mystery'",
    ),
    "no tensor": (
        lambda f: change(path_of(f, 4, 1), step=7), "holds a int under the name 'step'",
    ),
    "no dict": (lambda f: torch.save([1], path_of(f, 4, 1)), "holds a list where the weights"),
    "integers": (
        lambda f: [change(path_of(f, 4, r), norm__bias=torch.ones(8).int()) for r in (0, 1)],
        r"'norm\.bias' in .* should be floating point",
    ),
    "an empty file": (lambda f: path_of(f, 4, 1).write_bytes(b""), "model_01.*it is empty"),
    "half a file": (
        lambda f: path_of(f, 4, 1).write_bytes(path_of(f, 4, 0).read_bytes()[:999]), "is damaged",
    ),
    "a folder": (
        lambda f: [path_of(f, 4, 1).unlink(), path_of(f, 4, 1).mkdir()], "not a file",
    ),
    "a link to nothing": (
        lambda f: [path_of(f, 4, 1).unlink(), path_of(f, 4, 1).symlink_to("nothing")],
        "layer_04-model_01.*no such file",
    ),
    "no weights": (
        lambda f: [torch.save({}, path) for path in (f / STEP).glob("layer_*")], "no weights in",
    ),
    "no files of layers": (
        lambda f: [path.unlink() for path in (f / STEP).glob("layer_*")],
        "global_stepN, where that is a folder beside it with files layer_XX",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_one_checkpoint_are_errors(damage: str, tmp_path: Path) -> None:
    do, message = DAMAGES[damage]
    do(write(tmp_path, 2, whole_layers()))
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value) or "toy" in message


@pytest.mark.parametrize(
    "text", ["../elsewhere", "/elsewhere", "global_step7/../../elsewhere", "global_step8", ".", ""]
)
def test_latest_leads_nowhere_else(text: str, tmp_path: Path) -> None:
    write(tmp_path, 1, whole_layers())
    shutil.copytree(tmp_path / STEP, tmp_path.parent / "elsewhere", dirs_exist_ok=True)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest holds .*global_stepN, where that is a fold"):
        opened(tmp_path)


def test_layers_beside_other_weights_are_an_error_that_a_file_resolves(tmp_path: Path) -> None:
    layers = whole_layers()
    torch.save({"w": torch.ones(1)}, write(tmp_path, 1, layers) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"several layouts \(huggingface, layers\)"):
        opened(tmp_path)
    assert opened(tmp_path / "pytorch_model.bin").kind == "huggingface"
    expect(opened(tmp_path / "latest"), layers)


def test_where_no_table_is_for_the_names_they_are_told(tmp_path: Path) -> None:
    write(tmp_path, 1, {1: {"embeddings.weight": torch.ones(16, 8)}})
    with pytest.raises(CheckpointError, match=r"no model that is known has .*'1\.embeddings"):
        open_checkpoint(tmp_path, [])
    with pytest.raises(CheckpointError, match=r"has a tensor '1\.embeddings\.weight'"):
        checkpoint_in(tmp_path)
