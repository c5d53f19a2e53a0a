"""bminf/arch/glm.py: tensors under our names, from folders of any degree and layout; how ranks are
cut; configurations; and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import GLM130B_FUSED, TinyGLM, Weights, dequantized, tiny_glm10b, tiny_glm130b
from tiny_zoo import join, rank_file, write_ranks

from bminf.arch.glm import GLM10B, GLM130B, PUBLISHED_GLM, GLMConfig, glm10b_config, glm130b_config
from bminf.arch.registry import checkpoint_in, split_tables
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import (
    COLUMNS,
    PER_RANK,
    REPLICATED,
    ROWS,
    fused_rows,
    table_for,
)
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError
from bminf.quantization.packed import Format

LAYER = {
    "input_layernorm": "attention.norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "post_attention_layernorm": "norm",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}


def ours_of(name: str) -> str | None:
    """The name that a tensor should get; None for one that is dropped."""
    if name.endswith("inv_freq"):
        return None
    if name.endswith("word_embeddings.weight"):
        return "embed_tokens.weight"
    if name.endswith("block_position_embeddings.weight"):
        return "embed_block_positions.weight"
    if name.endswith("position_embeddings.weight"):
        return "embed_positions.weight"
    inner, _, kind = name.removeprefix("transformer.").rpartition(".")
    if inner == "final_layernorm":
        return f"norm.{kind}"
    _, number, part = inner.split(".", 2)
    return f"layers.{number}.{LAYER[part]}.{kind}"


def expect(found: dict[str, Stored], weights: Weights) -> None:
    expected = {ours_of(name): tensor for name, tensor in weights.items() if ours_of(name)}
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name  # type: ignore[index]
        assert torch.equal(found[name].read(), tensor), name  # type: ignore[index]


Tensors = Callable[[Checkpoint], dict[str, Stored]]
KINDS: dict[str, tuple[Callable[[], TinyGLM], Tensors]] = {
    "glm130b": (lambda: tiny_glm130b(has_inv_freq=True), GLM130B.tensors),
    "glm130b without inv_freq": (tiny_glm130b, GLM130B.tensors),
    "glm10b": (tiny_glm10b, GLM10B.tensors),
    "glm10b of SAT": (lambda: tiny_glm10b().as_sat(), GLM10B.tensors),
}


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_are_the_model(kind: str, degree: int, tmp_path: Path) -> None:
    make, tensors = KINDS[kind]
    made = make()
    opened = checkpoint_in(write_ranks(tmp_path, made.ranks(degree)))
    assert opened.kind == "original" and list(opened.tensors) == list(made.tensors)
    expect(tensors(opened), made.tensors)


@pytest.mark.parametrize("prefix", ["", "glm."])
def test_hugging_face_has_the_inner_names(prefix: str, tmp_path: Path) -> None:
    made = tiny_glm10b()
    found = GLM10B.tensors(checkpoint_in(made.write_huggingface(tmp_path, "sharded", prefix)))
    assert set(found) == {ours_of(name) for name in made.tensors}
    for name, tensor in made.tensors.items():
        assert torch.equal(found[str(ours_of(name))].read(), tensor), name


def test_their_names_are_known_for_messages() -> None:
    up = "layers.7.feed_forward.up.bias"
    theirs = "transformer.layers.7.mlp.dense_h_to_4h.bias"
    assert (
        GLM130B.original_name("original", up) == theirs == GLM10B.original_name("huggingface", up)
    )
    assert (
        GLM130B.original_name("original", "embed_tokens.weight")
        == "transformer.word_embeddings.weight"
    )
    assert GLM10B.original_name("original", "embed_tokens.weight") == "word_embeddings.weight"
    assert GLM10B.original_name("original", "embed_block_positions.weight") == (
        "transformer.block_position_embeddings.weight"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_model_is_named(kind: str, tmp_path: Path) -> None:
    make, tensors = KINDS[kind]
    for degree in (1, 2):
        ranks = [{**rank, "mystery.weight": torch.ones(2)} for rank in make().ranks(degree)]
        folder = write_ranks(tmp_path / str(degree), ranks)
        with pytest.raises(CheckpointError, match=r"'mystery\.weight'"):
            tensors(checkpoint_in(folder))


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path) -> None:
    twice = {"transformer.word_embeddings.weight": torch.ones(280, 64)}
    write_ranks(tmp_path, [{**tiny_glm10b().tensors, **twice}])
    with pytest.raises(CheckpointError, match=r"'word_embeddings\.weight' in .* once"):
        GLM10B.tensors(checkpoint_in(tmp_path))


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    torch.save(tiny_glm130b().tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="huggingface folder, a layout that GLM-130B"):
        GLM130B.tensors(checkpoint_in(tmp_path))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.pt")
    with pytest.raises(CheckpointError, match="modelcenter folder, a layout that GLM-10B"):
        GLM10B.tensors(checkpoint_in(tmp_path))


# ---- how tensors are cut -------------------------------------------------------------------------


def test_the_tables_of_cuts_depend_on_the_model() -> None:
    layer = "transformer.layers.11"
    same = {
        f"{layer}.input_layernorm.bias": REPLICATED,
        f"{layer}.attention.dense.weight": COLUMNS,
        f"{layer}.attention.dense.bias": REPLICATED,
        f"{layer}.mlp.dense_4h_to_h.weight": COLUMNS,
        "transformer.final_layernorm.weight": REPLICATED,
    }
    of_glm130b = {
        "transformer.word_embeddings.weight": ROWS,
        **{f"{layer}.attention.query_key_value.{k}": ROWS for k in ("weight", "weight_scale")},
        **{f"{layer}.mlp.dense_h_to_4h.{k}": fused_rows(2) for k in ("weight_scale", "bias")},
        f"{layer}.attention.dense.weight_scale": PER_RANK,
        f"{layer}.mlp.dense_4h_to_h.weight_scale": PER_RANK,
        f"{layer}.attention.rotary_emb.inv_freq": REPLICATED,
        "mixins.rotary-embedding.rotary_emb.inv_freq": REPLICATED,
    }
    of_glm10b = {
        "transformer.word_embeddings.weight": ROWS,
        "mixins.block_position_embedding.block_position_embeddings.weight": REPLICATED,
        "transformer.position_embeddings.weight": REPLICATED,
        f"{layer}.attention.query_key_value.weight": fused_rows(3),
        f"{layer}.mlp.dense_h_to_4h.bias": ROWS,
    }
    for own in (of_glm130b, of_glm10b):
        table = table_for([*same, *own], split_tables())
        assert {name: table.split(name) for name in [*same, *own]} == {**same, **own}


# ---- quantized folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_ranks_keep_their_own_scales(bits: int, degree: int, tmp_path: Path) -> None:
    ranks = tiny_glm130b().ranks(degree, bits)
    found = GLM130B.tensors(checkpoint_in(write_ranks(tmp_path, ranks)))
    expect(found, join([dequantized(rank, bits) for rank in ranks], GLM130B_FUSED))
    out = found["layers.1.attention.out.weight"]
    assert isinstance(out, Quantized)
    assert out.form == Format(bits, None if degree == 1 else 64 // degree)
    up = found["layers.1.feed_forward.up.weight"]
    assert isinstance(up, Quantized) and up.form == Format(bits)


def reshape(path: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change the tensors whose names end so."""
    module: Weights = {}
    for name, tensor in torch.load(path)["module"].items():
        change = next((f for end, f in changes.items() if name.endswith(end)), None)
        changed = tensor if change is None else change(tensor)
        if changed is not None:
            module[name] = changed
    torch.save({"module": module}, path)


Change = dict[str, Callable[[torch.Tensor], torch.Tensor | None]]
DAMAGES: dict[str, tuple[Change, str]] = {
    "a third of the columns": (
        {"query_key_value.weight": lambda w: w[:, :20].clone()},
        r"query_key_value\.weight' in .* \(192, 20\) beside a LayerNorm of 64",
    ),
    "no norm": (
        {"input_layernorm.weight": lambda w: None}, "beside a LayerNorm of no known width"
    ),
    "a norm of another kind": (
        {"input_layernorm.weight": lambda w: w[None].clone()}, "of no known width"
    ),
    "layers of both": (
        {"1.attention.query_key_value.weight": lambda w: w[:, :32].clone()}, "of 8 and 4 bits"
    ),
    "no codes": ({"query_key_value.weight": lambda w: None}, r"query_key_value\.weight_scale"),
    "codes of another type": ({"0.attention.dense.weight": lambda w: w.half()}, "should be int8"),
    "scales of another type": (
        {"0.attention.dense.weight_scale": lambda w: w.int()}, "floating point"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_codes_that_are_none_are_named(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    write_ranks(tmp_path, tiny_glm130b().ranks(1, 8))
    reshape(rank_file(tmp_path, 0), **change)
    with pytest.raises(CheckpointError, match=message):
        GLM130B.tensors(checkpoint_in(tmp_path))


# ---- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4])
def test_shapes_tell_all_but_the_heads(heads: int, tmp_path: Path) -> None:
    config = {"num_attention_heads": heads}
    opened = checkpoint_in(write_ranks(tmp_path / "a", tiny_glm130b().ranks(2)))
    found = glm130b_config(config, GLM130B.tensors(opened), "there")
    assert found == GLMConfig("glm-130b", 104, 64, 2, heads, 96, 2048)
    opened = checkpoint_in(write_ranks(tmp_path / "b", tiny_glm10b().ranks(1)))
    found = glm10b_config(config, GLM10B.tensors(opened), "there")
    assert found == GLMConfig("glm-10b", 280, 64, 2, heads, 256, 160)


class Shaped:
    """A tensor of which nothing but the shape is looked at."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


@pytest.mark.parametrize("title", PUBLISHED_GLM)
def test_published_models_need_no_configuration(title: str) -> None:
    published = PUBLISHED_GLM[title]
    size, positions = published.hidden_size, published.max_position_embeddings
    tensors: dict[str, Any] = {
        "embed_tokens.weight": Shaped(published.vocab_size, size),
        "norm.weight": Shaped(size),
        "layers.0.feed_forward.down.weight": Shaped(size, published.intermediate_size),
        f"layers.{published.num_hidden_layers - 1}.norm.weight": Shaped(size),
    }
    if published.is_rotary:
        assert glm130b_config({}, tensors, "there") == published
        return
    tensors["embed_positions.weight"] = Shaped(positions + 1, size)
    assert glm10b_config({}, tensors, "there") == published


def test_large_chinese_has_its_own_masks() -> None:
    small = PUBLISHED_GLM["GLM-10B-chinese"]
    large = GLMConfig("glm-10b", 50048, 1024, 24, 16, 4096, 1024)
    assert GLM10B.tokenizer_settings(large) == {"fixed_commands": True}
    assert GLM10B.tokenizer_settings(small) is None
