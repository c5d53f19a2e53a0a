"""CPM-1: 2.6 billion parameters, continues a Chinese text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bminf.arch import gpt
from bminf.arch.gpt import GPT
from bminf.models.calls import needs_open_model
from bminf.models.decoder_only import DecoderOnly
from bminf.models.options import Options


class CPM1(DecoderOnly):
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

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>")]
