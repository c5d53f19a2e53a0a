"""Folders at another degree: every rank as if it had been cut so from the beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import glm_files
import pytest
import torch
from glm_files import (
    HEADS,
    Weights,
    cut,
    glm10b,
    glm130b,
    load,
    rank_file,
    reshard,
    write,
)  # fmt: skip

from bminf.errors import ArgumentError, CheckpointError
from bminf.quantization.glm_rows import quantize_rows

MODELS: dict[str, Callable[[], Weights]] = {
    "glm130b": glm130b,
    "glm130b in bfloat16": lambda: glm130b(dtype=torch.bfloat16),
    "glm10b": glm10b,
    "glm10b of SAT, in float32": lambda: glm10b(is_sat=True, dtype=torch.float32),
}


def expect(folder: Path, weights: Weights, degree: int) -> None:
    """The ranks of `folder`, names in order, dtypes and bytes."""
    found = load(folder)
    assert len(found) == degree
    for rank, saved in enumerate(found):
        expected = cut(weights, rank, degree)
        assert list(saved["module"]) == list(expected)
        for name, tensor in expected.items():
            ours = saved["module"][name]
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name
            assert ours.is_contiguous()


@pytest.mark.parametrize("target", [1, 2, 4])
@pytest.mark.parametrize("source", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_every_degree_comes_from_every_other(
    model: str, source: int, target: int, tmp_path: Path
) -> None:
    weights = MODELS[model]()
    write(tmp_path / "a", weights, source)
    reshard(tmp_path / "a", tmp_path / "b", target, num_attention_heads=HEADS)
    expect(tmp_path / "b", weights, target)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_each_rank_is_quantised_by_itself(degree: int, bits: int, tmp_path: Path) -> None:
    weights = glm130b()
    weights["transformer.layers.0.mlp.dense_h_to_4h.weight"][5] = 0
    write(tmp_path / "a", weights, 2)
    reshard(tmp_path / "a", tmp_path / "b", degree, bits)
    for rank, saved in enumerate(load(tmp_path / "b")):
        expected: Weights = {}
        for name, tensor in cut(weights, rank, degree).items():
            expected[name] = tensor
            if tensor.dim() == 2 and "word_embeddings" not in name:
                expected[name], expected[f"{name}_scale"] = quantize_rows(tensor, bits)
        assert list(saved["module"]) == list(expected)
        for name, tensor in expected.items():
            ours = saved["module"][name]
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name


def test_glm130b_has_one_tracker_and_nothing_beside_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "a", glm130b(), 2, number="7", optimizer=None)
    reshard(tmp_path / "a", tmp_path / "b", 1)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"7", "latest"}
    assert (tmp_path / "b" / "latest").read_text() == "7"
    assert [set(saved) for saved in load(tmp_path / "b")] == [{"module"}]


def test_glm10b_has_two_trackers_and_its_iteration_and_degree(tmp_path: Path) -> None:
    write(tmp_path / "a", glm10b(), 2, number="7", mp_world_size=2)
    reshard(tmp_path / "a", tmp_path / "b", 4, num_attention_heads=HEADS)
    trackers = ("latest", "latest_checkpointed_iteration.txt")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"7", *trackers}
    assert [(tmp_path / "b" / name).read_text() for name in trackers] == ["7", "7"]
    for saved in load(tmp_path / "b"):
        assert {name: saved[name] for name in saved.keys() - {"module"}} == {
            "iteration": 7, "mp_world_size": 4
        }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "beside", "iteration"),
    [
        ("iter_0000300", {}, "300"),
        ("release", {"iteration": 300}, "release"),
        ("release", {}, "release"),
        ("somewhere", {"iteration": 300}, "300"),
        ("somewhere", {}, "release"),
    ],
)
def test_the_iteration_is_that_of_the_source(
    folder: str, beside: dict[str, Any], iteration: str, tmp_path: Path
) -> None:
    weights = glm10b()
    write(tmp_path / "a", weights, 1, folder, tracker=None, **beside)
    reshard(tmp_path / "a" / folder, tmp_path / "b", 2, num_attention_heads=HEADS)
    assert (tmp_path / "b" / "latest").read_text() == iteration
    saved = torch.load(tmp_path / "b" / iteration / "mp_rank_01_model_states.pt")
    assert saved.get("iteration") == (300 if "300" in folder else beside.get("iteration"))


@pytest.mark.parametrize("prefix", ["", "glm."])
def test_glm10b_comes_from_its_hugging_face_form(prefix: str, tmp_path: Path) -> None:
    weights = glm10b()
    (tmp_path / "a").mkdir()
    named = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save(named, tmp_path / "a" / "pytorch_model.bin")
    reshard(tmp_path / "a", tmp_path / "b", 2, num_attention_heads=HEADS)
    expect(tmp_path / "b", weights, 2)
    assert (tmp_path / "b" / "latest").read_text() == "release"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    weights = glm130b()
    write(tmp_path / "a", weights)
    (tmp_path / "b").mkdir()
    reshard(tmp_path / "a", tmp_path / "b", 2)
    expect(tmp_path / "b", weights, 2)


# ---- the number of heads -------------------------------------------------------------------------


def test_joining_whole_ranks_needs_no_number_of_heads(tmp_path: Path) -> None:
    weights = glm10b()
    write(tmp_path / "a", weights, 4)
    for degree in (1, 2, 4):
        reshard(tmp_path / "a", tmp_path / str(degree), degree)
        expect(tmp_path / str(degree), weights, degree)
    with pytest.raises(ArgumentError, match=r"degree=8 has to divide, is unknown; give a"):
        reshard(tmp_path / "a", tmp_path / "b", 8)


def test_the_rotary_table_tells_the_number_of_heads(tmp_path: Path) -> None:
    write(tmp_path / "a", glm130b(hidden=64, inner=64, rows=64))
    with pytest.raises(ArgumentError, match=r"divide the 4 attention heads .* accepted: 1, 2, 4$"):
        reshard(tmp_path / "a", tmp_path / "b", 8)
    write(tmp_path / "c", glm130b(hidden=64, inner=64, rows=64, has_inv_freq=False))
    with pytest.raises(ArgumentError, match="with num_attention_heads"):
        reshard(tmp_path / "c", tmp_path / "b", 8)
    reshard(tmp_path / "c", tmp_path / "b", 8, num_attention_heads=8)


def test_a_wrong_number_of_heads_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", glm130b())
    with pytest.raises(ArgumentError, match=r"num_attention_heads=8; accepted for .*: 4, or None"):
        reshard(tmp_path / "a", tmp_path / "b", 2, num_attention_heads=8)
    write(tmp_path / "c", glm130b(has_inv_freq=False))
    with pytest.raises(ArgumentError, match=r"num_attention_heads=5; accepted for .* of 32, or"):
        reshard(tmp_path / "c", tmp_path / "b", 2, num_attention_heads=5)


# ---- bad input: an error before anything is written ----------------------------------------------


def quantised(folder: Path) -> None:
    reshard(write(folder / "whole", glm130b()), folder / "a", 1, 8)


def other_model(folder: Path) -> None:
    write(folder / "a", {"word_embeddings.weight": torch.ones(4, 4)})


def our_own(folder: Path) -> None:
    (folder / "a").mkdir()
    torch.save(glm130b(), folder / "a" / "pytorch_model.bin")


def rank_missing(folder: Path) -> None:
    rank_file(write(folder / "a", glm130b(), 4), 1).unlink()


def tensor_missing(folder: Path) -> None:
    weights = glm130b(num_layers=1)
    del weights["transformer.layers.0.attention.dense.weight"]
    write(folder / "a", weights)


def no_matrix(folder: Path) -> None:
    weights = glm130b()
    weights["transformer.word_embeddings.weight"] = torch.ones(24)
    write(folder / "a", weights)


def odd_layer(folder: Path) -> None:
    weights = glm130b()
    weights["transformer.layers.1.attention.query_key_value.bias"] = torch.ones(95)
    write(folder / "a", weights)


def sizes(**given: int) -> Callable[[Path], object]:
    return lambda folder: write(folder / "a", glm130b(**given))


Make = Callable[[Path], object]
BAD: dict[str, tuple[Make, dict[str, Any], type[Exception], str]] = {
    "heads": (sizes(), {"degree": 8}, ArgumentError, "divide the 4 attention heads of .*1, 2, 4$"),
    "inner": (sizes(inner=46), {"degree": 4}, ArgumentError, "the 46 inner columns .*: 1, 2$"),
    "vocabulary": (sizes(rows=22), {"degree": 4}, ArgumentError, "22 vocabulary rows .*: 1, 2$"),
    "all": (sizes(), {"degree": 5}, ArgumentError, "24 vocab.* and the 32 hidden.* and the 48 in"),
    "odd columns": (
        sizes(inner=34), {"bits": 4}, ArgumentError, r"4h_to_h\.weight' has 17 columns a rank .*=2"
    ),
    "bits of glm10b": (
        lambda f: write(f / "a", glm10b()), {"bits": 8}, ArgumentError, "holds GLM-10B"
    ),
    "quantised": (quantised, {}, CheckpointError, "a is quantized, each rank"),
    "quantised again": (quantised, {"bits": 4}, CheckpointError, "a is quantized, each rank"),
    "another model": (other_model, {}, CheckpointError, "no checkpoint of GLM-130B or GLM-10B"),
    "another layout": (our_own, {}, CheckpointError, "it is a huggingface folder"),
    "a rank missing": (rank_missing, {}, CheckpointError, "lacks the file of rank 01"),
    "a tensor missing": (tensor_missing, {}, CheckpointError, r"holds no 'attention\.dense"),
    "no matrix": (no_matrix, {}, CheckpointError, r"\(24,\); it should be a matrix"),
    "one odd tensor": (odd_layer, {}, ArgumentError, r"1\.attention.*\.bias' in .*shape \(95,\)"),
    "no source": (lambda f: None, {}, CheckpointError, "a does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, arguments, error, message = BAD[case]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = {"source": tmp_path / "a", "destination": tmp_path / "b", "degree": 2, **arguments}
    with pytest.raises(error, match=message):
        reshard(**given)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    weights = glm130b()
    weights["transformer.layers.1.mlp.dense_4h_to_h.weight"][3, 1] = torch.nan
    write(tmp_path / "a", weights)
    with pytest.raises(CheckpointError, match=r"4h_to_h\.weight' in .* quantized: .* NaN"):
        reshard(tmp_path / "a", tmp_path / "b", 2, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", glm130b())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot be written"):
        reshard(tmp_path / "a", tmp_path / "file" / "b", 2)


def test_ranks_that_differ_in_what_all_should_have_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", glm130b(), 2)
    path = rank_file(tmp_path / "a", 1)
    module = glm_files.modules(tmp_path / "a")[1]
    module["transformer.final_layernorm.bias"] += 1
    torch.save({"module": module}, path)
    with pytest.raises(CheckpointError, match=r"should be the same, but differ"):
        reshard(tmp_path / "a", tmp_path / "b", 1)
    assert not (tmp_path / "b").exists()
