"""A folder, a configuration or an argument that is wrong is named, and nothing of what was refused
stays in memory.

bminf/models/source.py, bminf/models/assemble.py, bminf/checkpoint/config.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import tiny_glm, tiny_glm10b, tiny_glm130b, tiny_model, tokenizer_of
from tiny_zoo import (
    CPM1_CONFIG,
    TinyModel,
    bminf1_bytes,
    tiny,
    with_tensor,
    write_huggingface,
    write_ranks,
    write_vocabulary,
)

from bminf.errors import ArgumentError, BudgetError, CheckpointError
from bminf.models import convert, plan_model

Loader = Callable[..., Any]
Refuse = Callable[..., None]
MODELS = ["cpm1", "cpm2", "eva", "glm130b", "glm10b"]

# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write", "num_bytes", "words"),
    [
        ("cpm1", lambda made, to: made.write_original(to), -100, "truncated"),
        ("cpm1", lambda made, to: made.write_original(to, form="old"), 60, "truncated"),
        ("glm10b", lambda made, to: made.write_original(to, 2), -100, "truncated"),
        ("eva", lambda made, to: made.write_huggingface(to, "sharded"), -7, "is damaged or trunc"),
        ("cpm1", lambda made, to: made.write_bminf1(to), -7, ""),
    ],
)
def test_a_truncated_file(
    name: str, write: Callable[[Any, Path], Path], num_bytes: int, words: str, refuse: Refuse,
    tmp_path: Path,
) -> None:  # fmt: skip
    made = tiny_model(name)
    folder = write(made, tmp_path / "a")
    file = sorted([*folder.rglob("*.pt"), *folder.rglob("*.safetensors")])[-1]
    file.write_bytes(file.read_bytes()[:num_bytes])
    refuse(name, folder, CheckpointError, f"{re.escape(str(file))}.*{words}", config=made.config)


@pytest.mark.parametrize(
    ("name", "missing", "degree"),
    [
        ("cpm1", "transformer.layers.1.mlp.dense_h_to_4h.bias", 1),
        ("cpm1", "position_embeddings.weight", 1),
        ("cpm2", "lm_head.weight", 1),
        ("eva", "decoder.blocks.2.cross_attn.cross_attn.project_kv.weight", 1),
        ("eva", "encoder.blocks.0.self_attn.self_attn.relative_attention_bias.weight", 1),
        ("glm130b", "transformer.layers.1.attention.dense.bias", 1),
        ("glm130b", "transformer.final_layernorm.weight", 2),
        ("glm10b", "word_embeddings.weight", 1),
        ("glm10b", "transformer.position_embeddings.weight", 2),
    ],
)
def test_a_missing_tensor_is_named_as_in_the_file(
    name: str, missing: str, degree: int, refuse: Refuse, tmp_path: Path
) -> None:
    folder = with_tensor(tiny_model(name), missing, None).write_original(tmp_path / "a", degree)
    words = f"{re.escape(str(folder))} lacks '{re.escape(missing)}'"
    refuse(name, folder, CheckpointError, words)


@pytest.mark.parametrize("parts", ["qkv", "k"])
def test_the_parts_of_a_missing_matrix_are_named(
    parts: str, refuse: Refuse, tmp_path: Path
) -> None:
    made = tiny("eva")
    made.write_beside(tmp_path / "a", made.huggingface_config())
    names = [f"encoder.block.1.layer.0.SelfAttention.{part}.weight" for part in parts]
    tensors = {k: v for k, v in made.huggingface_tensors().items() if k not in names}
    folder = write_huggingface(tmp_path / "a", tensors, "safetensors")
    refuse("eva", folder, CheckpointError, f"lacks '{re.escape(' + '.join(names))}'")


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("cpm1", "transformer.layers.2.attention.dense.weight", (48, 47)),
        ("cpm1", "word_embeddings.weight", (64,)),
        ("cpm2", "encoder.blocks.0.ff.dense_relu_dense.wo.weight", (80, 48)),
        ("cpm2", "decoder.final_layernorm.weight", (49,)),
        ("eva", "lm_head.weight", (255, 48)),
        ("glm130b", "transformer.layers.1.attention.dense.weight", (64, 62)),
        ("glm130b", "transformer.layers.0.input_layernorm.bias", (63,)),
        ("glm10b", "transformer.block_position_embeddings.weight", (9, 64)),
        ("glm10b", "word_embeddings.weight", (280, 60)),
    ],
)
def test_a_tensor_of_another_shape(
    name: str, tensor: str, shape: tuple[int, ...], refuse: Refuse, tmp_path: Path
) -> None:
    made = with_tensor(tiny_model(name), tensor, torch.ones(shape).half())
    folder = made.write_original(tmp_path / "a")
    file = re.escape(str(next(folder.rglob("*.pt"))))
    words = rf"'{re.escape(tensor)}' in {file} has the shape {re.escape(str(shape))}"
    refuse(name, folder, CheckpointError, words)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("cpm1", "transformer.layers.0.attention.relative.weight", ""),
        ("cpm2", "encoder.blocks.0.adapter.weight", ""),
        ("cpm2", "encoder.prompt_embeds.weight", ".*prompt-tuned"),
        ("eva", "decoder.blocks.1.self_attn.self_attn.relative_attention_bias.weight", ""),
        ("glm130b", "transformer.layers.0.adapter.weight", ""),
        ("glm10b", "transformer.layers.0.adapter.weight", ""),
    ],
)
@pytest.mark.parametrize("degree", [1, 2])
def test_an_unknown_tensor(
    name: str, tensor: str, words: str, degree: int, refuse: Refuse, tmp_path: Path
) -> None:
    made = with_tensor(tiny_model(name), tensor, torch.ones(48, 48).half())
    folder = made.write_original(tmp_path / "a", degree)
    refuse(name, folder, CheckpointError, f"'{re.escape(tensor)}'{words}")


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_ranks_that_are_missing(name: str, refuse: Refuse, tmp_path: Path) -> None:
    """The last one is missed by the shapes; a file that tells the degree says it, too."""
    for gone, words in [
        (1, "lacks the file of rank 01 .*fetch all ranks"),
        (3, r"48 columns in all.*files of all ranks .*3 were found"),
    ]:
        folder = tiny_glm(name).write_original(tmp_path / str(gone), 4)
        next(folder.rglob(f"mp_rank_{gone:02d}_*.pt")).unlink()
        refuse(name, folder, CheckpointError, words)
        for tp in (None, 1, 3):
            given = {"tokenizer": tokenizer_of(name)} if tp is None else {"tp": tp}
            with pytest.raises(CheckpointError, match=words):
                convert(folder, tmp_path / "to", **given)
    told = tiny_glm(name).write_original(tmp_path / "told", 2, mp_world_size=4)
    refuse(name, told, CheckpointError, "one of 4 ranks")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("cpm1", "transformer.layers.2.input_layernorm.weight"),
        ("glm130b", "transformer.layers.1.post_attention_layernorm.weight"),
        ("glm10b", "transformer.layers.1.post_attention_layernorm.weight"),
    ],
)
def test_ranks_of_different_checkpoints(
    name: str, tensor: str, refuse: Refuse, load: Loader, tmp_path: Path
) -> None:
    """Found only while reading, with two slots and a file at work: what all hold alike differs."""
    made = tiny_model(name)
    ranks = made.ranks(2)
    ranks[1][tensor] += 1
    folder = write_ranks(made.write_beside(tmp_path / "a"), ranks)
    limit = load(name).plan.least_limit
    words = rf"'{re.escape(tensor)}.* should be the same"
    refuse(name, folder, CheckpointError, words, memory_limit=limit)


def test_scales_of_bminf1_that_are_not_finite(refuse: Refuse, tmp_path: Path) -> None:
    made = tiny("cpm1")
    tree = made.bminf1_tree()
    tree["layers"]["1"]["ff"]["linear_in"]["scale"][3] = math.inf
    folder = made.write_bminf1(tmp_path / "a")
    (folder / "checkpoint.pt").write_bytes(bminf1_bytes(tree))
    refuse(
        "cpm1", folder, CheckpointError,
        r"'layers\.1\.ff\.linear_in\.scale' in .*checkpoint\.pt holds NaN",
        config=CPM1_CONFIG, quantization="int8",
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_without_their_scales(bits: int, refuse: Refuse, tmp_path: Path) -> None:
    made = tiny_glm130b()
    ranks = made.ranks(1, bits)
    del ranks[0]["transformer.layers.0.attention.query_key_value.weight_scale"]
    folder = write_ranks(made.write_beside(tmp_path / "a"), ranks)
    words = r"query_key_value\.weight.* (is torch.int8|has the shape)"
    refuse("glm130b", folder, CheckpointError, words, quantization="int4")


# ---- another model, another vocabulary -----------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name", "wanted", "words"),
    [
        ("original", "cpm1", "cpm2", "holds CPM-1, not CPM-2"),
        ("original", "cpm2", "cpm1", "'word_embeds.weight'.*a CPM-1 .* does not have"),
        ("original", "eva", "cpm2", "holds EVA, not CPM-2"),
        ("huggingface", "eva", "cpm1", "holds EVA, not CPM-1"),
        ("huggingface", "cpm1", "eva", "holds CPM-1, not EVA"),
        ("modelcenter", "cpm2", "eva", "holds CPM-2, not EVA"),
        ("bminf1", "cpm1", "cpm2", "holds CPM-1, not CPM-2"),
        ("bminf1", "cpm2", "cpm1", "'input_embedding.weight'.*a CPM-1 .* does not have"),
        ("original", "cpm1", "glm10b", "holds CPM-1, not GLM-130B or GLM-10B"),
        ("original", "cpm2", "glm10b", "holds another model, not GLM-130B or GLM-10B"),
        ("original", "glm130b", "cpm1", "holds GLM-130B, not CPM-1"),
        ("original", "glm10b", "cpm1", "holds GLM-10B, not CPM-1"),
    ],
)
def test_a_checkpoint_of_another_model(
    layout: str, name: str, wanted: str, words: str, refuse: Refuse, tmp_path: Path
) -> None:
    folder = getattr(tiny_model(name), f"write_{layout}")(tmp_path / "a")
    refuse(wanted, folder, CheckpointError, f"{re.escape(str(folder))}.*{words}")


def test_a_glm_is_told_by_its_embedding(refuse: Refuse, tmp_path: Path) -> None:
    made = with_tensor(tiny_glm130b(), "transformer.word_embeddings.weight", None)
    folder = made.write_original(tmp_path / "untold")
    words = "untold holds another model, not GLM-130B or GLM-10B"
    refuse("glm130b", folder, CheckpointError, words)


def test_modelcenters_own_cpm1_is_another_architecture(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    torch.save({"input_embedding.weight": torch.ones(64, 48)}, tmp_path / "a" / "pytorch_model.pt")
    refuse("cpm1", tmp_path / "a", CheckpointError, "ModelCenter's CPM1 is another architecture")


def test_a_gpt2_of_other_sizes(refuse: Refuse, tmp_path: Path) -> None:
    made = tiny("cpm1")
    folder = made.write_huggingface(tmp_path / "a", "safetensors")
    config = {**made.huggingface_config(), "n_embd": 96}
    (folder / "config.json").write_text(json.dumps(config))
    words = r"'transformer\.w.e\.weight' in .*the configuration asks"
    refuse("cpm1", folder, CheckpointError, words)


def test_a_file_of_nothing_that_is_known(refuse: Refuse, tmp_path: Path) -> None:
    folder = tiny("cpm1").write_beside(tmp_path / "a")
    write_ranks(folder, [{"roberta.embeddings.weight": torch.ones(3, 3)}])
    refuse("cpm1", folder, CheckpointError, "'roberta.embeddings.weight'.*another model")


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_a_vocabulary_of_another_length(name: str, refuse: Refuse, tmp_path: Path) -> None:
    made: TinyModel = tiny(name)
    folder = made.write_original(tmp_path / "a")
    count = len(made.tokens)
    write_vocabulary(folder, [*made.tokens[:20], "另", *made.tokens[20:]])
    words = rf"has {count + 1} tokens \(.*vocab\.txt\), the embedding of .* {count} rows"
    refuse(name, folder, CheckpointError, words)


def test_a_vocabulary_of_another_glm(refuse: Refuse, tmp_path: Path) -> None:
    made = tiny_glm10b()
    folder = made.write_original(tmp_path / "a")
    ids = json.loads((folder / "vocab.json").read_text())
    last = ids.pop("<|endoftext|>")
    more = {f"{letter}{letter}": last + n for n, letter in enumerate("abcdefghijkl")}
    (folder / "vocab.json").write_text(json.dumps({**ids, **more, "<|endoftext|>": last + 12}))
    words = rf"has \d+ tokens \(.*vocab\.json.*\), the embedding of .* {made.num_rows} rows"
    refuse("glm10b", folder, CheckpointError, words)
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    refuse("glm10b", folder, CheckpointError, "no tokenizer for glm10b: looked for vocab.json")
    (folder / "a.model").write_bytes(b"no model")
    refuse("glm10b", folder, CheckpointError, r"a\.model")
    folder = tiny_glm130b().write_original(tmp_path / "b")
    words = r"has 20\d{3} tokens \(.*ice_text\.model\)"
    refuse("glm130b", folder, CheckpointError, words, tokenizer=None)


# ---- the constructor -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_no_checkpoint(name: str, refuse: Refuse) -> None:
    """The message names what each model takes."""
    accepted = {
        "cpm1": 'a folder with a CPM-1.*"TsinghuaAI/CPM-Generate"',
        "cpm2": "a folder with a CPM-2 checkpoint$",
        "eva": 'EVA checkpoint, "thu-coai/EVA1.0", .*"thu-coai/EVA2.0-xl',
        "glm130b": 'a folder with a GLM-130B or GLM-10B checkpoint, "THUDM/glm-10b"',
        "glm10b": 'a folder with a GLM-130B or GLM-10B checkpoint, "THUDM/glm-10b"',
    }[name]
    refuse(name, None, ArgumentError, f"no checkpoint is given; .*{accepted}")
    refuse(name, 3, ArgumentError, f"checkpoint is a int.*{accepted}")
    for given in ("not/there/at/all", Path("not/there/at/all")):
        refuse(name, given, CheckpointError, f"there is no 'not/there/at/all'.*{accepted}")


def test_an_empty_folder(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("cpm1", "glm130b"):
        words = r"is empty; accepted: .*mp_rank_NN.*checkpoint\.pt"
        refuse(name, tmp_path / "a", CheckpointError, words)
    (tmp_path / "a" / "notes.txt").write_text("none")
    refuse("cpm1", tmp_path / "a", CheckpointError, r"holds no checkpoint, but 'notes\.txt'")


ARGUMENTS: list[tuple[dict[str, Any], Any, str]] = [
    ({"quantization": "int3"}, ArgumentError, 'quantization=\'int3\'; accepted: "int8", "int4"'),
    ({"quantization": True}, ArgumentError, "quantization=True; accepted"),
    ({"quantization": "int4", "activations": "int8"}, ArgumentError, 'activations="int8" needs'),
    ({"activations": "int8"}, ArgumentError, "activations='int8', but quantization=None"),
    ({"quantization": "int8", "activations": "int9"}, ArgumentError, "activations='int9'; accep"),
    ({"dtype": torch.int8}, ArgumentError, r"dtype=torch\.int8; accepted: torch\.float32"),
    ({"dtype": "float15"}, ArgumentError, "dtype='float15'; accepted"),
    ({"device": "tpu"}, ArgumentError, "device='tpu'.*accepted"),
    ({"device": "meta"}, ArgumentError, "device='meta'; accepted"),
    ({"memory_limit": "10KB"}, BudgetError, r"limit of 10 KB .*least .*MiB \(\d+ bytes\)"),
    ({"memory_limit": 0}, BudgetError, "raise memory_limit, lower max_length"),
    ({"memory_limit": 0, "max_batch_size": 2}, BudgetError, "max_batch_size=2; .* lower those two"),
    ({"memory_limit": -1}, ArgumentError, "memory_limit=-1"),
    ({"max_length": 257}, ArgumentError, "max_length=257, but the model has (256|160) positions"),
    ({"max_length": 0}, ArgumentError, "max_length=0"),
    ({"max_batch_size": 0}, ArgumentError, "max_batch_size=0"),
    ({"config": 3}, ArgumentError, "config is a int; accepted: .*(GPT|GLM)Config"),
    ({"config": "nowhere.json"}, CheckpointError, r"nowhere\.json cannot be read"),
    ({"tokenizer": 3}, ArgumentError, "tokenizer=3"),
    ({"tokenizer": "nowhere"}, CheckpointError, "tokenizer='nowhere': there is no such"),
    ({"speed": 3}, TypeError, "'speed'"),
]
OF_GLM: list[tuple[str, dict[str, Any], str]] = [
    ("glm10b", {"quantization": "int3"}, 'accepted: "int8", "int4", "int4-row", a bminf.Form'),
    ("glm10b", {"head_quantization": "int3"}, "head_quantization='int3'; accepted"),
    ("glm10b", {"tokenizer": 3}, "tokenizer=3 .*GLMTokenizer"),
    ("glm10b", {"rotary_precision": "float16"}, "rotary_precision is for GLM-130B"),
    ("glm130b", {"rotary_precision": "half"}, "rotary_precision='half'; accepted: 'float16'"),
]


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [(name, *case) for name in ("cpm1", "glm10b") for case in ARGUMENTS]
    + [(name, given, ArgumentError, words) for name, given, words in OF_GLM],
    ids=lambda x: str(x)[:30],
)
def test_arguments_of_the_constructor(
    name: str, given: dict[str, Any], error: Any, words: str, folders: dict[str, Path],
    refuse: Refuse,
) -> None:  # fmt: skip
    refuse(name, folders[name], error, words, **given)


@pytest.mark.parametrize("name", ["cpm2", "glm130b", "glm10b"])
def test_the_least_limit_is_named_to_the_byte(
    name: str, load: Loader, folders: dict[str, Path], refuse: Refuse
) -> None:
    packed: dict[str, Any] = {"quantization": "int4"}
    packed |= {"head_quantization": "int8"} if name.startswith("glm") else {}
    with pytest.raises(BudgetError) as error:
        load(name, memory_limit=1, **packed)
    found = re.search(r"that would do, .*? \((\d+) bytes\)", str(error.value))
    del error
    assert found is not None
    least = int(found[1])
    refuse(name, folders[name], BudgetError, found[1], memory_limit=least - 1, **packed)
    with load(name, memory_limit=least, **packed) as model:
        assert model.plan.streamed and model.plan.total_bytes <= least
        assert plan_model(model.config, least, device="cpu", **packed) == model.plan
        with pytest.raises(BudgetError, match=found[1]):
            plan_model(model.config, least - 1, device="cpu", **packed)


# ---- configurations ------------------------------------------------------------------------------

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
    ("glm130b", {"num_attention_heads": 5}, "hidden_size=64 is not a multiple of 10"),
    ("glm130b", {"num_attention_heads": 64}, "hidden_size=64 is not a multiple of 128"),
    ("glm130b", {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
    ("glm130b", {"num_attention_heads": None}, "does not say num_attention_heads, and hidden_siz"),
    ("glm130b", {"num_layers": 3}, r"lacks 'transformer\.layers\.2\."),
    ("glm130b", {"num_layers": 1}, r"has unexpected tensors: 'transformer\.layers\.1\."),
    ("glm130b", {"inner_hidden_size": 128}, r"dense_h_to_4h.*the configuration asks for \(256"),
    ("glm130b", {"hidden_size": 32}, "the configuration asks for"),
    ("glm130b", {"layernorm_order": "pre"}, "layernorm_order is 'pre', which this library does"),
    ("glm130b", {"rotary_base": 500}, "rotary_base is 500"),
    ("glm130b", {"deepnorm_alpha": 3}, r"deepnorm_alpha is 3; with 2 layers it is 2\.0"),
    ("glm130b", {"layernorm_epsilon": 2}, "layernorm_epsilon is 2"),
    ("glm10b", {"num_attention_heads": 5}, "hidden_size=64 is not a multiple of 5"),
    ("glm10b", {"block_position_encoding": False}, "block_position_encoding is False"),
    ("glm10b", {"attention_scale": 0.5}, r"attention_scale is 0\.5"),
    ("glm10b", {"layernorm": "post"}, "layernorm is 'post'"),
    ("glm10b", {"activation": "relu"}, "activation is 'relu'"),
    ("glm10b", {"num_layers": 0}, "num_layers is 0"),
]


@pytest.mark.parametrize(("name", "changed", "words"), CONFIGS)
def test_a_configuration_that_is_wrong(
    name: str, changed: dict[str, Any], words: str, folders: dict[str, Path], refuse: Refuse
) -> None:
    config = {**tiny_model(name).config, **changed}
    refuse(name, folders[name], CheckpointError, words, config=config)


@pytest.mark.parametrize("written", ["not JSON", "[1, 2]", ""])
def test_a_configuration_file_that_is_none(written: str, refuse: Refuse, tmp_path: Path) -> None:
    folder = tiny("cpm1").write_original(tmp_path / "a")
    (folder / "config.json").write_text(written)
    refuse("cpm1", folder, CheckpointError, r"config\.json")


@pytest.fixture(scope="module")
def modelcenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("cpm2").write_modelcenter(tmp_path_factory.mktemp("modelcenter"))


@pytest.mark.parametrize(
    "changed",
    [
        *({name: True} for name in ("norm_bias", "att_bias", "ffn_bias", "proj_bias")),
        *({"post_layer_norm": True}, {"cls_head": 2}, {"pos_bias_type": "rotary"}),
        *({"ffn_activate_fn": "relu"}, {"attn_scale": 1}, {"tied": "yes"}),
        *({"length_scale": "yes"}, {"norm_eps": "small"}, {"dim_head": None}),
    ],
    ids=str,
)
def test_modelcenter_configurations_of_other_architectures(
    changed: dict[str, Any], refuse: Refuse, modelcenter: Path
) -> None:
    config = {**tiny("cpm2").modelcenter_config(), **changed}
    refuse("cpm2", modelcenter, CheckpointError, next(iter(changed)), config=config)
