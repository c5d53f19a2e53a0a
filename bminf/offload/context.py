"""What a text takes beside the weights, estimated before anything runs: the KV cache, and a
workspace for one pass.

The cache is counted from the configuration (transformers' fields). Layers differ: most keep keys
and values of every token, those with a window only the last ones, recurrent ones (Mamba, gated
delta rule, short convolutions) a state of fixed size, and some none. What a text of a given length
really takes is measured in tests/offload/test_context.py.

The workspace is the larger of two moments: the widest activations of one layer while the whole text
is read, and the logits while a token is sampled; and, on a CPU, what its allocator keeps of them.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.ops.linear import Pass
from bminf.quantization.packed import Format

_WINDOWED = ("sliding_attention", "hybrid_sliding", "chunked_attention", "local_attention")
_RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "linear")
_ALSO_ATTENTION = ("hybrid", "hybrid_sliding")  # beside their state
_NOTHING = ("dummy", "mlp", "moe")
_STATE_ITEMSIZE = 4  # recurrent states are cached in float32 by most models


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
    fits = per_layer is not None and len(per_layer) == len(kinds)
    layers = list(per_layer) if fits else [text] * len(kinds)
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
    kinds = ["dummy" if index < len(modes) and modes[index] == "reuse" else kind
        for index, kind in enumerate(kinds)]  # fmt: skip
    shared = first_of(text, "num_kv_shared_layers", default=0)
    return kinds if modes or not shared else kinds[:-shared]


def _layer_bytes(layer: Any, kind: str, num_tokens: int, itemsize: int) -> int:
    if kind in _NOTHING:
        return 0
    state = 0
    if kind in (*_RECURRENT, "hybrid_sliding"):
        convolved, recurrent = _state_sizes(layer)
        state = convolved * itemsize + recurrent * max(itemsize, _STATE_ITEMSIZE)
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


def _state_sizes(layer: Any) -> tuple[int, int]:
    """What the convolution of a recurrent layer keeps, and what its recurrence does, in numbers."""
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


DEFAULT_LENGTH = 2048
"""Tokens for which a plan says what they would take, where max_length was not given."""

_SAMPLING_BYTES = 12  # of a logit beside its own: in float32, as processed, and its probability
_MAX_CACHED_BYTES = 2**26  # by the allocators and libraries of a CPU; on a GPU a half of it
# By which the memory of a CPU process grows at the least: a Llama of 8 layers took 2 to 7 MB more
# than the rest of this counts, for 128 to 1,024 tokens.
_ARENAS_BYTES = 10 * 2**20
_FRAGMENTATION = 0.1  # of the workspace, between what is still there


@dataclass(frozen=True)
class Context:
    """Texts that a model is to have room for, and what they are estimated to take, in bytes.

    max_length: tokens of prompt and answer together; of each where there is an encoder.
    """

    max_length: int
    max_batch_size: int
    cache_bytes: int
    workspace_bytes: int

    @property
    def nbytes(self) -> int:
        return self.cache_bytes + self.workspace_bytes


def generates_text(model: torch.nn.Module) -> bool:
    """Whether `model` generates text, and has a configuration to count from (transformers')."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    can_generate = getattr(model, "can_generate", None)
    is_generative = callable(can_generate) and bool(can_generate())
    if not is_generative and not type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        return False
    text = text_config(config)
    return hidden_size(text) is not None and first_of(text, "vocab_size") is not None


def context_of(
    model: torch.nn.Module,
    max_length: int | None,
    max_batch_size: int = 1,
    format_: Format | None = None,
    is_cpu: bool = False,
) -> Context:
    """What `max_batch_size` texts of `max_length` tokens take in `model`.

    format_: that its linears will be packed in.   is_cpu: or a GPU.
    Raises ArgumentError for numbers below 1, and for a model that does not generate text.
    """
    max_batch_size = _whole_number("max_batch_size", max_batch_size)
    if max_length is None:
        raise ArgumentError(
            f"max_batch_size={max_batch_size} sets nothing aside by itself; give max_length, too, "
            "a whole number above 0"
        )
    max_length = _whole_number("max_length", max_length)
    if not generates_text(model):
        raise ArgumentError(
            f"max_length={max_length} needs a model that generates text and has a configuration "
            f"to count from, as transformers' have; for this {type(model).__name__}, set bytes "
            'aside with reserve=, for example reserve="1GB"'
        )
    try:
        # The dtype of an activation is that of the first weight that is floating point.
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(dtypes, torch.get_default_dtype())
        largest = Pass(max_batch_size, max_length, dtype, format_, is_cpu)
        cache = cache_bytes(model.config, max_batch_size, max_length, dtype.itemsize)
        return Context(max_length, max_batch_size, cache, _workspace_bytes(model, largest))
    # A configuration may lack any field, or hold anything in it.
    except Exception as error:
        raise ArgumentError(
            f"max_length={max_length}: what it takes cannot be counted from the configuration of "
            f"this {type(model).__name__} ({type(error).__name__}: {error}); set bytes aside with "
            'reserve=, for example reserve="1GB"'
        ) from error


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ArgumentError(f"{name}={value!r}; give a whole number above 0")
    return operator.index(value)


def _workspace_bytes(model: Any, largest: Pass) -> int:
    # Where it can, generate() has no more logits of a prompt computed than those it samples from.
    is_last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    num_sampled = largest.batch_size * (1 if is_last_only else largest.length)
    text = text_config(model.config)
    sampling_bytes = num_sampled * largest.dtype.itemsize + largest.batch_size * _SAMPLING_BYTES
    logits: int = text.vocab_size * sampling_bytes
    layer = max(_layer_moments(text, largest))
    peak = max(layer, logits)
    if largest.is_cpu:
        cached = min(layer + logits + _ARENAS_BYTES, _MAX_CACHED_BYTES)
    else:
        cached = min(layer + logits // 2, _MAX_CACHED_BYTES // 2)
    return peak + int(_FRAGMENTATION * peak) + cached


def _layer_moments(text: Any, largest: Pass) -> Iterator[int]:
    """Bytes held in each wide moment of a layer.   text: its configuration."""
    activations, linear = largest.activation_bytes, largest.linear_bytes
    hidden, heads = hidden_size(text) or 1, num_heads(text) or 1
    inner, keys = heads * head_dim(text, heads), attention_columns(text)
    masks = largest.score_bytes()
    if first_of(text, "_attn_implementation") == "eager":  # scores, also in float32
        masks += largest.score_bytes(heads) + heads * largest.batch_size * largest.length**2 * 4
    shared = masks + activations(hidden, hidden)  # the residual, and what its norm made of it
    yield shared + linear(hidden, inner + keys)
    # Queries and keys as they are rotated, keys and values for every head, and the result.
    yield shared + activations(2 * inner, keys, 2 * inner, inner)
    wide = _feed_forward_columns(text, hidden)
    yield shared + activations(2 * wide) + linear(hidden, wide)
    yield shared + activations(2 * wide) + linear(wide, hidden)


def _feed_forward_columns(text: Any, hidden: int) -> int:
    """What one token is spread to: by one network, or by the experts that it goes through."""
    names = ("intermediate_size", "decoder_ffn_dim", "ffn_dim", "d_ff", "ffn_hidden_size",
             "n_inner")  # fmt: skip
    wide = first_of(text, *names, default=4 * hidden)
    wide = max(wide) if isinstance(wide, list | tuple) else wide
    experts = first_of(text, "num_experts_per_tok", "num_experts_per_token", default=0)
    return int(max(wide, experts * first_of(text, "moe_intermediate_size", default=wide)))
