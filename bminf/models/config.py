"""Configurations in all the dialects that they are found in, and those of the published models.

A configuration is a GPTConfig, T5Config or GLMConfig, or a mapping: the authors' own fields, those
of Hugging Face, ModelCenter's, or ours. The vocabulary is that of the tensors, whatever a file
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bminf.arch.glm import GLMConfig, GLMKind
from bminf.arch.t5 import T5Config
from bminf.checkpoint.config import ConfigReader, num_layers_of, rows_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

PUBLISHED_CPM2 = {
    "CPM-2 (Chinese), CPM-2.1": T5Config(26240, 4096, 10240, 64, 64, 24, 24),
    "CPM-2 (Chinese and English)": T5Config(51968, 4096, 10240, 64, 64, 24, 24),
}
PUBLISHED_EVA = {
    "thu-coai/EVA1.0": T5Config(30000, 2048, 5120, 32, 64, 24, 24),
    "thu-coai/EVA2.0-xlarge": T5Config(30000, 2048, 5120, 32, 64, 24, 24, True),
    "thu-coai/EVA2.0-large": T5Config(30000, 1024, 4096, 16, 64, 24, 24, True),
    "thu-coai/EVA2.0-base": T5Config(30000, 768, 3072, 12, 64, 12, 12, True),
}
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


def t5_config(source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> T5Config:
    """The T5Config that `source` describes; see gpt_config.

    `feed_forward_proj` is not read: the authors' files say "relu" in it, and their code computes a
    tanh GELU with a gate. A field hidden_act is.
    """
    reader = ConfigReader(source, where)
    own = reader.own(T5Config)
    if own is not None:
        return own
    if "dim_model" in source:
        return _modelcenter_config(reader, tensors)
    num_layers = reader.integer("num_encoder_layers", "num_layers")
    return reader.made(
        T5Config,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=reader.integer("hidden_size", "d_model"),
        intermediate_size=reader.integer("intermediate_size", "d_ff"),
        num_attention_heads=reader.integer("num_attention_heads", "num_heads"),
        head_dim=reader.integer("head_dim", "d_kv"),
        num_encoder_layers=num_layers,
        num_decoder_layers=_num_decoder_layers(reader, num_layers, tensors),
        is_attention_scaled=reader.flag("is_attention_scaled", "attn_scale"),
        hidden_act=reader.activation("gelu_new", "hidden_act"),
        num_buckets=reader.optional("num_buckets", "relative_attention_num_buckets")
        or rows_of(tensors, "encoder.position_bias.weight", 32),
        max_distance=reader.optional("max_distance", "relative_attention_max_distance") or 128,
        rms_norm_eps=reader.number(1e-6, "rms_norm_eps", "layer_norm_epsilon"),
    )


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


def _modelcenter_config(reader: ConfigReader, tensors: Mapping[str, Stored]) -> T5Config:
    # Each of these would compute something that arch/t5.py does not.
    for name in ("norm_bias", "att_bias", "ffn_bias", "proj_bias", "post_layer_norm", "cls_head"):
        reader.must_be(name, None, False)
    for name in ("tied", "length_scale"):  # which models/source.py acts on
        reader.must_be(name, None, False, True)
    reader.must_be("pos_bias_type", None, "relative")
    activation = reader.must_be("ffn_activate_fn", "gated_gelu", "gated_gelu_new")
    return reader.made(
        T5Config,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=reader.integer("dim_model"),
        intermediate_size=reader.integer("dim_ff"),
        num_attention_heads=reader.integer("num_heads"),
        head_dim=reader.integer("dim_head"),
        num_encoder_layers=reader.integer("num_encoder_layers"),
        num_decoder_layers=reader.integer("num_decoder_layers"),
        is_attention_scaled=reader.flag("attn_scale"),
        hidden_act="gelu_tanh" if activation == "gated_gelu_new" else "gelu",
        num_buckets=reader.integer("position_bias_num_buckets"),
        max_distance=reader.integer("position_bias_max_distance"),
        rms_norm_eps=reader.number(1e-6, "norm_eps"),
    )


def _num_decoder_layers(
    reader: ConfigReader, num_layers: int, tensors: Mapping[str, Stored]
) -> int:
    """CPM-2's code and EVA's Hugging Face form build both stacks with num_layers layers, EVA's own
    code honours num_decoder_layers: of the two numbers, the one that the tensors confirm."""
    named = reader.optional("num_decoder_layers")
    if named is None or num_layers_of(tensors, "decoder.layers") == num_layers:
        return num_layers
    return named
