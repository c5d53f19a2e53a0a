"""What the two encoder-decoder models have in common beyond LanguageModel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bminf.arch.t5 import T5, T5Cache
from bminf.generation.loop import Decoder
from bminf.models.arguments import Text
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.decoders import T5Decoder, padded
from bminf.models.prompt import Prompt
from bminf.tokenizers.base import SentinelTokenizer


class T5Model(LanguageModel):
    """See LanguageModel."""

    model: T5
    _more_tokens = 1  # two begin an answer, and its last one is not fed
    tokenizer: SentinelTokenizer

    @needs_open_model
    def logits(self, text: Text, target: Text) -> torch.Tensor:
        """The logits after each token of `target`: (T, V) float32 on the CPU.

        text: for the encoder, a str, which is dressed as generate() dresses it, or token ids, which
        are taken as they are.   target: for the decoder; before a str come the ids that
        generate() starts with, and they count in T.   Raises ArgumentError.
        """
        is_text = isinstance(text, str) or _are_texts(text)
        prompt = self._prompt(text) if is_text else None
        input_ids = self._ids(text, "text") if prompt is None else prompt.input_ids
        target_ids = self._ids(target, "target")
        if isinstance(target, str):
            target_ids = [*self._start_ids(), *target_ids]
        self._check_length(input_ids, "text")
        self._check_length(target_ids, "target")
        with self._lock, torch.inference_mode():
            self._begin()
            self._cache.reset()
            self.model.encode(self._tensor([input_ids]), self._cache)
            return self._logits(self.model(self._tensor([target_ids]), self._cache)[0])

    def _start_ids(self) -> list[int]:
        """What the decoder of generate() is fed first."""
        raise NotImplementedError

    def _new_cache(self) -> T5Cache:
        return self.model.new_cache(
            self.max_batch_size, self.max_length, self.max_length + self._more_tokens
        )

    def _decoder(self, prompts: list[Prompt]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.input_ids for prompt in prompts]
        input_ids = self._tensor(padded(rows, self._pad_id, is_at_end=True))
        lengths = [len(row) for row in rows]
        decoder = T5Decoder(self.model, self._cache, input_ids, lengths)
        return decoder, self._tensor([prompt.start_ids for prompt in prompts])


def _are_texts(text: object) -> bool:
    """Whether it is a dialogue."""
    is_list = isinstance(text, Sequence) and len(text) > 0
    return is_list and all(isinstance(utterance, str) for utterance in text)  # type: ignore[attr-defined]
