"""bminf/models/fill.py, and what assemble.py packs: the authors' own quantized folders,
weights that cannot be packed, and where the embedding of a GLM lies."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import (
    GLM130B_FUSED,
    TinyGLM,
    dequantized,
    ice_tokenizer,
    tiny_glm10b,
    tiny_glm130b,
    tiny_model,
    tokenizer_of,
)
from tiny_zoo import join

from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.embedding import HostEmbedding
from bminf.models import convert
from bminf.ops.dequantize import dequantize_weight
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
Refuse = Callable[..., None]
TEXT = "the blocks of a [MASK] wait on the host"
HALF_GROUPS = Format(8, 32)


# ---- the authors' quantized folders --------------------------------------------------------------


def unpacked(made: TinyGLM, bits: int, degree: int) -> TinyGLM:
    """The weights that the authors compute with."""
    ranks = [dequantized(rank, bits) for rank in made.ranks(degree, bits)]
    return replace(made, tensors=join(ranks, GLM130B_FUSED))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """packed(4, 2): a GLM-130B in 4 bits, of two ranks."""
    root = tmp_path_factory.mktemp("packed")

    def folder(bits: int, degree: int) -> Path:
        found = root / f"int{bits}_tp{degree}"
        return found if found.exists() else tiny_glm130b().write_original(found, degree, bits)

    return folder


ALL_PACKED = [(bits, degree) for bits in (4, 8) for degree in (1, 2, 4)]


@pytest.mark.parametrize(("bits", "degree"), ALL_PACKED)
def test_a_quantized_folder_keeps_its_codes(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader
) -> None:
    """What belongs to one rank has a scale a row, what lies across ranks one a rank and row."""
    made = unpacked(tiny_glm130b(), bits, degree)
    model = load("glm130b", checkpoint=packed(bits, degree), quantization="int4")
    layer = model.model.layers[1]
    for linear, name in (
        (layer.attention.qkv, "attention.query_key_value"),
        (layer.attention.out, "attention.dense"),
        (layer.feed_forward.up, "mlp.dense_h_to_4h"),
        (layer.feed_forward.down, "mlp.dense_4h_to_h"),
    ):
        is_across = degree > 1 and name in ("attention.dense", "mlp.dense_4h_to_h")
        width = linear.in_features // degree if is_across else None
        assert linear.form == Format(bits, width)
        exact = made.tensors[f"transformer.layers.1.{name}.weight"]
        assert torch.equal(dequantize_weight(linear.packed, torch.float16), exact)
        bias = made.tensors[f"transformer.layers.1.{name}.bias"]
        assert torch.equal(linear.bias, bias.float()) and bias.any()
    floats = load("glm130b", checkpoint=packed(bits, degree), quantization=None)
    assert torch.equal(floats.model.layers[1].feed_forward.down.weight, exact.float())
    streamed = load(
        "glm130b", checkpoint=packed(bits, degree), quantization="int4",
        memory_limit=model.plan.least_limit,
    )  # fmt: skip
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), model.logits(TEXT))


@pytest.mark.parametrize(("bits", "degree"), [(4, 1), (4, 4), (8, 2)])
def test_a_quantized_folder_takes_its_own_format_alone(
    bits: int, degree: int, packed: Callable[[int, int], Path], load: Loader, tmp_path: Path
) -> None:
    rows = {4: "int4-row", 8: "int8"}[bits]
    own = load("glm130b", checkpoint=packed(bits, degree), quantization="int4").logits(TEXT)
    model = load("glm130b", checkpoint=packed(bits, degree), quantization=rows)
    assert torch.equal(model.logits(TEXT), own)
    for other in ({"int8", "int4-row"} - {rows}) | {HALF_GROUPS, Format(4, 16, True)}:
        with pytest.raises(ArgumentError, match=f"holds codes of {bits} bits already"):
            load("glm130b", checkpoint=packed(bits, degree), quantization=other)
        with pytest.raises(ArgumentError, match=f"holds codes of {bits} bits already"):
            convert(packed(bits, degree), tmp_path / "b", other, tokenizer=ice_tokenizer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_while_loading_makes_the_authors_codes(
    bits: int, packed: Callable[[int, int], Path], load: Loader
) -> None:
    """Of one rank: 4 bits as the authors round them. 8 bits are ours, with scales in float32."""
    own = load("glm130b", quantization={4: "int4-row", 8: "int8"}[bits])
    theirs = load("glm130b", checkpoint=packed(bits, 1), quantization="int4")
    logits = own.logits(TEXT), theirs.logits(TEXT)
    assert torch.equal(*logits) is (bits == 4) and torch.allclose(*logits, atol=0.3)


# ---- what cannot be packed -----------------------------------------------------------------------

LAST = {
    "cpm1": "transformer.layers.2.mlp.dense_4h_to_h.weight",
    "glm130b": "transformer.layers.1.mlp.dense_4h_to_h.weight",
    "glm10b": "transformer.layers.1.mlp.dense_4h_to_h.weight",
}


@pytest.mark.filterwarnings("ignore:.*no sentencepiece model")
@pytest.mark.parametrize("name", LAST)
def test_weights_that_are_not_finite(
    name: str, refuse: Refuse, load: Loader, tmp_path: Path
) -> None:
    """Found while packing the last layer, when all else is loaded and streaming is prepared."""
    made = tiny_model(name)
    made.tensors[LAST[name]][5, 7] = math.nan
    folder = made.write_original(tmp_path / "a")
    words = rf"'{re.escape(LAST[name])}' in .*\.pt cannot be quantized"
    for quantization in ("int8", "int4"):
        limit = load(name, quantization=quantization).plan.least_limit
        settings = {"quantization": quantization, "memory_limit": limit}
        refuse(name, folder, CheckpointError, words, **settings)
        with pytest.raises(CheckpointError, match=words):
            convert(folder, tmp_path / "to", quantization, tokenizer=tokenizer_of(name))
        assert not (tmp_path / "to").exists()


def test_an_odd_number_of_columns(refuse: Refuse, load: Loader, tmp_path: Path) -> None:
    """In 4 bits two columns share a byte."""
    made = tiny_glm130b(inner_hidden_size=51)
    folder = made.write_original(tmp_path / "a")
    words = r"dense_4h_to_h\.weight' in .*\.pt has 51 columns, and in 4 bits two .*use \"int8\""
    for quantization in ("int4-row", "int4"):
        refuse("glm130b", folder, ArgumentError, words, quantization=quantization)
        with pytest.raises(ArgumentError, match=words):
            convert(folder, tmp_path / "to", quantization, tokenizer=ice_tokenizer())
    with pytest.raises(ArgumentError, match=r"dense_4h_to_h.* has 51 columns a rank with degree=1"):
        convert(folder, tmp_path / "to", "int4-row", tp=1)
    assert not (tmp_path / "to").exists()
    for quantization in ("int8", None):
        load("glm130b", checkpoint=folder, quantization=quantization).close()


def test_groups_of_an_odd_width(refuse: Refuse, load: Loader, tmp_path: Path) -> None:
    """Of 8 bits: 51 columns a rank, which two ranks have quantized."""
    folder = tiny_glm130b(inner_hidden_size=102).write_original(tmp_path / "a", 2, 8)
    words = r"dense_4h_to_h\.weight' in .* 2 groups of its 102 columns.*quantization=None"
    refuse("glm130b", folder, CheckpointError, words, quantization="int4")
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "to", tokenizer=ice_tokenizer())
    load("glm130b", checkpoint=folder, quantization=None).close()


# ---- the embedding, which stays on the host ------------------------------------------------------


def test_an_embedding_at_an_odd_place_in_its_file_is_not_copied(
    load: Loader, tmp_path: Path
) -> None:
    """In the older files of torch tensors begin anywhere; half of the time at an odd byte."""
    expected = load("glm10b").logits(TEXT)
    made, places = tiny_glm10b(), set()
    for padding in range(2):
        folder = made.write_original(tmp_path / str(padding), form="old", note="x" * padding)
        model = load("glm10b", checkpoint=folder)
        (part,) = model.model.embed_tokens._parts
        places.add(part.dtype)
        assert torch.equal(model.logits(TEXT), expected)
    assert places == {torch.uint8, torch.float16}


def test_nothing_stays_when_the_embedding_cannot_be_mapped(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = load("glm130b").plan.least_limit

    def gone(*arguments: Any) -> None:
        raise CheckpointError("gone")

    monkeypatch.setattr(HostEmbedding, "keep", gone)
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(CheckpointError, match="gone"):
        load("glm130b", memory_limit=limit)
    assert "bminf-reader" not in {thread.name for thread in threading.enumerate()} - before
