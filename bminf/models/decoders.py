"""The architectures as generation/ sees them: ids in, logits of the next token out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bminf.arch.glm import GLM
from bminf.arch.gpt import GPT
from bminf.arch.t5 import T5, T5Cache
from bminf.layers.kv_cache import KVCache
from bminf.models.glm_text import Blank, is_ahead, position_tensor


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


class GLMDecoder:
    """A batch of blanks. Shorter texts are padded at their beginning, as in a GPTDecoder; the text
    is seen whole by itself, the answers behind it only by what comes after.
    """

    def __init__(self, model: GLM, cache: KVCache, blanks: Sequence[Blank]) -> None:
        cache.reset()
        self._model, self._cache, self._blanks = model, cache, list(blanks)
        self._longest = max(len(blank.start_ids) for blank in blanks)
        self._num_padding = torch.tensor(
            [self._longest - len(blank.start_ids) for blank in blanks], device=cache.keys.device
        )

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        begin, num_tokens = self._cache.length, input_ids.shape[1]
        x = self._model(
            input_ids,
            self._positions(begin).to(input_ids.device),
            self._cache,
            self._hidden(begin + num_tokens) if begin == 0 or self._is_padded else None,
        )
        return self._model.head(x[:, -1])

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)
        self._blanks = [self._blanks[row] for row in rows.tolist()]
        self._num_padding = self._num_padding[rows]

    @property
    def _is_padded(self) -> bool:
        return any(len(blank.start_ids) < self._longest for blank in self._blanks)

    def _positions(self, begin: int) -> torch.Tensor:
        """Of the whole beginning, or of the one token that comes behind `begin`."""
        has_blocks = not self._model.config.is_rotary
        if begin:
            number = begin - self._longest + 1  # counted from sop
            return position_tensor([[blank.position(number)] for blank in self._blanks], has_blocks)
        rows = [
            [(0, 0)] * (self._longest - len(blank.positions)) + list(blank.positions)
            for blank in self._blanks
        ]
        return position_tensor(rows, has_blocks)

    def _hidden(self, num_keys: int) -> torch.Tensor:
        """(B, T, S): padding, and in the beginning what comes after a text."""
        device = self._num_padding.device
        is_padding = torch.arange(num_keys, device=device) < self._num_padding.unsqueeze(1)
        if num_keys > self._longest:
            return is_padding.unsqueeze(1)
        later = [
            is_ahead(num_keys, num_keys, num_keys - len(b.start_ids) + len(b.input_ids))
            for b in self._blanks
        ]
        return is_padding.unsqueeze(1) | torch.stack(later).to(device)


def padded(prompts: Sequence[Sequence[int]], pad_id: int, is_at_end: bool) -> list[list[int]]:
    """Prompts of any lengths as rows of one."""
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        padding = [pad_id] * (longest - len(prompt))
        rows.append([*prompt, *padding] if is_at_end else [*padding, *prompt])
    return rows
