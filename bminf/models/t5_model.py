"""What the two encoder-decoder models have in common beyond LanguageModel."""

from __future__ import annotations

import torch

from bminf.arch.t5 import T5
from bminf.models.base import LanguageModel, Text
from bminf.tokenizers.base import SentinelTokenizer


class T5Model(LanguageModel):
    """See LanguageModel."""

    tokenizer: SentinelTokenizer

    def logits(self, text: Text, target: Text) -> torch.Tensor:
        """The logits after each token of `target`: (T, V) float32 on the CPU.

        text: for the encoder, a str, which is dressed as generate() dresses it, or token ids, which
        are taken as they are.   target: for the decoder; before a str come the ids that
        generate() starts with, and they count in T.   Raises ArgumentError.
        """
        prompt = self._prompt(text) if isinstance(text, str) else None
        input_ids = self._ids(text, "text") if prompt is None else prompt.input_ids
        target_ids = self._ids(target, "target")
        if isinstance(target, str):
            target_ids = [*self._start_ids(), *target_ids]
        self._check_length(input_ids, "text")
        self._check_length(target_ids, "target")
        with self._lock, torch.inference_mode():
            self._begin()
            assert isinstance(self.model, T5)
            self._cache.reset()
            self.model.encode(torch.tensor([input_ids], device=self.device), self._cache)
            x = self.model(torch.tensor([target_ids], device=self.device), self._cache)
            return self.model.head(x)[0].cpu()

    def _start_ids(self) -> list[int]:
        """What the decoder of generate() is fed first."""
        raise NotImplementedError
