"""A built-in model to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.models import CPM2, EVA, GLM, LanguageModel
from bminf.models.arguments import present_ids
from bminf.models.decoder_only import DecoderOnly
from bminf.models.glm_text import GENERATION_MASK, TEXT_MASK
from bminf.models.prompt import Prompt
from bminf.models.t5 import SPAN, _positions
from bminf.offload.hooks import Stats
from bminf.offload.plan import Plan
from bminf.server.texts import Asked, Fills, Message, Pieces, Settings, token_bytes
from bminf.tokenizers.base import TextStream

_NO_BLANKS = "this model fills no blanks; CPM-2 and GLM do"

_SPECIAL = {"eos_token": ("<eod>", "<|endoftext|>", "</s>"), "bos_token": ("<s>",),
            "pad_token": ("<pad>",)}  # fmt: skip


class ZooTexts:
    """dialogue: messages as utterances.   deterministic: see Engine."""

    def __init__(
        self,
        model: LanguageModel,
        dialogue: Callable[[Sequence[Message]], list[str]],
        deterministic: bool = False,
    ) -> None:
        self._model: Any = model
        self._utterances = dialogue
        own: Any = model.row_model
        self.engine = Engine(own, deterministic=True) if deterministic else model.engine
        self.max_length, self.vocab_size = model.max_length, model.config.vocab_size
        self.can_chat, self.can_fill = isinstance(model, EVA), isinstance(model, CPM2 | GLM)
        self.can_score = own.can_score
        known = {name: self._first(tokens) for name, tokens in _SPECIAL.items()}
        self.special: Mapping[str, str | None] = {**known, "chat_template": None}

    @property
    def plan(self) -> Plan:
        plan: Plan = self._model.plan
        return plan

    @property
    def stats(self) -> Stats:
        stats: Stats = self._model.stats
        return stats

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A text that is a special token, and nothing else, is its id."""
        tokenizer = self._model.tokenizer
        if text in self.special.values():
            return [tokenizer.token_id(text)]
        if not add_special_tokens:
            return list(tokenizer.encode(text))
        return self.prompt(text).prompt.input_ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.tokenizer.decode(ids)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        tokenizer = self._model.tokenizer
        if token_id >= tokenizer.vocab_size:
            return b""
        (piece,) = tokenizer.tokens([token_id])
        return token_bytes(piece, tokenizer.decode([token_id]))

    def prompt(self, text: str | Sequence[int], suffix: str | None = None) -> Asked:
        model = self._model
        if suffix is not None:
            if not isinstance(text, str):
                raise UnsupportedModelError("suffix needs a prompt that is a text")
            return self._blank(text, suffix)
        if isinstance(text, str):
            return self._asked(model._prompt(text))
        ids = model._ids(text, "prompt")
        if isinstance(model, GLM):
            masks = model.tokenizer.masks
            mask = GENERATION_MASK if GENERATION_MASK in masks else TEXT_MASK
            return self._asked(model._scored_blank(ids, mask))
        if isinstance(model, DecoderOnly):
            return self._asked(Prompt(ids, ids))
        start_ids = model._start_ids()
        return self._asked(Prompt([*ids, start_ids[-1]], start_ids))

    def dialogue(self, messages: Sequence[Message]) -> Asked:
        """Utterances in turn, without roles."""
        if any(message["role"] == "system" for message in messages):
            raise ArgumentError("this model reads utterances alone; leave system messages out")
        if messages[-1]["role"] != "user":
            raise ArgumentError("this model answers; let the last message be the user's")
        return self._asked(self._model._prompt(self._utterances(messages)))

    def room(self, prompt: Prompt) -> int:
        model = self._model
        if len(prompt.input_ids) > model.max_length:
            return 0
        cells = model.max_length + model._num_extra_tokens
        return int(min(cells - len(prompt.start_ids) + 1, model.max_length))

    def request(
        self,
        asked: Asked,
        settings: Settings,
        max_tokens: int,
        num_logprobs: int | None = None,
        on_token: Callable[[int], object] | None = None,
        num_prompt_logprobs: int | None = None,
        keep: bool = False,
    ) -> Request:
        model, prompt = self._model, asked.prompt
        sampling = model._sampling(self._options(settings, max(max_tokens, 1)))
        banned = {*sampling.banned_ids, *settings.banned_ids}
        return Request(
            prompt.input_ids, max_tokens,
            replace(sampling, banned_ids=tuple(sorted(banned)), logit_bias=settings.logit_bias),
            asked.stop_ids, num_logprobs=num_logprobs, num_prompt_logprobs=num_prompt_logprobs,
            on_token=on_token, keep=keep,
            start_ids=prompt.start_ids, prompt=prompt,
        )  # fmt: skip

    def pieces(self) -> Pieces:
        kind = _Unmarked if isinstance(self._model, CPM2) else TextStream
        return kind(self._model.tokenizer)

    def fill(self, text: str, settings: Settings, max_tokens: int) -> Fills:
        if isinstance(self._model, CPM2):
            return self._fill_spans(text, settings, max_tokens)
        if isinstance(self._model, GLM):
            return self._fill_masks(text, settings, max_tokens)
        raise UnsupportedModelError(_NO_BLANKS)

    def _fill_spans(self, text: str, settings: Settings, max_tokens: int) -> Fills:
        """All blanks in one answer, as CPM2.fill_blank()."""
        asked, sentinels = self._spans(text)
        positions = _positions(text, None)
        self._model._check_room(asked.prompt, self._options(settings, max_tokens))
        done = yield self.request(asked, settings, max_tokens)
        texts = self._model._segments(done.tokens, sentinels, asked.stop_ids)
        return [
            {"position": position, "text": filled}
            for position, filled in zip(positions, texts, strict=True)
        ]

    def _fill_masks(self, text: str, settings: Settings, max_tokens: int) -> Fills:
        """One answer after another, as GLM.fill_blank()."""
        model, options = self._model, self._options(settings, max_tokens)
        masked, stop_ids = model._masked(text), model._stop_ids(options)
        model._check_all_room(masked, options)
        answers: list[list[int]] = []
        for i in range(len(masked.positions)):
            one = Asked(model._next_blank(masked, answers, stop_ids), stop_ids)
            seed = None if settings.seed is None else settings.seed + i
            done = yield self.request(one, replace(settings, seed=seed), max_tokens)
            answers.append(done.tokens)
        return [
            {"position": position, "text": model._answer(answer, stop_ids)[0]}
            for position, answer in zip(masked.positions, answers, strict=True)
        ]

    def _blank(self, text: str, suffix: str) -> Asked:
        """What is to stand between two texts."""
        if isinstance(self._model, GLM):
            return self._asked(self._model._prompt(f"{text}{TEXT_MASK}{suffix}"))
        if isinstance(self._model, CPM2):
            return self._spans(f"{text}{SPAN}{suffix}")[0]
        raise UnsupportedModelError(_NO_BLANKS)

    def _spans(self, text: str) -> tuple[Asked, list[int]]:
        """The blanks of a CPM-2, and the sentinels of each and of the end."""
        model = self._model
        positions = _positions(text, None)
        sentinels = [model.tokenizer.sentinel(k) for k in range(len(positions) + 1)]
        ends = frozenset([sentinels[-1], model.tokenizer.token_id("<eod>")])
        return Asked(model._blanked(text, positions, sentinels), ends), sentinels

    def _asked(self, prompt: Prompt) -> Asked:
        return Asked(prompt, frozenset(self._model._end_ids()))

    def _options(self, settings: Settings, max_tokens: int) -> Any:
        model = self._model
        given: dict[str, Any] = {
            "max_tokens": max_tokens, "top_k": settings.top_k, "seed": settings.seed,
            "temperature": 0 if settings.is_greedy else settings.temperature,
            "top_p": settings.top_p or None,
            "frequency_penalty": settings.frequency_penalty,
            "presence_penalty": settings.presence_penalty,
        }  # fmt: skip
        known = {name: value for name, value in given.items() if value is not None}
        return model._settings(model._defaults, known)

    def _first(self, tokens: Sequence[str]) -> str | None:
        found = present_ids(self._model.tokenizer, tokens)
        return self._model.tokenizer.tokens(found[:1])[0] if found else None


class _Unmarked(TextStream):
    """Without sentinels: CPM2.fill_blank() ignores those that begin no blank."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._marks = frozenset(tokenizer.sentinel_ids)

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._marks else super().feed(token_id)
