"""GPT-2 as CPM-1 has it: learned positions, LayerNorm before each part, biases, a tied head.

Top to bottom: configuration, modules, names on disk, ranks, sizes, and the models there are.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Zhang et al.
2020, arXiv:2012.00413 (CPM).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bminf.arch.architecture import Architecture
from bminf.arch.sizes import BUCKET_BYTES, Pass, Sizes, layer_bytes
from bminf.checkpoint.config import ConfigReader, rows_of
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import (
    MEGATRON_LAYER,
    MEGATRON_WIDTHS,
    REPLICATED,
    ROWS,
    SplitTable,
)
from bminf.checkpoint.names import MEGATRON_NAMES, Rule, rules_of
from bminf.checkpoint.stored import Stored
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.attention import Causal, merge_heads, split_heads
from bminf.layers.embedding import embedded, embedding
from bminf.layers.feed_forward import FeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache, decoder_cache_bytes
from bminf.layers.norm import LayerNorm
from bminf.layers.packed_cache import Cache
from bminf.layers.parallel import ALONE
from bminf.ops.gated_linear import check_activation

# ---- configuration -------------------------------------------------------------------------------


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


def gpt_config(source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> GPTConfig:
    """The GPTConfig that `source` describes.

    tensors: under our names, for what shapes tell.   where: for messages.
    Raises CheckpointError where a field is missing, or is of a model that this is not.
    """
    reader = ConfigReader(source, where)
    native = reader.native(GPTConfig)
    if native is not None:
        return native
    # Each of these would make another model of GPT-2's names.
    for name in ("tie_word_embeddings", "scale_attn_weights"):
        reader.must_be(name, None, True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        reader.must_be(name, None, False)
    hidden_size = reader.integer("hidden_size", "n_embd")
    return reader.made(
        GPTConfig,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=hidden_size,
        num_hidden_layers=reader.integer("num_hidden_layers", "num_layers", "n_layer"),
        num_attention_heads=reader.integer("num_attention_heads", "n_head"),
        max_position_embeddings=reader.integer("max_position_embeddings", "n_positions", "n_ctx"),
        intermediate_size=reader.optional("intermediate_size", "n_inner") or 4 * hidden_size,
        layer_norm_eps=reader.number(
            1e-5, "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"
        ),
        hidden_act=reader.activation("gelu_new", "hidden_act", "activation_function"),
    )


# ---- modules -------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Causal self-attention; its norm is called by the layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.head_dim = config.head_dim

    def forward(self, normed: torch.Tensor, bias: Any, layer: int, cache: Cache) -> torch.Tensor:
        parts: Any = self._modules  # Module.__getattr__ takes as long as a small operation
        query, key, value = split_heads(parts["qkv"](normed), 3, self.head_dim)
        y = cache.attend(layer, query, key, value, bias, self.head_dim**-0.5)
        return parts["out"](merge_heads(y))


class Layer(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = Attention(config)
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.feed_forward = FeedForward(size, config.intermediate_size, config.hidden_act)

    def forward(self, x: torch.Tensor, bias: Any, layer: int, cache: Cache) -> torch.Tensor:
        parts: Any = self._modules
        attention = parts["attention"]
        y = attention(attention.norm(x), bias, layer, cache)
        x, normed = parts["norm"].add(x, y)
        return x + parts["feed_forward"](normed)


class GPT(torch.nn.Module):
    """Token ids in, hidden states out; `head` makes logits of them."""

    group = ALONE

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, size)
        self.embed_positions = embedding(config.max_position_embeddings, size)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(size, config.layer_norm_eps)
        # Of one of several ranks: its rows of the embedding, which none of them has whole.
        self.lm_head: torch.nn.Linear | None = None

    def forward(
        self, input_ids: torch.Tensor, cache: Cache, num_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states of some more tokens, which the cache grows by.

        input_ids: (B, T) int64, or the embeddings of these, (B, T, C); with a PackedCache B is 1,
        and T the tokens of all rows.   num_padding: (B,) int64, tokens at the beginning of each row
        that do not count; None is none.
        Returns (B, T, C), after the last norm.
        """
        num_tokens = input_ids.shape[1]
        positions = cache.positions(num_tokens)
        if num_padding is not None:
            positions = (positions - num_padding.unsqueeze(1)).clamp(min=0)
        x = embedded(self.embed_tokens, input_ids) + self.embed_positions(positions)
        causal = Causal(num_padding)
        bias = cache.bias(num_tokens, lambda *_: causal)
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, index, cache)
        cache.advance(num_tokens)
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32; the head is the embedding."""
        head = self.lm_head or self.embed_tokens
        return self.group.gather(F.linear(x, head.weight)).float()

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the last norm."""
        like = self.norm.weight
        return decoder_cache(self.config, batch_size, max_length, like, self.group.size)


# ---- names on disk -------------------------------------------------------------------------------

_EMBEDDINGS = {  # of each layout
    "word_embeddings.weight",
    "token_embedding.weight",
    "transformer.wte.weight",
    "wte.weight",
}


def _raw_tensors(checkpoint: Checkpoint) -> Mapping[str, Stored]:
    if checkpoint.kind == "modelcenter":
        raise CheckpointError(
            f"{checkpoint.path} is a modelcenter folder, a layout that CPM-1 is not found in: "
            "ModelCenter's CPM1 is another architecture (relative positions, RMSNorm)"
        )
    return checkpoint.tensors


def is_cpm1(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has its embedding, under the name that it has in one of the layouts."""
    return bool(checkpoint.tensors.keys() & _EMBEDDINGS)


def _huggingface(prefix: str) -> Iterator[Rule]:
    """Its linears are stored transposed."""
    layer = f"{prefix}h.{{n}}"
    yield Rule(f"{layer}.attn.bias", None)  # the causal mask, in old files
    yield Rule(f"{layer}.attn.masked_bias", None)
    yield from rules_of({f"{prefix}wte": "embed_tokens", f"{prefix}wpe": "embed_positions"})
    norms = {"h.{n}.ln_1": "layers.{n}.attention.norm", "h.{n}.ln_2": "layers.{n}.norm"}
    names = {f"{prefix}{source}": target for source, target in {**norms, "ln_f": "norm"}.items()}
    yield from rules_of(names, has_bias=True)
    linears = {
        f"{layer}.attn.c_attn": "layers.{n}.attention.qkv",
        f"{layer}.attn.c_proj": "layers.{n}.attention.out",
        f"{layer}.mlp.c_fc": "layers.{n}.feed_forward.up",
        f"{layer}.mlp.c_proj": "layers.{n}.feed_forward.down",
    }
    yield from rules_of(linears, has_bias=True, is_transposed=True)


_BMINF1 = {
    "layernorm": "norm",
    "layers.{n}.ln_attn": "layers.{n}.attention.norm",
    "layers.{n}.ln_ff": "layers.{n}.norm",
    "layers.{n}.self_attn.project_[qkv]": "layers.{n}.attention.qkv",
    "layers.{n}.self_attn.linear_out": "layers.{n}.attention.out",
    "layers.{n}.ff.linear_in": "layers.{n}.feed_forward.up",
    "layers.{n}.ff.linear_out": "layers.{n}.feed_forward.down",
}
_RULES = {
    "original": [
        *rules_of({"word_embeddings": "embed_tokens", "position_embeddings": "embed_positions"}),
        *rules_of(MEGATRON_NAMES, has_bias=True),
    ],
    "huggingface": [
        Rule("lm_head.weight", None),  # tied
        *_huggingface("transformer."),  # GPT2LMHeadModel
        *_huggingface(""),  # GPT2Model
    ],
    "bminf1": [
        *rules_of({"token_embedding": "embed_tokens", "position_embedding": "embed_positions"}),
        *rules_of(_BMINF1, has_bias=True),
    ],
}


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


# ---- sizes ---------------------------------------------------------------------------------------


def gpt_sizes(config: GPTConfig, given: Pass) -> Sizes:
    """Bytes of a pass."""
    size, bias, ranks = config.hidden_size, given.score_bytes(), given.num_ranks
    return Sizes(
        decoder_cache_bytes(config, given.batch_size, given.length, given.dtype, ranks),
        layer_bytes(given, size, size // ranks, config.intermediate_size // ranks),
        bias,
        2 * bias + BUCKET_BYTES * given.length**2,  # more than it takes: it has no buckets
    )


# ---- what there is -------------------------------------------------------------------------------

PUBLISHED_GPT = {
    "TsinghuaAI/CPM-Generate": GPTConfig(30000, 2560, 32, 32, 1024, 10240),
    "mymusise/CPM-Generate-distill": GPTConfig(30000, 768, 12, 12, 1024, 3072),
}


def _vocabulary_name(path: Path) -> str:
    """Of a sentencepiece model, or of the words that BMInf 1.x splits texts by."""
    return "vocab.txt" if path.suffix == ".txt" else "chinese_vocab.model"


CPM1 = Architecture(
    name="cpm1",
    title="CPM-1",
    config_class=GPTConfig,
    build=GPT,
    sizes=gpt_sizes,
    parse=gpt_config,
    matches=is_cpm1,
    rules=_RULES,
    raw_tensors=_raw_tensors,
    splits=SPLITS,
    published=PUBLISHED_GPT,
    needed_fields="hidden_size, num_layers, num_attention_heads, max_position_embeddings",
    hub_ids=("TsinghuaAI/CPM-Generate", "mymusise/CPM-Generate-distill"),
    aliases={"cpm1": "TsinghuaAI/CPM-Generate"},
    model_type="gpt2",
    has_generic_names=True,
    vocabulary_name=_vocabulary_name,
)
