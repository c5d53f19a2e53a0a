"""The rows of models of transformers that cannot share a pass: each has a cache of its own, of the
kind that the model makes itself, and a pass of its own. They share the order of their turns only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from bminf.engine.pool_rows import PoolRow, PoolRows, decoder_start
from bminf.engine.request import Request
from bminf.engine.rows import Feed
from bminf.engine.scoring import Scoring
from bminf.layers.packed_cache import Span
from bminf.offload.context import text_config

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What models call the cache that they give back, and take: since transformers 5.24 nearly all the
first, and the others are not given beside it."""


@dataclass(eq=False)
class AloneRow(PoolRow):
    """ids: what its cache holds.   cache, encoded: made by the model.   is_cut_short: whether an
    error has left the cache in between.   logits: of the last pass, (1, V)."""

    ids: list[int] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    encoded: Any = None
    is_cut_short: bool = False
    logits: Any = None


class AloneRows(PoolRows):
    """num_tokens: of all rows together.   max_length: of a row; None is num_tokens."""

    can_chunk = can_resume = False  # the caches of some models hold no single tokens

    def __init__(self, model: Any, num_tokens: int, max_length: int | None = None) -> None:
        vocab_size = text_config(model.config).vocab_size
        super().__init__(model, vocab_size, num_tokens, max_length or num_tokens)
        self._has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
        parameters = inspect.signature(model.forward).parameters
        self._takes_rows = "logits_to_keep" in parameters
        self.can_score = not self._has_encoder

    def sampler_device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def move_tokens(self, start: int, target: int, count: int) -> None:
        pass  # the pool only counts

    def start_ids(self, request: Request) -> Sequence[int]:
        if request.start_ids is None and self._has_encoder:
            return [decoder_start(self._model)]
        return super().start_ids(request)

    def open(self, request: Request) -> Any:
        row = super().open(request)
        return None if row is None else AloneRow(request, row.cells)

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        is_fixed = num_tokens is not None
        return torch.cat([self._logits(feed, is_fixed) for feed in feeds])

    def _logits(self, feed: Feed, is_fixed: bool) -> torch.Tensor:
        """(1, V). Asked once more for the same pass, it is what was computed."""
        row: AloneRow = feed.row
        ids = feed.ids
        if len(row.ids) == row.length + len(ids):
            return row.logits  # type: ignore[no-any-return]
        if row.is_cut_short:  # the model has written to its cache: from the beginning
            row.cache, ids, row.ids = {}, [*row.ids, *ids], []
        row.is_cut_short = True
        scoring = Scoring(self._model, [feed], self._takes_rows, is_fixed)
        with _one_thread() if is_fixed else nullcontext():
            inputs = self._inputs(row, ids)
            with scoring:
                output = self._model(**inputs, use_cache=True, return_dict=True)
            if not self._has_encoder:
                scoring.give(inputs["input_ids"], output.logits[0])
        names = _CACHES[:1] if output.get(_CACHES[0]) is not None else _CACHES[1:]
        row.cache = {name: output[name] for name in names if output.get(name) is not None}
        row.logits = output.logits[:, -1]
        row.ids, row.is_cut_short = [*row.ids, *ids], False
        return row.logits  # type: ignore[no-any-return]

    def _inputs(self, row: AloneRow, ids: Sequence[int]) -> dict[str, Any]:
        tokens = self._tensor(ids)
        if not self._has_encoder:
            mask = tokens.new_ones(1, len(row.ids) + len(ids))
            more = {"logits_to_keep": 1} if self._takes_rows else {}
            return {"input_ids": tokens, "attention_mask": mask, **row.cache, **more}
        prompt = self._tensor(row.request.input_ids)
        mask = torch.ones_like(prompt)
        if row.encoded is None:
            encoder = self._model.get_encoder()
            row.encoded = encoder(input_ids=prompt, attention_mask=mask, return_dict=True)
        return {
            "decoder_input_ids": tokens,
            "encoder_outputs": row.encoded,
            "attention_mask": mask,
            **row.cache,
        }

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.sampler_device())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of a few rows, as a short prompt takes them, give other last bits with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
