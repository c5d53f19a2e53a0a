"""bminf/models/convert.py, of a GLM: what it writes is the same model, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import ice_tokenizer, tiny_glm10b, tiny_glm130b, tokenizer_of

from bminf.arch.registry import checkpoint_in
from bminf.errors import ArgumentError, CheckpointError
from bminf.models import GLM, convert
from bminf.quantization.packed import INT4, INT8, Format
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer

Loader = Callable[..., Any]
NAMES = ("glm130b", "glm10b")
TEXT = "the blocks of a [MASK] wait on the host"
HALF_GROUPS = Format(8, 32)

each_model = pytest.mark.parametrize("name", NAMES)


PACKINGS: list[tuple[Any, Any]] = [
    ("auto", None), ("int4", "int8"), ("int4-row", None), ("int8", "int4"), (None, None),
    (None, "int8"), (HALF_GROUPS, HALF_GROUPS),
]  # fmt: skip


@each_model
@pytest.mark.parametrize(("quantization", "head"), PACKINGS, ids=str)
def test_a_converted_folder_is_the_same_model(
    name: str, quantization: Any, head: Any, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(
        folders[name], tmp_path / "b", quantization, tokenizer=tokenizer_of(name),
        head_quantization=head,
    )  # fmt: skip
    asked = "int4" if quantization == "auto" else quantization
    original = load(name, quantization=asked, head_quantization=head)
    logits = original.logits(TEXT)
    assert float(logits.std()) > 1
    model = load(name, checkpoint=made, quantization=asked)
    assert torch.equal(model.logits(TEXT), logits)
    # Cut for this dtype, too, which is not that of the folder.
    assert model.plan.blocks == original.plan.blocks
    settings = {"quantization": asked, "head_quantization": head}
    streamed = load(name, checkpoint=made, memory_limit=model.plan.least_limit, **settings)
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), logits)
    if asked is not None:  # the default stands for what the folder has
        assert torch.equal(load(name, checkpoint=made, quantization="int4").logits(TEXT), logits)
    words = r"is packed as .*leave quantization out|has a packed head and layers that are not"
    for other in {INT8, INT4, Format(4), None} - {model_form(model), INT4}:
        if asked is None and head is None:
            continue
        with pytest.raises(ArgumentError, match=words):
            load(name, checkpoint=made, quantization=other)


def model_form(model: Any) -> Format | None:
    return getattr(model.model.layers[0].attention.qkv, "form", None)


@each_model
def test_what_convert_left_unpacked_is_packed_when_it_is_loaded(
    name: str, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = convert(folders[name], tmp_path / "plain", None, tokenizer=tokenizer_of(name))
    assert json.loads((plain / "config.json").read_text())["exceptions"] == {}
    for quantization, head in (("int4", None), ("int8", "int8"), ("int4-row", "int4")):
        packed = {"quantization": quantization, "head_quantization": head}
        expected = load(name, **packed).logits(TEXT)
        assert torch.equal(load(name, checkpoint=plain, **packed).logits(TEXT), expected)
        again = convert(plain, tmp_path / quantization, tokenizer=tokenizer_of(name), **packed)
        model = load(name, checkpoint=again, quantization="int4")
        assert torch.equal(model.logits(TEXT), expected)


@each_model
def test_a_head_that_is_packed_leaves_the_embedding_as_it_is(
    name: str, folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    files = {}
    for head in (None, "int8"):
        to = tmp_path / str(head)
        made = convert(folders[name], to, tokenizer=tokenizer_of(name), head_quantization=head)
        files[head] = set(checkpoint_in(made).tensors)
    assert "embed_tokens.weight" in files["int8"] and "lm_head.parts.0.qweight" in files["int8"]
    assert "embed_tokens.weight" not in files[None] and "lm_head.parts.0.weight" in files[None]
    with pytest.raises(ArgumentError, match=r"is .*bits=4.*, but the head .*bits=8"):
        load(name, checkpoint=tmp_path / "int8", quantization="int4", head_quantization="int4")
    with pytest.raises(ArgumentError, match=r"is .*, but the head in .* as None"):
        load(name, checkpoint=tmp_path / "None", quantization="int4", head_quantization="int4")


@pytest.mark.parametrize("kind", ["glm130b", "english", "chinese"])
def test_the_folder_alone_is_enough(kind: str, tmp_path: Path) -> None:
    """With 20000 image tokens, as GLM-130B's vocabulary is read from its file."""
    made = tiny_glm130b(image_offset=20000) if kind == "glm130b" else tiny_glm10b(
        is_chinese=kind == "chinese"
    )  # fmt: skip
    folder = made.write_original(tmp_path / "a", 2)
    with GLM(folder, device="cpu") as model:
        answers = [model.generate(text, 6, seed=1) for text in ("the layer", TEXT)]
        assert model.tokenizer.vocab_size > 20000 or kind != "glm130b"
    moved = convert(folder, tmp_path / "there" / "b").rename(tmp_path / "here")
    with GLM(moved) as model:
        assert [model.generate(text, 6, seed=1) for text in ("the layer", TEXT)] == answers
    assert json.loads((moved / "config.json").read_text())["model"] == made.name


def test_the_rotary_table_is_no_part_of_the_folder(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    made = convert(folders["glm130b"], tmp_path / "b", tokenizer=ice_tokenizer())
    text = " ".join(["the blocks wait"] * 9)
    packed = {"quantization": "int4"}
    found = {
        precision: load("glm130b", checkpoint=made, rotary_precision=precision, **packed)
        for precision in (None, "float16", "float32")
    }
    logits = {precision: model.logits(text) for precision, model in found.items()}
    assert torch.equal(logits[None], logits["float16"])
    assert not torch.equal(logits["float32"], logits["float16"])
    original = load("glm130b", rotary_precision="float32", **packed)
    assert torch.equal(logits["float32"], original.logits(text))


def test_a_converted_folder_carries_the_settings_of_its_tokenizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(folders["glm130b"], tmp_path / "b", tokenizer=ice_tokenizer())
    with GLM(made, device="cpu") as model:  # other image tokens than in the published model
        assert model.tokenizer.masks == ice_tokenizer().masks
    chinese = tiny_glm10b(is_chinese=True).write_original(tmp_path / "c")
    fixed = CogPretrainTokenizer(chinese / "cog-pretrain.model", fixed_commands=True)
    made = convert(chinese, tmp_path / "d", tokenizer=fixed)
    with GLM(made, device="cpu") as model:
        assert model.tokenizer.masks == fixed.masks
        assert model.tokenizer.masks["[gMASK]"] != model.tokenizer.eop_id
    written = json.loads((made / "config.json").read_text())
    del written["checksums"]  # as an earlier version wrote it
    for settings in ({"fixed_commands": True, "more": 1}, [1]):
        (made / "config.json").write_text(json.dumps({**written, "tokenizer": settings}))
        with pytest.raises(CheckpointError, match=r"settings|tokenizer is \[1\]"):
            GLM(made, device="cpu")


@pytest.mark.parametrize(
    ("bits", "degree", "head"),
    [(4, 1, "int8"), (4, 2, None), (4, 4, "int4"), (8, 1, None), (8, 2, "int8")],
)
def test_converting_a_quantized_folder_rounds_nothing(
    bits: int, degree: int, head: Any, load: Loader, tmp_path: Path,
) -> None:  # fmt: skip
    rows = {4: "int4-row", 8: "int8"}[bits]
    folder = tiny_glm130b().write_original(tmp_path / "a", degree, bits)
    model = load("glm130b", checkpoint=folder, quantization="int4", head_quantization=head)
    expected = model.logits(TEXT)
    for quantization in ("auto", rows):
        made = convert(
            folder, tmp_path / quantization, quantization, tokenizer=ice_tokenizer(),
            head_quantization=head,
        )  # fmt: skip
        model = load("glm130b", checkpoint=made, quantization=rows, head_quantization=head)
        assert torch.equal(model.logits(TEXT), expected)
    streamed = load(
        "glm130b", checkpoint=made, quantization="int4", memory_limit=model.plan.least_limit
    )
    assert streamed.plan.streamed and torch.equal(streamed.logits(TEXT), expected)
    for wrong in (None, {4: "int8", 8: "int4-row"}[bits]):
        with pytest.raises(ArgumentError, match=rf"packed as Format\(bits={bits}"):
            load("glm130b", checkpoint=made, quantization=wrong)
    with pytest.raises(CheckpointError, match="is packed already"):
        convert(made, tmp_path / "again", tokenizer=ice_tokenizer())
    with pytest.raises(CheckpointError, match="it is a bminf folder"):
        convert(made, tmp_path / "again", tp=1)


@pytest.mark.parametrize(("bits", "degree"), [(4, 2), (8, 1)])
def test_converting_a_quantized_folder_to_no_packing(
    bits: int, degree: int, load: Loader, tmp_path: Path
) -> None:
    folder = tiny_glm130b().write_original(tmp_path / "a", degree, bits)
    made = convert(folder, tmp_path / "b", None, tokenizer=ice_tokenizer())
    expected = load("glm130b", checkpoint=folder, quantization=None).logits(TEXT)
    assert torch.equal(load("glm130b", checkpoint=made).logits(TEXT), expected)


def test_a_converted_folder_that_is_damaged(refuse: Callable[..., None], tmp_path: Path) -> None:
    made = convert(
        tiny_glm10b().write_original(tmp_path / "a"), tmp_path / "b", head_quantization="int8"
    )
    written = json.loads((made / "config.json").read_text())
    del written["checksums"]  # as an earlier version wrote it
    config = written["config"]
    for changed, words in [
        ({"exceptions": None}, "exceptions is None; convert the original anew"),
        ({"exceptions": {}}, "lacks|is torch.int8|unexpected tensors"),
        ({"exceptions": {"lm_head.parts.0": {"bits": 5}}}, "quantization is {'bits': 5}"),
        ({"quantization": None}, "lacks"),
        ({"config": {**config, "num_head_parts": 1}}, "has|lacks"),
        ({"config": {**config, "num_head_parts": 0}}, "num_head_parts"),
        ({"config": {**config, "num_hidden_layers": 3}}, r"lacks 'layers\.2\."),
        ({"model": "glm130b"}, "no tokenizer for glm130b"),
    ]:
        (made / "config.json").write_text(json.dumps({**written, **changed}))
        refuse("glm10b", made, CheckpointError, words, quantization="int4")
