"""How large a model's KV cache becomes, counted from its configuration (transformers' fields).

Layers differ: most keep keys and values of every token, those with a window only the last ones,
recurrent ones (Mamba, gated delta rule, short convolutions) a state of fixed size, and some none.
What a text of a given length really takes is measured in tests/offload/test_context.py.
"""

from __future__ import annotations

import re
import sys
from typing import Any

_WINDOWED = ("sliding_attention", "hybrid_sliding", "chunked_attention", "local_attention")
_RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "linear")
_ALSO_ATTENTION = ("hybrid", "hybrid_sliding")  # beside their state
_NOTHING = ("dummy", "mlp", "moe")
_STATE_ITEMSIZE = 4  # recurrent states are kept in float32 by most models


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that is there and not None."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # a field that differs by layer refuses to be read for all
            continue
        if value is not None:
            return value
    return default


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model, which may be all of it."""
    get = getattr(config, "get_text_config", None)
    if callable(get):
        return get(decoder=True)
    return first_of(config, "text_config", "llm_config", "language_config", default=config)


def num_heads(config: Any) -> Any:
    return first_of(config, "num_attention_heads", "decoder_attention_heads", "n_head", "n_heads",
        "num_heads")  # fmt: skip


def hidden_size(config: Any) -> Any:
    return first_of(config, "hidden_size", "d_model", "n_embd")


def num_layers(config: Any) -> Any:
    """Of the decoder, where there is an encoder, too; None where a part of `config` has them."""
    if getattr(config, "is_encoder_decoder", False):
        return first_of(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return first_of(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def cache_bytes(config: Any, num_texts: int, num_tokens: int, itemsize: int) -> int:
    """Bytes of the cache of `num_texts` texts of `num_tokens` tokens each.

    config: of the whole model.   itemsize: of its activations. With an encoder, the text that is
    read has `num_tokens` as well; an encoder of audio has the positions it was built for.
    """
    text = text_config(config)
    kinds = layer_kinds(text, num_layers(config) or num_layers(text) or 0)
    per_layer = first_of(text, "per_layer_config")  # where layers differ in their sizes
    layers = [text] * len(kinds) if per_layer is None else list(per_layer)
    if len(layers) != len(kinds):
        layers = [text] * len(kinds)
    total = sum(
        _layer_bytes(layer, kind, num_tokens, itemsize)
        for layer, kind in zip(layers, kinds, strict=True)
    )
    if getattr(config, "is_encoder_decoder", False):
        read = first_of(config, "max_source_positions", default=num_tokens)
        total += len(kinds) * read * attention_columns(text) * itemsize
    return num_texts * total


def layer_kinds(text: Any, count: int) -> list[str]:
    """The kind of each of `count` layers, in transformers' words."""
    kinds = first_of(text, "layer_types", "layers_block_type")
    if kinds is None:
        kind = "full_attention"
        if first_of(text, "sliding_window") and first_of(text, "use_sliding_window", default=True):
            kind = "sliding_attention"
        elif first_of(text, "attention_chunk_size"):
            kind = "chunked_attention"
        elif num_heads(text) is None:
            kind = "linear_attention"
        kinds = [kind] * count
    modes = first_of(text, "kv_sharing_modes", default=())
    kinds = ["dummy" if at < len(modes) and modes[at] == "reuse" else kind
        for at, kind in enumerate(kinds)]  # fmt: skip
    shared = first_of(text, "num_kv_shared_layers", default=0)
    return kinds if modes or not shared else kinds[:-shared]


def _layer_bytes(layer: Any, kind: str, num_tokens: int, itemsize: int) -> int:
    if kind in _NOTHING:
        return 0
    state = _state_bytes(layer, itemsize) if kind in (*_RECURRENT, "hybrid_sliding") else 0
    if kind in _RECURRENT and kind not in _ALSO_ATTENTION:
        return state
    window = None
    if kind in _WINDOWED:
        fields = ("sliding_window", "attention_window_size", "local_attention")
        window = first_of(layer, *(("attention_chunk_size",) if kind[0] == "c" else fields))
    held = num_tokens if window is None else min(num_tokens, window)
    return state + held * attention_columns(layer) * itemsize


def attention_columns(layer: Any) -> int:
    """Keys and values of one token in one layer, in numbers."""
    heads = num_heads(layer) or 1
    if first_of(layer, "kv_lora_rank") and first_of(layer, "qk_nope_head_dim") is not None:
        return _latent_columns(layer, heads)
    return num_kv_heads(layer, heads) * 2 * head_dim(layer, heads)


def _latent_columns(layer: Any, heads: int) -> int:
    """Latent attention: one latent for all heads, or what older code has expanded it to."""
    rotated = layer.qk_rope_head_dim
    indices = first_of(layer, "index_head_dim", default=0)
    if _are_latents_cached():
        return int(layer.kv_lora_rank + rotated + indices)
    return int(heads * (layer.qk_nope_head_dim + rotated + layer.v_head_dim) + indices)


def _are_latents_cached() -> bool:
    """Whether the transformers at hand does; of older ones that is not certain, so more is said."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "0.0"))
    return [int(digits) for digits in re.findall(r"\d+", version)[:2]] >= [5, 23]


def head_dim(layer: Any, heads: int) -> int:
    given = first_of(layer, "attention_head_dim", "head_dim", "d_kv", "kv_channels")
    return int(given or (hidden_size(layer) or 0) // heads)


def num_kv_heads(layer: Any, heads: int) -> int:
    if first_of(layer, "new_decoder_architecture"):  # Falcon's: expanded before they are cached
        return heads
    if first_of(layer, "multi_query"):
        return 1
    nested = first_of(layer, "attn_config")
    names = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "kv_n_heads")
    return int(first_of(layer, *names) or first_of(nested, "kv_n_heads") or heads)


def _state_bytes(layer: Any, itemsize: int) -> int:
    """Of a recurrent layer: what its convolution and its recurrence keep."""
    convolved, recurrent = _state_sizes(layer)
    return convolved * itemsize + recurrent * max(itemsize, _STATE_ITEMSIZE)


def _state_sizes(layer: Any) -> tuple[int, int]:
    hidden, heads = hidden_size(layer) or 0, num_heads(layer) or 1
    if first_of(layer, "linear_num_value_heads"):  # a gated delta rule
        key_size, value_size = layer.linear_key_head_dim, layer.linear_value_head_dim
        num_values = layer.linear_num_value_heads
        columns = 2 * layer.linear_num_key_heads * key_size + num_values * value_size
        kernel = first_of(layer, "linear_conv_kernel_dim", default=4)
        return columns * kernel, num_values * key_size * value_size
    if first_of(layer, "linear_attn_config"):  # the same, in Kimi's words
        given = dict(layer.linear_attn_config)
        columns = given["num_heads"] * given["head_dim"]
        return 3 * columns * given["short_conv_kernel_size"], columns * given["head_dim"]
    state = first_of(layer, "mamba_d_state", "ssm_state_size", "state_size")
    if state is not None:
        kernel = first_of(layer, "mamba_d_conv", "conv_kernel", "conv_kernel_size", default=4)
        groups = first_of(layer, "mamba_n_groups", "mamba_ngroups", "n_groups", default=0)
        inner = _mamba_size(layer, hidden)
        return (inner + 2 * groups * state) * kernel, inner * state
    if first_of(layer, "lru_width"):
        return layer.lru_width * first_of(layer, "conv1d_width", default=4), layer.lru_width
    if first_of(layer, "conv_L_cache"):
        return hidden * layer.conv_L_cache, 0
    if first_of(layer, "attention_hidden_size") and num_heads(layer) is None:  # RWKV
        return 0, 2 * hidden + 3 * layer.attention_hidden_size
    size = head_dim(layer, heads)
    return 0, heads * size * size  # linear attention: a matrix a head


def _mamba_size(layer: Any, hidden: int) -> int:
    heads = first_of(layer, "mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    size = first_of(layer, "mamba_d_head", "mamba_headdim", "mamba_head_dim", "head_dim")
    if heads and isinstance(size, int):
        return int(heads * size)
    expand = first_of(layer, "mamba_expand")
    if expand is None:
        return int(first_of(layer, "intermediate_size", default=2 * hidden))
    return int(expand * hidden)
