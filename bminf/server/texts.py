"""What a model has to offer to be served: from a text to a request of its engine, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.models.prompt import Prompt
from bminf.offload.hooks import Stats
from bminf.offload.plan import Plan
from bminf.tokenizers.gpt2 import BYTES

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""

Fills = Generator[Request, Request, list[dict[str, Any]]]
"""Requests one after another, each sent back when it has ended; then {"position", "text"} of each
blank."""


@dataclass(frozen=True)
class Settings:
    """How one answer is generated; None is the model's own default.

    temperature 0, and top_p 0, always take the most probable token.   seed: at least 0.
    logit_bias: (token, what is added to its logit).   banned_ids: tokens that never come.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0


@dataclass(frozen=True)
class Asked:
    """A prompt, and the tokens that end its answer."""

    prompt: Prompt
    stop_ids: frozenset[int]


class Pieces(Protocol):
    """The text of tokens that come one by one."""

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Texts(Protocol):
    """A loaded model.

    max_length: tokens of a prompt, or of prompt and answer.   can_chat, can_fill, can_score:
    whether it answers messages, fills blanks, and tells how probable the tokens of a prompt are.
    special: "eos_token", "bos_token", "pad_token", "chat_template", as text or None.
    All but engine, plan and stats may be used from any thread.   Raises ArgumentError, or
    UnsupportedModelError for what this model does not do.
    """

    engine: Engine
    max_length: int
    vocab_size: int
    can_chat: bool
    can_fill: bool
    can_score: bool
    special: Mapping[str, str | None]

    @property
    def plan(self) -> Plan: ...

    @property
    def stats(self) -> Stats: ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; part of a character, maybe."""
        ...

    def prompt(self, text: str | Sequence[int], suffix: str | None = None) -> Asked:
        """To be continued, or with a suffix, for what is to stand between."""
        ...

    def dialogue(self, messages: Sequence[Message]) -> Asked:
        """To be answered; or if the last one is the assistant's, to be continued."""
        ...

    def room(self, prompt: Prompt) -> int:
        """The most tokens of an answer; less than 1 where there is no room for the prompt."""
        ...

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
        """See Request for num_logprobs and what stands behind it."""
        ...

    def pieces(self) -> Pieces: ...

    def fill(self, text: str, settings: Settings, max_tokens: int) -> Fills: ...


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(piece: str, text: str) -> bytes:
    """Of a token that is spelled `piece` in its vocabulary and decoded to `text` by itself."""
    if "\N{REPLACEMENT CHARACTER}" in text:
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"  # which decoders drop from the beginning of a text
    return text.encode()


def token_text(nbytes: bytes) -> str:
    """As OpenAI's protocol writes a token: part of a character as its bytes."""
    try:
        return nbytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in nbytes)
