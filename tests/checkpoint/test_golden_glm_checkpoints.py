"""GLM-130B's and GLM-10B's own checkpoints: read, re-sharded and quantized as their authors do.

What a set holds makes the tests: one for each folder, and for each direction between two of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from golden import for_each, golden
from golden_glm import GLMSet
from tiny_glm import GLM130B_FUSED, dequantized, reshard
from tiny_zoo import FUSED, join, saved_ranks

from bminf.arch.glm import GLM10B, GLM130B
from bminf.arch.registry import checkpoint_in
from bminf.checkpoint.quantized import Quantized
from bminf.quantization.packed import dequantize

Weights = dict[str, torch.Tensor]
MODELS = ("glm130b", "glm10b")
TABLES = {
    "glm130b": (GLM130B.tensors, GLM130B.original_name),
    "glm10b": (GLM10B.tensors, GLM10B.original_name),
}
FUSED_IN = {"glm130b": GLM130B_FUSED, "glm10b": FUSED}
_SCALE = "_scale"


@lru_cache
def saved(folder: Path) -> list[dict[str, Any]]:
    return saved_ranks(folder)


def bits_of(folder: Path) -> int | None:
    """None of floating point; codes of 4 bits are half as many as the columns."""
    module = saved(folder)[0]["module"]
    for name, tensor in module.items():
        if name.endswith("query_key_value.weight") and name + _SCALE in module:
            return 8 * tensor.shape[1] // int(module[norm_of(name)].shape[0])
    return None


def norm_of(name: str) -> str:
    return name.replace("attention.query_key_value", "input_layernorm")


def directions(given: GLMSet) -> Iterator[list[str]]:
    for source in given.folders(packed=False):
        for target in given.folders():
            if target != source:
                yield [source, target]


def heads(given: GLMSet) -> int:
    config = json.loads((given.path / "config.json").read_text())
    return int(config["model"]["num_attention_heads"])


def convert(given: GLMSet, source: Path, target: str, destination: Path) -> None:
    """To what `target` is."""
    folder = given.path / target
    reshard(source, destination, len(saved(folder)), bits_of(folder), heads(given))


def expect_same(found: Path, expected: Path, source: Path) -> None:
    """The same files: names, keys in order, bytes; inv_freq where the source has it."""
    ours, theirs = saved_ranks(found), saved(expected)
    assert len(ours) == len(theirs)
    kept = frequencies(saved(source)[0]["module"])
    for mine, their in zip(ours, theirs, strict=True):
        assert set(mine) == set(their)
        assert {k: v for k, v in mine.items() if k != "module"} == {
            k: v for k, v in their.items() if k != "module"
        }
        assert frequencies(mine["module"]) == kept
        known = kept & frequencies(their["module"])
        expect_equal(without(mine["module"], known), without(their["module"], known))


def expect_equal(ours: Weights, theirs: Weights) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        mine, their = (t.contiguous().view(-1).view(torch.uint8) for t in (ours[name], tensor))
        assert torch.equal(mine, their), name


def frequencies(module: Weights) -> set[str]:
    return {name for name in module if name.endswith(".inv_freq")}


def without(module: Weights, known: set[str]) -> Weights:
    """All but the inv_freq that only one side has."""
    return {n: t for n, t in module.items() if not n.endswith(".inv_freq") or n in known}


@for_each(MODELS, directions)
def test_golden_folders_are_resharded_to_each_other(
    name: str, case: list[str], tmp_path: Path
) -> None:
    given, (source, target) = golden(name), case
    convert(given, given.path / source, target, tmp_path / "new")
    expect_same(tmp_path / "new", given.path / target, given.path / source)
    for tracker in (given.path / target).glob("latest*"):
        assert (tmp_path / "new" / tracker.name).read_text() == tracker.read_text().strip()


@for_each(MODELS, GLMSet.folders)
def test_golden_folders_are_read_as_one_model(name: str, case: str) -> None:
    """Codes as codes times scale, exactly."""
    folder = golden(name).path / case
    (tensors, their_name), bits = TABLES[name], bits_of(folder)
    found = tensors(checkpoint_in(folder))
    ranks = [dequantized(rank["module"], bits) for rank in saved(folder)]
    whole = without(join(ranks, FUSED_IN[name]), set())
    assert {their_name("original", ours) for ours in found} == set(whole)
    num_quantized = 0
    for ours, stored in found.items():
        expected = whole[their_name("original", ours)]
        assert stored.shape == tuple(expected.shape)
        assert torch.equal(stored.read(), expected), ours
        if isinstance(stored, Quantized):
            num_quantized += 1
            assert stored.bits == bits
            assert torch.equal(dequantize(stored.packed(), torch.float16), expected), ours
        else:
            assert stored.dtype == expected.dtype, ours
    scales = [key for key in saved(folder)[0]["module"] if key.endswith(_SCALE)]
    assert num_quantized == len(scales) and bool(scales) == (bits is not None)


@for_each(MODELS, GLMSet.folders)
def test_golden_folders_are_recognised(name: str, case: str) -> None:
    folder = golden(name).path / case
    for path in (folder, *folder.glob("latest*"), *folder.glob("*/mp_rank_00_*")):
        opened = checkpoint_in(path)
        assert opened.kind == "original"
        assert list(opened.tensors) == list(saved(folder)[0]["module"])
