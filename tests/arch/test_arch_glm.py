"""bminf/arch/glm.py: folders that are refused, configurations, and sizes.

That tensors get our names, from folders of any degree and layout, is in models/test_source.py and
models/test_fill.py; how ranks are cut in models/test_glm_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import Weights, tiny_glm10b, tiny_glm130b
from tiny_zoo import rank_file, write_ranks

from bminf.arch.glm import GLM10B, GLM130B, PUBLISHED_GLM, GLMConfig, glm10b_config, glm130b_config
from bminf.arch.registry import checkpoint_in
from bminf.errors import CheckpointError


def test_names_of_a_file_of_hugging_face_are_known_for_messages() -> None:
    """Those of other folders are in models/test_source_errors.py."""
    up = "layers.7.feed_forward.up.bias"
    theirs = "transformer.layers.7.mlp.dense_h_to_4h.bias"
    assert GLM10B.original_name("huggingface", up) == theirs


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


# ---- quantized folders ---------------------------------------------------------------------------


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
