"""Every layout that the models are found in means the same model: the same logits, bit for bit."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_zoo import (
    CPM1_CONFIG,
    TinyModel,
    save,
    split,
    tiny,
    vocabulary,
    write_huggingface,
    write_vocabulary,
)

from bminf.arch import t5
from bminf.arch.gpt import GPTConfig
from bminf.arch.t5 import T5Config
from bminf.errors import CheckpointError
from bminf.models import CPM1, CPM2, EVA

Loader = Callable[..., Any]
MODELS = ("cpm1", "cpm2", "eva")
GPT_IDS = list(range(11, 31))
PROMPT, TARGET = list(range(11, 41)), list(range(12, 26))


def logits(model: Any) -> torch.Tensor:
    """Of some ids, with a prompt long enough for shared buckets."""
    if isinstance(model, CPM1):
        return model.logits(GPT_IDS)
    return model.logits(PROMPT, TARGET)


@pytest.fixture(scope="module")
def tinies() -> dict[str, TinyModel]:
    return {name: tiny(name) for name in MODELS}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The logits of the authors' layout with one rank, filled as they are asked for."""
    return {}


@pytest.fixture
def same(load: Loader, expected: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """same("cpm2", folder): loads it, and its logits are those of the authors' layout."""

    def check(name: str, folder: Path, **arguments: Any) -> Any:
        if name not in expected:
            expected[name] = logits(load(name))
        model = load(name, checkpoint=folder, **arguments)
        assert torch.equal(logits(model), expected[name])
        return model

    return check


# ---- the authors' files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("degree", "form", "has_rank_folders"),
    [(2, "zip", False), (4, "old", False), (1, "old", True), (4, "zip", True)],
)
def test_original(
    name: str,
    degree: int,
    form: str,
    has_rank_folders: bool,
    tinies: dict[str, TinyModel],
    same: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tinies[name].write_original(tmp_path, degree, form=form, has_rank_folders=has_rank_folders)
    same(name, tmp_path)


def test_ranks_are_cut_as_the_authors_cut_them() -> None:
    """What the tests above stand on: each rank has its heads of Q, of K and of V."""
    weight = torch.arange(12.0).unsqueeze(1).expand(12, 4)
    name = "transformer.layers.0.attention.query_key_value.weight"
    first, second = (rank[name][:, 0].tolist() for rank in split({name: weight}, 2))
    assert first == [0, 1, 4, 5, 8, 9] and second == [2, 3, 6, 7, 10, 11]


class Scaler:
    """Something that a training program leaves in its files, of a class that nobody else has."""

    def __init__(self) -> None:
        self.scale, self.history = 2.0**16, [torch.ones(3)]


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("has_rank_folders", [False, True])
def test_what_stands_beside_the_weights_is_dropped(
    form: str,
    has_rank_folders: bool,
    tinies: dict[str, TinyModel],
    same: Callable[..., Any],
    tmp_path: Path,
) -> None:
    weight = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    tinies["cpm1"].write_original(
        tmp_path,
        form=form,
        has_rank_folders=has_rank_folders,
        optimizer=optimizer.state_dict(),
        optimizer_object=optimizer,
        lr_scheduler={"start_lr": 1e-4, "decay_style": "cosine"},
        loss_scaler=Scaler(),
        args=argparse.Namespace(num_layers=3, device=torch.device("cpu")),
        random_rng_state=random.getstate(),
        np_rng_state=np.random.get_state(),
        torch_rng_state=torch.get_rng_state(),
        rng_tracker_states={"model-parallel-rng": np.random.RandomState(1)},
        csr_tensor_module_names=set(),
        iteration=7,
        mp_world_size=1,
    )
    same("cpm1", tmp_path)


# ---- BMInf 1.x -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
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


# ---- ModelCenter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "old"])
def test_modelcenter(
    form: str, tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    same("cpm2", tinies["cpm2"].write_modelcenter(tmp_path, form))


def test_modelcenter_without_what_its_own_code_has_a_default_for(
    tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    left_out = {"position_bias_num_buckets": None, "position_bias_max_distance": None}
    same("cpm2", tinies["cpm2"].write_modelcenter(tmp_path, **left_out))


def test_modelcenter_with_the_exact_gelu(
    tinies: dict[str, TinyModel],
    load: Loader,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    folder = tinies["cpm2"].write_modelcenter(tmp_path, ffn_activate_fn="gated_gelu")
    found = logits(load("cpm2", checkpoint=folder))
    plain = load("cpm2", config={**tinies["cpm2"].config, "hidden_act": "gelu"})
    assert torch.equal(found, logits(plain))
    assert 1e-5 < (found - logits(load("cpm2"))).abs().max() < 0.1


def test_modelcenter_with_tied_weights(
    tinies: dict[str, TinyModel], load: Loader, tmp_path: Path
) -> None:
    made = tinies["cpm2"]
    tied = {**made.tensors, "lm_head.weight": made.tensors["word_embeds.weight"]}
    folder = made.write_modelcenter(tmp_path / "a", tied=True)
    plain = replace(made, tensors=tied).write_original(tmp_path / "b")
    assert torch.equal(
        logits(load("cpm2", checkpoint=folder)), logits(load("cpm2", checkpoint=plain))
    )


@pytest.mark.parametrize("tied", [False, True])
def test_modelcenter_with_length_scale(tied: bool, load: Loader, tmp_path: Path) -> None:
    """Sizes are powers of 4, so that their roots round nothing."""
    made = tiny("cpm2", d_model=64, d_ff=256, d_kv=4)
    if tied:
        made.tensors["lm_head.weight"] = made.tensors["word_embeds.weight"]
    folder = made.write_modelcenter(tmp_path / "a", length_scale=True, tied=tied)
    plain = made.write_original(tmp_path / "b")
    assert torch.equal(
        logits(load("cpm2", checkpoint=folder)), logits(load("cpm2", checkpoint=plain))
    )


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "eva"])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors", "sharded"])
def test_huggingface(
    name: str,
    form: str,
    tinies: dict[str, TinyModel],
    same: Callable[..., Any],
    tmp_path: Path,
) -> None:
    same(name, tinies[name].write_huggingface(tmp_path, form))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_huggingface_with_what_old_files_have_besides(
    prefix: str, tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    made = tinies["cpm1"]
    tensors = made.huggingface_tensors(prefix)
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    for n in range(made.config["num_layers"]):
        attention = f"{prefix}h.{n}.attn"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    made.write_beside(tmp_path, made.huggingface_config())
    same("cpm1", write_huggingface(tmp_path, tensors, "zip"))


def test_eva_in_hugging_faces_form_with_role_embeddings(
    tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    made = tinies["eva"]
    tensors = made.huggingface_tensors()
    for prefix in ("", "encoder.", "decoder."):
        tensors[f"{prefix}role_embeds.weight"] = torch.zeros(2, made.config["d_model"])
    made.write_beside(tmp_path, made.huggingface_config())
    same("eva", write_huggingface(tmp_path, tensors, "safetensors"))


# ---- transformers as an independent reference ----------------------------------------------------


def test_cpm1_is_gpt2_of_transformers(load: Loader, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = vocabulary(0)
    torch.manual_seed(1)
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokens), n_positions=40, n_embd=24, n_layer=2, n_head=2, n_inner=56,
            initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    reference.save_pretrained(tmp_path)
    write_vocabulary(tmp_path, tokens)
    model = load("cpm1", checkpoint=tmp_path)
    with torch.inference_mode():
        theirs = reference(torch.tensor([GPT_IDS])).logits[0]
    assert torch.allclose(logits(model), theirs, atol=2e-5)
    assert torch.equal(
        logits(load("cpm1", checkpoint=tmp_path, config=reference.config)), logits(model)
    )


@pytest.mark.parametrize(("name", "is_scaled"), [("cpm2", False), ("eva", True), ("eva", False)])
def test_the_others_are_t5_of_transformers(
    name: str, is_scaled: bool, load: Loader, tmp_path: Path
) -> None:
    """Written by transformers where nothing has to be folded in, and by the tests where it has."""
    made = tiny(name, attn_scale=is_scaled, d_kv=16)
    reference = reference_t5(made)
    if is_scaled:
        folder = made.write_original(tmp_path, 2)
    else:
        reference.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "attn_scale": False}))
        folder = write_vocabulary(tmp_path, made.tokens).parent
    with torch.inference_mode():
        theirs = reference(
            input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([TARGET])
        ).logits[0]
    model = load(name, checkpoint=folder)
    assert torch.allclose(logits(model), theirs, atol=1e-4)


def reference_t5(made: TinyModel) -> Any:
    from transformers import T5Config as TheirConfig
    from transformers import T5ForConditionalGeneration

    config = made.config
    reference = T5ForConditionalGeneration(
        TheirConfig(
            vocab_size=len(made.tokens), feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            **{name: config[name] for name in ("d_model", "d_kv", "d_ff", "num_layers",
            "num_decoder_layers", "num_heads")},
        )
    ).eval()  # fmt: skip
    # transformers 5 ties the head to the embedding whatever the configuration says.
    reference.lm_head.weight = torch.nn.Parameter(torch.empty_like(reference.lm_head.weight))
    tensors = {name: tensor.float() for name, tensor in made.huggingface_tensors().items()}
    if config.get("attn_scale"):  # which theirs cannot do: folded into the queries
        for name in tensors:
            if name.endswith("Attention.q.weight"):
                tensors[name] = tensors[name] * config["d_kv"] ** -0.5
    reference.load_state_dict(tensors)
    return reference


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


@pytest.mark.parametrize("name", ["cpm1", "eva"])
def test_a_configuration_in_any_form(
    name: str, tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    made = tinies[name]
    folder = made.write_original(tmp_path / "checkpoint" / "inner")
    found = next(path for path in folder.iterdir() if path.name.endswith("config.json"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found.rename(elsewhere / "config.json")
    with pytest.raises(CheckpointError, match=r"neither .* has a config.json"):
        same(name, folder)
    for given in (made.config, elsewhere, str(elsewhere / "config.json"), own_config(made)):
        model = same(name, folder, config=given)
        assert model.config == own_config(made)
    (elsewhere / "config.json").rename(folder.parent / "model_config.json")
    same(name, folder)


def own_config(made: TinyModel) -> GPTConfig | T5Config:
    size, given = len(made.tokens), made.config
    if made.name == "cpm1":
        width = given["hidden_size"]
        positions = given["max_position_embeddings"]
        heads = given["num_attention_heads"]
        return GPTConfig(size, width, given["num_layers"], heads, positions, 4 * width)
    return T5Config(
        size, given["d_model"], given["d_ff"], given["num_heads"], given["d_kv"],
        given["num_layers"], given["num_decoder_layers"], given["attn_scale"],
    )  # fmt: skip


def test_the_vocabulary_may_lie_in_the_parent(
    tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tinies["cpm2"].write_original(tmp_path / "inner")
    (folder / "vocab.txt").rename(tmp_path / "vocab.txt")
    model = same("cpm2", folder)
    (tmp_path / "vocab.txt").rename(tmp_path / "words.txt")
    with pytest.raises(CheckpointError, match=r"no tokenizer for cpm2.*tokenizer=\.\.\."):
        same("cpm2", folder)
    same("cpm2", folder, tokenizer=tmp_path / "words.txt")
    assert same("cpm2", folder, tokenizer=model.tokenizer).tokenizer is model.tokenizer


# ---- published models, told by their shapes ------------------------------------------------------


def publish(monkeypatch: pytest.MonkeyPatch, kind: Any, published: dict[str, Any]) -> None:
    (of,) = kind._architectures
    monkeypatch.setattr(kind, "_architectures", (replace(of, published=published),))


@pytest.fixture
def bare_eva(tinies: dict[str, TinyModel], tmp_path: Path) -> Path:
    """An EVA that nothing but its files tells of."""
    folder = tinies["eva"].write_original(tmp_path / "inner" / "eva")
    (folder / "model_config.json").unlink()
    return folder


def test_the_only_published_model_that_fits_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    tinies: dict[str, TinyModel],
    bare_eva: Path,
    same: Callable[..., Any],
) -> None:
    config = own_config(tinies["eva"])
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
    tinies: dict[str, TinyModel],
    bare_eva: Path,
    same: Callable[..., Any],
    tmp_path: Path,
) -> None:
    scaled = own_config(tinies["eva"])
    plain = replace(scaled, is_attention_scaled=False)
    publish(monkeypatch, EVA, {"EVA1.0": plain, "EVA2.0": scaled})
    with pytest.raises(CheckpointError, match=r"EVA1\.0 and of EVA2\.0.*attention scaling"):
        same("eva", bare_eva)
    (bare_eva.parent / "config.json").write_text(json.dumps(tinies["eva"].config))
    same("eva", bare_eva)


def test_bminf1_is_never_the_scaled_one(
    monkeypatch: pytest.MonkeyPatch, tinies: dict[str, TinyModel], load: Loader, tmp_path: Path
) -> None:
    scaled = own_config(tinies["eva"])
    plain = replace(scaled, is_attention_scaled=False)
    publish(monkeypatch, EVA, {"EVA1.0": plain, "EVA2.0": scaled})
    folder = tinies["eva"].write_bminf1(tmp_path / "inner")
    assert load("eva", checkpoint=folder).config == plain


@pytest.mark.parametrize(("kind", "name"), [(CPM1, "cpm1"), (CPM2, "cpm2")])
def test_the_other_models_are_told_by_their_shapes_too(
    kind: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tinies: dict[str, TinyModel],
    load: Loader,
    tmp_path: Path,
) -> None:
    made = replace(tinies[name], config={"attn_scale": False, **tinies[name].config})
    config = own_config(made)
    publish(monkeypatch, kind, {"it": config, "other": replace(config, vocab_size=9)})
    folder = tinies[name].write_bminf1(tmp_path / "inner")
    assert load(name, checkpoint=folder).config == config


def test_the_published_sizes_are_those_of_the_papers() -> None:
    """Parameters, counted from the architectures: facts that no tiny model knows."""
    from bminf.models.source import meta_network

    counts = {
        (CPM1, "TsinghuaAI/CPM-Generate"): 2_597_073_920,
        (CPM2, "CPM-2 (Chinese), CPM-2.1"): 11_087_097_856,
        (CPM2, "CPM-2 (Chinese and English)"): 11_297_861_632,
        (EVA, "thu-coai/EVA1.0"): 2_841_040_896,
        (EVA, "thu-coai/EVA2.0-xlarge"): 2_841_040_896,
        (EVA, "thu-coai/EVA2.0-large"): 967_535_616,
        (EVA, "thu-coai/EVA2.0-base"): 300_932_352,
    }
    for (kind, name), count in counts.items():
        model = meta_network(kind._architectures[0], kind._architectures[0].published[name])
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    scaled = [n for n, c in t5.EVA.published.items() if c.is_attention_scaled]
    assert scaled == [f"thu-coai/EVA2.0-{size}" for size in ("xlarge", "large", "base")]


def test_a_file_may_be_named_instead_of_its_folder(
    tinies: dict[str, TinyModel], same: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tinies["cpm1"].write_huggingface(tmp_path)
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
