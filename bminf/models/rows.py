"""The rows of the models of the zoo: how an engine decodes several requests with one together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bminf.arch.t5 import T5, PackedT5Cache, T5Cache
from bminf.cuda.launcher import fused_kernels
from bminf.engine.pool_rows import PoolRows, PromptedRow, PromptedRows, ids_of, last_tokens
from bminf.engine.request import Request
from bminf.engine.rows import Feed, fixed_length
from bminf.engine.scoring import give_scores
from bminf.engine.token_pool import Range, TokenPool
from bminf.layers.kv_cache import KVCache
from bminf.layers.packed_cache import PackedCache, Segments, Span
from bminf.layers.step_cache import Places, StepCache
from bminf.models.decode_step import DecodeSteps, Step
from bminf.models.leading import Leading


@dataclass(frozen=True)
class ToldRequest:
    """What a pass reads of a request."""

    input_ids: Sequence[int] = ()
    prompt: Any = None


@dataclass
class ToldRow:
    """A row of rank 0, as far as a pass of another rank needs to know it.

    prompt_cells, is_read: of a PromptedRow.
    """

    length: int
    request: ToldRequest = ToldRequest()
    prompt_cells: Range = field(default_factory=lambda: Range(0, 0))
    is_read: bool = True


class DecoderRows(PoolRows):
    """Rows of a decoder-only network, which is called with ids (1, T) and a PackedCache.

    max_length: the most tokens of a row.   begin: called when a request gets its row.
    uses_fused_kernels: see LanguageModel.
    """

    def __init__(
        self,
        network: Any,
        cache: KVCache,
        max_length: int,
        begin: Callable[[], object] = lambda: None,
        uses_fused_kernels: bool = True,
    ) -> None:
        num_tokens = cache.tokens[0].shape[2]
        super().__init__(network, network.config.vocab_size, num_tokens, max_length)
        self.network, self._cache, self._begin = network, cache, begin
        self.steps: DecodeSteps | None = None
        """Computes passes of one token of each row; None computes them as all others."""
        self._uses_fused_kernels = uses_fused_kernels

    def sampler_device(self) -> torch.device:
        return self._cache.keys.device

    def move_tokens(self, start: int, target: int, count: int) -> None:
        self._cache.move_tokens(start, target, count)

    def open(self, request: Request) -> Any:
        row = super().open(request)
        if row is not None:
            self._begin()
        return row

    def forward(self, feeds: Sequence[Feed], num_tokens: int | None = None) -> torch.Tensor:
        if self._uses_fused_kernels:
            return super().forward(feeds, num_tokens)
        with fused_kernels(False):
            return super().forward(feeds, num_tokens)

    def compute(
        self, feeds: Sequence[Feed], spans: Sequence[Span], num_tokens: int | None
    ) -> torch.Tensor:
        steps = self.steps if num_tokens is None else None
        if steps is not None and len(feeds) <= steps.max_rows and self.can_step(feeds):
            return steps.logits(feeds, spans)
        ids = self.ids_tensor(ids_of(feeds, num_tokens))
        packed = PackedCache(self._cache.tokens, spans, copies=num_tokens is not None)
        x = self.hidden_states(feeds, ids, packed)
        give_scores(feeds, lambda where: self.network.head(x[0, where.to(x.device)]), packed.copies)
        wanted = last_tokens(feeds, num_tokens)
        if not wanted:
            return x.new_empty(0, self.vocab_size)
        logits: torch.Tensor = self.network.head(_states(x, wanted))
        return logits if num_tokens is None else logits[: sum(feed.has_logits for feed in feeds)]

    # ---- several ranks, see leading.py ----------------------------------------------------------

    def lead(self, leading: Leading) -> None:
        """From now on tell other ranks of each pass."""
        own = partial(type(self).compute, self)
        self.__dict__["compute"] = partial(leading.pass_of, self, own)

    def told_of(self, feed: Feed) -> Any:
        """What of its row other ranks need to know for a pass, beside its place in the cache."""
        return None

    def row_told(self, span: Span, told: Any) -> ToldRow:
        """A row of which that was told, for compute()."""
        return ToldRow(span.length)

    def hidden_states(
        self, feeds: Sequence[Feed], ids: torch.Tensor, packed: PackedCache
    ) -> torch.Tensor:
        """(1, T, C) of ids (1, T), those of all feeds."""
        x: torch.Tensor = self.network(ids, packed)
        return x

    # ---- the same in memory that stays, see decode_step.py --------------------------------------

    def can_step(self, feeds: Sequence[Feed]) -> bool:
        """Whether each row gets one token, whose logits are asked for, and nobody scores."""
        return all(len(feed.ids) == 1 and feed.has_logits and not feed.score for feed in feeds)

    def new_step(self, num_rows: int, num_keys: int) -> Step:
        x = self._embedded([0] * num_rows)
        return Step(torch.empty_like(x), places_in(self._cache, num_rows, num_keys))

    def fill_step(self, step: Step, feeds: Sequence[Feed], spans: Sequence[Span]) -> None:
        step.x.copy_(self._embedded([token for feed in feeds for token in feed.ids]))
        step.own.fill([span.start for span in spans], [span.num_keys for span in spans])

    def run_step(self, step: Step) -> torch.Tensor:
        logits: torch.Tensor = self.network.head(self.step_states(step)[0])
        return logits

    def step_states(self, step: Step) -> torch.Tensor:
        """(1, B, C)."""
        x: torch.Tensor = self.network(step.x, StepCache(self._cache.tokens, step.own))
        return x

    def _embedded(self, ids: list[int]) -> torch.Tensor:
        x: torch.Tensor = self.network.embed_tokens(self.ids_tensor(ids))
        return x

    def ids_tensor(self, ids: list[int]) -> torch.Tensor:
        """(1, T) int64 on the device."""
        return torch.tensor([ids], device=self.sampler_device())


def places_in(cache: KVCache, num_rows: int, num_keys: int | None = None) -> Places:
    """num_keys: the most of a row; None is as many as there are."""
    _, _, most, _ = cache.tokens[0].shape
    return Places(num_rows, min(num_keys or most, most), cache.tokens[0].device)


def _states(x: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """(1, T, C) -> (R, C), those of these tokens; a view where it can be, as for a text alone."""
    if wanted == list(range(x.shape[1])):
        return x[0]
    if len(wanted) == 1:
        return x[:, wanted[0]]
    return x[0, torch.tensor(wanted, device=x.device)]


class T5Rows(PromptedRows, DecoderRows):
    """Rows of an encoder-decoder network. Prompts are encoded in the first pass of their row.

    max_length: of what the decoder is fed; the pool of prompts is that of the cache.
    """

    network: T5

    def __init__(
        self,
        network: T5,
        cache: T5Cache,
        max_length: int,
        begin: Callable[[], object],
        uses_fused_kernels: bool = True,
    ) -> None:
        super().__init__(network, cache.own, max_length, begin, uses_fused_kernels)
        self._cross = cache.cross
        self._prompts = TokenPool(cache.cross.tokens[0].shape[2], cache.cross.move_tokens)

    def hidden_states(
        self, feeds: Sequence[Feed], ids: torch.Tensor, packed: PackedCache
    ) -> torch.Tensor:
        newcomers = [feed.row for feed in feeds if not feed.row.is_read]
        if newcomers:
            self._encode(newcomers, packed.copies)
        spans = [_prompt_span(feed.row, len(feed.ids)) for feed in feeds]
        cross = PackedCache(self._cross.tokens, spans, packed.copies)
        x: torch.Tensor = self.network(ids, PackedT5Cache(packed, cross, len(feeds)))
        return x

    def told_of(self, feed: Feed) -> Any:
        row: PromptedRow = feed.row
        return row.prompt_cells.start, list(row.request.input_ids), row.is_read

    def row_told(self, span: Span, told: Any) -> ToldRow:
        start, input_ids, is_read = told
        cells = Range(start, len(input_ids))
        return ToldRow(span.length, ToldRequest(input_ids), cells, is_read)

    def can_step(self, feeds: Sequence[Feed]) -> bool:
        return super().can_step(feeds) and all(feed.row.is_read for feed in feeds)

    def new_step(self, num_rows: int, num_keys: int) -> Step:
        step = super().new_step(num_rows, num_keys)
        return replace(step, prompts=places_in(self._cross, num_rows))

    def fill_step(self, step: Step, feeds: Sequence[Feed], spans: Sequence[Span]) -> None:
        super().fill_step(step, feeds, spans)
        assert step.prompts is not None
        starts = [feed.row.prompt_cells.start for feed in feeds]
        step.prompts.fill(starts, [len(feed.row.request.input_ids) for feed in feeds])

    def step_states(self, step: Step) -> torch.Tensor:
        assert step.prompts is not None
        own = StepCache(self._cache.tokens, step.own)
        cross = StepCache(self._cross.tokens, step.prompts)
        x: torch.Tensor = self.network(step.x, PackedT5Cache(own, cross, step.x.shape[1]))
        return x

    def _encode(self, rows: Sequence[Any], copies: bool) -> None:
        prompts = [row.request.input_ids for row in rows]
        spans = [_prompt_span(row, len(row.request.input_ids)) for row in rows]
        ids = [token for prompt in prompts for token in prompt]
        if copies:
            ids += [0] * (fixed_length(len(ids)) - len(ids))
        self.network.encode_packed(
            self.ids_tensor(ids),
            Segments([len(prompt) for prompt in prompts], copies),
            PackedCache(self._cross.tokens, spans),
        )
        for row in rows:
            row.is_read = True


def _prompt_span(row: Any, num_tokens: int) -> Span:
    """All of the prompt, seen from as many tokens."""
    return Span(row.prompt_cells.start, len(row.request.input_ids) - num_tokens, num_tokens)
