"""Configurations in all the dialects that they are found in, and those of the published models.

A configuration is a GPTConfig, T5Config or GLMConfig, or a mapping: the authors' own fields, those
of Hugging Face, ModelCenter's, or ours. The vocabulary is that of the tensors, whatever a file
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bminf.arch.glm import GLMConfig, GLMKind
from bminf.checkpoint.config import ConfigReader, num_layers_of, rows_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

PUBLISHED_GLM = {
    "GLM-130B": GLMConfig("glm-130b", 150528, 12288, 70, 96, 32768, 2048),
    "GLM-10B": GLMConfig("glm-10b", 50304, 4096, 48, 64, 16384, 1024),
    "GLM-10B-chinese": GLMConfig("glm-10b", 50048, 4096, 48, 64, 16384, 1024),
    "GLM-2B": GLMConfig("glm-10b", 50304, 2048, 36, 32, 8192, 1024),
}
"""Sizes: the papers, and the files that were published."""

_GLM_HEADS = {
    "glm-130b": {12288: 96},
    "glm-10b": {4096: 64, 2048: 32, 1152: 18, 1024: 16, 768: 12},
}
"""Hidden size -> heads of the published models: all that their shapes do not tell."""


def glm130b_config(
    source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> GLMConfig:
    """The GLMConfig that `source` describes; see gpt_config. What it does not say the shapes do."""
    reader = ConfigReader(_inner(source), where)
    reader.must_be("layernorm_order", None, "post")
    reader.must_be("rotary_base", None, 10000)
    config = reader.own(GLMConfig) or _glm_config(reader, "glm-130b", tensors)
    alpha = reader.source.get("deepnorm_alpha", config.residual_scale)
    if not isinstance(alpha, int | float) or abs(alpha - config.residual_scale) > 1e-3:
        raise CheckpointError(
            f"{where}: deepnorm_alpha is {alpha!r}; with {config.num_hidden_layers} layers it is "
            f"{config.residual_scale}"
        )
    return config


def glm10b_config(
    source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> GLMConfig:
    """As glm130b_config, for GLM with 110 million to 10 billion parameters."""
    reader = ConfigReader(_inner(source), where)
    # Each of these would compute something that arch/glm.py does not.
    reader.must_be("block_position_encoding", None, True)
    reader.must_be("attention_scale", None, 1.0)
    reader.must_be("layernorm", None, "pre")
    reader.must_be("activation", None, "gelu_tanh")
    return reader.own(GLMConfig) or _glm_config(reader, "glm-10b", tensors)


def _inner(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration may stand beside that of the tokenizer."""
    inner = source.get("model")
    return inner if isinstance(inner, Mapping) else source


def _glm_config(
    reader: ConfigReader, architecture: GLMKind, tensors: Mapping[str, Stored]
) -> GLMConfig:
    hidden_size = reader.optional("hidden_size") or rows_of(tensors, "norm.weight", 1)
    num_heads = reader.optional("num_attention_heads") or _GLM_HEADS[architecture].get(hidden_size)
    if num_heads is None:
        raise CheckpointError(
            f"{reader.where} does not say num_attention_heads, and hidden_size={hidden_size} is of "
            "no published GLM; give config=..., a path or a mapping with num_attention_heads"
        )
    positions = reader.optional("max_position_embeddings", "max_sequence_length") or 2048
    if "embed_positions.weight" in tensors:
        positions = tensors["embed_positions.weight"].shape[0] - 1
    wide = tensors.get("layers.0.feed_forward.down.weight")
    return reader.made(
        GLMConfig,
        architecture=architecture,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=hidden_size,
        num_hidden_layers=reader.optional("num_hidden_layers", "num_layers")
        or max(1, num_layers_of(tensors, "layers")),
        num_attention_heads=num_heads,
        intermediate_size=reader.optional("intermediate_size", "inner_hidden_size")
        or (4 * hidden_size if wide is None else wide.shape[1]),
        max_position_embeddings=positions,
        layer_norm_eps=reader.number(
            1e-5, "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"
        ),
        rotary_precision=reader.source.get("rotary_precision", "float16"),
    )
