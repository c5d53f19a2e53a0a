"""T5 v1.1 as CPM-2 and EVA have it: an encoder, a decoder, gated feed-forwards, a head of its own.

What differs within the family (attention scaling, GELU, sizes) is configuration. Keys and values of
the cross-attention are computed once a prompt by modules of their own, so that their weights are
not touched while decoding.

Top to bottom: configuration, modules, names on disk, ranks, sizes, and the models there are.

Source: Raffel et al. 2020, arXiv:1910.10683; Zhang et al. 2021, arXiv:2106.10715 (CPM-2); Zhou et
al. 2021, arXiv:2108.01547 (EVA).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bminf.arch.architecture import Architecture
from bminf.arch.sizes import BUCKET_BYTES, Pass, Sizes, layer_bytes
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.config import ConfigReader, find_config, num_layers_of, rows_of
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import COLUMNS, REPLICATED, ROWS, SplitTable, fused_rows
from bminf.checkpoint.names import Rule, num_known, rules_of
from bminf.checkpoint.stored import Stored
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.attention import (
    attention,
    mask_to_bias,
    merge_heads,
    padding_mask,
    split_heads,
)
from bminf.layers.embedding import embedded, embedding
from bminf.layers.feed_forward import GatedFeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache, decoder_cache_bytes
from bminf.layers.norm import RMSNorm
from bminf.layers.packed_cache import PackedCache, Segments
from bminf.layers.parallel import ALONE
from bminf.layers.position_bias import RelativePositionBias
from bminf.layers.step_cache import StepCache
from bminf.ops.gated_linear import check_activation

# ---- configuration -------------------------------------------------------------------------------


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
    def num_hidden_layers(self) -> int:
        """Of the decoder, which is what has a cache."""
        return self.num_decoder_layers

    @property
    def max_position_embeddings(self) -> None:
        """Positions are relative, and have no end."""

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.is_attention_scaled else 1.0


def t5_config(source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> T5Config:
    """The T5Config that `source` describes; see Architecture.parse.

    `feed_forward_proj` is not read: the authors' files say "relu" in it, and their code computes a
    tanh GELU with a gate. A field hidden_act is.
    """
    reader = ConfigReader(source, where)
    native = reader.native(T5Config)
    if native is not None:
        return native
    if "dim_model" in source:
        hidden_act = _modelcenter_activation(reader)
    else:
        hidden_act = reader.activation("gelu_new", "hidden_act")
    num_layers = reader.integer("num_encoder_layers", "num_layers")
    return reader.made(
        T5Config,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=reader.integer("hidden_size", "d_model", "dim_model"),
        intermediate_size=reader.integer("intermediate_size", "d_ff", "dim_ff"),
        num_attention_heads=reader.integer("num_attention_heads", "num_heads"),
        head_dim=reader.integer("head_dim", "d_kv", "dim_head"),
        num_encoder_layers=num_layers,
        num_decoder_layers=_num_decoder_layers(reader, num_layers, tensors),
        is_attention_scaled=reader.flag("is_attention_scaled", "attn_scale"),
        hidden_act=hidden_act,
        num_buckets=reader.optional(
            "num_buckets", "relative_attention_num_buckets", "position_bias_num_buckets"
        )
        or rows_of(tensors, "encoder.position_bias.weight", 32),
        max_distance=reader.optional(
            "max_distance", "relative_attention_max_distance", "position_bias_max_distance"
        )
        or 128,
        rms_norm_eps=reader.number(1e-6, "rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
    )


def _modelcenter_activation(reader: ConfigReader) -> str:
    """Raises CheckpointError for fields of a model that this is not."""
    for name in ("norm_bias", "att_bias", "ffn_bias", "proj_bias", "post_layer_norm", "cls_head"):
        reader.must_be(name, None, False)
    for name in ("tied", "length_scale"):  # which models/source.py acts on
        reader.must_be(name, None, False, True)
    reader.must_be("pos_bias_type", None, "relative")
    activation = reader.must_be("ffn_activate_fn", "gated_gelu", "gated_gelu_new")
    return "gelu_tanh" if activation == "gated_gelu_new" else "gelu"


def _num_decoder_layers(
    reader: ConfigReader, num_layers: int, tensors: Mapping[str, Stored]
) -> int:
    """CPM-2's code and EVA's of Hugging Face build both stacks with num_layers layers, EVA's own
    code honours num_decoder_layers: of the two numbers, the one that the tensors confirm."""
    named = reader.optional("num_decoder_layers")
    if named is None or num_layers_of(tensors, "decoder.layers") == num_layers:
        return num_layers
    return named


# ---- modules -------------------------------------------------------------------------------------


class T5Cache:
    """All that decoding needs of the past: keys and values of the tokens written so far (`own`),
    those of the prompt (`cross`), and the bias that masks the prompt's padding."""

    def __init__(self, own: KVCache, cross: KVCache) -> None:
        self.own, self.cross = own, cross
        self.cross_bias: torch.Tensor | None = None
        self._prompt_of: list[int] = []  # of each row

    def reset(self) -> None:
        """Forget prompt and tokens; the memory stays."""
        self.own.reset()
        self.cross.reset()
        self.cross_bias = None

    def start(self, num_prompts: int, cross_bias: torch.Tensor | None) -> None:
        """The first rows are this many prompts. cross_bias: (B, 1, 1, S), or None."""
        self._prompt_of = list(range(num_prompts))
        self.cross_bias = cross_bias

    def attend_to_prompt(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """(B, H, T, D), see attention()."""
        key, value = self.cross.read(layer, query.shape[0], self.cross.length)
        return attention(query, key, value, self.cross_bias, scale)

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


@dataclass(frozen=True)
class PackedT5Cache:
    """The same for a pass over rows that lie one behind another, see PackedCache.

    cross: its rows hold the prompts.
    """

    own: PackedCache | StepCache
    cross: PackedCache | StepCache
    num_rows: int

    def attend_to_prompt(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        if isinstance(self.cross, StepCache):
            return self.cross.attend_to_kept(layer, query, None, scale)
        return self.cross.attend_to_kept(layer, query, [None] * self.num_rows, scale)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, float], torch.Tensor]
"""attention(), or one that takes the same and remembers keys and values."""


class SelfAttention(torch.nn.Module):
    """Its norm is called by the layer."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = torch.nn.Linear(config.hidden_size, 3 * config.inner_size, bias=False)
        self.out = torch.nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.head_dim, self.scale = config.head_dim, config.attention_scale

    def forward(self, normed: torch.Tensor, bias: Any, attend: Attend = attention) -> torch.Tensor:
        parts: Any = self._modules  # Module.__getattr__ takes as long as a small operation
        query, key, value = split_heads(parts["qkv"](normed), 3, self.head_dim)
        return parts["out"](merge_heads(attend(query, key, value, bias, self.scale)))


class CrossAttention(torch.nn.Module):
    """Looks at the prompt, whose keys and values are in the cache; the layer calls its norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.query = torch.nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.out = torch.nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.head_dim, self.scale = config.head_dim, config.attention_scale

    def forward(
        self, normed: torch.Tensor, layer: int, cache: T5Cache | PackedT5Cache
    ) -> torch.Tensor:
        parts: Any = self._modules
        (query,) = split_heads(parts["query"](normed), 1, self.head_dim)
        return parts["out"](merge_heads(cache.attend_to_prompt(layer, query, self.scale)))


class EncoderLayer(torch.nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = GatedFeedForward(
            config.hidden_size, config.intermediate_size, config.hidden_act
        )

    def forward(self, x: torch.Tensor, bias: Any, attend: Attend) -> torch.Tensor:
        y = self.attention(self.attention.norm(x), bias, attend)
        x, normed = self.norm.add(x, y)
        return x + self.feed_forward(normed)


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
        self, x: torch.Tensor, bias: Any, layer: int, cache: T5Cache | PackedT5Cache
    ) -> torch.Tensor:
        parts: Any = self._modules
        own, cross = parts["attention"], parts["cross_attention"]
        y = own(own.norm(x), bias, partial(cache.own.attend, layer))
        x, normed = cross.norm.add(x, y)
        x, normed = parts["norm"].add(x, cross(normed, layer, cache))
        return x + parts["feed_forward"](normed)


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

    def forward(
        self,
        x: torch.Tensor,
        padding_bias: torch.Tensor | None = None,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        """(B, S, C) embeddings -> (B, S, C).

        padding_bias: (B, 1, 1, S), or None.   segments: texts that lie one behind another, where B
        is 1; None is one text a row.
        """
        if segments is None:
            bias: Any = self.position_bias(x.shape[1], x.shape[1])
            attend: Attend = attention
        else:
            bias = [self.position_bias(length, length) for length in segments.lengths]
            attend = segments.attend
        if padding_bias is not None:
            bias = bias + padding_bias
        for layer in self.layers:
            x = layer(x, bias, attend)
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

    def forward(self, encoder_output: torch.Tensor, cache: KVCache | PackedCache) -> None:
        """encoder_output: (B, S, C). Writes all layers of the cache."""
        for index, layer in enumerate(self.layers):
            key, value = split_heads(layer(encoder_output), 2, self.head_dim)
            cache.append(index, key, value)
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

    def forward(self, x: torch.Tensor, cache: T5Cache | PackedT5Cache) -> torch.Tensor:
        """(B, T, C) embeddings of some more tokens -> (B, T, C). The cache grows by them."""
        num_tokens, own = x.shape[1], self.position_bias.of_decoder()
        bias = cache.own.bias(num_tokens, lambda *_: own)
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, index, cache)
        cache.own.advance(num_tokens)
        return self.norm(x)


class T5(torch.nn.Module):
    """encode() a prompt into a cache, then call it with token after token."""

    group = ALONE

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
            padding = padding_mask(lengths, input_ids.shape[1])
            padding_bias = mask_to_bias(padding, x.dtype)[:, None, None]
        cache.start(len(input_ids), padding_bias)
        x = self.encoder(x, padding_bias)
        self.cross_projections(x, cache.cross)
        return x

    def encode_packed(
        self, input_ids: torch.Tensor, segments: Segments, cross: PackedCache
    ) -> None:
        """Read prompts that lie one behind another, (1, S) int64, into the rows of `cross`."""
        x = self.encoder(self.embed_tokens(input_ids), segments=segments)
        self.cross_projections(x, cross)

    def forward(self, input_ids: torch.Tensor, cache: T5Cache | PackedT5Cache) -> torch.Tensor:
        """The decoder's hidden states of some more tokens: (B, T) int64, or the embeddings of
        these, (B, T, C) -> (B, T, C)."""
        return self.decoder(embedded(self.embed_tokens, input_ids), cache)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return self.group.gather(self.lm_head(x)).float()

    def new_cache(self, batch_size: int, max_prompt_length: int, max_length: int) -> T5Cache:
        """An empty cache in the dtype and on the device of the last norm."""
        lengths = (max_length, max_prompt_length)
        like = self.decoder.norm.weight
        own, cross = (
            decoder_cache(self.config, batch_size, length, like, self.group.size)
            for length in lengths
        )
        return T5Cache(own, cross)


# ---- names on disk -------------------------------------------------------------------------------

_STACKS = ("encoder", "decoder")
_IN_MODELCENTER = "position_bias_dec.relative_attention_bias"


def _raw_tensors(checkpoint: Checkpoint) -> Mapping[str, Stored]:
    """But for the prompts of a prompt-tuned model, which generate() has no use for."""
    prompts = [name for name in checkpoint.tensors if name.endswith("prompt_embeds.weight")]
    if prompts:
        raise CheckpointError(
            f"{checkpoint.path} holds {prompts[0]!r}: it is prompt-tuned for one task, and without "
            "those prompts it would answer wrongly; take the checkpoint it was tuned from"
        )
    return checkpoint.tensors


def is_t5(checkpoint: Checkpoint) -> bool:
    """Whether most of a checkpoint's tensors have names of CPM-2 and EVA in its layout."""
    rules = _RULES.get(checkpoint.kind)
    if rules is None:
        return False
    return 2 * num_known(checkpoint.tensors, rules) > len(checkpoint.tensors)


def is_cpm2(checkpoint: Checkpoint) -> bool:
    """Whether nothing but CPM-2 can have these names: EVA was not published in this layout."""
    return _IN_MODELCENTER in checkpoint.tensors


def is_eva(checkpoint: Checkpoint) -> bool:
    """Whether names or the configuration tell EVA from CPM-2, of which all else is the same."""
    names = checkpoint.tensors.keys()
    if is_cpm2(checkpoint):
        return False
    if "role_embeds.weight" in names:
        return True
    is_huggingface = checkpoint.kind == "huggingface" and "shared.weight" in names
    path = find_config(checkpoint.path, (None, "eva")) if is_huggingface else None
    return path is not None and read_json(path).get("model_type") == "eva"


def _rules(names: Mapping[str, str | None]) -> list[Rule]:
    """Rules for both stacks, from the names of modules: source -> target.

    {stack} is "encoder" or "decoder", {short} its first three letters, {ff} the index of the
    feed-forward among the parts of a layer; {layer} and {cross} are short for targets.
    """
    table: dict[str, str | None] = {}
    for stack, feed_forward in zip(_STACKS, "12", strict=True):
        fields = {
            "stack": stack,
            "short": stack[:3],
            "ff": feed_forward,
            "n": "{n}",
            "layer": f"{stack}.layers.{{n}}",
            "cross": "decoder.layers.{n}.cross_attention",
        }
        for source, target in names.items():
            table[source.format(**fields)] = None if target is None else target.format(**fields)
    return [*rules_of(table)]


_ORIGINAL = {
    "word_embeds": "embed_tokens",
    "lm_head": "lm_head",
    "role_embeds": None,  # EVA's, not used after its training
    "{stack}.word_embeds": None,  # the shared embedding again
    "{stack}.role_embeds": None,
    "{stack}.final_layernorm": "{stack}.norm",
    "{stack}.blocks.0.self_attn.self_attn.relative_attention_bias": "{stack}.position_bias",
    "{stack}.blocks.{n}.self_attn.layer_norm": "{layer}.attention.norm",
    "{stack}.blocks.{n}.self_attn.self_attn.project": "{layer}.attention.qkv",
    "{stack}.blocks.{n}.self_attn.self_attn.dense": "{layer}.attention.out",
    "{stack}.blocks.{n}.ff.layer_norm": "{layer}.norm",
    "{stack}.blocks.{n}.ff.dense_relu_dense.wi_0": "{layer}.feed_forward.gate",
    "{stack}.blocks.{n}.ff.dense_relu_dense.wi_1": "{layer}.feed_forward.up",
    "{stack}.blocks.{n}.ff.dense_relu_dense.wo": "{layer}.feed_forward.down",
    "decoder.blocks.{n}.cross_attn.layer_norm": "{cross}.norm",
    "decoder.blocks.{n}.cross_attn.cross_attn.project_q": "{cross}.query",
    "decoder.blocks.{n}.cross_attn.cross_attn.dense": "{cross}.out",
    "decoder.blocks.{n}.cross_attn.cross_attn.project_kv": "cross_projections.layers.{n}",
}
_HUGGINGFACE = {
    "shared": "embed_tokens",
    "lm_head": "lm_head",
    "role_embeds": None,
    "{stack}.embed_tokens": None,
    "{stack}.role_embeds": None,
    "{stack}.final_layer_norm": "{stack}.norm",
    "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias": "{stack}.position_bias",
    "{stack}.block.{n}.layer.0.layer_norm": "{layer}.attention.norm",
    "{stack}.block.{n}.layer.0.SelfAttention.[qkv]": "{layer}.attention.qkv",
    "{stack}.block.{n}.layer.0.SelfAttention.o": "{layer}.attention.out",
    "{stack}.block.{n}.layer.{ff}.layer_norm": "{layer}.norm",
    "{stack}.block.{n}.layer.{ff}.DenseReluDense.wi_0": "{layer}.feed_forward.gate",
    "{stack}.block.{n}.layer.{ff}.DenseReluDense.wi_1": "{layer}.feed_forward.up",
    "{stack}.block.{n}.layer.{ff}.DenseReluDense.wo": "{layer}.feed_forward.down",
    "decoder.block.{n}.layer.1.layer_norm": "{cross}.norm",
    "decoder.block.{n}.layer.1.EncDecAttention.q": "{cross}.query",
    "decoder.block.{n}.layer.1.EncDecAttention.o": "{cross}.out",
    "decoder.block.{n}.layer.1.EncDecAttention.[kv]": "cross_projections.layers.{n}",
}
_MODELCENTER = {
    "input_embedding": "embed_tokens",
    "output_projection": "lm_head",
    "{stack}.output_layernorm": "{stack}.norm",
    "{stack}.layers.{n}.self_att.layernorm_before_attention": "{layer}.attention.norm",
    "{stack}.layers.{n}.self_att.self_attention.project_[qkv]": "{layer}.attention.qkv",
    "{stack}.layers.{n}.self_att.self_attention.attention_out": "{layer}.attention.out",
    "{stack}.layers.{n}.ffn.layernorm_before_ffn": "{layer}.norm",
    "{stack}.layers.{n}.ffn.ffn.w_in.w_0": "{layer}.feed_forward.gate",
    "{stack}.layers.{n}.ffn.ffn.w_in.w_1": "{layer}.feed_forward.up",
    "{stack}.layers.{n}.ffn.ffn.w_out": "{layer}.feed_forward.down",
    # The cross-attention, too, is called self_attention there.
    "decoder.layers.{n}.cross_att.layernorm_before_attention": "{cross}.norm",
    "decoder.layers.{n}.cross_att.self_attention.project_q": "{cross}.query",
    "decoder.layers.{n}.cross_att.self_attention.attention_out": "{cross}.out",
    "decoder.layers.{n}.cross_att.self_attention.project_[kv]": "cross_projections.layers.{n}",
}
_BMINF1 = {
    "input_embedding": "embed_tokens",
    "output_embedding": "lm_head",
    "ln_{short}": "{stack}.norm",
    "{short}_layers.{n}.ln_attn": "{layer}.attention.norm",
    "{short}_layers.{n}.self_attn.project_[qkv]": "{layer}.attention.qkv",
    "{short}_layers.{n}.self_attn.linear_out": "{layer}.attention.out",
    "{short}_layers.{n}.ln_ff": "{layer}.norm",
    "{short}_layers.{n}.ff.linear_in": "{layer}.feed_forward.gate",
    "{short}_layers.{n}.ff.linear_gated": "{layer}.feed_forward.up",
    "{short}_layers.{n}.ff.linear_out": "{layer}.feed_forward.down",
    "dec_layers.{n}.ln_cross_attn": "{cross}.norm",
    "dec_layers.{n}.cross_attn.project_q": "{cross}.query",
    "dec_layers.{n}.cross_attn.linear_out": "{cross}.out",
    "dec_layers.{n}.cross_attn.project_[kv]": "cross_projections.layers.{n}",
}
_BIASES = {f"position_bias_{stack[:3]}": f"{stack}.position_bias" for stack in _STACKS}
_RULES = {
    "original": _rules(_ORIGINAL),
    "huggingface": _rules(_HUGGINGFACE),
    "modelcenter": [
        *_rules(_MODELCENTER),
        *(
            Rule(f"{n}.relative_attention_bias", f"{target}.weight")
            for n, target in _BIASES.items()
        ),
    ],
    "bminf1": [*_rules(_BMINF1), *rules_of(_BIASES, is_transposed=True)],
}


# ---- ranks ---------------------------------------------------------------------------------------

SPLITS = SplitTable(
    "the CPM family",
    {
        r"(.*\.)?word_embeds\.weight": ROWS,
        r"lm_head\.weight": ROWS,
        r"(.*\.)?(role|prompt)_embeds\.weight": REPLICATED,
        r".*\.final_layernorm\.weight": REPLICATED,
        r".*\.layer_norm\.weight": REPLICATED,
        r".*\.self_attn\.project\.weight": fused_rows(3),
        r".*\.(self|cross)_attn\.dense\.weight": COLUMNS,
        r".*\.self_attn\.relative_attention_bias\.weight": COLUMNS,
        r".*\.cross_attn\.project_q\.weight": ROWS,
        r".*\.cross_attn\.project_kv\.weight": fused_rows(2),
        r".*\.dense_relu_dense\.wi_[01]\.weight": ROWS,
        r".*\.dense_relu_dense\.wo\.weight": COLUMNS,
    },
    is_for=lambda names: True,  # what is of no other model
)
"""CPM-2 and EVA.   Source: change_mp.py of EVA."""


# ---- sizes ---------------------------------------------------------------------------------------


def t5_sizes(config: T5Config, given: Pass) -> Sizes:
    """Bytes of a pass, of a prompt and an answer of this length each."""
    ranks = given.num_ranks
    inner, wide = config.inner_size // ranks, config.intermediate_size // ranks
    bias = given.score_bytes(config.num_attention_heads // ranks)
    return Sizes(
        decoder_cache_bytes(config, given.batch_size, 2 * given.length + 1, given.dtype, ranks),
        layer_bytes(given, config.hidden_size, inner, wide, gated=wide),
        bias,
        2 * bias + BUCKET_BYTES * given.length**2,
        kept_quarters=6,
    )


# ---- what there is -------------------------------------------------------------------------------

PUBLISHED_CPM2 = {
    "CPM-2 (Chinese), CPM-2.1": T5Config(26240, 4096, 10240, 64, 64, 24, 24),
    "CPM-2 (Chinese and English)": T5Config(51968, 4096, 10240, 64, 64, 24, 24),
}
PUBLISHED_EVA = {
    "thu-coai/EVA1.0": T5Config(30000, 2048, 5120, 32, 64, 24, 24),
    "thu-coai/EVA2.0-xlarge": T5Config(30000, 2048, 5120, 32, 64, 24, 24, True),
    "thu-coai/EVA2.0-large": T5Config(30000, 1024, 4096, 16, 64, 24, 24, True),
    "thu-coai/EVA2.0-base": T5Config(30000, 768, 3072, 12, 64, 12, 12, True),
}

CPM2 = Architecture(
    name="cpm2",
    title="CPM-2",
    config_class=T5Config,
    build=T5,
    sizes=t5_sizes,
    parse=t5_config,
    matches=is_cpm2,
    rules=_RULES,
    raw_tensors=_raw_tensors,
    splits=SPLITS,
    uses={"encoder.layers": 1, "cross_projections.layers": 1},  # once a prompt
    num_extra_tokens=1,  # two begin an answer, and its last one is not fed
    published=PUBLISHED_CPM2,
    needed_fields="d_model, d_ff, d_kv, num_heads, num_layers, attn_scale",
    aliases={name: "CPM-2 (Chinese), CPM-2.1" for name in ("cpm2", "cpm21")},
    matches_config=lambda source: True,  # what is of no other model
)
EVA = replace(
    CPM2,
    name="eva",
    title="EVA",
    matches=is_eva,
    published=PUBLISHED_EVA,
    hub_ids=(
        "thu-coai/EVA1.0",
        "thu-coai/EVA2.0-base",
        "thu-coai/EVA2.0-large",
        "thu-coai/EVA2.0-xlarge",
    ),
    aliases={
        "eva": "thu-coai/EVA2.0-xlarge",
        "eva1": "thu-coai/EVA1.0",
        "eva2": "thu-coai/EVA2.0-xlarge",
    },
    model_type="eva",
    matches_config=lambda source: source.get("model_type") == "eva",
)
