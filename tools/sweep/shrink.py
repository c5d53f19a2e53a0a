"""A configuration of published size made small, with the relations between its numbers kept.

All widths are divided by one number, so that what was a multiple, a sum or a product of others
still is. Either the numbers of heads stay and heads get narrower, or heads keep their width and
get fewer. Layers are cut to a few.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LAYERS = 6
VOCABULARY = 512

_LAYERS = re.compile(
    r"(^|_)(n|num)_.*layers?$|^n_layers?$|_layers$|^layers$|^depth$|_depth$|^depths$|num_blocks$"
    r"|layers_per_block|^num_stages_layers$"
)
# No more of these than this; the first that fits.
_MOST = {
    re.compile(r"vocab"): VOCABULARY,
    re.compile(r"num_.*experts$|n_routed_experts$|^n_experts$"): 8,
    re.compile(r"^n_group$|^num_expert_groups$"): 2,
    re.compile(r"^topk_group$"): 1,
    re.compile(r"experts_per_tok|moe_(top)?k$|top_k_experts"): 2,
    re.compile(r"max_.*positions?(_embeddings)?$|^n_positions$|^n_ctx$|max_seq_len"): 512,
}
_WIDTH = re.compile(
    r"hidden|embed|embd|d_model|dim|width|channel|intermediate|ffn|d_ff|d_inner|inner|rank|proj"
    r"|feed_?forward|d_kv|head_size|filters|units|lru|bottleneck|mlp_size|d_embed|d_head"
)
_NO_WIDTH = re.compile(
    r"num_|^n_|heads$|layer|token|_id$|position|ratio|prob|drop|max_|min_|type|act|std|scale"
    r"|image_size|in_channels|in_chans|kernel|stride|eps|groups|temporal|spatial|stem_hidden_layers"
    r"|input_channels|mask|norm|init|factor"
)
_HEADS = re.compile(r"heads$|^n_head$|_head$|^num_head$")
_HEAD_WIDTH = re.compile(r"head_(dim|size)|_head_dim|^d_kv$|rope_.*dim|rotary_dim|d_head")
_SPECIAL = re.compile(r"token|_ids?$|_index$")
_INDICES = re.compile(r"indices|indexes|layer_ids|_layers$|feature_layer|select_layer|_layer_idx")
_DROPPED = ("stage_names", "out_features", "_out_features", "transformers_version")


@dataclass
class Shrinker:
    """factor: what widths are divided by. fewer_heads: so are numbers of heads, not their width.

    layers: the most that are left. special: old token id -> new one, in order of sight.
    """

    factor: int
    fewer_heads: bool = False
    layers: int = LAYERS
    special: dict[int, int] = field(default_factory=dict)

    @classmethod
    def all_for(cls, values: Mapping[str, Any]) -> list[Shrinker]:
        """The likeliest to work first; the last only cuts layers, vocabulary and the like."""
        widest = max((v for k, v in _numbers(values) if _is_width(k)), default=0)
        factor = 8 if widest < 6500 else 16 if widest < 16_000 else 32
        whole = [cls(1)] if widest <= 2048 else []
        return [cls(factor), cls(factor, fewer_heads=True), *whole]

    def shrink(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of one configuration, those of the configurations in it included."""
        layers = {v for k, v in values.items() if _LAYERS.search(k) and _is_number(v)}
        kept = {k: v for k, v in values.items() if k not in _DROPPED}
        return {key: self._value(key, value, layers) for key, value in kept.items()}

    def _value(self, key: str, value: Any, layers: set[int]) -> Any:
        if key == "pad_token_id" and value is None:
            return 0  # classifiers of sequences need one for a batch
        if isinstance(value, Mapping):
            if value and all(str(k).isdigit() for k in value):  # by layer
                return {k: v for k, v in value.items() if int(k) < self.layers}
            return self.shrink(value) if all(isinstance(k, str) for k in value) else value
        if isinstance(value, list | tuple):
            return type(value)(self._items(key, list(value), layers))
        return self._number(key, value) if _is_number(value) else value

    def _items(self, key: str, items: list[Any], layers: set[int]) -> list[Any]:
        if len(items) in layers and len(items) > self.layers:
            items = items[: self.layers]
        if key == "mrope_section":
            return self._sections(items)
        if _INDICES.search(key) and all(map(_is_number, items)) and layers:
            return _indices(items, max(layers), self.layers)
        if _is_width(key) and not all(self._divides(v) for v in items if _is_number(v)):
            return items
        if any(isinstance(item, list | tuple | Mapping) for item in items):
            return [self._value(key, item, layers) for item in items]
        return [self._number(key, item) if _is_number(item) else item for item in items]

    def _number(self, key: str, value: int) -> int:
        if _SPECIAL.search(key) and "num" not in key:
            return self._token(value)
        for pattern, most in (_MOST | {_LAYERS: self.layers}).items():
            if pattern.search(key):
                return min(value, most)
        if "groups" in key and value == 32:
            return 4  # of channels, for their normalisation
        if self.fewer_heads and (_HEADS.search(key) or _HEAD_WIDTH.search(key)):
            return max(1, value // self.factor) if _HEADS.search(key) else value
        return value // self.factor if _is_width(key) and self._divides(value) else value

    def _divides(self, width: int) -> bool:
        return width >= 2 * self.factor and width % self.factor == 0

    def _token(self, old: int) -> int:
        if old < VOCABULARY - 64:
            return old
        return self.special.setdefault(old, VOCABULARY - 1 - len(self.special))

    def _sections(self, sections: list[int]) -> list[int]:
        """Their sum is half a head's width."""
        if self.fewer_heads:
            return sections
        small = [section // self.factor for section in sections]
        return [small[0] + sum(sections) // self.factor - sum(small), *small[1:]]


def _indices(items: list[int], layers: int, most: int) -> list[int]:
    if layers <= most or not items or max(items) > layers:
        return items
    small = [item * most // layers if item >= 0 else max(item, -most) for item in items]
    is_distinct = len(set(small)) == len(small)
    return small if is_distinct else list(range(most + 1 - len(items), most + 1))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            yield from _numbers(value)
        elif _is_number(value):
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_width(key: str) -> bool:
    return bool(_WIDTH.search(key)) and not _NO_WIDTH.search(key)
