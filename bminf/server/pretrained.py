"""A model of transformers to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.engine.wrapped import rows_of
from bminf.errors import UnsupportedModelError
from bminf.models.prompt import Prompt
from bminf.offload.hooks import Stats
from bminf.offload.plan import Plan
from bminf.server.texts import Asked, Fills, Message, Pieces, Settings, token_bytes
from bminf.tokenizers.pretrained_stream import PretrainedStream
from bminf.wrapping import plan_of, stats_of

_NO_BLANKS = "this model fills no blanks; CPM-2 and GLM do"


class PretrainedTexts:
    """model: wrapped.   prompt, dialogue: a text, and messages, as token ids.

    end_ids: tokens that end an answer.   template: what messages are put into; None is none.
    deterministic: see Engine.
    """

    can_fill = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Callable[[str], list[int]],
        dialogue: Callable[[Sequence[Message]], list[int]],
        end_ids: Sequence[int],
        template: str | None,
        deterministic: bool = False,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompt_ids, self._dialogue_ids = prompt, dialogue
        self._end_ids = frozenset(end_ids)
        self._rows = rows_of(model, None, None, deterministic)
        self.engine = Engine(self._rows, deterministic=deterministic)
        self.max_length, self.vocab_size = self._rows.max_length, self._rows.vocab_size
        self.can_chat = template is not None
        self.can_score = self._rows.can_score
        names = ("eos_token", "bos_token", "pad_token")
        known = {name: getattr(tokenizer, name, None) for name in names}
        self.special: Mapping[str, str | None] = {**known, "chat_template": template}

    @property
    def plan(self) -> Plan:
        plan = plan_of(self._model)
        assert plan is not None, "it is wrapped"
        return plan

    @property
    def stats(self) -> Stats:
        stats = stats_of(self._model)
        assert stats is not None, "it is wrapped"
        return stats

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(token) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return token_bytes(piece or "", self._tokenizer.decode([token_id]))

    def prompt(self, text: str | Sequence[int], suffix: str | None = None) -> Asked:
        if suffix is not None:
            raise UnsupportedModelError(_NO_BLANKS)
        return self._asked(self._prompt_ids(text) if isinstance(text, str) else list(text))

    def dialogue(self, messages: Sequence[Message]) -> Asked:
        return self._asked(self._dialogue_ids(messages))

    def room(self, prompt: Prompt) -> int:
        if len(prompt.input_ids) > self.max_length:
            return 0
        request = Request(prompt.input_ids, 1)
        return self.max_length - len(self._rows.start_ids(request)) + 1

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
        return Request(
            asked.prompt.input_ids, max_tokens, self._sampling(settings), asked.stop_ids,
            num_logprobs=num_logprobs, num_prompt_logprobs=num_prompt_logprobs, on_token=on_token,
            keep=keep,
        )  # fmt: skip

    def pieces(self) -> Pieces:
        return PretrainedStream(self._tokenizer)

    def fill(self, text: str, settings: Settings, max_tokens: int) -> Fills:
        raise UnsupportedModelError(_NO_BLANKS)

    def _asked(self, ids: list[int]) -> Asked:
        return Asked(Prompt(ids, ids), self._end_ids)

    def _sampling(self, settings: Settings) -> Sampling:
        """The default is what the model's authors say, if they say that tokens are drawn."""
        own = self._model.generation_config
        known = own if own.do_sample else None

        def default(name: str, otherwise: Any) -> Any:
            found = getattr(known, name, None)
            return otherwise if found is None else found

        given = settings
        top_p = default("top_p", None) if given.top_p is None else given.top_p
        temperature = (
            default("temperature", 1.0) if given.temperature is None else given.temperature
        )
        return Sampling(
            temperature=0.0 if given.is_greedy else temperature,
            top_k=(default("top_k", None) or None) if given.top_k is None else given.top_k,
            top_p=top_p or None,
            frequency_penalty=given.frequency_penalty,
            presence_penalty=given.presence_penalty,
            banned_ids=given.banned_ids,
            seed=given.seed,
            logit_bias=given.logit_bias,
        )
