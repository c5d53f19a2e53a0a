"""Bytes that a model needs beside its weights: the KV cache, and what a pass holds at its peak.

Both are bounded when a model is made, by max_length and max_batch_size, and are part of its
memory_limit. The peak is the largest of a few moments: a product with what its operands become,
the attention with its bias, and the logits. Each architecture counts its own (see arch/sizes.py);
what is common is here.
"""

from __future__ import annotations

import torch

from bminf.arch.architecture import Architecture, Config
from bminf.arch.sizes import Pass
from bminf.quantization.packed import Format

LOGITS_AT_ONCE = 8  # positions of one text whose logits are computed together

_DRAWN_BYTES = 64  # of an entry of the logits: in the model's type, and what drawing sorts
# What stays with the allocators and libraries of a CPU after tensors are gone. Measured, not
# derived: about as much again as a layer and half of the logits hold (with weights that are not
# packed up to 7/4 of a layer), and no more than this.
_MOST_KEPT_BYTES = 7 * 2**25
_LIBRARY_BYTES = 2**25  # on a GPU, where torch uses again what is gone: of cuBLAS
_HOLES = 0.1  # of the peak, between what is still there


def reserved_bytes(
    architecture: Architecture,
    config: Config,
    max_batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    form: Format | None,
    device_type: str = "cpu",
) -> int:
    """Cache and workspace together.

    max_length: see Pass.   device_type: "cpu" or "cuda"; their products hold different things on
    the way.
    """
    is_cpu = device_type == "cpu"
    sizes = architecture.sizes(config, Pass(max_batch_size, max_length, dtype, form, is_cpu))
    # The last ones of each row while they are drawn from; logits() has fewer at a time.
    head = config.vocab_size * max(LOGITS_AT_ONCE, max_batch_size) * _DRAWN_BYTES
    aligned = 0 if is_cpu else sizes.bias  # the copy that attention may make of it
    peak = max(sizes.making_bias, sizes.bias + aligned + sizes.layer, head)
    left = sizes.layer if form is not None else 7 * sizes.layer // 4
    kept = min(left + head // 2, _MOST_KEPT_BYTES) if is_cpu else min(peak, _LIBRARY_BYTES)
    return sizes.cache + peak + int(_HOLES * peak) + kept
