"""Encoder-decoder models: CPM-2 continues a text or fills its blanks, EVA continues a dialogue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from bminf.arch import t5
from bminf.arch.t5 import T5, T5Cache
from bminf.checks import check_positive, plain
from bminf.engine.beam import Decoder
from bminf.errors import ArgumentError
from bminf.models.arguments import Text
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.options import Options
from bminf.models.prompt import Prompt, padded
from bminf.models.rows import T5Rows
from bminf.tokenizers.base import SentinelTokenizer

SPAN = "<span>"
MAX_SPANS = 16

_TRUNCATION_LENGTH = 256


class T5Decoder:
    """A batch of an encoder-decoder model, whose prompts are encoded by the constructor.

    prompts: (B, S) int64, right-padded.   lengths: without padding.
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


class T5Model(LanguageModel):
    """What the encoder-decoder models have in common; see LanguageModel."""

    model: T5
    tokenizer: SentinelTokenizer

    @needs_open_model
    def logits(self, text: Text, target: Text) -> torch.Tensor:
        """The logits after each token of `target`: (T, V) float32 on the CPU.

        text: for the encoder, a str, which gets the prompt template of generate(), or token ids,
        which do not.   target: for the decoder; a str gets the start ids of generate(), which count
        in T.   Raises ArgumentError.
        """
        items: Sequence[object] = text if isinstance(text, Sequence) else ()
        is_dialogue = len(items) > 0 and all(isinstance(item, str) for item in items)
        if isinstance(text, str) or is_dialogue:
            input_ids = self._prompt(text).input_ids
        else:
            input_ids = self._ids(text, "text")
        target_ids = self._ids(target, "target")
        if isinstance(target, str):
            target_ids = [*self._start_ids(), *target_ids]
        self._check_length(input_ids, "text")
        self._check_length(target_ids, "target")
        with self._whole_cache():
            self._cache.reset()
            self._network.encode(self._tensor([input_ids]), self._cache)
            return self._logits(self._network(self._tensor([target_ids]), self._cache)[0])

    def _start_ids(self) -> list[int]:
        """The first input of the decoder in generate()."""
        raise NotImplementedError

    def _new_cache(self) -> T5Cache:
        return self.model.new_cache(
            self.max_batch_size, self.max_length, self.max_length + self._num_extra_tokens
        )

    def _new_rows(self) -> T5Rows:
        longest = self.max_length + self._num_extra_tokens
        return T5Rows(self.model, self._cache, longest, self._begin, self._uses_fused_kernels)

    def _decoder(self, prompts: Sequence[Any]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.input_ids for prompt in prompts]
        input_ids = self._tensor(padded(rows, self._pad_id, padding_side="right"))
        lengths = [len(row) for row in rows]
        decoder = T5Decoder(self._network, self._cache, input_ids, lengths)
        return decoder, self._tensor([prompt.start_ids for prompt in prompts])


class CPM2(T5Model):
    """CPM-2 and CPM-2.1, Chinese or Chinese and English.

    Arguments, errors and use: see LanguageModel.
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
        """(continuation of `text`, stopped).   stopped: whether `<eod>`, a sentinel or a stop token
        ended it, which is not part of it; otherwise max_tokens did.

        The decoder starts with `<s>` and the sentinel that ends the prompt, so that its first token
        is the first of the answer. BMInf 1.x let the model generate that sentinel and dropped the
        first token, whatever it was: there max_tokens=12 gave 11.
        Arguments and other keywords (seed, num_beams, ...): see bminf.models.Options.
        Raises ArgumentError.
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
        """The text of each blank `<span>` of `text`, in order: {"position", "text"}.

        spans_position: positions of the blanks in `text`, if not every `<span>` is one; None for
        all. At least 1, at most 16.   max_tokens: of all blanks together; a blank that the model
        did not reach is "".
        Arguments and other keywords (seed, ...): see bminf.models.Options; there is no beam search.
        Unlike in BMInf 1.x the decoder starts with the sentinel of the first blank, so that an
        answer cannot start with another one ("Unexpected model output"); and `<eod>` ends it.
        Raises ArgumentError.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text is a {type(text).__name__}; give a str")
        positions = _positions(text, spans_position)
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty
        )
        settings = self._settings(settings, more).with_stop_tokens()
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
        # The sentinel behind the last blank ends the answer; those between blanks separate them.
        end_ids = [sentinels[-1], self.tokenizer.token_id("<eod>")]
        stop_ids = frozenset([*end_ids, *settings.stop_ids(self.tokenizer)])
        (answer,) = self._answers([prompt], settings, stop_ids)
        return self._segments(answer, sentinels, stop_ids)

    def _segments(
        self, answer: Sequence[int], sentinels: Sequence[int], stop_ids: frozenset[int]
    ) -> list[str]:
        """The text of each blank. A sentinel starts its blank; earlier sentinels are ignored."""
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
        start = 0
        for position, sentinel in zip(positions, sentinels[:-1], strict=True):
            ids += [*self.tokenizer.encode(text[start:position]), sentinel]
            start = position + len(SPAN)
        ids += self.tokenizer.encode(text[start:])
        return Prompt(ids, [self.tokenizer.token_id("<s>"), sentinels[0]])

    def _prompt(self, text: Any) -> Prompt:
        return Prompt([*self._encoded(text), self._start_ids()[1]], self._start_ids())

    def _start_ids(self) -> list[int]:
        last = self.tokenizer.sentinel(self.tokenizer.num_sentinels - 1)
        return [self.tokenizer.token_id("<s>"), last]

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>"), *self.tokenizer.sentinel_ids]


def _positions(text: str, given: Sequence[int] | None) -> list[int]:
    """The positions of the blanks in `text`.   Raises ArgumentError."""
    found = [match.start() for match in re.finditer(re.escape(SPAN), text)]
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    given = list(map(plain, given)) if given is not None and is_list else given
    if given is not None and not (is_list and all(type(position) is int for position in given)):
        raise ArgumentError(f"spans_position={given!r}; give a list of ints, or None")
    positions = found if given is None else sorted(given)
    if not set(positions) <= set(found) or len(set(positions)) < len(positions):
        raise ArgumentError(
            f"spans_position={given!r}; accepted: positions where {SPAN!r} starts in the text, "
            f"each once ({', '.join(map(str, found)) or 'there is none'})"
        )
    if not 1 <= len(positions) <= MAX_SPANS:
        raise ArgumentError(
            f"the text has {len(positions)} blanks; accepted: 1 to {MAX_SPANS}, each {SPAN!r}"
        )
    return positions


class EVA(T5Model):
    """EVA 1.0 (2.8 billion parameters) and EVA 2.0 (base, large, xLarge).

    EVA 1.0 and EVA 2.0 xLarge have the same shapes, and only the second divides its attention
    scores by the square root of the head size: the configuration has to say which one it is.
    Relative positions are distinguished up to a distance of 128, as in training (BMInf 1.x: 256).

    Arguments, errors and use: see LanguageModel.
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
        """(answer, stopped).   stopped: whether `<sep>` or a stop token ended it; otherwise
        max_tokens did.

        context: the utterances so far, the oldest first.   truncation_length: only this many of
        their last tokens are read; None for all, which have to fit max_length.
        Arguments and other keywords (seed, num_beams, ...): see bminf.models.Options.
        Raises ArgumentError.
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
        """dialogue() with one utterance, or with a list of them, of which the last 256 tokens are
        read. The defaults of top_n and temperature are those of EVA's authors.
        """
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        return self._generate([text], self._settings(settings, more))[0]

    def _settings(self, options: Options, keywords: dict[str, Any]) -> Options:
        """The default of top_n is dropped where top_k is given, or a beam search is asked for."""
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
        self.truncation_length = plain(truncation_length)
        check_positive("truncation_length", self.truncation_length, none="None")
