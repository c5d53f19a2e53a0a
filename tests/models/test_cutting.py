"""What convert(..., tp=N) puts beside the weights: the folder loads with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import TinyGLM, ice_tokenizer, tiny_glm10b, tiny_glm130b
from tiny_zoo import write_ranks

from bminf.errors import ArgumentError, CheckpointError
from bminf.models import convert

Loader = Callable[..., Any]
TEXT = "a [MASK] b"


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
    bare = write_ranks(tmp_path / "a" / "from", [made.rank(n, 2) for n in range(2)])
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
