"""bminf/models/source.py: every layout that the models are found in means the same model, bit for
bit, wherever its configuration and its vocabulary lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_glm130b, tiny_model
from tiny_zoo import CPM1_CONFIG, save, tiny, write_huggingface

from bminf.errors import CheckpointError
from bminf.models import BLOOM, CPM1, CPM2, EVA, GLM, convert

Loader = Callable[..., Any]
GPT_IDS = list(range(11, 31))
PROMPT, TARGET = list(range(11, 41)), list(range(12, 26))


def logits(model: Any) -> torch.Tensor:
    """Of some ids, with a prompt long enough for shared buckets; of a GLM, of a text."""
    if isinstance(model, GLM):
        return model.logits("the blocks of a [MASK] wait on the host")
    return (
        model.logits(GPT_IDS) if isinstance(model, CPM1 | BLOOM) else model.logits(PROMPT, TARGET)
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The logits of the authors' layout with one rank, filled as they are asked for."""
    return {}


@pytest.fixture
def same(load: Loader, expected: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """same("cpm2", folder): loads it, and its logits are those of the authors' layout."""

    def check(name: str, folder: Path, quantization: str | None = None, **arguments: Any) -> Any:
        key = f"{name}, {quantization}"
        if key not in expected:
            expected[key] = logits(load(name, quantization=quantization))
        model = load(name, checkpoint=folder, quantization=quantization, **arguments)
        assert torch.equal(logits(model), expected[key])
        return model

    return check


# ---- layouts: those that the golden sets have are compared there, too ----------------------------

Writer = Callable[[Any, Path], Path]
NO_BUCKETS = {"position_bias_num_buckets": None, "position_bias_max_distance": None}
LAYOUTS: dict[str, Writer] = {
    "cpm1, 4 ranks": lambda made, to: made.write_original(to, 4, form="old", has_rank_folders=True),
    "cpm2, 2 ranks": lambda made, to: made.write_original(to, 2),
    "eva, 4 ranks": lambda made, to: made.write_original(to, 4, has_rank_folders=True),
    "cpm2, modelcenter": lambda made, to: made.write_modelcenter(to, "old"),
    "cpm2, modelcenter's defaults": lambda made, to: made.write_modelcenter(to, **NO_BUCKETS),
    "cpm1, bin": lambda made, to: made.write_huggingface(to, "old"),
    "cpm1, sharded": lambda made, to: made.write_huggingface(to, "sharded"),
    "eva, bin": lambda made, to: made.write_huggingface(to, "zip"),
    "eva, safetensors": lambda made, to: made.write_huggingface(to, "safetensors"),
    "glm130b, 2 ranks": lambda made, to: made.write_original(to, 2, has_rank_folders=True),
    "glm130b, 4 ranks": lambda made, to: made.write_original(to, 4, form="old"),
    "glm130b, inv_freq": lambda _, to: tiny_glm130b(has_inv_freq=True).write_original(to, 2),
    "glm10b, 2 ranks": lambda made, to: made.write_original(to, 2, mp_world_size=2),
    "glm10b, bin": lambda made, to: made.write_huggingface(to),
    "glm10b, sharded": lambda made, to: made.write_huggingface(to, "sharded", "glm."),
    "bloom, bin": lambda made, to: made.write_huggingface(to),
    "bloom, sharded": lambda made, to: made.write_huggingface(to, "sharded", "transformer."),
    "bloom, safetensors": lambda made, to: made.write_huggingface(to, "safetensors"),
    "bloom, 3 ranks": lambda made, to: made.write_original(to, 3),
    "glm10b, SAT": lambda made, to: made.as_sat().write_original(to, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(
    layout: str, same: Callable[..., Any], tmp_path: Path
) -> None:
    name = layout.partition(",")[0]
    folder = LAYOUTS[layout](tiny_model(name), tmp_path)
    for quantization in (None, "int4"):
        same(name, folder, quantization)


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_bminf1(name: str, load: Loader, tmp_path: Path) -> None:
    """In float32, codes * scale; with quantization="int8", the codes of the file."""
    made = tiny(name, attn_scale=False) if name == "eva" else tiny(name)
    model = load(name, checkpoint=made.write_bminf1(tmp_path / "a"), config=made.config)
    plain = load(name, checkpoint=made.dequantized().write_original(tmp_path / "b"))
    assert torch.equal(logits(model), logits(plain))
    packed = load(name, checkpoint=tmp_path / "a", config=made.config, quantization="int8")
    tree = made.bminf1_tree()
    where = "layers.0" if name == "cpm1" else "encoder.layers.0"
    own = tree["layers" if name == "cpm1" else "enc_layers"]["0"]["self_attn"]
    weight = packed.model.get_submodule(f"{where}.attention.qkv").packed
    parts = [own[f"project_{x}"] for x in "qkv"]
    codes = torch.cat([part["weight"] for part in parts])
    assert torch.equal(weight.qweight[:, : codes.shape[1]], codes)
    assert torch.equal(weight.scale, torch.cat([part["scale"] for part in parts]).float())
    assert torch.allclose(logits(packed), logits(model), atol=2e-3)


@pytest.mark.parametrize(("is_scaled", "is_tied"), [(False, True), (True, False), (True, True)])
def test_modelcenter_with_length_scale_and_tied_weights(
    is_scaled: bool, is_tied: bool, load: Loader, tmp_path: Path
) -> None:
    """Sizes are powers of 4, so that their roots round nothing."""
    made = tiny("cpm2", d_model=64, d_ff=256, d_kv=4)
    if is_tied:
        made.tensors["lm_head.weight"] = made.tensors["word_embeds.weight"]
    folder = made.write_modelcenter(tmp_path / "a", length_scale=is_scaled, tied=is_tied)
    plain = made.write_original(tmp_path / "b")
    found = [logits(load("cpm2", checkpoint=path)) for path in (folder, plain)]
    assert torch.equal(*found)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_huggingface_with_what_old_files_have_besides(
    prefix: str, same: Callable[..., Any], tmp_path: Path
) -> None:
    made = tiny("cpm1")
    tensors = made.huggingface_tensors(prefix)
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    for n in range(made.config["num_layers"]):
        attention = f"{prefix}h.{n}.attn"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e4)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(8)
    made.write_beside(tmp_path, made.huggingface_config())
    same("cpm1", write_huggingface(tmp_path, tensors, "zip"))


def test_eva_in_hugging_faces_form_with_role_embeddings(
    same: Callable[..., Any], tmp_path: Path
) -> None:
    made = tiny("eva")
    tensors = made.huggingface_tensors()
    for prefix in ("", "encoder.", "decoder."):
        tensors[f"{prefix}role_embeds.weight"] = torch.zeros(2, made.config["d_model"])
    made.write_beside(tmp_path, made.huggingface_config())
    same("eva", write_huggingface(tmp_path, tensors, "safetensors"))


# ---- depths --------------------------------------------------------------------------------------


def test_stacks_of_different_depths(load: Loader, tmp_path: Path) -> None:
    model = load("cpm2")
    assert (model.config.num_encoder_layers, model.config.num_decoder_layers) == (2, 3)
    made = tiny("eva", num_layers=3, num_decoder_layers=1)
    model = load("eva", checkpoint=made.write_original(tmp_path))
    assert len(model.model.encoder.layers) == 3 and len(model.model.decoder.layers) == 1


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_list_of_one_layer_is_packed_and_streamed_as_any(
    quantization: str | None, load: Loader, tmp_path: Path
) -> None:
    folder = tiny("cpm1", num_layers=1).write_original(tmp_path)
    plan = load("cpm1", checkpoint=folder, quantization=quantization).plan
    assert [block.name for block in plan.blocks] == ["layers.0"]
    weights = 12 * CPM1_CONFIG["hidden_size"] ** 2  # of its four matrices
    assert (plan.blocks[0].nbytes < 2 * weights) is (quantization is not None)


def test_a_number_of_decoder_layers_that_the_authors_code_ignores(
    load: Loader, tmp_path: Path
) -> None:
    """CPM-2's code builds both stacks with num_layers layers, whatever the file says."""
    made = tiny("cpm2", num_decoder_layers=2)
    made.config["num_decoder_layers"] = 12
    model = load("cpm2", checkpoint=made.write_original(tmp_path))
    assert len(model.model.decoder.layers) == 2


# ---- where a configuration comes from ------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "eva", "glm130b", "glm10b"])
def test_a_configuration_in_any_form(
    name: str, load: Loader, same: Callable[..., Any], tmp_path: Path
) -> None:
    made, own = tiny_model(name), load(name).config
    folder = made.write_original(tmp_path / "checkpoint" / "inner")
    found = next(path for path in folder.iterdir() if path.name.endswith("config.json"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found.rename(elsewhere / "config.json")
    with pytest.raises(CheckpointError, match=r"neither .* has a config.json|does not say"):
        load(name, checkpoint=folder)
    forms = [made.config, elsewhere, str(elsewhere / "config.json"), own, asdict(own)]
    if name.startswith("glm"):  # as in the authors' golden sets; and its head is cut anew
        forms += [{"model": made.config, "tokenizer": {"file": "any"}}]
        forms += [replace(own, num_head_parts=1), asdict(replace(own, num_head_parts=1))]
    for given in forms:
        assert same(name, folder, config=given).config == own
    (elsewhere / "config.json").rename(folder.parent / "model_config.json")
    same(name, folder)


def test_the_vocabulary_may_lie_in_the_parent(same: Callable[..., Any], tmp_path: Path) -> None:
    folder = tiny("cpm2").write_original(tmp_path / "inner")
    (folder / "vocab.txt").rename(tmp_path / "vocab.txt")
    model = same("cpm2", folder)
    (tmp_path / "vocab.txt").rename(tmp_path / "words.txt")
    with pytest.raises(CheckpointError, match=r"no tokenizer for cpm2.*tokenizer=\.\.\."):
        same("cpm2", folder)
    same("cpm2", folder, tokenizer=tmp_path / "words.txt")
    assert same("cpm2", folder, tokenizer=model.tokenizer).tokenizer is model.tokenizer


def mark(folder: Path, encoding: str, endings: set[str]) -> list[str]:
    """Write each text file of the folder again; the names of those."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in endings]
    for path in found:
        path.write_bytes(path.read_bytes().decode().encode(encoding))
    return [path.name for path in found]


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm10b"])
@pytest.mark.parametrize(
    ("encoding", "endings"), [("utf-8-sig", {".json", ".txt"}), ("utf-16", {".json"})]
)
def test_text_files_with_a_byte_order_mark_are_read_as_without(
    name: str,
    encoding: str,
    endings: set[str],
    folders: dict[str, Path],
    load: Loader,
    tmp_path: Path,
) -> None:
    marked = tmp_path / "marked"
    shutil.copytree(folders[name], marked)
    assert {"config.json", "model_config.json"} & set(mark(marked, encoding, endings))
    plain, other = load(name), load(name, checkpoint=marked)
    assert other.config == plain.config
    assert other.generate("a", 3, temperature=0) == plain.generate("a", 3, temperature=0)
    assert other.tokenizer.encode("a b") == plain.tokenizer.encode("a b")


def test_a_converted_folder_with_byte_order_marks(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    folder = convert(folders["cpm2"], tmp_path / "own", None, "cpm2")
    before = load("cpm2", checkpoint=folder).logits([5, 6], [7, 8])
    assert set(mark(folder, "utf-8-sig", {".json", ".txt"})) == {"config.json", "vocab.txt"}
    assert torch.equal(load("cpm2", checkpoint=folder).logits([5, 6], [7, 8]), before)
    own = load("cpm2", checkpoint=folder, config=folder / "config.json")
    assert own.config == load("cpm2").config


# ---- published models, told by their shapes ------------------------------------------------------


def publish(monkeypatch: pytest.MonkeyPatch, kind: Any, published: dict[str, Any]) -> None:
    (of,) = kind._architectures
    monkeypatch.setattr(kind, "_architectures", (replace(of, published=published),))


@pytest.fixture
def bare_eva(tmp_path: Path) -> Path:
    """An EVA that nothing but its files tells of."""
    folder = tiny("eva").write_original(tmp_path / "inner" / "eva")
    (folder / "model_config.json").unlink()
    return folder


def test_the_only_published_model_that_fits_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    bare_eva: Path,
    load: Loader,
    same: Callable[..., Any],
) -> None:
    config = load("eva").config
    others = {
        "larger": replace(config, hidden_size=64),
        "deeper": replace(config, num_encoder_layers=3),
    }
    publish(monkeypatch, EVA, {**others, "it": config})
    assert same("eva", bare_eva).config == config
    publish(monkeypatch, EVA, others)
    with pytest.raises(CheckpointError, match=r"no published EVA \(larger, deeper\).*attn_scale"):
        same("eva", bare_eva)


def test_two_that_differ_in_attention_scaling_are_not_guessed(
    monkeypatch: pytest.MonkeyPatch,
    bare_eva: Path,
    load: Loader,
    same: Callable[..., Any],
) -> None:
    scaled = load("eva").config
    plain = replace(scaled, is_attention_scaled=False)
    publish(monkeypatch, EVA, {"EVA1.0": plain, "EVA2.0": scaled})
    with pytest.raises(CheckpointError, match=r"EVA1\.0 and of EVA2\.0.*attention scaling"):
        same("eva", bare_eva)
    (bare_eva.parent / "config.json").write_text(json.dumps(tiny("eva").config))
    same("eva", bare_eva)


def test_bminf1_is_never_the_scaled_one(
    monkeypatch: pytest.MonkeyPatch, load: Loader, tmp_path: Path
) -> None:
    scaled = load("eva").config
    plain = replace(scaled, is_attention_scaled=False)
    publish(monkeypatch, EVA, {"EVA1.0": plain, "EVA2.0": scaled})
    folder = tiny("eva").write_bminf1(tmp_path / "inner")
    assert load("eva", checkpoint=folder).config == plain


@pytest.mark.parametrize(("kind", "name"), [(CPM1, "cpm1"), (CPM2, "cpm2")])
def test_the_other_models_are_told_by_their_shapes_too(
    kind: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    load: Loader,
    tmp_path: Path,
) -> None:
    config = load(name).config
    publish(monkeypatch, kind, {"it": config, "other": replace(config, vocab_size=9)})
    folder = tiny(name).write_bminf1(tmp_path / "inner")
    assert load(name, checkpoint=folder).config == config


def test_a_file_may_be_named_instead_of_its_folder(
    same: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tiny("cpm1").write_huggingface(tmp_path)
    save({"not": torch.ones(1)}, folder / "pytorch_model.pt")  # another layout beside it
    with pytest.raises(CheckpointError, match="several layouts"):
        same("cpm1", folder)
    same("cpm1", folder / "pytorch_model.bin")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_in_float8_are_the_numbers_that_they_stand_for(
    dtype: torch.dtype, quantization: str | None, load: Loader, tmp_path: Path
) -> None:
    made = tiny("cpm1")
    found = []
    for kept in (dtype, torch.float32):
        folder = made.write_original(tmp_path / str(kept))
        (file,) = folder.rglob("*.pt")
        saved = torch.load(file)
        for name, tensor in saved["module"].items():
            if tensor.dim() == 2 and "embeddings" not in name:
                saved["module"][name] = tensor.float().to(dtype).to(kept)
                saved["module"][name].model_parallel = True
        torch.save(saved, file)
        model = load("cpm1", checkpoint=folder, quantization=quantization)
        found.append(logits(model))
    assert torch.equal(*found)
