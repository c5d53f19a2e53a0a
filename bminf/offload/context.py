"""What a text takes beside the weights, estimated before anything runs: the KV cache, and a
workspace for one pass.

The workspace is the larger of two moments: the widest activations of one layer while the whole text
is read, and the logits while a token is drawn; and, on a CPU, what its allocator keeps of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.offload.cache_size import (
    attention_columns,
    cache_bytes,
    first_of,
    head_dim,
    hidden_size,
    num_heads,
    text_config,
)
from bminf.ops.product_size import product_bytes
from bminf.quantization.packed import Format

USUAL_LENGTH = 2048
"""Tokens for which a plan says what they would take, where nobody said how many there will be."""

_DRAWN_BYTES = 12  # of a logit beside its own: in float32, as processed, and its probability
_MOST_KEPT_BYTES = 2**26  # by the allocators and libraries of a CPU; on a GPU a half of it
# By which the memory of a CPU process grows at the least: a Llama of 8 layers took 2 to 7 MB more
# than the rest of this counts, for 128 to 1,024 tokens.
_ARENAS_BYTES = 10 * 2**20
_HOLES = 0.1  # of the workspace, between what is still there


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


def writes_text(model: torch.nn.Module) -> bool:
    """Whether `model` generates text, and has a configuration to count from (transformers')."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    can_generate = getattr(model, "can_generate", None)
    is_told = callable(can_generate) and bool(can_generate())
    if not is_told and not type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        return False
    text = text_config(config)
    return hidden_size(text) is not None and first_of(text, "vocab_size") is not None


def context_of(
    model: torch.nn.Module,
    max_length: int | None,
    max_batch_size: int = 1,
    form: Format | None = None,
    is_cpu: bool = False,
) -> Context:
    """What `max_batch_size` texts of `max_length` tokens take in `model`.

    form: that its linears will be packed in.   is_cpu: or a GPU.
    Raises ArgumentError for numbers below 1, and for a model that does not generate text.
    """
    max_batch_size = _whole_number("max_batch_size", max_batch_size)
    if max_length is None:
        raise ArgumentError(
            f"max_batch_size={max_batch_size} sets nothing aside by itself; give max_length, too, "
            "a whole number above 0"
        )
    max_length = _whole_number("max_length", max_length)
    if not writes_text(model):
        raise ArgumentError(
            f"max_length={max_length} needs a model that generates text and has a configuration "
            f"to count from, as transformers' have; for this {type(model).__name__}, set bytes "
            'aside with reserve=, for example reserve="1GB"'
        )
    try:
        return _counted(model, max_length, max_batch_size, form, is_cpu)
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


def _counted(
    model: torch.nn.Module,
    max_length: int,
    max_batch_size: int,
    form: Format | None,
    is_cpu: bool,
) -> Context:
    itemsize = _itemsize(model)
    sizes = _Sizes(max_batch_size * max_length, itemsize, form, is_cpu)
    return Context(
        max_length,
        max_batch_size,
        cache_bytes(model.config, max_batch_size, max_length, itemsize),
        _workspace_bytes(model, max_length, max_batch_size, sizes),
    )


@dataclass(frozen=True)
class _Sizes:
    """num_rows: of all matrices of activations.   itemsize: of one."""

    num_rows: int
    itemsize: int
    form: Format | None
    is_cpu: bool

    def held(self, *columns: int) -> int:
        return self.num_rows * sum(columns) * self.itemsize

    def product(self, inputs: int, outputs: int) -> int:
        return product_bytes(self.num_rows, inputs, outputs, self.itemsize, self.form, self.is_cpu)


def _itemsize(model: torch.nn.Module) -> int:
    """Of an activation: of the first weight that is floating point."""
    floats = (p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype().itemsize)


def _workspace_bytes(
    model: torch.nn.Module, max_length: int, max_batch_size: int, sizes: _Sizes
) -> int:
    text = text_config(model.config)
    num_drawn = max_batch_size if _computes_last_logits(model) else sizes.num_rows
    logits: int = text.vocab_size * (num_drawn * sizes.itemsize + max_batch_size * _DRAWN_BYTES)
    layer = max(_layer_moments(text, max_length, max_batch_size, sizes))
    peak = max(layer, logits)
    if sizes.is_cpu:
        kept = min(layer + logits + _ARENAS_BYTES, _MOST_KEPT_BYTES)
    else:
        kept = min(layer + logits // 2, _MOST_KEPT_BYTES // 2)
    return peak + int(_HOLES * peak) + kept


def _layer_moments(text: Any, max_length: int, max_batch_size: int, sizes: _Sizes) -> Iterator[int]:
    """Bytes held in each wide moment of a layer."""
    hidden, heads = hidden_size(text) or 1, num_heads(text) or 1
    inner, keys = heads * head_dim(text, heads), attention_columns(text)
    residual = sizes.held(hidden, hidden)  # and what its norm made of it
    masks = max_batch_size * max_length**2 * sizes.itemsize
    if first_of(text, "_attn_implementation") == "eager":  # scores, also in float32
        masks += heads * max_batch_size * max_length**2 * (sizes.itemsize + 4)
    yield residual + masks + sizes.product(hidden, inner + keys)
    # Queries and keys as they are turned, keys and values for every head, and the result.
    yield residual + masks + sizes.held(2 * inner, keys, 2 * inner, inner)
    wide = _feed_forward_columns(text, hidden)
    yield residual + masks + sizes.held(2 * wide) + sizes.product(hidden, wide)
    yield residual + masks + sizes.held(2 * wide) + sizes.product(wide, hidden)


def _feed_forward_columns(text: Any, hidden: int) -> int:
    """What one token is spread to: by one network, or by the experts that it goes through."""
    names = ("intermediate_size", "decoder_ffn_dim", "ffn_dim", "d_ff", "ffn_hidden_size",
             "n_inner")  # fmt: skip
    wide = first_of(text, *names, default=4 * hidden)
    wide = max(wide) if isinstance(wide, list | tuple) else wide
    experts = first_of(text, "num_experts_per_tok", "num_experts_per_token", default=0)
    return int(max(wide, experts * first_of(text, "moe_intermediate_size", default=wide)))


def _computes_last_logits(model: torch.nn.Module) -> bool:
    """Whether generate() has it compute no more logits of a prompt than those it draws from."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
