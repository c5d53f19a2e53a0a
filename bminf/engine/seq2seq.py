"""The rows of encoder-decoder models of transformers: the passes of their decoders are shared as in
causal.py. A prompt is encoded by itself when its row begins; the keys and values that the decoder
makes of it, layer by layer in the row's first pass, lie in a pool of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from bminf.engine.causal import Attention, CausalRows, Kept, RowsPass
from bminf.engine.pool_rows import PromptedRow, PromptedRows, decoder_start, ids_of, last_tokens
from bminf.engine.request import Request
from bminf.engine.rows import Feed
from bminf.engine.token_pool import TokenPool
from bminf.layers.packed_cache import Span

MODEL_TYPES = ("bart", "blenderbot", "marian", "mbart", "mt5", "pegasus", "t5", "umt5")
"""Whose decoders count positions from the length of the cache, in one of the ways below."""


class Seq2SeqRows(PromptedRows, CausalRows):
    """num_tokens: of the decoder's pool, and of that of the prompts."""

    def __init__(self, model: Any, num_tokens: int, max_length: int | None = None) -> None:
        super().__init__(model, num_tokens, max_length)
        self._prompts = TokenPool(num_tokens, self._move_prompts)
        self._cross: Kept = {}
        self._states: Any = None  # of the encoder; only their width and type are looked at

    def start_ids(self, request: Request) -> Sequence[int]:
        return request.start_ids or [decoder_start(self._model)]

    def _move_prompts(self, start: int, target: int, count: int) -> None:
        for tensors in self._cross.values():
            for tensor in tensors:
                tensor[:, target : target + count] = tensor[:, start : start + count].clone()

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        device, ids = self.sampler_device(), ids_of(feeds, None)
        newcomers = [feed.row for feed in feeds if not feed.row.is_read]
        states = [self._encoded(row.request.input_ids) for row in newcomers]
        self._states = states[0][:, :1] if states else self._states
        own = _OwnPass(self._layers, spans, self._pool.num_tokens)
        reading = [_prompt_span(feed.row, len(feed.ids)) for feed in feeds]
        writing = [_prompt_span(row, len(row.request.input_ids)) for row in newcomers]
        cross = _CrossPass(self._cross, reading, self._prompts.num_tokens, writing)
        current = _Pass(own, cross, self._positions(spans), is_read=not newcomers)
        with self.attending(current):
            logits: torch.Tensor = self._model(
                encoder_outputs=BaseModelOutput(
                    last_hidden_state=torch.cat(states, dim=1) if states else self._states
                ),
                decoder_input_ids=torch.tensor([ids], device=device),
                decoder_attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                use_cache=True,
                **{self._cache_name: current},
            ).logits[0]
        for row in newcomers:
            row.is_read = True
        return logits[last_tokens(feeds, None)]

    def _encoded(self, ids: Sequence[int]) -> torch.Tensor:
        """(1, S, C)."""
        prompt = torch.tensor([list(ids)], device=self.sampler_device())
        output = self._model.get_encoder()(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), return_dict=True
        )
        states: torch.Tensor = output.last_hidden_state
        return states

    def _positions(self, spans: Sequence[Span]) -> torch.Tensor:
        """(T,) int64."""
        positions = [n for span in spans for n in range(span.length, span.num_keys)]
        return torch.tensor(positions, device=self.sampler_device())


def _prompt_span(row: PromptedRow, num_tokens: int) -> Span:
    """All of the prompt, seen from as many tokens."""
    return Span(row.prompt_cells.start, len(row.request.input_ids) - num_tokens, num_tokens)


class _OwnPass(RowsPass):
    """Of a decoder's attention to itself, whose bias, where it has one, is made for as many keys as
    the longest row has."""

    def __init__(self, layers: Kept, spans: Sequence[Span], num_tokens: int) -> None:
        super().__init__(layers, spans, num_tokens)
        self._num_keys = max(span.num_keys for span in spans)

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **more: Any
    ) -> Any:
        super().update(key_states, value_states, layer_idx)
        shape = (1, key_states.shape[1], self._num_keys, key_states.shape[3])
        longest = key_states.new_empty(()).expand(shape)
        return longest, longest


class _CrossPass(RowsPass):
    """Of its attention to the prompts.   writing: the rows whose prompts are read in this pass."""

    def __init__(
        self, layers: Kept, spans: Sequence[Span], num_tokens: int, writing: Sequence[Span]
    ) -> None:
        super().__init__(layers, spans, num_tokens)
        self._writing = writing
        self._made: dict[int, torch.Tensor] = {}  # by id, which is its own while it is here
        self.layers = _Layers()

    def __len__(self) -> int:
        return 0

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **more: Any
    ) -> Any:
        self.keep(layer_idx, key_states, value_states, self._writing)
        self._made[id(key_states)] = key_states
        return key_states, value_states

    def is_of(self, key: torch.Tensor) -> bool:
        """Whether a key that attention was given is one of a prompt."""
        return key is _NOTHING or id(key) in self._made


_NOTHING = torch.zeros(1, 1, 1, 1, device="cpu")
"""In the place of keys that lie in the pool."""


class _Layers:
    """All layers of a cache whose prompts were read before."""

    keys = values = _NOTHING

    def __getitem__(self, layer: int) -> _Layers:
        return self

    def __iter__(self) -> Iterator[_Layers]:
        return iter(())


class _Pass(EncoderDecoderCache):  # type: ignore[misc]
    """positions: (T,) of the tokens.   is_read: whether no prompt is to be read in this pass."""

    def __init__(
        self, own: _OwnPass, cross: _CrossPass, positions: torch.Tensor, is_read: bool
    ) -> None:
        super().__init__(own, cross)
        self._own, self._crossing = own, cross
        self.is_updated = _Always(is_read)
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """What a decoder adds to 0, 1, ... to get the positions of its tokens: BART's to a row of
        them, and T5's, whose layers ask each for themselves, to a column."""
        return self._offsets if layer_idx is None else self._offsets.unsqueeze(1)

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
        one: RowsPass = self._crossing if self._crossing.is_of(key) else self._own
        if one is self._crossing:
            more = {**more, "position_bias": None}  # it is all zeros
            return one.attend_to_all(original, module, query, more)
        return one.attend(original, is_eager, module, query, key, value, more)


class _Always(dict[int, bool]):
    """The same for every layer, whatever is set."""

    def __init__(self, value: bool) -> None:
        super().__init__()
        self._value = value

    def get(self, key: int, default: Any = None) -> bool:
        return self._value
