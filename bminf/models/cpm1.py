"""CPM-1: 2.6 billion parameters, continues a Chinese text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bminf.arch import gpt
from bminf.arch.gpt import GPT
from bminf.engine.beam import Decoder
from bminf.layers.kv_cache import KVCache
from bminf.models.arguments import Text
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.options import Options
from bminf.models.prompt import Prompt, padded


class GPTDecoder:
    """A batch of a decoder-only model. Shorter prompts are left-padded, so that all rows have the
    same length in the cache; padding is masked and has no positions.

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


class CPM1(LanguageModel):
    """CPM-1, the authors' model of 2020 (also in Hugging Face's GPT-2 layout).

    Arguments, errors and use: see LanguageModel.
    """

    _architectures = (gpt.CPM1,)
    model: GPT

    @needs_open_model
    def generate(
        self,
        text: str,
        max_tokens: int = 128,
        top_n: int | None = None,
        top_p: float | None = None,
        temperature: float = 0.9,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        stop_tokens: Sequence[str] | str | None = None,
        **more: Any,
    ) -> tuple[str, bool]:
        """(continuation of `text`, stopped).   stopped: whether `<eod>` or a stop token ended it,
        which is not part of it; otherwise max_tokens did.

        Arguments and other keywords (seed, num_beams, ...): see bminf.models.Options.
        Raises ArgumentError, also where text and max_tokens together exceed max_length (BMInf 1.x
        truncated the text silently).
        """
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        return self._generate([text], self._settings(settings, more))[0]

    @needs_open_model
    def logits(self, text: Text) -> torch.Tensor:
        """The logits after each token of `text`: (T, V) float32 on the CPU.

        text: a str or token ids, at most max_length.   Raises ArgumentError.
        """
        ids = self._ids(text, "text")
        self._check_length(ids, "text")
        with self._whole_cache():
            self._cache.reset()
            return self._logits(self.model(self._tensor([ids]), self._cache)[0])

    def _prompt(self, text: Any) -> Prompt:
        ids = self._encoded(text)
        return Prompt(ids, ids)

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>")]

    def _new_cache(self) -> KVCache:
        return self.model.new_cache(self.max_batch_size, self.max_length)

    def _decoder(self, prompts: Sequence[Any]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.start_ids for prompt in prompts]
        decoder = GPTDecoder(self.model, self._cache, [len(row) for row in rows])
        return decoder, self._tensor(padded(rows, self._pad_id, padding_side="left"))
