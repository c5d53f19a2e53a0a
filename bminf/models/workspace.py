"""Bytes that a model needs beside its weights: the KV cache, and what a pass holds at its peak.

Both are bounded when a model is made, by max_length and max_batch_size, and are part of its
memory_limit. The peak is the largest of a few moments: a product with what its operands become,
the attention with its bias, and the logits. What a product holds is read off the operations (see
ops/product_size.py), and held against measurements by tests/models/test_zoo_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bminf.arch.glm import GLMConfig
from bminf.arch.t5 import T5Config, t5_cache_bytes
from bminf.layers.kv_cache import decoder_cache_bytes
from bminf.ops.product_size import product_bytes
from bminf.quantization.packed import Format

LOGITS_AT_ONCE = 8  # positions of one text whose logits are computed together

_BUCKET_BYTES = 40  # of a cell: distances, their logarithms and buckets
_HIDDEN_BYTES = 4  # of a cell: what is ahead, what is padding, and both
_DRAWN_BYTES = 64  # of an entry of the logits: in the model's type, and what drawing sorts
# What stays with the allocators and libraries of a CPU after tensors are gone. Measured, not
# derived: about as much again as a layer and half of the logits hold (with weights that are not
# packed up to 7/4 of a layer), and no more than this.
_MOST_KEPT_BYTES = 7 * 2**25
_LIBRARY_BYTES = 2**25  # on a GPU, where torch uses again what is gone: of cuBLAS
_HOLES = 0.1  # of the peak, between what is still there


@dataclass(frozen=True)
class _Sizes:
    """num_rows: of all matrices of activations.   itemsize: of one."""

    num_rows: int
    itemsize: int
    form: Format | None
    is_cpu: bool

    def held(self, *columns: int) -> int:
        """Activations of so many columns that are held at once."""
        return self.num_rows * sum(columns) * self.itemsize

    def product(self, inputs: int, outputs: int) -> int:
        """The result of a product, and what is held on the way beside its input."""
        return product_bytes(self.num_rows, inputs, outputs, self.itemsize, self.form, self.is_cpu)


def reserved_bytes(
    config: Any,
    max_batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    form: Format | None,
    device_type: str = "cpu",
) -> int:
    """Cache and workspace together.

    max_length: tokens of prompt and answer together in a GPT, of each in a T5.   device_type: "cpu"
    or "cuda"; their products hold different things on the way.
    """
    num_rows, is_cpu = max_batch_size * max_length, device_type == "cpu"
    if isinstance(config, T5Config):
        cache = t5_cache_bytes(config, max_batch_size, max_length, max_length + 1, dtype)
    else:
        cache = decoder_cache_bytes(config, max_batch_size, max_length, dtype)
    bias = _bias_bytes(config, max_batch_size, max_length, dtype.itemsize)
    layer = _layer_bytes(config, _Sizes(num_rows, dtype.itemsize, form, is_cpu))
    # The last ones of each row while they are drawn from; logits() has fewer at a time.
    vocab_size: int = config.vocab_size
    head = vocab_size * max(LOGITS_AT_ONCE, max_batch_size) * _DRAWN_BYTES
    making_bias = 2 * bias + _BUCKET_BYTES * max_length**2  # before the first layer
    if isinstance(config, GLMConfig):  # whose positions are in no bias
        making_bias = bias + _HIDDEN_BYTES * max_batch_size * max_length**2
    aligned = 0 if is_cpu else bias  # the copy that attention may make of it
    peak = max(making_bias, bias + aligned + layer, head)
    left = layer if form is not None else 7 * layer // 4
    kept = min(left + head // 2, _MOST_KEPT_BYTES) if is_cpu else min(peak, _LIBRARY_BYTES)
    return cache + peak + int(_HOLES * peak) + kept


def _layer_bytes(config: Any, sizes: _Sizes) -> int:
    """The widest moment of a layer, but for its bias."""
    size, wide = config.hidden_size, config.intermediate_size
    inner = config.inner_size if isinstance(config, T5Config) else size
    residual = sizes.held(size, size)  # and what its norm made of it
    if isinstance(config, GLMConfig) and config.is_rotary:
        # The layer's own input too: its caller holds it until there is an output.
        return (
            residual
            + sizes.held(size)
            + max(
                sizes.product(size, 2 * wide),
                sizes.held(3 * size, 2 * size, 2 * size),  # queries and keys as they are turned
                sizes.held(2 * wide, wide, wide),
                sizes.held(3 * wide) + sizes.product(wide, size),
            )
        )
    gated = wide if isinstance(config, T5Config) else 0
    return residual + max(
        sizes.product(size, 3 * inner),
        sizes.held(3 * inner, inner, inner),
        sizes.held(inner) + sizes.product(inner, size),
        sizes.held(gated, wide) + sizes.product(size, wide),
        sizes.held(wide) + sizes.product(wide, size),
    )


def _bias_bytes(config: Any, max_batch_size: int, max_length: int, itemsize: int) -> int:
    """Of scores, by row and head where positions are learned by head."""
    is_by_head = isinstance(config, T5Config)
    heads: int = config.num_attention_heads if is_by_head else 1
    cells = max_batch_size * max_length**2 * heads
    return cells * itemsize
