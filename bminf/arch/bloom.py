"""BLOOM and BLOOMZ, 560 million to 176 billion parameters: a GPT whose positions are ALiBi alone.

LayerNorm behind the embedding and before each part, biases, and queries, keys and values of a head
side by side in one matrix. The embedding is gathered on the host; the head, which has the same
weights, is split into parts that can be streamed like any other matrix.

Top to bottom: configuration, modules, names on disk, ranks, sizes, the models there are.

Source: BigScience 2022, arXiv:2211.05100. Of the names on disk: Megatron-DeepSpeed of BigScience,
DeepSpeed 0.7.3 (module_inject), transformers (convert_bloom_original_checkpoint_to_pytorch).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bminf.arch.architecture import Architecture, matrices_of
from bminf.arch.sizes import Pass, Sizes, layer_bytes
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.config import ConfigReader, find_config, num_layers_of, rows_of
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import AVERAGED, COLUMNS, ROWS, SplitTable
from bminf.checkpoint.names import Rule, rules_of
from bminf.checkpoint.stored import Rows, Stored
from bminf.checks import check_bool, check_eps, check_sizes
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.alibi import TILE_BYTES, Alibi, slopes_on
from bminf.layers.attention import merge_heads
from bminf.layers.embedding import HostEmbedding, embedded
from bminf.layers.feed_forward import FeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache, decoder_cache_bytes
from bminf.layers.norm import LayerNorm
from bminf.layers.packed_cache import Cache
from bminf.layers.parallel import ALONE
from bminf.layers.split_head import Head, split_head

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BloomConfig:
    """Sizes of a BLOOM.

    apply_residual_connection_post_layernorm: whether what a part is added to has gone through its
    norm; of no published model.   num_head_parts: matrices that the output head is split into.
    Raises ArgumentError.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    num_head_parts: int = 1

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_head_parts",
        )  # fmt: skip
        check_eps("layer_norm_eps", self.layer_norm_eps)
        name = "apply_residual_connection_post_layernorm"
        check_bool(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ArgumentError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_head_parts > self.vocab_size:
            raise ArgumentError(
                f"num_head_parts={self.num_head_parts} is more than vocab_size={self.vocab_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def max_position_embeddings(self) -> None:
        """ALiBi has no end; the published models were trained with 2048 tokens."""
        return


_NUM_HEADS = {1024: 16, 1536: 16, 2048: 16, 2560: 32, 4096: 32, 14336: 112}
"""Hidden size -> heads of the published models: all that their shapes do not tell."""


def bloom_config(
    source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> BloomConfig:
    """The BloomConfig that `source` describes; see Architecture.parse.

    pretraining_tp and slow_but_exact, of how training summed, are of no use here.
    """
    reader = ConfigReader(source, where)
    native = reader.native(BloomConfig)
    if native is not None:
        return native
    hidden_size = (
        reader.optional("hidden_size", "n_embed") or rows_of(tensors, "norm.weight", 0) or 1
    )
    inner = reader.optional("n_inner") or 4 * hidden_size
    if inner != 4 * hidden_size:
        raise CheckpointError(f"{where}: n_inner is {inner}; accepted: {4 * hidden_size}, or null")
    num_rows = rows_of(tensors, "embed_tokens.weight", 1)
    if tensors and reader.optional("vocab_size") not in (None, num_rows):
        raise CheckpointError(
            f"{where}: vocab_size is {source['vocab_size']}, and the embedding has {num_rows} "
            "rows; take the configuration that came with it"
        )
    config = reader.made(
        BloomConfig,
        vocab_size=num_rows,
        hidden_size=hidden_size,
        num_hidden_layers=reader.optional("num_hidden_layers", "n_layer")
        or max(1, num_layers_of(tensors, "layers")),
        num_attention_heads=_num_heads(reader, hidden_size),
        layer_norm_eps=reader.number(1e-5, "layer_norm_eps", "layer_norm_epsilon"),
        apply_residual_connection_post_layernorm=reader.flag(
            "apply_residual_connection_post_layernorm"
        ),
    )
    _check_heads_of_ranks(config, tensors, where)
    return config


def _check_heads_of_ranks(config: BloomConfig, tensors: Mapping[str, Stored], where: str) -> None:
    """Raise CheckpointError where a rank would have a part of a head: there are others then."""
    shared, rows = tensors.get("layers.0.attention.qkv.bias"), 3 * config.head_dim
    for part in shared.parts if isinstance(shared, Rows) else ():
        if part.shape[0] % rows:
            raise CheckpointError(
                f"{where}: n_head is {config.num_attention_heads}, {rows} rows each, but "
                f"{part.where} has {part.shape[0]}, and a rank has whole heads; give the n_head "
                "that this checkpoint was trained with"
            )


def _num_heads(reader: ConfigReader, hidden_size: int) -> int:
    found = reader.optional("num_attention_heads", "n_head") or _NUM_HEADS.get(hidden_size)
    if found is None:
        raise CheckpointError(
            f"{reader.where} does not say n_head, and hidden_size={hidden_size} is of no published "
            "BLOOM; put its config.json there, or give config=..., a path or a mapping with n_head"
        )
    return found


# ---- modules -------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Causal self-attention; its norm is called by the layer."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.head_dim = config.head_dim

    def forward(self, normed: torch.Tensor, bias: Any, layer: int, cache: Cache) -> torch.Tensor:
        parts: Any = self._modules  # Module.__getattr__ takes as long as a small operation
        query, key, value = self._heads(parts["qkv"](normed))
        y = cache.attend(layer, query, key, value, bias, self.head_dim**-0.5)
        return parts["out"](merge_heads(y))

    def _heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, T, 3 C) -> queries, keys and values, (B, H, T, D) each."""
        by_head = x.view(*x.shape[:2], -1, 3 * self.head_dim).transpose(1, 2)  # q, k, v of a head
        return list(by_head.chunk(3, dim=-1))


class Layer(torch.nn.Module):
    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = Attention(config)
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.feed_forward = FeedForward(size, config.intermediate_size, "gelu_tanh")
        self.config = config

    def forward(self, x: torch.Tensor, bias: Any, layer: int, cache: Cache) -> torch.Tensor:
        parts: Any = self._modules
        attention = parts["attention"]
        normed = attention.norm(x)
        y = attention(normed, bias, layer, cache)
        x, normed = parts["norm"].add(residual(x, normed, self.config), y)
        return residual(x, normed, self.config) + parts["feed_forward"](normed)


def residual(x: torch.Tensor, normed: torch.Tensor, config: BloomConfig) -> torch.Tensor:
    """What a part's output is added to."""
    return normed if config.apply_residual_connection_post_layernorm else x


class Bloom(torch.nn.Module):
    """Token ids in, hidden states out; `head` makes logits of them."""

    group = ALONE

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.embed_tokens = HostEmbedding(config.vocab_size, size)
        self.embed_norm = LayerNorm(size, config.layer_norm_eps)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.lm_head = Head(config)

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
        x = self.embed_norm(embedded(self.embed_tokens, input_ids))
        steep = self.group.share(slopes_on(x.device, self.config.num_attention_heads))
        padding = None if num_padding is None else num_padding.tolist()
        alibi = Alibi(steep, padding)
        bias = cache.bias(num_tokens, lambda *_: alibi)
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, index, cache)
        cache.advance(num_tokens)
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32; the head is the embedding."""
        return self.group.gather(self.lm_head(x))

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the last norm."""
        like = self.norm.weight
        return decoder_cache(self.config, batch_size, max_length, like, self.group.size)


# ---- names on disk -------------------------------------------------------------------------------

_LAYERS = "layers"  # the kind of a checkpoint: Megatron-DeepSpeed's files of each layer
_PRESHARDED = "presharded"
_HUGGINGFACE = {
    "word_embeddings_layernorm": "embed_norm",
    "h.{n}.input_layernorm": "layers.{n}.attention.norm",
    "h.{n}.self_attention.query_key_value": "layers.{n}.attention.qkv",
    "h.{n}.self_attention.dense": "layers.{n}.attention.out",
    "h.{n}.post_attention_layernorm": "layers.{n}.norm",
    "h.{n}.mlp.dense_h_to_4h": "layers.{n}.feed_forward.up",
    "h.{n}.mlp.dense_4h_to_h": "layers.{n}.feed_forward.down",
    "ln_f": "norm",
}
_INFERENCE = {  # DeepSpeed's: names of weights and of biases differ in their last letter
    "norm_": "layers.{n}.attention.norm",
    "attention.attn_qkv": "layers.{n}.attention.qkv",
    "attention.attn_o": "layers.{n}.attention.out",
    "mlp.attn_n": "layers.{n}.norm",
    "mlp.inter_": "layers.{n}.feed_forward.up",
    "mlp.output_": "layers.{n}.feed_forward.down",
}


def _huggingface(prefix: str) -> Iterator[Rule]:
    yield Rule(f"{prefix}word_embeddings.weight", "embed_tokens.weight")
    yield Rule("lm_head.weight", "lm_head.parts.0.weight")  # which is split later
    names = {f"{prefix}{source}": target for source, target in _HUGGINGFACE.items()}
    yield from rules_of(names, has_bias=True)


def _inference() -> Iterator[Rule]:
    for source, target in _INFERENCE.items():
        for letter, kind in (("w", "weight"), ("b", "bias")):
            yield Rule(f"transformer.h.{{n}}.{source}{letter}", f"{target}.{kind}")


_RULES = {
    "huggingface": [*_huggingface("transformer."), *_huggingface("")],  # with a head, and without
    _LAYERS: [*_huggingface("")],  # once they are numbered as there
    _PRESHARDED: [*_huggingface("transformer."), *_inference()],
}

_OF_LAYER = re.compile(r"(\d+)\.(.+)")
_NUM_BEFORE_LAYERS = 3  # in a pipeline: a cast, the embedding, and what moves its axes


def _raw_tensors(checkpoint: Checkpoint) -> Mapping[str, Stored]:
    """Those of layers under the names that Hugging Face's have. A head counts where it is said to
    have other weights than the embedding; CheckpointError where it is not there then."""
    if checkpoint.kind != _LAYERS:
        has_own_head = _has_own_head(checkpoint.path)
        if has_own_head and "lm_head.weight" not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path} lacks 'lm_head.weight', and its config.json says that "
                "tie_word_embeddings is false; fetch it again, or leave that out there if the "
                "head is the embedding"
            )
        tensors = checkpoint.tensors.items()
        return {n: t for n, t in tensors if has_own_head or n != "lm_head.weight"}
    last = max(int(name.partition(".")[0]) for name in checkpoint.tensors)
    return {_numbered(name, last): stored for name, stored in checkpoint.tensors.items()}


def _has_own_head(folder: Path) -> bool:
    path = find_config(folder, ["bloom"])
    return path is not None and read_json(path).get("tie_word_embeddings") is False


def _numbered(name: str, last: int) -> str:
    match = _OF_LAYER.fullmatch(name)
    if match is None:
        return name
    number, own = int(match[1]), match[2]
    if number < _NUM_BEFORE_LAYERS:
        return own.replace("word_embeddings.norm.", "word_embeddings_layernorm.")
    if number == last and own in ("weight", "bias"):
        return f"ln_f.{own}"
    return f"h.{number - _NUM_BEFORE_LAYERS}.{own}"


def is_bloom(names: Collection[str]) -> bool:
    """Whether these are names of a BLOOM, in any layout: it has a norm behind its embedding."""
    return any(
        name.endswith(("word_embeddings_layernorm.weight", ".word_embeddings.norm.weight"))
        for name in names
    )


# ---- ranks ---------------------------------------------------------------------------------------

SPLITS = SplitTable(
    "BLOOM's kind",
    {
        r"\d+\.word_embeddings\.weight": ROWS,
        # Norms and biases that each rank has drifted apart in training; their mean is the model.
        r".*norm\.(weight|bias)": AVERAGED,
        # A head's rows of Q, K and V stand together, so a rank has the rows of whole heads.
        r".*\.query_key_value\.(weight|bias)": ROWS,
        r".*\.dense_h_to_4h\.(weight|bias)": ROWS,
        r".*\.(dense|dense_4h_to_h)\.weight": COLUMNS,
        r".*\.(dense|dense_4h_to_h)\.bias": AVERAGED,
        r"\d+\.(weight|bias)": AVERAGED,
        r".*\.(attn_qkv|inter_)[wb]": ROWS,
        r".*\.(attn_o|output_)w": COLUMNS,
        r".*\.(attn_o|output_)b": AVERAGED,
        r".*\.(norm_|attn_n)[wb]": AVERAGED,
    },
    is_bloom,
    # The columns that the ranks have together are as many as the rows of Q, K or V are wide.
    {"dense.weight": "query_key_value.weight", "attn_ow": "attn_qkvw"},
)
"""Source: the conversion script of transformers 4.47; DeepSpeed, module_inject/load_checkpoint."""


# ---- sizes ---------------------------------------------------------------------------------------


def bloom_sizes(config: BloomConfig, given: Pass) -> Sizes:
    """Bytes of a pass."""
    size, ranks = config.hidden_size, given.num_ranks
    inner, wide = size // ranks, config.intermediate_size // ranks
    # The biases of some queries of a row, of one at least, and what is ahead of them.
    query = 4 * config.num_attention_heads // ranks * given.length
    biases = 5 * max(min(query * given.length, TILE_BYTES), query) // 4
    half = given.dtype != torch.float32
    exact = 4 * given.batch_size * given.length * 4 * inner if half else 0  # q, k, v and y
    return Sizes(
        decoder_cache_bytes(config, given.batch_size, given.length, given.dtype, ranks),
        layer_bytes(given, size, inner, wide) + exact,
        biases,
        biases,
        kept_quarters=6,
    )


# ---- what there is -------------------------------------------------------------------------------

_VOCAB_SIZE = 250880
PUBLISHED_BLOOM = {
    "560m": BloomConfig(_VOCAB_SIZE, 1024, 24, 16),
    "1b1": BloomConfig(_VOCAB_SIZE, 1536, 24, 16),
    "1b7": BloomConfig(_VOCAB_SIZE, 2048, 24, 16),
    "3b": BloomConfig(_VOCAB_SIZE, 2560, 30, 32),
    "7b1": BloomConfig(_VOCAB_SIZE, 4096, 30, 32),
    "": BloomConfig(_VOCAB_SIZE, 14336, 70, 112),
}
"""By what their names end in. BLOOMZ has the same shapes."""
_NAMES = {
    f"bigscience/{kind}{'-' if size else ''}{size}": config
    for kind in ("bloom", "bloomz")
    for size, config in PUBLISHED_BLOOM.items()
}


_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # the tokenizer

BLOOM = Architecture(
    name="bloom",
    title="BLOOM",
    config_class=BloomConfig,
    build=Bloom,
    sizes=bloom_sizes,
    parse=bloom_config,
    matches=lambda checkpoint: is_bloom(checkpoint.tensors.keys()),
    rules=_RULES,
    raw_tensors=_raw_tensors,
    splits=SPLITS,
    blocks=matrices_of,
    published=_NAMES,
    is_implied_by_shapes=True,
    hub_ids=tuple(_NAMES),
    aliases={"bloom176b": "bigscience/bloom", "bloomz176b": "bigscience/bloomz"},
    model_type="bloom",
    classes=("BloomForCausalLM", "BloomModel"),
    matches_config=lambda source: source.get("model_type") == "bloom",
    split_head=split_head,
    vocabulary_name=lambda path: path.name if path.name in _BESIDE else "tokenizer.json",
    has_padded_vocabulary=True,
)
