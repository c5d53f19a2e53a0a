"""CPM-2: 11 billion parameters; continues a text, Chinese or Chinese and English, or fills blanks
in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bminf.arch import t5
from bminf.errors import ArgumentError
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.options import Options
from bminf.models.prompt import Prompt
from bminf.models.t5_model import T5Model

SPAN = "<span>"
MOST_SPANS = 16


class CPM2(T5Model):
    __doc__ = f"""CPM-2 and CPM-2.1, Chinese or Chinese and English.

    {LanguageModel.__doc__}
    """
    _architectures = (t5.CPM2,)

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
        """(continuation of `text`, stopped): whether `<eod>`, a sentinel or a stop token ended it,
        which is not part of it, or max_tokens did.

        The decoder is given `<s>` and the sentinel that stands at the end of the prompt, so the
        first token that it writes is the first of the answer. BMInf 1.x let the model write that
        sentinel and threw away the first token unseen, whatever it was: there max_tokens=12 gave
        11.
        Arguments and further keywords (seed, num_beams, ...): see
        bminf.models.Options.   Raises ArgumentError.
        """
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        return self._generate([text], self._settings(settings, more))[0]

    @needs_open_model
    def fill_blank(
        self,
        text: str,
        spans_position: Sequence[int] | None = None,
        max_tokens: int = 128,
        top_n: int | None = None,
        top_p: float | None = None,
        temperature: float = 0.9,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """What stands in the blanks of `text`: {"position", "text"} for each `<span>`, in order.

        spans_position: where in `text` the blanks are, for a text in which not every `<span>` is
        one; None is all of them. At least 1, at most 16.   max_tokens: of all blanks together; a
        blank that the model did not come to is "".
        Arguments and further keywords (seed, num_beams, ...): see
        bminf.models.Options; no beams.
        Other than BMInf 1.x, the decoder is given the sentinel of the first blank, so an answer can
        not begin with another one ("Unexpected model output"); and `<eod>` ends it.
        Raises ArgumentError.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text is a {type(text).__name__}; give a str")
        positions = _positions(text, spans_position)
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty
        )
        settings = self._settings(settings, more)
        if settings.num_beams > 1:
            raise ArgumentError("fill_blank() has no beam search; leave num_beams out")
        texts = self._fill(text, positions, settings)
        return [
            {"position": position, "text": filled}
            for position, filled in zip(positions, texts, strict=True)
        ]

    def _fill(self, text: str, positions: Sequence[int], settings: Options) -> list[str]:
        sentinels = [self.tokenizer.sentinel(k) for k in range(len(positions) + 1)]
        prompt = self._blanked(text, positions, sentinels)
        self._check_room(prompt, settings)
        # The sentinel behind the last blank ends it all; those in between are told apart below.
        end_ids = [sentinels[-1], self.tokenizer.token_id("<eod>")]
        stop_ids = frozenset([*end_ids, *settings.stop_ids(self.tokenizer)])
        sampler = self._sampler([prompt], settings)
        (answer,) = self._draw([prompt], sampler, stop_ids, settings)
        return self._segments(answer, sentinels, stop_ids)

    def _segments(
        self, answer: Sequence[int], sentinels: Sequence[int], stop_ids: frozenset[int]
    ) -> list[str]:
        """The text of each blank. A sentinel opens its blank; what is open already stays so."""
        filled: list[list[int]] = [[] for _ in sentinels[:-1]]
        blank, all_sentinels = 0, set(self.tokenizer.sentinel_ids)
        for token in answer:
            if token in sentinels[blank + 1 : -1]:
                blank = sentinels.index(token)
            elif token not in all_sentinels and token not in stop_ids:
                filled[blank].append(token)
        return [self.tokenizer.decode(ids) for ids in filled]

    def _blanked(self, text: str, positions: Sequence[int], sentinels: Sequence[int]) -> Prompt:
        ids: list[int] = []
        begin = 0
        for position, sentinel in zip(positions, sentinels[:-1], strict=True):
            ids += [*self.tokenizer.encode(text[begin:position]), sentinel]
            begin = position + len(SPAN)
        ids += self.tokenizer.encode(text[begin:])
        return Prompt(ids, [self.tokenizer.token_id("<s>"), sentinels[0]])

    def _prompt(self, text: Any) -> Prompt:
        return Prompt([*self._encoded(text), self._start_ids()[1]], self._start_ids())

    def _start_ids(self) -> list[int]:
        last = self.tokenizer.sentinel(self.tokenizer.num_sentinels - 1)
        return [self.tokenizer.token_id("<s>"), last]

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>"), *self.tokenizer.sentinel_ids]


def _positions(text: str, given: Sequence[int] | None) -> list[int]:
    """Where the blanks begin.   Raises ArgumentError."""
    found = [match.start() for match in re.finditer(re.escape(SPAN), text)]
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if given is not None and not (is_list and all(type(position) is int for position in given)):
        raise ArgumentError(f"spans_position={given!r}; give a list of ints, or None")
    positions = found if given is None else sorted(given)
    if not set(positions) <= set(found) or len(set(positions)) < len(positions):
        raise ArgumentError(
            f"spans_position={given!r}; accepted: places in the text where {SPAN!r} begins, each "
            f"once ({', '.join(map(str, found)) or 'there is none'})"
        )
    if not 1 <= len(positions) <= MOST_SPANS:
        raise ArgumentError(
            f"the text has {len(positions)} blanks; accepted: 1 to {MOST_SPANS}, each {SPAN!r}"
        )
    return positions
