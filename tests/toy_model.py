"""The toy of toy_arch.py for users: all that models/ needs of one more."""

from __future__ import annotations

from typing import Any

import torch
from toy_arch import TOY, Toy

from bminf.engine.beam import Decoder
from bminf.layers.kv_cache import KVCache
from bminf.models.base import LanguageModel
from bminf.models.cpm1 import GPTDecoder
from bminf.models.prompt import Prompt


class ToyModel(LanguageModel):
    """Goes on with a text."""

    _architectures = (TOY,)
    model: Toy

    def _prompt(self, text: Any) -> Prompt:
        ids = self._encoded(text)
        return Prompt(ids, ids)

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>")]

    def _new_cache(self) -> KVCache:
        return self.model.new_cache(self.max_batch_size, self.max_length)

    def _decoder(self, prompts: list[Prompt]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.start_ids for prompt in prompts]
        decoder: Any = GPTDecoder(self.model, self._cache, [len(row) for row in rows])
        return decoder, self._tensor(rows)
