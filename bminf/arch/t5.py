"""T5 v1.1 as CPM-2 and EVA have it: an encoder, a decoder, gated feed-forwards, a head of its own.

What differs within the family (attention scaling, GELU, sizes) is configuration. Keys and values of
the cross-attention are computed once a prompt by modules of their own, so that their weights are
not touched while decoding.

Source: Raffel et al. 2020, arXiv:1910.10683; Zhang et al. 2021, arXiv:2106.10715 (CPM-2); Zhou et
al. 2021, arXiv:2108.01547 (EVA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bminf.checkpoint.splits import COLUMNS, REPLICATED, ROWS, STRIPED, SplitTable
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError
from bminf.layers.attention import (
    attention,
    hide,
    is_later,
    is_padding,
    merge_heads,
    split_heads,
)
from bminf.layers.embedding import embedding
from bminf.layers.feed_forward import GatedFeedForward
from bminf.layers.kv_cache import KVCache, cache_bytes
from bminf.layers.norm import RMSNorm
from bminf.layers.position_bias import RelativePositionBias
from bminf.ops.gated_linear import check_activation


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5.

    is_attention_scaled: whether scores are divided by sqrt(head_dim); T5 and CPM-2 do not.
    hidden_act: "gelu_tanh", "gelu" (the exact one) or "silu".   Raises ArgumentError.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    is_attention_scaled: bool = False
    hidden_act: str = "gelu_tanh"
    num_buckets: int = 32
    max_distance: int = 128
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "head_dim", "num_encoder_layers", "num_decoder_layers", "num_buckets", "max_distance",
        )  # fmt: skip
        check_eps("rms_norm_eps", self.rms_norm_eps)
        check_activation(self.hidden_act, "hidden_act: ")
        if type(self.is_attention_scaled) is not bool:
            raise ArgumentError(f"is_attention_scaled={self.is_attention_scaled!r}; True or False")
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ArgumentError(
                f"num_buckets={self.num_buckets} and max_distance={self.max_distance}; a multiple "
                "of 4, and more than half as many, are needed"
            )

    @property
    def inner_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.is_attention_scaled else 1.0


class T5Cache:
    """All that decoding needs of the past: keys and values of the tokens written so far (`own`),
    those of the prompt (`cross`), and the bias that hides the prompt's padding."""

    def __init__(self, own: KVCache, cross: KVCache) -> None:
        self.own, self.cross = own, cross
        self.cross_bias: torch.Tensor | None = None
        self._prompt_of: list[int] = []  # of each row

    def reset(self) -> None:
        """Forget prompt and tokens; the memory stays."""
        self.own.reset()
        self.cross.reset()
        self.cross_bias = None

    def begin(self, num_prompts: int, cross_bias: torch.Tensor | None) -> None:
        """The first rows are this many prompts. cross_bias: (B, 1, 1, S), or None."""
        self._prompt_of = list(range(num_prompts))
        self.cross_bias = cross_bias

    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was. rows: (B,) int64.

        The beams of one prompt read the same keys and values of it, so those stay where they are
        as long as no row turns to another prompt.
        """
        self.own.select(rows)
        prompt_of = [self._prompt_of[row] for row in rows.tolist()]
        if prompt_of == self._prompt_of:
            return
        self._prompt_of = prompt_of
        self.cross.select(rows)
        if self.cross_bias is not None:
            self.cross_bias = self.cross_bias[rows]


class SelfAttention(torch.nn.Module):
    """With its norm and its residual connection; in the decoder it appends to a cache."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = torch.nn.Linear(config.hidden_size, 3 * config.inner_size, bias=False)
        self.out = torch.nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.head_dim, self.scale = config.head_dim, config.attention_scale

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, layer: int = 0, cache: KVCache | None = None
    ) -> torch.Tensor:
        query, key, value = split_heads(self.qkv(self.norm(x)), 3, self.head_dim)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return x + self.out(merge_heads(attention(query, key, value, bias, self.scale)))


class CrossAttention(torch.nn.Module):
    """Looks at the prompt, whose keys and values are in the cache."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.query = torch.nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.out = torch.nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.head_dim, self.scale = config.head_dim, config.attention_scale

    def forward(self, x: torch.Tensor, layer: int, cache: T5Cache) -> torch.Tensor:
        (query,) = split_heads(self.query(self.norm(x)), 1, self.head_dim)
        key, value = cache.cross.read(layer, len(x), cache.cross.length)
        y = attention(query, key, value, cache.cross_bias, self.scale)
        return x + self.out(merge_heads(y))


class EncoderLayer(torch.nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = GatedFeedForward(
            config.hidden_size, config.intermediate_size, config.hidden_act
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, bias)
        return x + self.feed_forward(self.norm(x))


class DecoderLayer(torch.nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = GatedFeedForward(
            config.hidden_size, config.intermediate_size, config.hidden_act
        )

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, layer: int, cache: T5Cache
    ) -> torch.Tensor:
        x = self.attention(x, bias, layer, cache.own)
        x = self.cross_attention(x, layer, cache)
        return x + self.feed_forward(self.norm(x))


class Encoder(torch.nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(
            config.num_buckets, config.num_attention_heads, config.max_distance, True
        )
        self.layers = torch.nn.ModuleList(
            EncoderLayer(config) for _ in range(config.num_encoder_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, padding_bias: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, C) embeddings -> (B, S, C). padding_bias: (B, 1, 1, S), or None."""
        bias = self.position_bias(x.shape[1], x.shape[1])
        if padding_bias is not None:
            bias = bias + padding_bias
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class CrossProjections(torch.nn.Module):
    """Keys and values of the prompt, for the cross-attention of each decoder layer."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, 2 * config.inner_size, bias=False)
            for _ in range(config.num_decoder_layers)
        )
        self.head_dim = config.head_dim

    def forward(self, encoder_output: torch.Tensor, cache: KVCache) -> None:
        """encoder_output: (B, S, C). Writes all layers of the cache."""
        for number, layer in enumerate(self.layers):
            key, value = split_heads(layer(encoder_output), 2, self.head_dim)
            cache.append(number, key, value)
        cache.advance(encoder_output.shape[1])


class Decoder(torch.nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(
            config.num_buckets, config.num_attention_heads, config.max_distance, False
        )
        self.layers = torch.nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_decoder_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cache: T5Cache) -> torch.Tensor:
        """(B, T, C) embeddings of some more tokens -> (B, T, C). The cache grows by them."""
        num_tokens = x.shape[1]
        bias = self.position_bias(num_tokens, cache.own.length + num_tokens)
        if num_tokens > 1:
            bias = bias + hide(is_later(num_tokens, bias.shape[3], x.device), x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, bias, number, cache)
        cache.own.advance(num_tokens)
        return self.norm(x)


class T5(torch.nn.Module):
    """encode() a prompt into a cache, then call it with token after token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.encoder = Encoder(config)
        self.cross_projections = CrossProjections(config)
        self.decoder = Decoder(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def encode(
        self, input_ids: torch.Tensor, cache: T5Cache, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts into an empty cache.

        input_ids: (B, S) int64, padded at the end.   lengths: (B,) int64, None where nothing is
        padding.   Returns the encoder's output, (B, S, C); beyond a row's length it means nothing.
        """
        x = self.embed_tokens(input_ids)
        padding_bias = None
        if lengths is not None:
            padding = is_padding(lengths, input_ids.shape[1])
            padding_bias = hide(padding, x.dtype)[:, None, None]
        cache.begin(len(input_ids), padding_bias)
        x = self.encoder(x, padding_bias)
        self.cross_projections(x, cache.cross)
        return x

    def forward(self, input_ids: torch.Tensor, cache: T5Cache) -> torch.Tensor:
        """The decoder's hidden states of some more tokens: (B, T) int64 -> (B, T, C)."""
        return self.decoder(self.embed_tokens(input_ids), cache)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return self.lm_head(x).float()

    def new_cache(self, batch_size: int, max_prompt_length: int, max_length: int) -> T5Cache:
        """An empty cache in the dtype and on the device of the embedding."""
        config, weight = self.config, self.embed_tokens.weight
        own, cross = (
            KVCache(
                config.num_decoder_layers,
                batch_size,
                config.num_attention_heads,
                length,
                config.head_dim,
                weight.dtype,
                weight.device,
            )
            for length in (max_length, max_prompt_length)
        )
        return T5Cache(own, cross)


def t5_cache_bytes(
    config: T5Config, batch_size: int, max_prompt_length: int, max_length: int, dtype: torch.dtype
) -> int:
    """Bytes of T5.new_cache."""
    return cache_bytes(
        config.num_decoder_layers,
        batch_size,
        config.num_attention_heads,
        max_prompt_length + max_length,
        config.head_dim,
        dtype,
    )


# ---- ranks ---------------------------------------------------------------------------------------

SPLITS = SplitTable(
    "the CPM family",
    {
        r"(.*\.)?word_embeds\.weight": ROWS,
        r"lm_head\.weight": ROWS,
        r"(.*\.)?(role|prompt)_embeds\.weight": REPLICATED,
        r".*\.final_layernorm\.weight": REPLICATED,
        r".*\.layer_norm\.weight": REPLICATED,
        r".*\.self_attn\.project\.weight": STRIPED(3),
        r".*\.(self|cross)_attn\.dense\.weight": COLUMNS,
        r".*\.self_attn\.relative_attention_bias\.weight": COLUMNS,
        r".*\.cross_attn\.project_q\.weight": ROWS,
        r".*\.cross_attn\.project_kv\.weight": STRIPED(2),
        r".*\.dense_relu_dense\.wi_[01]\.weight": ROWS,
        r".*\.dense_relu_dense\.wo\.weight": COLUMNS,
    },
    is_for=lambda names: True,  # what is of no other model
)
"""CPM-2 and EVA.   Source: change_mp.py of EVA."""
