"""A decoder-only architecture that the library does not have: all that arch/ needs of one more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bminf.arch.architecture import Architecture
from bminf.arch.sizes import Pass, Sizes, layer_bytes
from bminf.checkpoint.config import ConfigReader, rows_of
from bminf.checkpoint.model_parallel import COLUMNS, REPLICATED, ROWS, SplitTable, fused_rows
from bminf.checkpoint.names import Rule
from bminf.checkpoint.stored import Stored
from bminf.layers.attention import causal_mask, mask_to_bias, merge_heads, split_heads
from bminf.layers.embedding import embedding
from bminf.layers.feed_forward import GatedFeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache, decoder_cache_bytes
from bminf.layers.norm import RMSNorm
from bminf.layers.packed_cache import Cache


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 64

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def toy_config(source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> ToyConfig:
    reader = ConfigReader(source, where)
    return reader.native(ToyConfig) or reader.made(
        ToyConfig,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=reader.integer("width"),
        num_hidden_layers=reader.integer("depth"),
        num_attention_heads=reader.integer("heads"),
        intermediate_size=reader.integer("inner"),
    )


class Layer(torch.nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm, self.second_norm = RMSNorm(size, 1e-6), RMSNorm(size, 1e-6)
        self.qkv = torch.nn.Linear(size, 3 * size, bias=False)
        self.out = torch.nn.Linear(size, size, bias=False)
        self.feed_forward = GatedFeedForward(size, config.intermediate_size, "silu")
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5

    def forward(self, x: torch.Tensor, bias: Any, layer: int, cache: Cache) -> torch.Tensor:
        query, key, value = split_heads(self.qkv(self.norm(x)), 3, self.head_dim)
        x = x + self.out(merge_heads(cache.attend(layer, query, key, value, bias, self.scale)))
        return x + self.feed_forward(self.second_norm(x))


class Toy(torch.nn.Module):
    """Without positions: a token knows what was before it, but not where."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: torch.Tensor, cache: Cache, num_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert num_padding is None
        num_tokens = input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        bias = cache.bias(
            num_tokens, lambda n, keys: mask_to_bias(causal_mask(n, keys, x.device), x.dtype)
        )
        for number, layer in enumerate(self.layers):
            x = layer(x, bias, number, cache)
        cache.advance(num_tokens)
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x).float()

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        return decoder_cache(self.config, batch_size, max_length, self.norm.weight)


NAMES = {
    "h.{n}.ln_a.w": "layers.{n}.norm.weight",
    "h.{n}.qkv.w": "layers.{n}.qkv.weight",
    "h.{n}.out.w": "layers.{n}.out.weight",
    "h.{n}.ln_b.w": "layers.{n}.second_norm.weight",
    "h.{n}.gate.w": "layers.{n}.feed_forward.gate.weight",
    "h.{n}.up.w": "layers.{n}.feed_forward.up.weight",
    "h.{n}.down.w": "layers.{n}.feed_forward.down.weight",
    "toy_table.w": "embed_tokens.weight",
    "ln.w": "norm.weight",
    "logits.w": "lm_head.weight",
}
"""On disk -> in the network."""


def toy_sizes(config: ToyConfig, given: Pass) -> Sizes:
    size, wide, bias = config.hidden_size, config.intermediate_size, given.score_bytes()
    return Sizes(
        decoder_cache_bytes(config, given.batch_size, given.length, given.dtype),
        layer_bytes(given, size, size, wide, gated=wide),
        bias,
        2 * bias,
    )


TOY = Architecture(
    name="toy",
    title="Toy",
    config_class=ToyConfig,
    build=Toy,
    sizes=toy_sizes,
    parse=toy_config,
    matches=lambda checkpoint: "toy_table.w" in checkpoint.tensors,
    rules={"original": [Rule(source, target) for source, target in NAMES.items()]},
    splits=SplitTable(
        "toys",
        {
            r".*ln.*": REPLICATED,
            r".*\.qkv\.w": fused_rows(3),
            r".*\.(out|down)\.w": COLUMNS,
            r"toy_table\.w|logits\.w|.*\.(gate|up)\.w": ROWS,
        },
        lambda names: "toy_table.w" in names,
    ),
    published={"toy-small": ToyConfig(256, 32, 4, 4, 48)},
    needed_fields="width, depth, heads, inner",
    tokenizer="cpm2",
)
