"""bminf/checkpoint/model_parallel.py: all ranks together are the whole, mixed ranks are errors, and
a tracker names the iteration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_glm10b, tiny_glm130b
from tiny_zoo import rank_file, split, tiny, write_ranks

from bminf.arch.registry import checkpoint_in, split_tables
from bminf.checkpoint.model_parallel import (
    COLUMNS,
    PER_RANK,
    SplitTable,
    read_model_parallel,
    table_for,
)
from bminf.errors import ArgumentError, CheckpointError


def whole_weights() -> dict[str, torch.Tensor]:
    """Of a CPM-1 and of an EVA that was prompt-tuned, whose names and cuts one table has."""
    weights = tiny("cpm1").tensors | tiny("eva").tensors
    return {**weights, "encoder.prompt_embeds.weight": weights["role_embeds.weight"]}


@pytest.mark.parametrize("name", ["transformer.mystery.weight", "weight", "lm_head.weights", ""])
def test_a_name_of_another_model_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name!r}"):
        table_for([*whole_weights(), name], split_tables()).split(name)


def test_of_several_tables_the_last_one_that_is_for_the_names_counts() -> None:
    toy = SplitTable("a toy's kind", {"w": COLUMNS}, lambda names: "w" in names)
    assert table_for(["w"], (*split_tables(), toy)).split("w") == COLUMNS
    with pytest.raises(CheckpointError, match="no model of the CPM family has a tensor 'v'"):
        table_for(["v"], (*split_tables(), toy)).split("v")
    with pytest.raises(CheckpointError, match="no model that is known has the tensors 'v'"):
        table_for(["v"], [toy])


def write(folder: Path, num_ranks: int, **how: Any) -> Path:
    """A folder of whole_weights(), cut for so many ranks."""
    ranks = split(whole_weights(), num_ranks)
    return write_ranks(folder, ranks, optimizer=None, mp_world_size=num_ranks, **how)


def test_ranks_are_cut_as_the_authors_cut_them() -> None:
    """What the tests below stand on: each rank has its heads of Q, of K and of V."""
    weight = torch.arange(12.0).unsqueeze(1).expand(12, 4)
    name = "transformer.layers.0.attention.query_key_value.weight"
    first, second = (rank[name][:, 0].tolist() for rank in split({name: weight}, 2))
    assert first == [0, 1, 4, 5, 8, 9] and second == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("how", [{}, {"form": "old"}, {"has_rank_folders": True}], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_together_are_the_whole(
    num_ranks: int, how: dict[str, Any], tmp_path: Path
) -> None:
    """With rank folders, in the layout without DeepSpeed."""
    write(tmp_path, num_ranks, **how)
    for folder in (tmp_path, next(tmp_path.glob("*7"))):
        found = read_model_parallel(folder, split_tables())
        assert list(found) == list(whole_weights())
        for name, tensor in whole_weights().items():
            assert found[name].shape == tuple(tensor.shape), name
            assert torch.equal(found[name].read(), tensor), name


def test_one_rank_is_read_whatever_its_names_are(tmp_path: Path) -> None:
    torch.save({"module": {"mystery": torch.ones(1)}}, tmp_path / "mp_rank_00_model_states.pt")
    assert list(read_model_parallel(tmp_path, split_tables())) == ["mystery"]


def change(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path, weights_only=False), **changes}, path)


def change_weights(path: Path, **changes: Any) -> None:
    weights = torch.load(path)["module"]
    weights.update({name.replace("__", "."): value for name, value in changes.items()})
    change(path, module={name: value for name, value in weights.items() if value is not None})


def mix_degrees(folder: Path) -> None:
    for rank, num_ranks in enumerate((2, 4)):
        weights = split(whole_weights(), num_ranks)[rank]
        change(rank_file(folder, rank), module=weights, mp_world_size=None)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank 0 missing": (lambda f: rank_file(f, 0).unlink(), "lacks the file of rank 00"),
    "rank 1 missing": (lambda f: rank_file(f, 1).unlink(), "mp_world_size"),
    "a gap": (
        lambda f: rank_file(f, 1).rename(f / "7" / "mp_rank_02_model_states.pt"),
        "lacks the file of rank 01",
    ),
    "twice": (
        lambda f: shutil.copy(rank_file(f, 1), f / "7" / "mp_rank_1_model_states.pt"),
        "holds rank 01 twice",
    ),
    "degrees mixed": (mix_degrees, "do not go together.*different degrees"),
    "another degree": (
        lambda f: change(rank_file(f, 1), mp_world_size=4),
        r"mp_rank_01_model_states.pt is one of 4 ranks .* holds 2",
    ),
    "other names": (
        lambda f: change_weights(rank_file(f, 1), extra=torch.ones(1)),
        "do not hold the same tensors: 'extra' in one",
    ),
    "a tensor missing": (
        lambda f: change_weights(rank_file(f, 0), lm_head__weight=None),
        r"do not hold the same tensors: 'lm_head\.weight'",
    ),
    "another dtype": (
        lambda f: change_weights(rank_file(f, 1), lm_head__weight=torch.ones(128, 48)),
        r"'lm_head\.weight' in .*rank_00.*'lm_head\.weight' in .*rank_01",
    ),
    "a tensor that no rule cuts": (
        lambda f: [change_weights(rank_file(f, r), mystery=torch.ones(1)) for r in (0, 1)],
        "no model of the CPM family has a tensor 'mystery'",
    ),
    "no module": (lambda f: torch.save({"a": 1}, rank_file(f, 0)), "under the key 'module'.*'a'"),
    "no weights": (lambda f: change(rank_file(f, 0), module={}), "it is empty"),
    "None as weights": (lambda f: change(rank_file(f, 0), module=None), "holds None where"),
    "no iteration": (lambda f: (f / "7").rename(f / "8"), "names the iteration 7"),
    "empty iteration": (
        lambda f: [rank_file(f, r).unlink() for r in (0, 1)], "holds no mp_rank_00"
    ),
    "a bad tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../7"),
        "should be the number of an iteration",
    ),
    "an empty tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text(""),
        "should be the number of an iteration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_ranks_that_do_not_go_together_are_errors(damage: str, tmp_path: Path) -> None:
    do, message = DAMAGES[damage]
    do(write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_parallel(tmp_path, split_tables())
    assert str(tmp_path) in str(caught.value) or "CPM family" in message


def test_replicated_tensors_that_differ_are_an_error_when_read(tmp_path: Path) -> None:
    name = "transformer.final_layernorm.bias"
    write(tmp_path, 2)
    change_weights(rank_file(tmp_path, 1), **{name: torch.ones(48).half()})
    found = read_model_parallel(tmp_path, split_tables())
    with pytest.raises(CheckpointError, match=r"rank_00.*rank_01.* should be the same, but differ"):
        found[name].read()
    assert torch.equal(found["lm_head.weight"].read(), whole_weights()["lm_head.weight"])


# ---- how tensors are cut -------------------------------------------------------------------------


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    write_ranks(tmp_path, [{"w": torch.randn(24)}])
    vector: Any = checkpoint_in(tmp_path).tensors["w"]
    with pytest.raises(CheckpointError, match=r"'w' in .* should have 2 dimensions"):
        COLUMNS.part(vector, 0, 2)
    with pytest.raises(ArgumentError, match="ranks it was made for"):
        PER_RANK.part(vector, 0, 2)


# ---- trackers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["latest", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("iteration", ["300", "release", "0"])
def test_either_tracker_names_a_number_or_release(
    tracker: str, iteration: str, tmp_path: Path
) -> None:
    made = tiny_glm130b()
    write_ranks(tmp_path, made.ranks(2), iteration, tracker=tracker)
    for path in (tmp_path, tmp_path / tracker, tmp_path / iteration):
        tensors = checkpoint_in(path).tensors
        assert all(torch.equal(tensors[name].read(), t) for name, t in made.tensors.items())


def write_latest(folder: Path) -> Path:
    return write_ranks(folder, [{"w": torch.ones(1)}], "300", tracker="latest")


def test_two_trackers_that_agree_are_one(tmp_path: Path) -> None:
    write_latest(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" 0300\n")
    assert checkpoint_in(tmp_path).kind == "original"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"latest_checkpointed_iteration.txt": "301"}, "iteration 301, but latest beside it 300"),
        ({"latest_checkpointed_iteration.txt": "release"}, "release, but latest beside it 300"),
        ({"latest": "301"}, r"names the iteration 301, but .* no 301/ and no iter_0000301/"),
        ({"latest": "release"}, r"names the iteration release, but the folder holds no release/;"),
        ({"latest": "global_step300"}, "'global_step300'; it should be the number .* 'release'"),
        ({"latest": ""}, "it should be the number"),
    ],
)
def test_trackers_that_lead_nowhere_say_so(
    texts: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_latest(tmp_path)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_in(tmp_path)


def test_what_a_trainer_leaves_beside_other_weights_is_no_checkpoint_of_ours(
    tmp_path: Path,
) -> None:
    torch.save(tiny_glm10b().tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "latest").write_text("global_step300")
    assert checkpoint_in(tmp_path).kind == "huggingface"
    (tmp_path / "latest").write_text("300")
    with pytest.raises(CheckpointError, match="several layouts"):
        checkpoint_in(tmp_path)
