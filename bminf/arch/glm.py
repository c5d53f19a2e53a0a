"""GLM: fills blanks in a text that it sees whole, writing each of them from left to right.

Two architectures share the idea, and little else:
  "glm-130b"  norms first, in DeepNorm's order; rotary positions; a gated feed-forward
  "glm-10b"   GPT-2's order; two learned positions, in the text and in the blank (110M to 10B)

The embedding is gathered on the host, and the output head, which has the same weights, is cut into
parts that can be streamed like any other matrix.

Sources: Du et al. 2022, arXiv:2103.10360; Zeng et al. 2022, arXiv:2210.02414.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from bminf.checkpoint.splits import (
    COLUMNS,
    MEGATRON_LAYER,
    MEGATRON_WIDTHS,
    OWN,
    REPLICATED,
    ROWS,
    STRIPED,
    SplitTable,
)
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError
from bminf.layers.attention import attention, hide, merge_heads, split_heads
from bminf.layers.embedding import embedding
from bminf.layers.feed_forward import FeedForward, HalvedFeedForward
from bminf.layers.host_embedding import HostEmbedding
from bminf.layers.kv_cache import KVCache, decoder_cache
from bminf.layers.rotary import Rotary, rotate

GLMKind = Literal["glm-130b", "glm-10b"]
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class GLMConfig:
    """Sizes of a GLM.

    max_position_embeddings: of a "glm-10b", each of its two tables has one row more.
    rotary_precision: of a "glm-130b", "float16" or "float32" (see layers/rotary.py).
    num_head_parts: matrices that the output head is cut into.   Raises ArgumentError.
    """

    architecture: GLMKind
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    rotary_precision: str = "float16"
    num_head_parts: int = 1

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "num_head_parts",
        )  # fmt: skip
        check_eps("layer_norm_eps", self.layer_norm_eps)
        for name, accepted in (
            ("architecture", ("glm-130b", "glm-10b")),
            ("rotary_precision", tuple(_PRECISIONS)),
        ):
            if getattr(self, name) not in accepted:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r}; accepted: {', '.join(map(repr, accepted))}"
                )
        # Rotary positions turn columns in pairs.
        unit = self.num_attention_heads * (2 if self.is_rotary else 1)
        if self.hidden_size % unit:
            raise ArgumentError(
                f"hidden_size={self.hidden_size} is not a multiple of {unit}, for "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_head_parts > self.vocab_size:
            raise ArgumentError(
                f"num_head_parts={self.num_head_parts} is more than vocab_size={self.vocab_size}"
            )

    @property
    def is_rotary(self) -> bool:
        return self.architecture == "glm-130b"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha."""
        return math.sqrt(2 * self.num_hidden_layers)


Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, see Rotary."""


class Attention(torch.nn.Module):
    """Self-attention with its norm and its residual connection."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = torch.nn.LayerNorm(size, config.layer_norm_eps)
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.config, self.head_dim = config, config.head_dim

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        angles: Angles | None,
        layer: int,
        cache: KVCache,
    ) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = self._heads(self.qkv(normed))
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        key, value = cache.append(layer, key, value)
        # GLM-130B's own code divides queries by the number of the layer and multiplies scores by
        # it in float32, against overflow: here scores are sums in float32 from the beginning.
        y = attention(query, key, value, bias, self.head_dim**-0.5)
        y = self.out(merge_heads(y))
        return residual(x, normed, self.config) + y

    def _heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, T, 3 C) -> queries, keys and values, (B, H, T, D) each."""
        if not self.config.is_rotary:
            return split_heads(x, 3, self.head_dim)
        by_head = x.view(*x.shape[:2], -1, 3 * self.head_dim).transpose(1, 2)  # q, k, v of a head
        return list(by_head.chunk(3, dim=-1))


class Layer(torch.nn.Module):
    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        self.norm = torch.nn.LayerNorm(size, config.layer_norm_eps)
        self.feed_forward: torch.nn.Module = (
            HalvedFeedForward(size, wide)
            if config.is_rotary
            else FeedForward(size, wide, "gelu_tanh")
        )
        self.config = config

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        angles: Angles | None,
        layer: int,
        cache: KVCache,
    ) -> torch.Tensor:
        x = self.attention(x, bias, angles, layer, cache)
        normed = self.norm(x)
        y = self.feed_forward(normed)
        return residual(x, normed, self.config) + y  # in this order less is held at once


def residual(x: torch.Tensor, normed: torch.Tensor, config: GLMConfig) -> torch.Tensor:
    """What a part's output is added to: in DeepNorm's order the normalised input, enlarged.

    Source: Wang et al. 2022, arXiv:2203.00555.
    """
    return normed * config.residual_scale if config.is_rotary else x


class Head(torch.nn.Module):
    """The output head, cut by rows."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, end - begin, bias=False)
            for begin, end in head_rows(config)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return torch.cat([part(x) for part in self.parts], dim=-1).float()


def head_rows(config: GLMConfig) -> Iterator[tuple[int, int]]:
    """(first row, end) of each part of the head; of equal sizes, as far as the rows allow."""
    ends = [
        number * config.vocab_size // config.num_head_parts
        for number in range(config.num_head_parts + 1)
    ]
    yield from pairwise(ends)


class GLM(torch.nn.Module):
    """Reads a text with blanks, then goes on token after token; the past is in a cache."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = HostEmbedding(config.vocab_size, config.hidden_size)
        if config.is_rotary:
            self.rotary = Rotary(
                config.head_dim,
                config.max_position_embeddings,
                _PRECISIONS[config.rotary_precision],
            )
        else:
            num_rows = config.max_position_embeddings + 1
            self.embed_positions = embedding(num_rows, config.hidden_size)
            self.embed_block_positions = embedding(num_rows, config.hidden_size)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = torch.nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = Head(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: KVCache,
        is_hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The hidden states of some more tokens, which the cache grows by.

        input_ids: (B, T) int64.   position_ids: (B, T) int64, of a "glm-10b" (B, 2, T): in the
        text, and in the blank.   is_hidden: (1 or B, T, S) bool, which of the S tokens in the cache
        then each token does not see; None hides nothing.   Returns (B, T, C), after the last norm.
        """
        x = self.embed_tokens(input_ids)
        angles = None
        if self.config.is_rotary:
            angles = self.rotary(position_ids)
        else:
            x = x + self.embed_positions(position_ids[:, 0])
            x = x + self.embed_block_positions(position_ids[:, 1])
        bias = None if is_hidden is None else hide(is_hidden.unsqueeze(1), x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, bias, angles, number, cache)
        cache.advance(input_ids.shape[1])
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return self.lm_head(x)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the last norm."""
        return decoder_cache(self.config, batch_size, max_length, self.norm.weight)


def matrices_of(model: GLM) -> list[str]:
    """The names of all matrices of the layers and the head, in the order of a pass: blocks.

    A layer of 130 billion parameters is large beside a small card: two slots of one matrix leave
    more room for what stays than two slots of a layer.
    """
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


# ---- ranks ---------------------------------------------------------------------------------------

_BLOCK_POSITIONS = (
    "transformer.block_position_embeddings.weight",
    "mixins.block_position_embedding.block_position_embeddings.weight",  # in SwissArmyTransformer
)
_EMBEDDING_OF_GLM130B = "transformer.word_embeddings.weight"


def is_glm10b(names: Collection[str]) -> bool:
    """Whether these are names of GLM-10B: it has a second table of positions."""
    return any(name in names for name in _BLOCK_POSITIONS)


def is_glm130b(names: Collection[str]) -> bool:
    """Whether these are names of GLM-130B."""
    return _EMBEDDING_OF_GLM130B in names and not is_glm10b(names)


SPLITS_OF_GLM130B = SplitTable(
    "GLM-130B's kind",
    {
        re.escape(_EMBEDDING_OF_GLM130B): ROWS,
        r".*layernorm\.(weight|bias)": REPLICATED,
        # A head's rows of Q, K and V stand together, so a rank has the rows of whole heads.
        r".*\.attention\.query_key_value\.(weight|weight_scale|bias)": ROWS,
        r".*\.attention\.dense\.weight": COLUMNS,
        r".*\.attention\.dense\.weight_scale": OWN,
        r".*\.attention\.dense\.bias": REPLICATED,
        # What is gated, and below it the gate.
        r".*\.mlp\.dense_h_to_4h\.(weight|weight_scale|bias)": STRIPED(2),
        r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
        r".*\.mlp\.dense_4h_to_h\.weight_scale": OWN,
        r".*\.mlp\.dense_4h_to_h\.bias": REPLICATED,
        r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq": REPLICATED,
        r"mixins\.rotary-embedding\.rotary_emb\.inv_freq": REPLICATED,
    },
    is_glm130b,
    MEGATRON_WIDTHS,
)
"""Source: tools/convert_tp.py of GLM-130B."""

SPLITS_OF_GLM10B = SplitTable(
    "GLM-10B's kind",
    {
        r"(transformer\.)?word_embeddings\.weight": ROWS,
        r"transformer\.position_embeddings\.weight": REPLICATED,
        **{re.escape(name): REPLICATED for name in _BLOCK_POSITIONS},
        **MEGATRON_LAYER,
    },
    is_glm10b,
    MEGATRON_WIDTHS,
)
"""Source: change_mp.py of GLM."""
