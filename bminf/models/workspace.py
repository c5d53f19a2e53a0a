"""Bytes that a model needs beside its weights: the KV cache, and what a pass holds at its peak.

Both are bounded when a model is made, by max_length and max_batch_size, and are part of its
memory_limit.
"""

from __future__ import annotations

import torch

from bminf.arch.gpt import GPTConfig, gpt_cache_bytes
from bminf.arch.t5 import T5Config, t5_cache_bytes
from bminf.quantization.packed import Format

_SLICE_BYTES = 2**27  # a slice of a dequantised weight, see ops/linear_weight_only.py
_VOCABULARY_BYTES = 64  # of an entry of the logits: in the model's type, and what drawing sorts


def reserved_bytes(
    config: GPTConfig | T5Config,
    max_batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    form: Format | None,
) -> int:
    """Cache and workspace together.

    max_length: tokens of prompt and answer together in a GPT, of each in a T5.
    """
    if isinstance(config, T5Config):
        cache = t5_cache_bytes(config, max_batch_size, max_length, max_length, dtype)
        inner_size, intermediate_size = config.inner_size, 2 * config.intermediate_size
    else:
        cache = gpt_cache_bytes(config, max_batch_size, max_length, dtype)
        inner_size, intermediate_size = config.hidden_size, config.intermediate_size
    # The widest moment of a layer: residual stream, normed input, and what lies between the two
    # products of attention or of the feed-forward.
    width = 4 * config.hidden_size + max(5 * inner_size, 2 * intermediate_size)
    tokens = max_batch_size * max_length
    activations = tokens * width * max(dtype.itemsize, 4)
    bias = config.num_attention_heads * max_length * max_length * dtype.itemsize * 2
    logits = max_batch_size * config.vocab_size * _VOCABULARY_BYTES
    packed = 0 if form is None else _dequantized_bytes(config, inner_size, dtype)
    return cache + activations + max_batch_size * bias + logits + packed


def _dequantized_bytes(config: GPTConfig | T5Config, inner_size: int, dtype: torch.dtype) -> int:
    largest = config.hidden_size * max(3 * inner_size, config.intermediate_size)
    return min(_SLICE_BYTES, largest * max(dtype.itemsize, 4))
