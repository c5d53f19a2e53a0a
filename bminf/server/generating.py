"""Completions, chats and blanks: from a body to a reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from bminf.engine.request import Request, Usage
from bminf.models.prompt import Prompt
from bminf.server.bodies import ChatBody, CompletionBody, FillBody, Generating
from bminf.server.choice import Choice, Inbox
from bminf.server.errors import ApiError
from bminf.server.replies import ChatShape, CompletionShape, Shape, usage_json
from bminf.server.sending import EventStream, Reply, WholeReply
from bminf.server.texts import Asked, Fills, Settings, Texts
from bminf.server.worker import Worker

TEXT_TOKENS = 16
"""The most tokens of a completion, unless it was said; OpenAI's number."""

_LETTERS = 64  # characters of a token; a text with more a token than that is not tokenized

T = TypeVar("T")


class Generation:
    """name: of the model.   ping_s: between bytes, where there are none."""

    def __init__(self, worker: Worker, name: str, ping_s: float) -> None:
        self._worker, self._name, self._ping_s = worker, name, ping_s
        # One thread: tokenizers hold the interpreter, and a long text must not hold the loop up.
        self._tokenizing = ThreadPoolExecutor(1, "bminf-tokenizer")

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what may take long."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, function, *arguments)

    async def complete(self, body: CompletionBody) -> Any:
        """The reply to POST /v1/completions.   Raises ApiError, BMInfError."""
        texts = self._worker.ready()
        _check_abilities(texts, body)
        asked = [await self.in_thread(texts.prompt, prompt, body.suffix) for prompt in body.prompts]
        making, echoes = _Making(texts, body, body.logprobs), dict[int, str]()
        for prompt, one in zip(body.prompts, asked, strict=True):
            echo = await self.in_thread(_echo, texts, prompt) if body.echo else ""
            max_tokens = _max_tokens(texts, one.prompt, body.max_tokens, TEXT_TOKENS, "prompt")
            is_scored, ids = body.echo and body.logprobs is not None, one.prompt.input_ids
            echoed = await self.in_thread(_offsets, texts, ids) if is_scored else ()
            made = making.add(one, max_tokens, echoed, len(echo))
            echoes |= {choice.index: echo for choice in made if body.echo}
        shape = CompletionShape(self._name, texts.token_bytes, echoes, body.logprobs)
        return self._reply(making, asked, shape)

    async def chat(self, body: ChatBody) -> Any:
        """The reply to POST /v1/chat/completions.   Raises ApiError, BMInfError."""
        texts = self._worker.ready()
        if not texts.can_chat:
            raise ApiError(400, _no_chat(texts), "messages", "chat_not_supported")
        messages = [message.as_message for message in body.messages]
        for message in messages:
            check_letters(texts, message["content"], "messages")
        asked = await self.in_thread(texts.dialogue, messages)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        making = _Making(texts, body, num_logprobs, keep=True)
        making.add(asked, _max_tokens(texts, asked.prompt, most, texts.max_length, "messages"))
        shape = ChatShape(self._name, texts.token_bytes, range(body.n), body.logprobs)
        return self._reply(making, [asked], shape)

    async def fill(self, body: FillBody) -> Any:
        """The reply to POST /v1/fill.   Raises ApiError, BMInfError."""
        texts = self._worker.ready()
        if not texts.can_fill:
            raise ApiError(400, "this model fills no blanks; CPM-2 and GLM do", "text")
        check_letters(texts, body.text, "text")
        settings = Settings(body.temperature, body.top_p, _top_k(body.top_k), seed=_seed(body.seed))
        fills = await self.in_thread(texts.fill, body.text, settings, body.max_tokens)
        return WholeReply(self._filled(fills), self._ping_s)

    # ---- replies --------------------------------------------------------------------------------

    def _reply(self, making: _Making, asked: Sequence[Asked], shape: Shape) -> Any:
        body = making.body
        num_prompt_tokens = sum(len(one.prompt.input_ids) for one in asked)
        reply = Reply(self._worker, making.inbox, making.choices, num_prompt_tokens)
        reply.submit()
        if body.stream:
            return EventStream(reply, shape, body.stream_options.include_usage, self._ping_s)
        return WholeReply(reply.whole(shape), self._ping_s, reply.cancel)

    async def _filled(self, fills: Fills) -> dict[str, Any]:
        """Blank after blank: each request that `fills` asks for is run before it goes on."""
        done: Request | None = None
        usage = Usage(0, 0)
        while True:
            request, blanks = await self.in_thread(_next, fills, done)
            if request is None:
                return {"model": self._name, "blanks": blanks, "usage": usage_json(usage)}
            await self._run(request, is_first=done is None)
            done, own = request, request.usage
            usage = Usage(
                usage.prompt_tokens + own.prompt_tokens,
                usage.completion_tokens + own.completion_tokens,
            )

    async def _run(self, request: Request, is_first: bool) -> None:
        """Until its end.   Raises ApiError."""
        inbox = Inbox()
        choice = Choice(0, inbox, lambda _: request, _NoText())
        reply = Reply(self._worker, inbox, [choice], request.usage.prompt_tokens)
        self._worker.submit([choice], is_continued=not is_first)
        try:
            async for _ in reply.pieces(self._ping_s):
                pass
        finally:
            reply.cancel()


class _NoText:
    """Of a request whose tokens are decoded together."""

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


# ---- what is asked -------------------------------------------------------------------------------


@dataclass
class _Making:
    """The choices of one reply.   num_logprobs: of each token, beside its own; None for none.
    keep: whether what they have read stays for a request that goes on from it."""

    texts: Texts
    body: Generating
    num_logprobs: int | None
    keep: bool = False
    inbox: Inbox = field(default_factory=Inbox)
    choices: list[Choice] = field(default_factory=list)

    def add(
        self,
        asked: Asked,
        max_tokens: int,
        echoed: Sequence[tuple[int, int]] = (),
        offset: int = 0,
    ) -> list[Choice]:
        """Those of one prompt.   echoed, offset: see Choice.   Raises ArgumentError."""
        first, is_empty = len(self.choices), max_tokens == 0 and not echoed
        most = 1 if is_empty else max_tokens  # a request needs one, also if it is not run
        request_of = partial(self._request, asked, most, bool(echoed))
        self.choices += [
            Choice(
                first + number, self.inbox, partial(request_of, number),
                self.texts.pieces(), self.body.stops, echoed, offset, is_empty,
            )
            for number in range(self.body.n)
        ]  # fmt: skip
        return self.choices[first:]

    def _request(
        self,
        asked: Asked,
        max_tokens: int,
        is_scored: bool,
        number: int,
        on_token: Callable[[int], bool],
    ) -> Request:
        settings = replace(_settings(self.body, self.texts), seed=_seed(self.body.seed_of(number)))
        request = self.texts.request(
            asked, settings, max_tokens, self.num_logprobs, on_token,
            self.num_logprobs if is_scored else None, self.keep,
        )  # fmt: skip
        self.texts.engine.check(request)
        return request


def _check_abilities(texts: Texts, body: CompletionBody) -> None:
    """Raise ApiError for what this model cannot do, and for what is too long for any tokenizer."""
    if body.echo and body.logprobs is not None and not texts.can_score:
        raise ApiError(400, "this model does not score its prompt; leave echo out", "echo")
    if body.suffix is not None and not texts.can_fill:
        raise ApiError(400, "this model fills no blanks; leave suffix out", "suffix")
    for prompt in body.prompts:
        check_letters(texts, prompt, "prompt")


def _settings(body: Generating, texts: Texts) -> Settings:
    biases = {_token(name, texts): bias for name, bias in body.logit_bias.items()}
    return Settings(
        body.temperature, body.top_p, _top_k(body.top_k), body.frequency_penalty,
        body.presence_penalty, None,
        tuple((token, bias) for token, bias in biases.items() if -100 < bias and bias != 0),
        tuple(token for token, bias in biases.items() if bias == -100),
    )  # fmt: skip


def _token(name: str, texts: Texts) -> int:
    """A key of logit_bias."""
    if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < texts.vocab_size):
        raise ApiError(
            400, f"logit_bias: its keys are token ids, 0 to {texts.vocab_size - 1}", "logit_bias"
        )
    return int(name)


def _top_k(top_k: int | None) -> int | None:
    """0 and -1 are all tokens, in some clients' words."""
    return top_k if top_k is not None and top_k > 0 else None


def _seed(seed: int | None) -> int | None:
    return None if seed is None else seed % 2**64


def check_letters(texts: Texts, text: str | Sequence[int], param: str) -> None:
    """Refuse, unread, what is too long for any tokenizer."""
    if isinstance(text, str) and len(text) > _LETTERS * texts.max_length:
        raise _too_long(f"{len(text)} characters", texts, param)


def _max_tokens(texts: Texts, prompt: Prompt, asked: int | None, default: int, param: str) -> int:
    """Of the answer, within the room that there is.   Raises ApiError."""
    if asked is not None and asked > texts.max_length:
        raise ApiError(
            400, f"max_tokens={asked if asked < 2**63 else 'a huge number'} is more than this "
            f"model can hold; accepted: at most {texts.max_length}", "max_tokens",
        )  # fmt: skip
    room = texts.room(prompt)
    if room < 1:
        raise _too_long(f"{len(prompt.input_ids)} tokens", texts, param)
    return min(default if asked is None else asked, room)


def _too_long(length: str, texts: Texts, param: str) -> ApiError:
    # Clients look for these words.
    text = f"prompt is too long: {length}, this model reads at most {texts.max_length} tokens"
    return ApiError(400, text, param, "context_length_exceeded")


def _no_chat(texts: Texts) -> str:
    also = " and /v1/fill" if texts.can_fill else ""
    return (
        f"this model has no chat template; use /v1/completions{also}, or start the server with "
        "--chat-template FILE, the template of its authors"
    )


def _echo(texts: Texts, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else texts.decode(prompt)


def _offsets(texts: Texts, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Each token, and how many characters stand before it."""
    pieces, offset, found = texts.pieces(), 0, []
    for token in ids:
        found.append((token, offset))
        offset += len(pieces.feed(token))
    return found


def _next(fills: Fills, done: Request | None) -> tuple[Request | None, list[dict[str, Any]]]:
    """The next request; or none, and the blanks."""
    try:
        return (next(fills) if done is None else fills.send(done)), []
    except StopIteration as end:
        return None, end.value
