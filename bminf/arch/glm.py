"""GLM: fills blanks in a text that it sees whole, writing each of them from left to right.

Two architectures share the idea, and little else:
  "glm-130b"  norms first, in DeepNorm's order; rotary positions; a gated feed-forward
  "glm-10b"   GPT-2's order; two learned positions, in the text and in the blank (110M to 10B)

The embedding is gathered on the host, and the output head, which has the same weights, is split
into parts that can be streamed like any other matrix.

Top to bottom: configuration, modules, names on disk, ranks, sizes, the models there are.

Sources: Du et al. 2022, arXiv:2103.10360; Zeng et al. 2022, arXiv:2210.02414. Of the names on disk:
GLM-130B, tools/convert_tp.py and quantization/layers.py; GLM, change_mp.py and
model/modeling_glm.py; SwissArmyTransformer, examples/glm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bminf.arch.architecture import Architecture, matrices_of
from bminf.arch.sizes import HIDDEN_BYTES, Pass, Sizes, layer_bytes
from bminf.checkpoint.config import ConfigReader, num_layers_of, rows_of
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.model_parallel import (
    COLUMNS,
    MEGATRON_LAYER,
    MEGATRON_WIDTHS,
    PER_RANK,
    REPLICATED,
    ROWS,
    SplitTable,
    fused_rows,
)
from bminf.checkpoint.names import MEGATRON_NAMES, rules_of
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import Stored
from bminf.checks import check_eps, check_sizes
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.attention import mask_to_bias, merge_heads, split_heads
from bminf.layers.embedding import HostEmbedding, embedded, embedding
from bminf.layers.feed_forward import FeedForward, HalvedFeedForward
from bminf.layers.kv_cache import KVCache, decoder_cache, decoder_cache_bytes
from bminf.layers.norm import LayerNorm
from bminf.layers.packed_cache import Cache
from bminf.layers.parallel import ALONE
from bminf.layers.rotary import Rotary
from bminf.layers.split_head import Head, split_head
from bminf.ops.rotary_append import Angles
from bminf.quantization import glm_rows
from bminf.quantization.packed import FORMATS, INT4, Format, PackedWeight
from bminf.quantization.packing import pack

# ---- configuration -------------------------------------------------------------------------------

GLMKind = Literal["glm-130b", "glm-10b"]
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class GLMConfig:
    """Sizes of a GLM.

    max_position_embeddings: of a "glm-10b", each of its two tables has one row more.
    rotary_precision: of a "glm-130b", "float16" or "float32" (see layers/rotary.py).
    num_head_parts: matrices that the output head is split into.   Raises ArgumentError.
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
        # Rotary positions rotate columns in pairs.
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


_GLM_HEADS = {
    "glm-130b": {12288: 96},
    "glm-10b": {4096: 64, 2048: 32, 1152: 18, 1024: 16, 768: 12},
}
"""Hidden size -> heads of the published models: all that their shapes do not tell."""


def glm130b_config(
    source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> GLMConfig:
    """The GLMConfig that `source` describes; see Architecture.parse.

    What it does not say the shapes do.
    """
    reader = ConfigReader(_inner(source), where)
    reader.must_be("layernorm_order", None, "post")
    reader.must_be("rotary_base", None, 10000)
    config = reader.native(GLMConfig) or _glm_config(reader, "glm-130b", tensors)
    alpha = reader.source.get("deepnorm_alpha", config.residual_scale)
    if not isinstance(alpha, int | float) or abs(alpha - config.residual_scale) > 1e-3:
        raise CheckpointError(
            f"{where}: deepnorm_alpha is {alpha!r}; with {config.num_hidden_layers} layers it is "
            f"{config.residual_scale}"
        )
    return config


def glm10b_config(
    source: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> GLMConfig:
    """As glm130b_config, for GLM with 110 million to 10 billion parameters."""
    reader = ConfigReader(_inner(source), where)
    # Each of these would compute something that this does not.
    reader.must_be("block_position_encoding", None, True)
    reader.must_be("attention_scale", None, 1.0)
    reader.must_be("layernorm", None, "pre")
    reader.must_be("activation", None, "gelu_tanh")
    return reader.native(GLMConfig) or _glm_config(reader, "glm-10b", tensors)


def _inner(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration may stand beside that of the tokenizer."""
    inner = source.get("model")
    return inner if isinstance(inner, Mapping) else source


def _glm_config(
    reader: ConfigReader, architecture: GLMKind, tensors: Mapping[str, Stored]
) -> GLMConfig:
    hidden_size = reader.optional("hidden_size") or rows_of(tensors, "norm.weight", 1)
    num_heads = reader.optional("num_attention_heads") or _GLM_HEADS[architecture].get(hidden_size)
    if num_heads is None:
        raise CheckpointError(
            f"{reader.where} does not say num_attention_heads, and hidden_size={hidden_size} is of "
            "no published GLM; give config=..., a path or a mapping with num_attention_heads"
        )
    positions = reader.optional("max_position_embeddings", "max_sequence_length") or 2048
    if "embed_positions.weight" in tensors:
        positions = tensors["embed_positions.weight"].shape[0] - 1
    wide = tensors.get("layers.0.feed_forward.down.weight")
    return reader.made(
        GLMConfig,
        architecture=architecture,
        vocab_size=rows_of(tensors, "embed_tokens.weight", 1),
        hidden_size=hidden_size,
        num_hidden_layers=reader.optional("num_hidden_layers", "num_layers")
        or max(1, num_layers_of(tensors, "layers")),
        num_attention_heads=num_heads,
        intermediate_size=reader.optional("intermediate_size", "inner_hidden_size")
        or (4 * hidden_size if wide is None else wide.shape[1]),
        max_position_embeddings=positions,
        layer_norm_eps=reader.number(
            1e-5, "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"
        ),
        rotary_precision=reader.source.get("rotary_precision", "float16"),
    )


# ---- modules -------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Self-attention; its norm is called by the layer."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.is_by_head, self.head_dim = config.is_rotary, config.head_dim

    def forward(
        self,
        normed: torch.Tensor,
        bias: Any,
        angles: Angles | None,
        layer: int,
        cache: Cache,
    ) -> torch.Tensor:
        parts: Any = self._modules  # Module.__getattr__ takes as long as a small operation
        query, key, value = self._heads(parts["qkv"](normed))
        # GLM-130B's own code divides queries by the layer's index and multiplies scores by
        # it in float32, against overflow: here scores are sums in float32 from the start.
        y = cache.attend(layer, query, key, value, bias, self.head_dim**-0.5, angles)
        return parts["out"](merge_heads(y))

    def _heads(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """(B, T, 3 C) -> queries, keys and values, (B, H, T, D) each."""
        if not self.is_by_head:
            return split_heads(x, 3, self.head_dim)
        by_head = x.view(*x.shape[:2], -1, 3 * self.head_dim).transpose(1, 2)  # q, k, v of a head
        return by_head.chunk(3, dim=-1)


class Layer(torch.nn.Module):
    """In DeepNorm's order what a part's output is added to is its normalized input, enlarged.

    Source: Wang et al. 2022, arXiv:2203.00555.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.feed_forward: torch.nn.Module = (
            HalvedFeedForward(size, wide)
            if config.is_rotary
            else FeedForward(size, wide, "gelu_tanh")
        )
        self.is_deep = config.is_rotary
        self.scale = config.residual_scale if self.is_deep else 1.0

    def forward(
        self,
        x: torch.Tensor,
        bias: Any,
        angles: Angles | None,
        layer: int,
        cache: Cache,
    ) -> torch.Tensor:
        parts: Any = self._modules
        attention = parts["attention"]
        normed = attention.norm(x)
        y = attention(normed, bias, angles, layer, cache)
        x, normed = parts["norm"].add(normed if self.is_deep else x, y, self.scale)
        y = parts["feed_forward"](normed)
        return (normed * self.scale if self.is_deep else x) + y


def mask_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """(B, T, S) bool -> (B, 1, T, S)."""
    return None if mask is None else mask_to_bias(mask.unsqueeze(1), dtype)


class GLM(torch.nn.Module):
    """Reads a text with blanks, then goes on token after token; the past is in a cache."""

    group = ALONE

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
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = Head(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        attention_mask: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """The hidden states of some more tokens, which the cache grows by.

        input_ids: (B, T) int64, or the embeddings of these, (B, T, C).   position_ids: (B, T)
        int64, of a "glm-10b" (B, 2, T): in the text, and in the blank.   attention_mask: (1 or B,
        T, S) bool, true where a token does not attend to one of the S that are in the cache then;
        None masks nothing. With a PackedCache B is 1, and the mask a list: (1, T, S) of each row,
        or None.
        Returns (B, T, C), after the last norm.
        """
        x = embedded(self.embed_tokens, input_ids)
        angles: Angles | None = None
        if self.config.is_rotary:
            angles = self.rotary(position_ids)
        else:
            x = x + self.embed_positions(position_ids[:, 0])
            x = x + self.embed_block_positions(position_ids[:, 1])
        if isinstance(attention_mask, Sequence):
            bias: Any = [mask_bias(mask, x.dtype) for mask in attention_mask]
        else:
            bias = mask_bias(attention_mask, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, angles, index, cache)
        cache.advance(input_ids.shape[1])
        return self.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V) float32."""
        return self.group.gather(self.lm_head(x))

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the last norm."""
        like = self.norm.weight
        return decoder_cache(self.config, batch_size, max_length, like, self.group.size)


# ---- names on disk -------------------------------------------------------------------------------

_SCALE = "_scale"  # behind the name of a quantized weight
_QKV = re.compile(r"(transformer\.layers\.\d+)\.attention\.query_key_value\.weight")


def is_quantized(tensors: Mapping[str, Stored]) -> bool:
    """Whether there are codes and scales among the tensors, which have the original names."""
    return any(n.endswith(_SCALE) or not t.dtype.is_floating_point for n, t in tensors.items())


_GLM130B_RULES = {
    "original": [
        *rules_of({"transformer.word_embeddings": "embed_tokens"}),
        *rules_of(MEGATRON_NAMES, has_bias=True),
    ]
}


def _with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Each matrix of codes together with its scales, as one."""
    bits = _bits(tensors)
    joined: dict[str, Stored] = {}
    for name, stored in tensors.items():
        scale = tensors.get(name + _SCALE)
        if scale is not None:
            joined[name] = Quantized(stored, scale, bits, torch.float16)
        elif name.removesuffix(_SCALE) not in tensors or not name.endswith(_SCALE):
            joined[name] = stored
    return joined


def _bits(tensors: Mapping[str, Stored]) -> int:
    """Of the codes, which nothing but their shapes tells: 8 where there are none."""
    found: dict[int, Stored] = {}
    for name, stored in tensors.items():
        match = _QKV.fullmatch(name)
        if match and name + _SCALE in tensors:
            found[_bits_of(stored, tensors.get(f"{match[1]}.input_layernorm.weight"))] = stored
    if len(found) > 1:
        one, other = found.values()
        raise CheckpointError(
            f"{one.where} and {other.where} are of {' and '.join(map(str, found))} bits; "
            "the files are not of one checkpoint"
        )
    return next(iter(found), 8)


def _bits_of(codes: Stored, norm: Stored | None) -> int:
    width = norm.shape[0] if norm is not None and len(norm.shape) == 1 else None
    columns = codes.shape[1] if len(codes.shape) == 2 else None
    if width is not None and columns is not None:
        if columns == width:
            return 8
        if 2 * columns == width:
            return 4
    raise CheckpointError(
        f"{codes.where} has shape {codes.shape} beside a LayerNorm of "
        f"{'no known width' if width is None else width}; codes of 8 bits are as many columns, "
        "of 4 bits half as many: this is damaged, or of another model"
    )


_GLM10B = {
    "word_embeddings": "embed_tokens",
    "transformer.position_embeddings": "embed_positions",
    "transformer.block_position_embeddings": "embed_block_positions",
}
"""Inside the model, where its own code and Hugging Face's share the names."""
_GLM10B_ADDED = {
    "transformer.word_embeddings": "embed_tokens",
    "mixins.block_position_embedding.block_position_embeddings": "embed_block_positions",
}
"""SwissArmyTransformer's, where the second table is an addition to its base model."""
_GLM10B_RULES = {
    "original": [
        *rules_of(_GLM10B),
        *rules_of(MEGATRON_NAMES, has_bias=True),
        *rules_of(_GLM10B_ADDED),
    ],
    "huggingface": [
        replace(rule, source_name=f"{prefix}{rule.source_name}")
        for prefix in ("", "glm.")  # of the classes around the model
        for rule in (*rules_of(_GLM10B), *rules_of(MEGATRON_NAMES, has_bias=True))
    ],
}


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
        r".*\.attention\.dense\.weight_scale": PER_RANK,
        r".*\.attention\.dense\.bias": REPLICATED,
        # What is gated, and below it the gate.
        r".*\.mlp\.dense_h_to_4h\.(weight|weight_scale|bias)": fused_rows(2),
        r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
        r".*\.mlp\.dense_4h_to_h\.weight_scale": PER_RANK,
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


# ---- sizes ---------------------------------------------------------------------------------------


def glm_sizes(config: GLMConfig, given: Pass) -> Sizes:
    """Bytes of a pass."""
    size, ranks = config.hidden_size, given.num_ranks
    inner, wide = size // ranks, config.intermediate_size // ranks
    bias = given.score_bytes()
    cells = given.batch_size * given.length**2
    return Sizes(
        decoder_cache_bytes(config, given.batch_size, given.length, given.dtype, ranks),
        _rotary_bytes(config, given) if config.is_rotary else layer_bytes(given, size, inner, wide),
        bias,
        bias + HIDDEN_BYTES * cells,  # positions are in no bias
    )


def _rotary_bytes(config: GLMConfig, given: Pass) -> int:
    """The widest moment of a layer of a "glm-130b", but for its bias."""
    size, ranks = config.hidden_size, given.num_ranks
    inner, wide = size // ranks, config.intermediate_size // ranks
    # The layer's own input too: its caller holds it until there is an output.
    return given.activation_bytes(size, size, size) + max(
        given.linear_bytes(size, 2 * wide),
        # Rotated queries and keys; both halves of the gate's product, and what it makes.
        given.activation_bytes(max((3 + 2 + 2) * inner, (2 + 1 + 1) * wide)),
        given.activation_bytes(3 * wide) + given.linear_bytes(wide, size),
    )


# ---- what there is -------------------------------------------------------------------------------

PUBLISHED_GLM = {
    "GLM-130B": GLMConfig("glm-130b", 150528, 12288, 70, 96, 32768, 2048),
    "GLM-10B": GLMConfig("glm-10b", 50304, 4096, 48, 64, 16384, 1024),
    "GLM-10B-chinese": GLMConfig("glm-10b", 50048, 4096, 48, 64, 16384, 1024),
    "GLM-2B": GLMConfig("glm-10b", 50304, 2048, 36, 32, 8192, 1024),
}
"""Sizes: the papers, and the files that were published."""

INT4_ROW = Format(4)
GLM_FORMATS = {**FORMATS, "int4-row": INT4_ROW}
"""By the names that users give; the last one is that of GLM-130B's authors."""


def _pack(weight: torch.Tensor, weight_format: Format) -> PackedWeight:
    """Four bits and a scale a row as GLM-130B's own code packs them; all else as everywhere."""
    is_row = weight_format == INT4_ROW
    return glm_rows.pack_rows(weight, 4) if is_row else pack(weight, weight_format)


def _is_glm10b(checkpoint: Checkpoint) -> bool:
    """With any prefix: classes around the model put one before its names."""
    return any(name.endswith("block_position_embeddings.weight") for name in checkpoint.tensors)


def _vocabulary_name(path: Path) -> str:
    """Of the Chinese tokenizer, or of the two files of the English one."""
    if path.suffix == ".model":
        return "cog-pretrain.model"
    return "vocab.json" if path.suffix == ".json" else "merges.txt"


def _tokenizer_settings(config: GLMConfig) -> Mapping[str, Any] | None:
    """GLM-large-chinese has masks of other ids than GLM-10B-chinese, the only other model with its
    vocabulary."""
    is_large_chinese = (config.vocab_size, config.hidden_size) == (50048, 1024)
    return {"fixed_commands": True} if is_large_chinese else None


GLM130B = Architecture(
    name="glm130b",
    title="GLM-130B",
    config_class=GLMConfig,
    build=GLM,
    sizes=glm_sizes,
    parse=glm130b_config,
    matches=lambda checkpoint: is_glm130b(checkpoint.tensors.keys()),
    rules=_GLM130B_RULES,
    raw_tensors=lambda checkpoint: _with_scales(checkpoint.tensors),
    splits=SPLITS_OF_GLM130B,
    blocks=matrices_of,
    published={"GLM-130B": PUBLISHED_GLM["GLM-130B"], "THUDM/GLM-130B": PUBLISHED_GLM["GLM-130B"]},
    is_implied_by_shapes=True,
    has_generic_names=True,
    formats=GLM_FORMATS,
    default_format=INT4,
    pack=_pack,
    split_head=split_head,
    is_config_of=lambda config: config.is_rotary,
    vocabulary_name=lambda path: "ice_text.model",
    has_padded_vocabulary=True,
)
_SMALL = {name: sizes for name, sizes in PUBLISHED_GLM.items() if not sizes.is_rotary}
GLM10B = replace(
    GLM130B,
    name="glm10b",
    title="GLM-10B",
    parse=glm10b_config,
    matches=_is_glm10b,
    rules=_GLM10B_RULES,
    raw_tensors=lambda checkpoint: checkpoint.tensors,
    splits=SPLITS_OF_GLM10B,
    published={**_SMALL, **{f"THUDM/{name}": sizes for name, sizes in _SMALL.items()}},
    hub_ids=("THUDM/glm-10b", "THUDM/glm-2b", "THUDM/glm-10b-chinese"),
    model_type="glm",
    is_config_of=lambda config: not config.is_rotary,
    has_generic_names=False,
    matches_config=lambda source: "block_position_encoding" in source,
    vocabulary_name=_vocabulary_name,
    tokenizer_settings=_tokenizer_settings,
)
