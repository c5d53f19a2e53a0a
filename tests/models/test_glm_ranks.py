"""bminf/models/glm_ranks.py: folders at another degree, every rank as if it had been cut so from
the beginning; and what lies beside the weights goes along."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import (
    TinyGLM,
    ice_tokenizer,
    reshard,
    tiny_glm10b,
    tiny_glm130b,
)
from tiny_zoo import modules, rank_file, saved_ranks, with_tensor, write_ranks

from bminf.errors import ArgumentError, CheckpointError
from bminf.models import convert
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
HEADS = 4
TEXT = "a [MASK] b"


def in_dtype(made: TinyGLM, dtype: torch.dtype) -> TinyGLM:
    return replace(made, tensors={name: t.to(dtype) for name, t in made.tensors.items()})


def with_heads(**changed: Any) -> TinyGLM:
    """A GLM-130B whose rotary table tells the number of heads."""
    return tiny_glm130b(has_inv_freq=True, **changed)


MODELS: dict[str, Callable[[], TinyGLM]] = {
    "glm130b": with_heads,
    "glm130b in bfloat16": lambda: in_dtype(with_heads(), torch.bfloat16),
    "glm10b": tiny_glm10b,
    "glm10b of SAT, in float32": lambda: in_dtype(tiny_glm10b().as_sat(), torch.float32),
}


def write(folder: Path, made: TinyGLM, degree: int = 1, **beside: Any) -> Path:
    """The weights alone, without a configuration."""
    return write_ranks(folder, made.ranks(degree), **beside)


def expect(folder: Path, made: TinyGLM, degree: int, bits: int | None = None) -> None:
    """The ranks of `folder`: names in order, dtypes and bytes."""
    found, wanted = modules(folder), made.ranks(degree, bits)
    assert [list(rank) for rank in found] == [list(rank) for rank in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
            assert ours[name].is_contiguous()


@pytest.mark.parametrize(("source", "target"), [(1, 4), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_a_degree_comes_from_another(model: str, source: int, target: int, tmp_path: Path) -> None:
    made = MODELS[model]()
    write(tmp_path / "a", made, source)
    reshard(tmp_path / "a", tmp_path / "b", target, num_attention_heads=HEADS)
    expect(tmp_path / "b", made, target)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_each_rank_is_quantized_by_itself(degree: int, bits: int, tmp_path: Path) -> None:
    made = with_heads()
    reshard(write(tmp_path / "a", made, 2), tmp_path / "b", degree, bits)
    expect(tmp_path / "b", made, degree, bits)


def test_glm130b_has_one_tracker_and_nothing_beside_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "a", with_heads(), 2, optimizer=None)
    reshard(tmp_path / "a", tmp_path / "b", 1)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"7", "latest"}
    assert (tmp_path / "b" / "latest").read_text() == "7"
    assert [set(saved) for saved in saved_ranks(tmp_path / "b")] == [{"module"}]


def test_glm10b_has_two_trackers_and_its_iteration_and_degree(tmp_path: Path) -> None:
    write(tmp_path / "a", tiny_glm10b(), 2, mp_world_size=2)
    reshard(tmp_path / "a", tmp_path / "b", 4, num_attention_heads=HEADS)
    trackers = ("latest", "latest_checkpointed_iteration.txt")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"7", *trackers}
    assert [(tmp_path / "b" / name).read_text() for name in trackers] == ["7", "7"]
    for saved in saved_ranks(tmp_path / "b"):
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
    write_ranks(tmp_path / "a", tiny_glm10b().ranks(1), folder, tracker=None, **beside)
    reshard(tmp_path / "a" / folder, tmp_path / "b", 2, num_attention_heads=HEADS)
    assert (tmp_path / "b" / "latest").read_text() == iteration
    saved = torch.load(tmp_path / "b" / iteration / "mp_rank_01_model_states.pt")
    assert saved.get("iteration") == (300 if "300" in folder else beside.get("iteration"))


@pytest.mark.parametrize("prefix", ["", "glm."])
def test_glm10b_comes_from_its_hugging_face_form(prefix: str, tmp_path: Path) -> None:
    made = tiny_glm10b()
    made.write_huggingface(tmp_path / "a", prefix=prefix)
    (tmp_path / "b").mkdir()  # an empty folder is filled
    reshard(tmp_path / "a", tmp_path / "b", 2, num_attention_heads=HEADS)
    expect(tmp_path / "b", made, 2)
    assert (tmp_path / "b" / "latest").read_text() == "release"


# ---- the number of heads -------------------------------------------------------------------------


def test_joining_whole_ranks_needs_no_number_of_heads(tmp_path: Path) -> None:
    made = tiny_glm10b()
    write(tmp_path / "a", made, 4)
    for degree in (1, 2, 4):
        reshard(tmp_path / "a", tmp_path / str(degree), degree)
        expect(tmp_path / str(degree), made, degree)
    with pytest.raises(ArgumentError, match=r"degree=8 has to divide, is unknown; give a"):
        reshard(tmp_path / "a", tmp_path / "b", 8)
    reshard(tmp_path / "a", tmp_path / "b", 8, num_attention_heads=8)


# ---- bad input: an error that leaves nothing -----------------------------------------------------


def quantized(folder: Path) -> None:
    write_ranks(folder / "a", tiny_glm130b().ranks(2, 8))


def rank_missing(folder: Path) -> None:
    rank_file(write(folder / "a", with_heads(), 4), 1).unlink()


def another_layout(folder: Path) -> None:
    (folder / "a").mkdir()
    torch.save(tiny_glm130b().tensors, folder / "a" / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    """Found in the middle of writing."""
    made = with_heads()
    made.tensors["transformer.layers.1.mlp.dense_4h_to_h.weight"][3, 1] = torch.nan
    write(folder / "a", made)


def ranks_differ(folder: Path) -> None:
    ranks = with_heads().ranks(2)
    ranks[1]["transformer.final_layernorm.bias"] += 1
    write_ranks(folder / "a", ranks)


def without_heads(folder: Path) -> None:
    write(folder / "a", tiny_glm130b())


def with_shape(name: str, *shape: int) -> Callable[[Path], object]:
    """One whose tensor has this shape; of shape (): lacks it."""
    tensor = torch.ones(shape) if shape else None
    return lambda f: write(f / "a", with_tensor(with_heads(num_layers=1), name, tensor))


def of_sizes(**sizes: int) -> Callable[[Path], object]:
    return lambda f: write(f / "a", with_heads(**sizes))


LAYER = "transformer.layers.0"
Make = Callable[[Path], object]
BAD: dict[str, tuple[Make, dict[str, Any], type[Exception], str]] = {
    "heads": (
        of_sizes(), {"degree": 8}, ArgumentError, "divide the 4 attention heads of .*1, 2, 4$"
    ),
    "heads of another number": (
        of_sizes(), {"num_attention_heads": 8}, ArgumentError, "=8; accepted for .*: 4, or None"
    ),
    "heads that are not told": (
        without_heads, {"degree": 8}, ArgumentError, "with num_attention_heads"
    ),
    "heads of no width": (
        without_heads, {"num_attention_heads": 5}, ArgumentError, "=5; accepted for .* of 64, or"
    ),
    "not finite": (
        not_finite, {"bits": 8}, CheckpointError, r"4h_to_h\.weight' in .* quantized: .* NaN"
    ),
    "ranks differ": (
        ranks_differ, {"degree": 1}, CheckpointError, "should be the same, but differ"
    ),
    "inner": (
        of_sizes(inner_hidden_size=98), {"degree": 4}, ArgumentError, "the 98 inner .*: 1, 2$"
    ),
    "vocabulary": (
        with_shape("transformer.word_embeddings.weight", 22, 64), {"degree": 4}, ArgumentError,
        "22 vocabulary rows .*: 1, 2$",
    ),
    "all": (
        of_sizes(), {"degree": 5}, ArgumentError, "104 vocab.* and the 64 hidden.* and the 96 in"
    ),
    "odd columns": (
        of_sizes(inner_hidden_size=34), {"bits": 4}, ArgumentError,
        r"4h_to_h\.weight' has 17 columns a rank .*=2",
    ),
    "bits of glm10b": (
        lambda f: write(f / "a", tiny_glm10b()), {"bits": 8}, ArgumentError, "holds GLM-10B"
    ),
    "quantized": (quantized, {}, CheckpointError, r"a is quantized, each rank .* re-sharded; give"),
    "quantized again": (quantized, {"bits": 4}, CheckpointError, "a is quantized, each rank"),
    "another model": (
        lambda f: write_ranks(f / "a", [{"word_embeddings.weight": torch.ones(4, 4)}]), {},
        CheckpointError, "no checkpoint of GLM-130B or GLM-10B",
    ),
    "another layout": (another_layout, {}, CheckpointError, "it is a huggingface folder"),
    "a rank missing": (rank_missing, {}, CheckpointError, "lacks the file of rank 01"),
    "a tensor missing": (
        with_shape(f"{LAYER}.attention.dense.weight"), {}, CheckpointError,
        r"holds no 'attention\.dense",
    ),
    "no matrix": (
        with_shape("transformer.word_embeddings.weight", 24), {}, CheckpointError,
        r"\(24,\); it should be a matrix",
    ),
    "one odd tensor": (
        with_shape(f"{LAYER}.attention.query_key_value.bias", 95), {}, ArgumentError,
        r"0\.attention.*\.bias' in .*shape \(95,\)",
    ),
    "no source": (lambda f: None, {}, CheckpointError, "a does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_leaves_nothing(case: str, tmp_path: Path) -> None:
    make, arguments, error, message = BAD[case]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = {"source": tmp_path / "a", "destination": tmp_path / "b", "degree": 2, **arguments}
    with pytest.raises(error, match=message):
        reshard(**given)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", with_heads())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot be written"):
        reshard(tmp_path / "a", tmp_path / "file" / "b", 2)


# ---- convert(..., tp=N): what is put beside the weights ------------------------------------------


def same(load: Loader, folder: Path, made: TinyGLM, wanted: Path) -> None:
    given = {"tokenizer": ice_tokenizer()} if made.name == "glm130b" else {}
    logits = [load(made.name, checkpoint=path, **given).logits(TEXT) for path in (folder, wanted)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["original", "huggingface", "chinese", "glm130b"])
def test_configuration_and_vocabulary_go_along(kind: str, load: Loader, tmp_path: Path) -> None:
    made = tiny_glm130b() if kind == "glm130b" else tiny_glm10b(is_chinese=kind == "chinese")
    write = made.write_huggingface if kind == "huggingface" else made.write_original
    source = write(tmp_path / "a" / "from")
    cut = convert(source, tmp_path / "b" / "to", tp=2)
    beside = {path.name for path in made.write_beside(tmp_path / "beside").iterdir()}
    assert beside <= {path.name for path in cut.iterdir()}
    for name in beside:
        assert (cut / name).read_bytes() == (source / name).read_bytes()
    same(load, cut, made, source)
    same(load, convert(cut, tmp_path / "c" / "again", tp=1), made, source)


@pytest.mark.parametrize("is_chinese", [False, True])
def test_what_is_given_goes_along(is_chinese: bool, load: Loader, tmp_path: Path) -> None:
    """A configuration as a mapping, and a vocabulary under any name."""
    made = tiny_glm10b(is_chinese=is_chinese)
    source = made.write_original(tmp_path / "a" / "from")
    (source / "config.json").unlink()
    vocabulary = tmp_path / "elsewhere"
    vocabulary.mkdir()
    for path in [*source.glob("*.json"), *source.glob("merges.txt"), *source.glob("*.model")]:
        path.rename(vocabulary / path.name)
    cut = convert(source, tmp_path / "b" / "to", tp=4, config=made.config, tokenizer=vocabulary)
    same(load, cut, made, made.write_original(tmp_path / "c" / "whole"))


def test_what_lies_in_the_parent_goes_along(load: Loader, tmp_path: Path) -> None:
    made = tiny_glm10b()
    source = made.write_original(tmp_path / "a" / "from")
    for path in [*source.glob("*.json"), source / "merges.txt"]:
        path.rename(path.parents[1] / path.name)
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "model_config.json")
    cut = convert(source, tmp_path / "b" / "to", tp=2)
    same(load, cut, made, source)


def test_sizes_that_only_the_shapes_tell_are_written(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bminf.arch import glm

    monkeypatch.setitem(glm._GLM_HEADS, "glm-10b", {64: 4})
    made = tiny_glm10b()
    source = made.write_original(tmp_path / "a" / "from")
    wanted = load("glm10b", checkpoint=source).config
    (source / "config.json").unlink()
    cut = convert(source, tmp_path / "b" / "to", tp=2)
    monkeypatch.undo()  # now only the file tells it
    assert json.loads((cut / "config.json").read_text())["num_attention_heads"] == 4
    assert load("glm10b", checkpoint=cut).config == wanted


def test_what_is_nowhere_is_said(tmp_path: Path) -> None:
    made = tiny_glm10b()
    bare = write(tmp_path / "a" / "from", made, 2)
    with (
        pytest.warns(UserWarning, match="has no vocabulary .*no tokenizer for glm10b") as warned,
        pytest.warns(UserWarning, match="has no configuration.* give config="),
    ):
        cut = convert(bare, tmp_path / "b" / "to", tp=1)
    assert {warning.filename for warning in warned} == {__file__}
    assert {path.suffix for path in cut.iterdir()} == {"", ".txt"}  # the weights are there


def test_a_wrong_vocabulary_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_glm10b().write_original(tmp_path / "a" / "from")
    (tmp_path / "empty" / "in").mkdir(parents=True)
    for given, error, words in (
        (tmp_path / "nowhere", ArgumentError, "no such file or folder.* leave tokenizer out"),
        (tmp_path / "empty" / "in", CheckpointError, "no tokenizer for glm10b: looked for"),
        (3, ArgumentError, "tokenizer=3"),
    ):
        with pytest.raises(error, match=words):
            convert(source, tmp_path / "b" / "to", tp=2, tokenizer=given)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_convert(bits: int, tmp_path: Path) -> None:
    """How it loads is in test_fill.py."""
    made = tiny_glm130b()
    source = made.write_original(tmp_path / "a" / "from", 2)
    cut = convert(source, tmp_path / "b" / "to", {4: "int4-row", 8: "int8"}[bits], tp=4)
    expect(cut, made, 4, bits)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"tp": 3}, ArgumentError, "does not divide the 280 vocabulary rows and the 64 hidden col"),
        ({"tp": 8}, ArgumentError, "does not divide the 4 attention heads"),
        ({"tp": 0}, ArgumentError, "tp=0; accepted: an int of at least 1"),
        ({"dtype": torch.float16}, ArgumentError, "leave dtype out"),
        ({"tokenizer": "nowhere"}, ArgumentError, "leave tokenizer out"),
        ({"head_quantization": "int8"}, ArgumentError, "leave head_quantization out"),
        ({"max_shard_size": "1GB"}, ArgumentError, "leave max_shard_size out"),
        ({"quantization": Format(4, 32)}, ArgumentError, "own code cannot read; accepted with tp"),
        ({"quantization": "int8"}, ArgumentError, "GLM-10B, whose code has no quant"),
        ({"quantization": "int3"}, ArgumentError, "quantization='int3'"),
        ({"model": "glm"}, ArgumentError, "model='glm'; accepted: .*glm130b, glm10b"),
        ({"model": "glm130b"}, CheckpointError, "holds GLM-10B, not GLM-130B"),
        ({"config": 3}, ArgumentError, "config is a int; accepted: .*GLMConfig"),
        ({"config": {"num_attention_heads": 5}}, CheckpointError, "hidden_size=64 is not a mult"),
    ],
    ids=str,
)
def test_arguments_of_convert_with_tp(
    given: dict[str, Any], error: type[Exception], words: str, folders: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=words):
        convert(folders["glm10b"], tmp_path / "to", **{"tp": 2, **given})
    assert list(tmp_path.iterdir()) == []


def test_only_a_glm_has_ranks_to_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only those have model-parallel files"):
        convert(folders["cpm1"], tmp_path / "to", tp=2)
    assert list(tmp_path.iterdir()) == []
