"""EVA 1.0 and 2.0: goes on with a Chinese dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bminf.arch import t5
from bminf.checks import check_positive
from bminf.errors import ArgumentError
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.options import Options
from bminf.models.prompt import Prompt
from bminf.models.t5_model import T5Model

_TRUNCATION_LENGTH = 256


class EVA(T5Model):
    __doc__ = f"""EVA 1.0 (2.8 billion parameters) and EVA 2.0 (base, large, xLarge).

    EVA 1.0 and EVA 2.0 xLarge have the same shapes, and only the second divides its attention by
    the square root of the head size: which one it is must be told, by the configuration that came
    with it. Positions are told apart up to a distance of 128, as in training (BMInf 1.x: 256).

    {LanguageModel.__doc__}
    """
    _architectures = (t5.EVA,)
    _defaults = Options(top_n=10, temperature=0.85)

    @needs_open_model
    def dialogue(
        self,
        context: Sequence[str],
        max_tokens: int = 128,
        top_n: int | None = 10,
        top_p: float | None = None,
        temperature: float = 0.85,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        truncation_length: int | None = _TRUNCATION_LENGTH,
        **more: Any,
    ) -> tuple[str, bool]:
        """(answer, stopped): whether `<sep>` or a stop token ended it, or max_tokens did.

        context: the utterances so far, the oldest first.   truncation_length: only the last of
        their tokens are read, this many; None is all, which must fit max_length.
        Arguments and further keywords (seed, num_beams, ...): see
        bminf.models.Options.   Raises ArgumentError.
        """
        if isinstance(context, str):
            raise ArgumentError("context is one str; give a list of utterances, the oldest first")
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty
        )
        dialogue = _Dialogue(context, truncation_length)
        return self._generate([dialogue], self._settings(settings, more))[0]

    @needs_open_model
    def generate(
        self,
        text: str | Sequence[str],
        max_tokens: int = 128,
        top_n: int | None = 10,
        top_p: float | None = None,
        temperature: float = 0.85,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        stop_tokens: Sequence[str] | str | None = None,
        **more: Any,
    ) -> tuple[str, bool]:
        """dialogue() with one utterance, or with a list of them, of which it reads the last 256
        tokens. top_n and temperature are other than in CPM-1 and CPM-2, as EVA's authors have them.
        """
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        return self._generate([text], self._settings(settings, more))[0]

    def _settings(self, options: Options, keywords: dict[str, Any]) -> Options:
        """top_n has a default here; it gives way to what it does not go together with."""
        is_default = options.top_n == self._defaults.top_n and "top_n" not in keywords
        is_search = keywords.get("num_beams", 1) != 1
        if is_default and (is_search or keywords.get("top_k") is not None):
            keywords = {**keywords, "top_n": None}
        return super()._settings(options, keywords)

    def _remedy(self) -> str:
        return f"give a lower truncation_length, or {super()._remedy()}"

    def _prompt(self, text: Any) -> Prompt:
        given = text if isinstance(text, _Dialogue) else _Dialogue(text, _TRUNCATION_LENGTH)
        separator = self.tokenizer.token_id("<sep>")
        ids: list[int] = []
        for utterance in given.utterances:
            ids += [*self._encoded(utterance, "an utterance"), separator]
        ids += self._start_ids()
        if given.truncation_length is not None:
            ids = ids[-given.truncation_length :]
        return Prompt(ids, self._start_ids())

    def _start_ids(self) -> list[int]:
        return [self.tokenizer.sentinel(0)]

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<sep>")]


class _Dialogue:
    """Utterances, and how many of their last tokens are read.   Raises ArgumentError."""

    def __init__(self, context: str | Sequence[str], truncation_length: int | None) -> None:
        if not isinstance(context, str | Sequence):
            raise ArgumentError(
                f"context is a {type(context).__name__}; give a list of utterances, oldest first"
            )
        self.utterances = [context] if isinstance(context, str) else list(context)
        if not self.utterances:
            raise ArgumentError("context is empty; give at least one utterance")
        check_positive("truncation_length", truncation_length, none="None")
        self.truncation_length = truncation_length
