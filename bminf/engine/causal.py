"""The rows of causal models of transformers, wrapped or not.

The tokens of all rows are given to the model as one text (1, T), with the positions of each in its
own row. A cache of ours keeps keys and values in a pool, and while the model runs its attention is
one of ours, which calls the model's own function for each row over the keys of that row: scores
that are capped, sinks and windows stay the model's.

It needs a model whose attention is such a function, and whose layers are of full or of sliding
attention; see `why_alone`. What is not, alone.py decodes row by row.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from bminf.engine.pool_rows import PoolRows, ids_of, last_tokens
from bminf.engine.rows import Feed
from bminf.engine.scoring import Scoring
from bminf.layers.packed_cache import Span, copied, slices
from bminf.offload.context import first_of, layer_kinds, num_layers, text_config

_KINDS = ("sdpa", "eager")
"""Attention functions of models that a function of ours can stand for."""

_BATCHED_LAYERS = {"full_attention", "sliding_attention"}
_ROPE_OF_LENGTH = ("dynamic", "longrope")  # whose angles depend on the longest text in a pass


def why_alone(model: Any) -> str | None:
    """Why the rows of `model` cannot share its passes; None where they can."""
    text = text_config(model.config)
    kinds = set(layer_kinds(text, num_layers(model.config) or num_layers(text) or 0))
    ropes = {str(getattr(module, "rope_type", None)) for module in model.modules()}
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    if model.config._attn_implementation not in _KINDS:
        return f"its attention is {model.config._attn_implementation!r}"
    if kinds - _BATCHED_LAYERS:
        return f"it has layers of {', '.join(sorted(kinds - _BATCHED_LAYERS))}"
    if first_of(text, "num_kv_shared_layers", "index_topk", "kv_sharing_modes"):
        return "its layers share keys and values, or choose among them"
    if any(word in rope for rope in ropes for word in _ROPE_OF_LENGTH):
        return "its positions depend on the longest text"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids"
    if "sliding_attention" in kinds and not _windows_are_handed_on(model):
        return "its windows are known to its masks only"
    return None


def _windows_are_handed_on(model: Any) -> bool:
    classes = {type(module) for module in model.modules() if hasattr(module, "layer_idx")}
    sources = [_source_of(one.forward) for one in classes]
    asking = [source for source in sources if "ALL_ATTENTION_FUNCTIONS" in source]
    return bool(asking) and all("sliding_window=" in source for source in asking)


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


class CausalRows(PoolRows):
    """num_tokens: of the pool.   max_length: the most tokens of a row; None is all of the pool."""

    def __init__(self, model: Any, num_tokens: int, max_length: int | None = None) -> None:
        text = text_config(model.config)
        super().__init__(model, text.vocab_size, num_tokens, max_length or num_tokens)
        self._layers: Kept = {}
        self._gathers = first_of(text, "kv_lora_rank") is not None
        self._configs = _configs_of(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_rows = "logits_to_keep" in parameters
        # transformers 5.24 has renamed it, and warns of the other name.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        _register()

    def sampler_device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def move_tokens(self, start: int, target: int, count: int) -> None:
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[:, target : target + count] = tensor[:, start : start + count].clone()

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        device, ids = self.sampler_device(), ids_of(feeds, num_tokens)
        positions = [n for span in spans for n in range(span.length, span.num_keys)]
        positions += [0] * (len(ids) - len(positions))
        # One where none is wanted: of a vocabulary, logits of all tokens would be many.
        wanted, is_alone = last_tokens(feeds, num_tokens) or [0], len(feeds) == 1
        keep: Any = torch.tensor(wanted, device=device)
        if is_alone and num_tokens is None:
            keep = 1  # as generate() has it
        is_fixed = num_tokens is not None
        current = RowsPass(self._layers, spans, self._pool.num_tokens, self._gathers, is_fixed)
        given = torch.tensor([ids], device=device)
        scoring = Scoring(self._model, feeds, self._takes_rows, is_fixed)
        with self.attending(current), scoring:
            logits: torch.Tensor = self._model(
                input_ids=given,
                position_ids=torch.tensor([positions], device=device),
                use_cache=True,
                **{self._cache_name: current},
                **({"logits_to_keep": keep} if self._takes_rows else {}),
            ).logits[0]
        scoring.give(given, logits)
        num_wanted = sum(feed.has_logits for feed in feeds)
        return logits[:num_wanted] if self._takes_rows else logits[wanted[:num_wanted]]

    @contextmanager
    def attending(self, current: RowsPass) -> Iterator[None]:
        """Within it the model's attention is that of `current`, in this thread."""
        before = [config._attn_implementation_internal for config in self._configs]
        try:
            _active.current = current
            for config, kind in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = _name(kind) if kind in _KINDS else kind
            yield
        finally:
            _active.current = None
            for config, kind in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = kind


def _configs_of(model: Any) -> list[Any]:
    """Those that its modules ask for the attention to use."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = {id(one): one for one in configs if hasattr(one, "_attn_implementation_internal")}
    return list(found.values())


# ---- a pass --------------------------------------------------------------------------------------

Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> its keys and values, (H, N, D) each, made when the layer first asks for them."""

Attention = Callable[..., tuple[torch.Tensor, Any]]
"""Of transformers: (module, query, key, value, attention_mask, **more) -> (1, T, H, D), weights."""


class RowsPass(Cache):  # type: ignore[misc]
    """The cache of one pass.

    gathers: whether what is kept becomes keys and values only when it is read (latent attention).
    copies: see PackedCache.
    """

    def __init__(
        self,
        layers: Kept,
        spans: Sequence[Span],
        num_tokens: int,
        gathers: bool = False,
        copies: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self._kept, self._spans = layers, spans
        self._num_tokens, self._gathers, self._copies = num_tokens, gathers, copies

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, (1, H, T, D) each. What is returned is read by attend() alone, or, if
        it is gathered, by the model."""
        self.keep(layer_idx, key_states, value_states, self._spans)
        if not self._gathers:
            return key_states, value_states
        keys, values = self._kept[layer_idx]
        return self._gathered(keys), self._gathered(values)

    def keep(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span]
    ) -> None:
        """(1, H, T, D) each, of these rows."""
        if layer not in self._kept:
            with torch.inference_mode(False):
                self._kept[layer] = self._room_for(key), self._room_for(value)
        for kept, new in zip(self._kept[layer], (key, value), strict=True):
            for span, ours in slices(spans):
                kept[:, span.end - span.num_tokens : span.end] = new[0, :, ours]

    def _room_for(self, new: torch.Tensor) -> torch.Tensor:
        shape = (new.shape[1], self._num_tokens, new.shape[3])
        return torch.zeros(shape, dtype=new.dtype, device=new.device)

    def _gathered(self, kept: torch.Tensor) -> torch.Tensor:
        """All keys of all rows, one row behind another."""
        rows = [kept[:, span.start : span.start + span.num_keys] for span in self._spans]
        return torch.cat(rows, dim=1).unsqueeze(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0  # of a mask that is not made

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def attend(
        self,
        original: Attention,
        is_eager: bool,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        more: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        """(1, T, H, D): the model's own attention, of each row to its keys."""
        outputs, end = [], 0
        for span, ours in slices(self._spans):
            start, end = end, end + span.num_keys
            if self._gathers:
                keys, values = key[:, :, start:end], value[:, :, start:end]
            else:
                keys, values = self._of_row(module.layer_idx, span)
            own, window = query[:, :, ours], more.get("sliding_window")
            if window is not None and span.num_tokens == 1:
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            if self._copies:
                own, keys, values = copied(own), copied(keys), copied(values)
            mask = _mask(span, window, is_eager, query)
            if (bias := more.get("position_bias")) is not None:
                given = {**more, "position_bias": bias[:, :, ours, : span.num_keys]}
            else:
                given = more
            with self._operators():
                outputs.append(original(module, own, keys, values, mask, **given)[0])
        missing = query.shape[2] - sum(span.num_tokens for span in self._spans)
        if missing:
            outputs.append(outputs[0].new_zeros(1, missing, *outputs[0].shape[2:]))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None

    def attend_to_all(
        self, original: Attention, module: Any, query: torch.Tensor, more: dict[str, Any]
    ) -> tuple[torch.Tensor, None]:
        """The same, of each token to all keys of its row, of which it adds none."""
        outputs = [
            original(module, query[:, :, ours], *self._of_row(module.layer_idx, span), None, **more)
            for span, ours in slices(self._spans)
        ]
        return torch.cat([output for output, _ in outputs], dim=1), None

    def _of_row(self, layer: int, span: Span) -> list[torch.Tensor]:
        """Keys and values of a row, (1, H, S, D) each."""
        return [kept[None, :, span.start : span.end] for kept in self._kept[layer]]

    def _operators(self) -> AbstractContextManager[Any]:
        """Of torch, that attention may use; see attention_in_products()."""
        return sdpa_kernel(SDPBackend.MATH) if self._copies else nullcontext()


def _mask(
    span: Span, window: int | None, is_eager: bool, query: torch.Tensor
) -> torch.Tensor | None:
    """(1, 1, T, S) as the attention of transformers takes it; None where it does without."""
    is_short = window is None or span.num_keys <= window
    if span.num_tokens == 1 or (span.length == 0 and is_short and not is_eager):
        return None
    keys = torch.arange(span.num_keys, device=query.device)
    queries = keys[span.length :].unsqueeze(1)
    is_seen = keys <= queries
    if window is not None:
        is_seen = is_seen & (keys > queries - window)
    if not is_eager:
        return is_seen[None, None]
    bias = torch.zeros(is_seen.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~is_seen, torch.finfo(query.dtype).min)[None, None]


# ---- the functions that transformers finds by their names ----------------------------------------


class _Active(threading.local):
    """The pass that this thread runs."""

    current: RowsPass | None = None


_active = _Active()


def _name(kind: str) -> str:
    return f"bminf_{kind}"


def _register() -> None:
    """In other threads, and after a pass, each is what it stands for."""
    for kind in _KINDS:
        AttentionInterface.register(_name(kind), _attention(kind))
        AttentionMaskInterface.register(_name(kind), _mask_function(kind))


def _attention(kind: str) -> Attention:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, Any]:
        original = _original(kind, module)
        current = _active.current
        if current is None:
            return original(module, query, key, value, attention_mask, **more)
        return current.attend(original, kind == "eager", module, query, key, value, more)

    return attend


def _original(kind: str, module: Any) -> Attention:
    """The eager one is a function beside the class of the attention."""
    if kind != "eager":
        found: Attention = AttentionInterface()[kind]
        return found
    own: Attention = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return own


def _mask_function(kind: str) -> Callable[..., Any]:
    def mask(*arguments: Any, **more: Any) -> Any:
        if _active.current is not None:
            return None
        return AttentionMaskInterface()[kind](*arguments, **more)

    return mask
