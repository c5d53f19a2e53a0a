"""GPT-2 as CPM-1 has it: learned positions, LayerNorm before each part, biases, a tied head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Zhang et al.
2020, arXiv:2012.00413 (CPM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bminf.checkpoint.splits import (
    MEGATRON_LAYER,
    MEGATRON_WIDTHS,
    REPLICATED,
    ROWS,
    SplitTable,
)
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError
from bminf.layers.attention import attention, hide, is_later, merge_heads, split_heads
from bminf.layers.embedding import embedding
from bminf.layers.feed_forward import FeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache
from bminf.ops.gated_linear import check_activation


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    hidden_act: "gelu_tanh", "gelu" (the exact one) or "silu".   Raises ArgumentError.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_tanh"

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "intermediate_size",
        )  # fmt: skip
        check_eps("layer_norm_eps", self.layer_norm_eps)
        check_activation(self.hidden_act, "hidden_act: ")
        if self.hidden_size % self.num_attention_heads:
            raise ArgumentError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(torch.nn.Module):
    """Causal self-attention with its norm and its residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = torch.nn.LayerNorm(size, config.layer_norm_eps)
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.head_dim = config.head_dim

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, layer: int, cache: KVCache
    ) -> torch.Tensor:
        query, key, value = split_heads(self.qkv(self.norm(x)), 3, self.head_dim)
        key, value = cache.append(layer, key, value)
        y = attention(query, key, value, bias, self.head_dim**-0.5)
        return x + self.out(merge_heads(y))


class Layer(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = Attention(config)
        self.norm = torch.nn.LayerNorm(size, config.layer_norm_eps)
        self.feed_forward = FeedForward(size, config.intermediate_size, config.hidden_act)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, layer: int, cache: KVCache
    ) -> torch.Tensor:
        x = self.attention(x, bias, layer, cache)
        return x + self.feed_forward(self.norm(x))


class GPT(torch.nn.Module):
    """Token ids in, hidden states out; `head` makes logits of them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, size)
        self.embed_positions = embedding(config.max_position_embeddings, size)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = torch.nn.LayerNorm(size, config.layer_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, cache: KVCache, num_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states of some more tokens, which the cache grows by.

        input_ids: (B, T) int64.   num_padding: (B,) int64, tokens at the beginning of each row that
        do not count; None is none.   Returns (B, T, C), after the last norm.
        """
        num_tokens = input_ids.shape[1]
        positions = torch.arange(cache.length, cache.length + num_tokens, device=input_ids.device)
        if num_padding is not None:
            positions = (positions - num_padding.unsqueeze(1)).clamp(min=0)
        x = self.embed_tokens(input_ids) + self.embed_positions(positions)
        bias = attention_bias(num_tokens, cache.length + num_tokens, num_padding, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, bias, number, cache)
        cache.advance(num_tokens)
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32; the head is the embedding."""
        return F.linear(x, self.embed_tokens.weight).float()

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the embedding."""
        return decoder_cache(self.config, batch_size, max_length, self.embed_tokens.weight)


def attention_bias(
    num_queries: int, num_keys: int, num_padding: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor | None:
    """(1 or B, 1, T, S): hides later tokens and padding; None where there is nothing to hide."""
    is_hidden = is_later(num_queries, num_keys, x.device) if num_queries > 1 else None
    if num_padding is not None:
        is_early = torch.arange(num_keys, device=x.device) < num_padding.unsqueeze(1)
        is_hidden = is_early[:, None] if is_hidden is None else is_hidden | is_early[:, None]
    if is_hidden is None:
        return None
    return hide(is_hidden.view(-1, 1, num_queries, num_keys), x.dtype)


# ---- ranks ---------------------------------------------------------------------------------------

SPLITS = SplitTable(
    "the CPM family",
    {
        r"word_embeddings\.weight": ROWS,
        r"position_embeddings\.weight": REPLICATED,
        **MEGATRON_LAYER,
    },
    is_for=lambda names: True,  # what is of no other model
    widths=MEGATRON_WIDTHS,
)
"""CPM-1.   Source: change_mp.py of CPM-1-Generate."""
