"""A folder that is no model of the zoo: the error says what it is, and what to do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_model
from tiny_zoo import save, tiny, write_huggingface

from bminf.arch.registry import checkpoint_in
from bminf.errors import ArgumentError, BMInfError, CheckpointError
from bminf.models import convert
from bminf.models.recognition import architectures_for, recognized

LLAMA = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
BERT = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"]
# Names that a model of the zoo has, too.
FALCON = ["transformer.word_embeddings.weight", "transformer.h.0.input_layernorm.weight"]
GPT2 = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"]
OTHERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (LLAMA, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    "glm4": (LLAMA, {"model_type": "glm", "architectures": ["GlmForCausalLM"]}),
    "bert": (BERT, {"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
    "falcon": (FALCON, {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}),
    "falcon's body": ([name.partition(".")[2] for name in FALCON], {"model_type": "falcon"}),
    "gptj": (GPT2, {"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}),
    "unet": (["conv_in.weight", "mid.weight"], {"_class_name": "UNet2DConditionModel"}),
}


def write(folder: Path, names: list[str], config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True)
    write_huggingface(folder, {name: torch.ones(2, 2) for name in names}, "safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_what_another_model_is_is_said(name: str, tmp_path: Path) -> None:
    names, config = OTHERS[name]
    folder = write(tmp_path / "a" / "from", names, config)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "to")
    said = str(caught.value)
    for word in [config.get("model_type"), *config.get("architectures", []), str(folder)]:
        assert word is None or word in said
    assert "none of the models here (CPM-1, CPM-2, EVA, GLM-130B, GLM-10B, BLOOM)" in said
    assert "bminf.wrapper(model, memory_limit=...)" in said and "may hold" not in said
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", ["huggingface", "original", "modelcenter"])
def test_without_a_configuration_the_names_say_it(kind: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(2) for name in LLAMA}
    folder = tmp_path / "a" / "from"
    if kind == "original":
        save({"module": tensors}, folder / "mp_rank_00_model_states.pt")
    else:
        file = {"huggingface": "pytorch_model.bin", "modelcenter": "pytorch_model.pt"}[kind]
        save(tensors, folder / file)
    with pytest.raises(CheckpointError, match=r"tensors called 'model.embed.*bminf\.wrapper"):
        convert(folder, tmp_path / "to")


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_a_t5_may_have_been_one_of_them(model_type: str, tmp_path: Path) -> None:
    """Their names are those of T5 1.1: a T5 is told from its configuration alone."""
    folder = tiny("eva").write_huggingface(tmp_path / "a" / "from", "safetensors")
    for path in folder.glob("*config.json"):
        path.unlink()
    config = {"model_type": model_type, "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"a T5ForCond.*wrapper.*made from CPM-2 or EVA, say"):
        convert(folder, tmp_path / "to")
    assert [one.name for one in architectures_for(folder, "eva") or ()] == ["eva"]


def test_a_gpt2_without_a_vocabulary_of_cpm1(tmp_path: Path) -> None:
    folder = write(tmp_path / "a" / "from", GPT2, {"model_type": "gpt2", "vocab_size": 50257})
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).write_text("{}")
    words = r"model_type 'gpt2'.*chinese_vocab\.model.*If it is another GPT-2, .*bminf\.wrapper"
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "to")
    assert recognized(checkpoint_in(folder), has_tokenizer=True).name == "cpm1"
    assert [one.name for one in architectures_for(folder, "cpm1") or ()] == ["cpm1"]
    (folder / "vocab.txt").write_text("a\n")
    assert recognized(checkpoint_in(folder)).name == "cpm1"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("original", name) for name in ("cpm1", "eva", "glm130b", "glm10b")),
        *(("huggingface", name) for name in ("cpm1", "eva", "glm10b")),
        *(("modelcenter", "cpm2"), ("bminf1", "cpm1")),
    ],
)
def test_the_model_is_told_from_the_files(layout: str, name: str, tmp_path: Path) -> None:
    folder = getattr(tiny_model(name), f"write_{layout}")(tmp_path / "from")
    assert recognized(checkpoint_in(folder)).name == name


@pytest.mark.parametrize("layout", ["original", "bminf1"])
def test_the_model_must_be_named_where_cpm2_and_eva_look_alike(layout: str, tmp_path: Path) -> None:
    folder = getattr(tiny("cpm2"), f"write_{layout}")(tmp_path / "from")
    with pytest.raises(ArgumentError, match=r'may hold CPM-2 or EVA.*say model="cpm2" or mo'):
        recognized(checkpoint_in(folder))
    for name in ("cpm2", "eva"):
        assert [one.name for one in architectures_for(folder, name) or ()] == [name]


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(BMInfError, match="is empty"):
        convert(tmp_path, tmp_path / "to")


def test_a_folder_of_ours_for_a_model_of_another_version(tmp_path: Path) -> None:
    folder = write(tmp_path / "a" / "from", LLAMA, {"format": "bminf", "model": "cpm9"})
    with pytest.raises(CheckpointError, match=r"holds 'cpm9', none of the models here \(CPM-1, "):
        convert(folder, tmp_path / "to")
