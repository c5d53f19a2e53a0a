"""The architectures as generation/ sees them: ids in, logits of the next token out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bminf.arch.gpt import GPT
from bminf.arch.t5 import T5, T5Cache
from bminf.layers.kv_cache import KVCache


class GPTDecoder:
    """A batch of a decoder-only model. Shorter prompts are padded at their beginning, so that all
    rows are at the same place in the cache; the padding is hidden and has no positions.

    lengths: of the prompts, without padding.
    """

    def __init__(self, model: GPT, cache: KVCache, lengths: Sequence[int]) -> None:
        cache.reset()
        self._model, self._cache = model, cache
        longest = max(lengths)
        self._num_padding: torch.Tensor | None = None
        if min(lengths) < longest:
            padding = [longest - length for length in lengths]
            self._num_padding = torch.tensor(padding, device=cache.keys.device)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self._model(input_ids, self._cache, self._num_padding)
        return self._model.head(x[:, -1])

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)
        if self._num_padding is not None:
            self._num_padding = self._num_padding[rows]


class T5Decoder:
    """A batch of an encoder-decoder model, whose prompts are read when it is made.

    prompts: (B, S) int64, shorter ones padded at their end.   lengths: without padding.
    """

    def __init__(
        self, model: T5, cache: T5Cache, prompts: torch.Tensor, lengths: Sequence[int]
    ) -> None:
        cache.reset()
        self._model, self._cache = model, cache
        is_padded = min(lengths) < prompts.shape[1]
        held = torch.tensor(lengths, device=prompts.device) if is_padded else None
        model.encode(prompts, cache, held)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._model.head(self._model(input_ids, self._cache)[:, -1])

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)


def padded(prompts: Sequence[Sequence[int]], pad_id: int, is_at_end: bool) -> list[list[int]]:
    """Prompts of any lengths as rows of one."""
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        padding = [pad_id] * (longest - len(prompt))
        rows.append([*prompt, *padding] if is_at_end else [*padding, *prompt])
    return rows
