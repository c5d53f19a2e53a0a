"""What is wrong is said before anything is generated, and nothing of it stays in memory."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import (
    CPM1_CONFIG,
    T5_CONFIG,
    TinyModel,
    split,
    tiny,
    write_huggingface,
    write_original,
    write_ranks,
    write_vocabulary,
)

from bminf.errors import (
    ArgumentError,
    BudgetError,
    CheckpointError,
    UnknownKeywordError,
    UnsupportedModelError,
)
from bminf.models import CPM1, CPM2, EVA

Loader = Callable[..., Any]
TEXT = "今天天气"


@pytest.fixture(scope="module")
def tinies() -> dict[str, TinyModel]:
    return {name: tiny(name) for name in ("cpm1", "cpm2", "eva")}


# ---- files ---------------------------------------------------------------------------------------


def test_a_truncated_file(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    for form, size in (("zip", -100), ("zip", 0.5), ("old", -100), ("old", 60)):
        folder = tmp_path / f"{form}{size}"
        tinies["cpm1"].write_original(folder, form=form)
        file = next(folder.rglob("*.pt"))
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * size) if size == 0.5 else int(size)])
        refuse("cpm1", folder, CheckpointError, f"{re.escape(str(file))}.* truncated")


@pytest.mark.parametrize("form", ["safetensors", "sharded"])
def test_a_truncated_safetensors_file(
    form: str, tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    folder = tinies["eva"].write_huggingface(tmp_path / "a", form)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-7])
    refuse("eva", folder, CheckpointError, f"{re.escape(str(file))} is damaged or truncated")


def test_a_truncated_file_of_bminf1(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    folder = tinies["cpm1"].write_bminf1(tmp_path / "a")
    file = folder / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-7])
    refuse("cpm1", folder, CheckpointError, re.escape(str(file)), config=CPM1_CONFIG)


def without(made: TinyModel, name: str) -> TinyModel:
    return replace(made, tensors={n: t for n, t in made.tensors.items() if n != name})


def with_tensor(made: TinyModel, name: str, tensor: torch.Tensor) -> TinyModel:
    return replace(made, tensors={**made.tensors, name: tensor})


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("cpm1", "transformer.layers.1.mlp.dense_h_to_4h.bias"),
        ("cpm1", "position_embeddings.weight"),
        ("cpm2", "lm_head.weight"),
        ("eva", "decoder.blocks.2.cross_attn.cross_attn.project_kv.weight"),
        ("eva", "encoder.blocks.0.self_attn.self_attn.relative_attention_bias.weight"),
    ],
)
def test_a_missing_tensor_is_named_as_in_the_file(
    name: str,
    missing: str,
    tinies: dict[str, TinyModel],
    refuse: Callable[..., None],
    tmp_path: Path,
) -> None:
    folder = without(tinies[name], missing).write_original(tmp_path / "a")
    words = f"{re.escape(str(folder))} lacks '{re.escape(missing)}'"
    refuse(name, folder, CheckpointError, words)


def test_all_parts_of_a_missing_matrix_are_named(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = tinies["eva"]
    made.write_beside(tmp_path / "a", made.huggingface_config())
    attention = "encoder.block.1.layer.0.SelfAttention"
    names = [f"{attention}.{part}.weight" for part in "qkv"]
    tensors = {k: v for k, v in made.huggingface_tensors().items() if k not in names}
    folder = write_huggingface(tmp_path / "a", tensors, "safetensors")
    refuse("eva", folder, CheckpointError, f"lacks '{re.escape(' + '.join(names))}'")


def test_a_missing_third_of_the_attention(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = tinies["eva"]
    made.write_beside(tmp_path / "a", made.huggingface_config())
    tensors = made.huggingface_tensors()
    del tensors["encoder.block.1.layer.0.SelfAttention.k.weight"]
    folder = write_huggingface(tmp_path / "a", tensors, "safetensors")
    refuse("eva", folder, CheckpointError, r"lacks 'encoder\.block\.1\..*\.k\.weight'")


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("cpm1", "transformer.layers.2.attention.dense.weight", (48, 47)),
        ("cpm1", "word_embeddings.weight", (64,)),
        ("cpm2", "encoder.blocks.0.ff.dense_relu_dense.wo.weight", (80, 48)),
        ("cpm2", "decoder.final_layernorm.weight", (49,)),
        ("eva", "lm_head.weight", (255, 48)),
    ],
)
def test_a_tensor_of_another_shape(
    name: str,
    tensor: str,
    shape: tuple[int, ...],
    tinies: dict[str, TinyModel],
    refuse: Callable[..., None],
    tmp_path: Path,
) -> None:
    made = with_tensor(tinies[name], tensor, torch.ones(shape).half())
    folder = made.write_original(tmp_path / "a")
    file = next(folder.rglob("*.pt"))
    words = (
        rf"'{re.escape(tensor)}' in {re.escape(str(file))} has the shape {re.escape(str(shape))}"
    )
    refuse(name, folder, CheckpointError, words)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("cpm1", "transformer.layers.0.attention.relative.weight"),
        ("cpm2", "encoder.blocks.0.adapter.weight"),
        ("eva", "decoder.blocks.1.self_attn.self_attn.relative_attention_bias.weight"),
    ],
)
@pytest.mark.parametrize("degree", [1, 2])
def test_an_unknown_tensor(
    name: str,
    tensor: str,
    degree: int,
    tinies: dict[str, TinyModel],
    refuse: Callable[..., None],
    tmp_path: Path,
) -> None:
    made = with_tensor(tinies[name], tensor, torch.ones(48, 48).half())
    refuse(name, made.write_original(tmp_path / "a", degree), CheckpointError, re.escape(tensor))


def test_inv_freq_is_left_out(tinies: dict[str, TinyModel], load: Loader, tmp_path: Path) -> None:
    """The other unused ones are in test_layouts.py: with them, the logits are the same."""
    name = "transformer.layers.0.attention.rotary_emb.inv_freq"
    made = with_tensor(tinies["cpm1"], name, torch.ones(8))
    loaded = load("cpm1", checkpoint=made.write_original(tmp_path / "a"))
    assert torch.equal(loaded.logits([11, 12]), load("cpm1").logits([11, 12]))


@pytest.mark.parametrize("degree", [1, 2])
def test_the_prompts_of_a_tuned_model(
    degree: int, tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = with_tensor(tinies["cpm2"], "encoder.prompt_embeds.weight", torch.ones(4, 48).half())
    folder = made.write_original(tmp_path / "a", degree)
    refuse("cpm2", folder, CheckpointError, r"'encoder\.prompt_embeds\.weight'.*prompt-tuned")


def test_ranks_of_different_degrees(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = tinies["cpm2"]
    mixed = [split(made.tensors, 2)[0], split(made.tensors, 4)[1]]
    folder = write_ranks(made.write_beside(tmp_path / "a"), mixed)
    words = r"mp_rank_00_model_states\.pt .*mp_rank_01_model_states\.pt .*degrees"
    refuse("cpm2", folder, CheckpointError, words)
    half = write_ranks(made.write_beside(tmp_path / "b"), split(made.tensors, 4)[:2])
    refuse("cpm2", half, CheckpointError, "shape")  # two of four ranks: every matrix is half
    beside = write_ranks(made.write_beside(tmp_path / "c"), split(made.tensors, 2), mp_world_size=4)
    refuse("cpm2", beside, CheckpointError, "one of 4 ranks")


def test_ranks_of_different_checkpoints(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], load: Loader, tmp_path: Path
) -> None:
    """Found only while reading: what all ranks hold alike differs."""
    made = tinies["cpm1"]
    ranks = split(made.tensors, 2)
    ranks[1]["transformer.layers.2.input_layernorm.weight"] += 1
    folder = write_ranks(made.write_beside(tmp_path / "a"), ranks)
    refuse(
        "cpm1", folder, CheckpointError, r"'transformer\.layers\.2\.input.* should be the same",
        memory_limit=tight(load, None),
    )  # fmt: skip


def tight(load: Loader, quantization: str | None) -> int:
    """A limit at which CPM-1 is streamed, so that a thread and a file are at work."""
    plan = load("cpm1", quantization=quantization).plan
    limit = plan.total_bytes - min(block.nbytes for block in plan.blocks)
    assert load("cpm1", quantization=quantization, memory_limit=limit).plan.streamed
    return int(limit)


class Runs:
    """When a pickle of it is loaded by whoever trusts it, a file appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_that_would_run_code(
    form: str, tinies: dict[str, TinyModel], refuse: Callable[..., None], load: Loader,
    tmp_path: Path,
) -> None:  # fmt: skip
    mark, made = tmp_path / "mark", tinies["cpm1"]
    tensors: dict[str, Any] = {**made.tensors, "transformer.extra": Runs(mark)}
    folder = write_ranks(made.write_beside(tmp_path / "a"), [tensors], form=form)
    refuse(
        "cpm1",
        folder,
        CheckpointError,
        r"\.pt holds an object that is not read .*transformer\.extra",
    )
    made.write_original(tmp_path / "b", form=form, hooks=[Runs(mark)])
    load("cpm1", checkpoint=tmp_path / "b").close()
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(mark)))
    assert mark.exists()


def test_weights_that_are_not_finite(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], load: Loader, tmp_path: Path
) -> None:
    """Found while packing the last layer, when all else is loaded and streaming is prepared."""
    made = tinies["cpm1"]
    name = "transformer.layers.2.mlp.dense_4h_to_h.weight"
    weight = made.tensors[name].clone()
    weight[5, 7] = math.nan
    folder = with_tensor(made, name, weight).write_original(tmp_path / "a")
    for quantization in ("int8", "int4"):
        refuse(
            "cpm1", folder, CheckpointError, rf"'{re.escape(name)}' in .*\.pt cannot be quantized",
            quantization=quantization, memory_limit=tight(load, quantization),
        )  # fmt: skip


def test_scales_of_bminf1_that_are_not_finite(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    from tiny_zoo import bminf1_bytes

    made = tinies["cpm1"]
    tree = made.bminf1_tree()
    tree["layers"]["1"]["ff"]["linear_in"]["scale"][3] = math.inf
    folder = made.write_bminf1(tmp_path / "a")
    (folder / "checkpoint.pt").write_bytes(bminf1_bytes(tree))
    refuse(
        "cpm1", folder, CheckpointError,
        r"'layers\.1\.ff\.linear_in\.scale' in .*checkpoint\.pt holds NaN",
        config=CPM1_CONFIG, quantization="int8",
    )  # fmt: skip


# ---- another model, another vocabulary -----------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name", "wanted", "words"),
    [
        ("original", "cpm1", "cpm2", "holds CPM-1, not CPM-2"),
        ("original", "cpm1", "eva", "holds CPM-1, not EVA"),
        ("original", "cpm2", "cpm1", "'word_embeds.weight'.*a CPM-1 .* does not have"),
        ("original", "eva", "cpm2", "holds EVA, not CPM-2"),
        ("huggingface", "eva", "cpm1", "holds EVA, not CPM-1"),
        ("huggingface", "eva", "cpm2", "holds EVA, not CPM-2"),
        ("huggingface", "cpm1", "eva", "holds CPM-1, not EVA"),
        ("modelcenter", "cpm2", "eva", "holds CPM-2, not EVA"),
        ("modelcenter", "cpm2", "cpm1", "holds CPM-2, not CPM-1"),
        ("bminf1", "cpm1", "cpm2", "holds CPM-1, not CPM-2"),
        ("bminf1", "cpm2", "cpm1", "'input_embedding.weight'.*a CPM-1 .* does not have"),
    ],
)
def test_a_checkpoint_of_another_model(
    layout: str, name: str, wanted: str, words: str, tinies: dict[str, TinyModel],
    refuse: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    folder = getattr(tinies[name], f"write_{layout}")(tmp_path / "a")
    refuse(wanted, folder, CheckpointError, f"{re.escape(str(folder))}.*{words}")


def test_modelcenters_own_cpm1_is_another_architecture(
    refuse: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    tensors = {"input_embedding.weight": torch.ones(64, 48), "encoder.output_layernorm.weight": 1}
    torch.save(
        {"input_embedding.weight": tensors["input_embedding.weight"]},
        tmp_path / "a" / "pytorch_model.pt",
    )
    refuse("cpm1", tmp_path / "a", CheckpointError, "ModelCenter's CPM1 is another architecture")


def test_a_gpt2_of_other_sizes(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = tinies["cpm1"]
    folder = made.write_huggingface(tmp_path / "a", "safetensors")
    config = {**made.huggingface_config(), "n_embd": 96}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(
        "cpm1", folder, CheckpointError, r"'transformer\.w.e\.weight' in .*the configuration asks"
    )


def test_a_file_of_nothing_that_is_known(
    tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    folder = tinies["cpm1"].write_beside(tmp_path / "a")
    write_original(folder, {"roberta.embeddings.weight": torch.ones(3, 3)})
    refuse("cpm1", folder, CheckpointError, "'roberta.embeddings.weight'.*another model")


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_a_vocabulary_of_another_length(
    name: str, tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    made = tinies[name]
    folder = made.write_original(tmp_path / "a")
    count = len(made.tokens)
    write_vocabulary(folder, [*made.tokens[:20], "另", *made.tokens[20:]])
    words = rf"has {count + 1} tokens \(.*vocab\.txt\), the embedding of .* {count} rows"
    refuse(name, folder, CheckpointError, words)


# ---- the constructor -----------------------------------------------------------------------------

CPM1_HUB = '"TsinghuaAI/CPM-Generate"'


@pytest.mark.parametrize(
    ("checkpoint", "error", "words"),
    [
        (None, ArgumentError, f"no checkpoint is given; .*a folder with a CPM-1.*{CPM1_HUB}"),
        (3, ArgumentError, f"checkpoint is a int.*{CPM1_HUB}"),
        ("not/there/at/all", CheckpointError, f"there is no 'not/there/at/all'.*{CPM1_HUB}"),
        (Path("nothing/here"), CheckpointError, f"there is no 'nothing/here'.*{CPM1_HUB}"),
    ],
)
def test_no_checkpoint(
    checkpoint: Any, error: Any, words: str, refuse: Callable[..., None]
) -> None:
    refuse("cpm1", checkpoint, error, words)


def test_the_message_names_what_each_model_takes(refuse: Callable[..., None]) -> None:
    refuse("cpm2", None, ArgumentError, "a folder with a CPM-2 checkpoint$")
    refuse("eva", None, ArgumentError, 'EVA checkpoint, "thu-coai/EVA1.0", .*"thu-coai/EVA2.0-xl')


def test_an_empty_folder(refuse: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    refuse(
        "cpm1", tmp_path / "a", CheckpointError, r"is empty; accepted: .*mp_rank_.*checkpoint\.pt"
    )
    (tmp_path / "a" / "notes.txt").write_text("none")
    refuse("cpm1", tmp_path / "a", CheckpointError, r"holds no checkpoint, but 'notes\.txt'")


ARGUMENTS: list[tuple[dict[str, Any], Any, str]] = [
    ({"quantization": "int3"}, ArgumentError, 'quantization=\'int3\'; accepted: "int8", "int4"'),
    ({"quantization": True}, ArgumentError, "quantization=True"),
    ({"quantization": "int4", "activations": "int8"}, ArgumentError, 'activations="int8" needs'),
    ({"activations": "int8"}, ArgumentError, "activations='int8', but quantization=None"),
    (
        {"quantization": "int8", "activations": "int9"},
        ArgumentError,
        "activations='int9'; accepted",
    ),
    ({"dtype": torch.int8}, ArgumentError, r"dtype=torch\.int8; accepted: torch\.float32"),
    ({"dtype": "float15"}, ArgumentError, "dtype='float15'"),
    ({"device": "tpu"}, ArgumentError, "device='tpu'.*accepted"),
    ({"device": "meta"}, ArgumentError, "device='meta'; accepted"),
    ({"memory_limit": "10KB"}, BudgetError, r"limit of 10 KB .*least .*MiB \(\d+ bytes\)"),
    ({"memory_limit": 0}, BudgetError, "raise memory_limit, lower those two"),
    ({"memory_limit": -1}, ArgumentError, "memory_limit=-1"),
    ({"memory_limit": "lots"}, ArgumentError, "memory_limit='lots'"),
    ({"max_length": 257}, ArgumentError, "max_length=257, but the model has 256 positions"),
    ({"max_length": 0}, ArgumentError, "max_length=0"),
    ({"max_batch_size": 0}, ArgumentError, "max_batch_size=0"),
    ({"max_batch_size": True}, ArgumentError, "max_batch_size=True"),
    ({"config": 3}, ArgumentError, "config is a int; accepted"),
    ({"config": "nowhere.json"}, CheckpointError, r"nowhere\.json cannot be read"),
    ({"tokenizer": 3}, ArgumentError, "tokenizer=3"),
    ({"tokenizer": "nowhere"}, CheckpointError, "tokenizer='nowhere': there is no such"),
    ({"speed": 3}, TypeError, "'speed'"),
]


@pytest.mark.parametrize(("given", "error", "words"), ARGUMENTS, ids=lambda x: str(x)[:30])
def test_arguments_of_the_constructor(
    given: dict[str, Any], error: Any, words: str, folders: dict[str, Path],
    refuse: Callable[..., None],
) -> None:  # fmt: skip
    refuse("cpm1", folders["cpm1"], error, words, **given)


def test_a_limit_just_below_the_least_that_would_do(
    load: Loader, folders: dict[str, Path], refuse: Callable[..., None]
) -> None:
    """The number in the message is the least limit, to the byte."""
    with pytest.raises(BudgetError) as error:
        load("cpm2", memory_limit=1)
    found = re.search(r"that would do, .*? \((\d+) bytes\)", str(error.value))
    del error
    assert found is not None
    least = int(found[1])
    refuse("cpm2", folders["cpm2"], BudgetError, str(least), memory_limit=least - 1)
    model = load("cpm2", memory_limit=least)
    assert model.plan.total_bytes <= least and model.plan.streamed
    model.close()


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("cpm1", {"num_layers": None}, "config has no num_hidden_layers or num_layers or n_layer"),
    ("cpm1", {"num_layers": 0}, "num_layers is 0; a whole number"),
    ("cpm1", {"num_layers": 4}, r"lacks 'transformer\.layers\.3\."),
    ("cpm1", {"num_layers": 2}, r"has unexpected tensors: 'transformer\.layers\.2\."),
    ("cpm1", {"num_attention_heads": "3"}, "num_attention_heads is '3'"),
    ("cpm1", {"num_attention_heads": 5}, "hidden_size=48 is not a multiple of num_attention_he"),
    ("cpm1", {"layernorm_epsilon": -1}, "layernorm_epsilon is -1"),
    ("cpm1", {"hidden_act": "relu"}, "hidden_act is 'relu'; accepted: gelu"),
    ("cpm1", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ("cpm1", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("cpm2", {"d_model": None}, "config has no hidden_size or d_model"),
    ("cpm2", {"attn_scale": "yes"}, "attn_scale is 'yes'; true or false is needed"),
    ("cpm2", {"d_kv": 7}, r"project\.weight' in .* has the shape .*asks for \(84, 48\)"),
    ("cpm2", {"num_heads": 3}, r"relative_attention_bias\.weight' in .* has the shape"),
    ("cpm2", {"d_ff": 8.0}, r"d_ff is 8\.0"),
]


@pytest.mark.parametrize(("name", "changed", "words"), CONFIGS)
def test_a_configuration_that_is_wrong(
    name: str, changed: dict[str, Any], words: str, folders: dict[str, Path],
    refuse: Callable[..., None],
) -> None:  # fmt: skip
    config = {**(CPM1_CONFIG if name == "cpm1" else T5_CONFIG), **changed}
    refuse(name, folders[name], CheckpointError, words, config=config)


@pytest.mark.parametrize("written", ["not JSON", "[1, 2]", ""])
def test_a_configuration_file_that_is_none(
    written: str, tinies: dict[str, TinyModel], refuse: Callable[..., None], tmp_path: Path
) -> None:
    folder = tinies["cpm1"].write_original(tmp_path / "a")
    (folder / "config.json").write_text(written)
    refuse("cpm1", folder, CheckpointError, r"config\.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_bias": True},
        {"att_bias": True},
        {"ffn_bias": True},
        {"proj_bias": True},
        {"post_layer_norm": True},
        {"cls_head": 2},
        {"pos_bias_type": "rotary"},
        {"ffn_activate_fn": "relu"},
        {"attn_scale": 1},
        {"tied": "yes"},
        {"length_scale": "yes"},
        {"norm_eps": "small"},
        {"dim_head": None},
    ],
    ids=str,
)
def test_modelcenter_configurations_of_other_architectures(
    changed: dict[str, Any], tinies: dict[str, TinyModel], refuse: Callable[..., None],
    modelcenter: Path,
) -> None:  # fmt: skip
    config = {**tinies["cpm2"].modelcenter_config(), **changed}
    refuse("cpm2", modelcenter, CheckpointError, next(iter(changed)), config=config)


@pytest.fixture(scope="module")
def modelcenter(tinies: dict[str, TinyModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinies["cpm2"].write_modelcenter(tmp_path_factory.mktemp("modelcenter"))


# ---- what is generated ---------------------------------------------------------------------------


@pytest.fixture
def silent(load: Loader) -> Callable[..., Any]:
    """silent("cpm1"): a model that must not be run."""

    def loader(name: str, **arguments: Any) -> Any:
        def run(*_: Any) -> Any:
            raise AssertionError("something was generated before the error")

        model = load(name, max_length=20, **arguments)
        model.model.forward = model.model.head = model.model.encode = run
        return model

    return loader


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"top_n": 0}, "top_n=0; accepted: an int of at least 1"),
    ({"top_n": 2.0}, r"top_n=2\.0"),
    ({"top_n": 999}, "=999 is more than the .* tokens of the vocabulary"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.5}, r"top_p=1\.5"),
    ({"temperature": -1}, "temperature=-1; accepted: a finite number from 0 on"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": None}, "temperature=None"),
    ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
    ({"presence_penalty": "1"}, "presence_penalty='1'"),
    ({"stop_tokens": ["龙"]}, "token='龙' is not one of .*vocab.txt"),
    ({"stop_tokens": 5}, "stop_tokens=5; give a list"),
    ({"stop_tokens": [3]}, "token=3"),
    ({"banned_tokens": ["龙"]}, "token='龙'"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": "9"}, "max_tokens='9'"),
    ({"max_tokens": 21}, "max_tokens=21 are more than max_length=20"),
    ({"seed": 1.5}, r"seed=1\.5"),
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_beams": 2}, "2 rows at once .* max_batch_size is 1"),
    ({"num_beams": 2, "top_p": 0.5}, "num_beams=2 searches .* top_p"),
    ({"speed": 3}, "has no keyword 'speed'; did you mean 'seed'.*accepted: .*max_tokens"),
]


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_options_of_generating(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for options, words in OPTIONS:
        given = {"max_tokens": 3, **options}
        with pytest.raises(ArgumentError, match=words):
            model.generate(TEXT, **given)
        with pytest.raises(ArgumentError, match=words):
            model.generate_batch([TEXT], **given)
        if "num_beams" not in options:
            with pytest.raises(ArgumentError, match=words):
                model.generate_iter(TEXT, **given)
    with pytest.raises(UnknownKeywordError, match="'speed'"):
        model.generate(TEXT, speed=3)
    with pytest.raises(ArgumentError, match="beam search"):
        model.generate_iter(TEXT, num_beams=2, max_tokens=3)


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_top_n_and_top_k_are_two_names_of_one_thing(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    uses = [
        lambda: model.generate(TEXT, max_tokens=3, top_n=3, top_k=3),
        lambda: model.generate_iter(TEXT, max_tokens=3, top_n=3, top_k=3),
        lambda: model.generate_batch([TEXT], max_tokens=3, top_n=3, top_k=3),
    ]
    if name == "cpm2":
        uses.append(lambda: model.fill_blank("a<span>", max_tokens=3, top_n=3, top_k=3))
    if name == "eva":
        uses.append(lambda: model.dialogue([TEXT], max_tokens=3, top_n=3, top_k=3))
    for use in uses:
        with pytest.raises(ArgumentError, match="two names of one option"):
            use()


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_texts(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for text, words in [
        ("", "no tokens; give a text that is not empty"),
        (b"bytes", "give a str"),
        ([3], "give a str"),
        ("a" * 30, "more than max_length=20; .*shorten"),
        ("\ud800", "surrogate"),
    ]:
        if name == "eva" and isinstance(text, bytes):
            continue  # a sequence of utterances that are no texts, as [3] is
        for generate in (model.generate, model.generate_iter):
            with pytest.raises(ArgumentError, match=words):
                generate(text, max_tokens=3)
        with pytest.raises(ArgumentError, match=words):
            model.generate_batch([TEXT, text], max_tokens=3)
    for texts in ("今天", [], 3):
        with pytest.raises(ArgumentError, match=r"texts=.*; give a list"):
            model.generate_batch(texts)
    with pytest.raises(ArgumentError, match="2 rows at once"):
        model.generate_batch([TEXT, TEXT], max_tokens=3)


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_ids_to_score(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    size = model.config.vocab_size
    what = "(text|target|utterance)"
    outside = f"{what} has .*ids from 0 to {size - 1}"
    wrong: list[tuple[Any, str]] = [(ids, outside) for ids in ("", [], [size], [-1])]
    wrong += [([number], f"{what} holds a .*ids as ints") for number in (1.5, True, None)]
    wrong.append((["a", 1], f"{what} holds a str.*ids as ints"))
    for tensor in (torch.tensor([0.5]), torch.ones(2, 3, dtype=torch.long), torch.tensor(1)):
        wrong.append((tensor, rf"{what} is torch.*whole numbers \(T,\)"))
    wrong += [(nothing, f"{what} is a .*give a str, or token ids") for nothing in (None, 3)]
    for ids, words in wrong:
        for arguments in [[ids]] if name == "cpm1" else [[ids, [1]], [[1], ids]]:
            with pytest.raises(ArgumentError, match=words):
                model.logits(*arguments)
    with pytest.raises(ArgumentError, match="text has 21 tokens, more than max_length=20"):
        model.logits(*([[1] * 21] if name == "cpm1" else [[1] * 21, [1]]))


def test_a_text_longer_than_the_positions(load: Loader) -> None:
    model = load("cpm1", max_length=None)
    with pytest.raises(ArgumentError, match="take a model with more positions"):
        model.generate("今天" * 300, max_tokens=3)


def test_blanks(silent: Callable[..., Any]) -> None:
    model = silent("cpm2")
    for text, words in [
        (TEXT, "0 blanks; accepted: 1 to 16"),
        ("<span>" * 17, "17 blanks; accepted: 1 to 16"),
        (["<span>"], "give a str"),
        ("a" * 30 + "<span>", "31 tokens, more than max_length=20"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            model.fill_blank(text, max_tokens=3)
    for options, words in OPTIONS:
        if "num_beams" not in options:
            with pytest.raises(ArgumentError, match=words):
                model.fill_blank("a<span>", **{"max_tokens": 3, **options})


def test_dialogues(silent: Callable[..., Any]) -> None:
    model = silent("eva")
    for context in ([""], ["今天", ""], [3]):
        with pytest.raises(ArgumentError, match="an utterance"):
            model.dialogue(context, max_tokens=3)
    with pytest.raises(ArgumentError, match="more than max_length=20"):
        model.dialogue([TEXT] * 20, max_tokens=3, truncation_length=None)
    for options, words in OPTIONS:
        with pytest.raises(ArgumentError, match=words):
            model.dialogue([TEXT], **{"max_tokens": 3, **options})


@pytest.mark.parametrize("kind", [CPM1, CPM2, EVA])
def test_a_closed_model(kind: Any, load: Loader) -> None:
    model = load(kind.__name__.lower())
    model.close()
    uses: list[Callable[[], Any]] = [
        lambda: model.generate(TEXT),
        lambda: model.generate(TEXT, num_beams=2),
        lambda: model.generate_batch([TEXT]),
        lambda: model.generate_iter(TEXT),
        lambda: model.logits(*([[1]] if kind is CPM1 else [[1], [1]])),
        lambda: model.plan,
        lambda: model.stats,
        lambda: model.__enter__(),
    ]
    if kind is CPM2:
        uses.append(lambda: model.fill_blank("a<span>"))
    if kind is EVA:
        uses.append(lambda: model.dialogue([TEXT]))
    for use in uses:
        with pytest.raises(UnsupportedModelError, match=f"this {kind.__name__} was closed"):
            use()
