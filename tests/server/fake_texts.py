"""A model to be served with no network behind: its tokens are bytes, and it says what it is told.

A prompt is a script: after its last ">" stands what is answered, byte by byte, and then the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fake_rows import FakeRows

from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError
from bminf.models.prompt import Prompt
from bminf.offload.hooks import Stats
from bminf.offload.plan import Block, plan
from bminf.server.texts import Asked, Settings

END, START, VOCAB = 256, 257, 258
SURE = 20.0  # a logit beside zeros


def logits_of(history: Sequence[int]) -> list[float]:
    """ "NaN" in a prompt makes them that; "random" leaves all tokens alike."""
    at = history.index(START) if START in history else len(history) - 1
    prompt, said = bytes(token for token in history[:at] if token < 256), history[at + 1 :]
    if b"NaN" in prompt:
        return [float("nan")] * VOCAB
    if b"random" in prompt:
        return [0.0] * 256 + [-SURE] * 2
    answer = [*prompt.rpartition(b">")[2], END]
    logits = [0.0] * VOCAB
    logits[answer[min(len(said), len(answer) - 1)]] = SURE
    return logits


class Gate:
    """Holds passes up while it is shut.   patience_s: after which nobody opens it any more."""

    def __init__(self) -> None:
        self.patience_s = 30.0
        self._open = threading.Event()
        self._open.set()
        self.shut, self.open = self._open.clear, self._open.set

    def wait(self, feeds: object) -> None:
        assert self._open.wait(self.patience_s), "no test opened it"


class Bytes:
    """Text of bytes that come one by one."""

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, token_id: int) -> str:
        self._bytes += bytes([token_id]) if token_id < 256 else b""
        return self._final(is_last=False)

    def finish(self) -> str:
        return self._final(is_last=True)

    def _final(self, is_last: bool) -> str:
        try:
            text, self._bytes = self._bytes.decode(), b""
        except UnicodeDecodeError as error:
            if not is_last and error.reason == "unexpected end of data":
                return ""
            text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


class FakeTexts:
    can_chat = can_fill = can_score = True

    def __init__(self, num_tokens: int = 4096, max_rows: int = 64, **settings: Any) -> None:
        none = dict.fromkeys(("bos_token", "pad_token"))
        self.special = {"eos_token": "<end>", "chat_template": "x", **none}
        self.gate = Gate()
        self.rows = FakeRows(logits_of, num_tokens, VOCAB, max_rows)
        self.rows.before = self.gate.wait
        self.engine = Engine(self.rows, **settings)
        self.max_length, self.vocab_size = num_tokens, VOCAB
        self.plan = plan([Block(f"layer.{i}", 100) for i in range(8)], 500)
        self.stats = Stats()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if text == "<end>":
            return [END]
        return [*text.encode(), *([START] if add_special_tokens else [])]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<end>"

    def prompt(self, text: str | Sequence[int], suffix: str | None = None) -> Asked:
        if suffix is not None:
            return self._asked([*f"{text}[{suffix}]>blank".encode(), START])
        if not text:
            raise ArgumentError("the text is empty")
        return self._asked(self.encode(text, True) if isinstance(text, str) else list(text))

    def dialogue(self, messages: Sequence[Any]) -> Asked:
        if any("refuse" in message["content"] for message in messages):
            raise ArgumentError("the template refuses these messages")
        text = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        return self._asked(self.encode(text.rstrip("\n"), True))

    def _asked(self, ids: list[int]) -> Asked:
        return Asked(Prompt(ids, ids), frozenset([END]))

    def room(self, prompt: Prompt) -> int:
        return self.max_length - len(prompt.input_ids) + 1

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
        temperature = 1.0 if settings.temperature is None else settings.temperature
        sampling = Sampling(
            0.0 if settings.is_greedy else temperature, seed=settings.seed,
            logit_bias=settings.logit_bias, banned_ids=settings.banned_ids,
        )  # fmt: skip
        return Request(
            asked.prompt.input_ids, max_tokens, sampling, asked.stop_ids,
            num_logprobs=num_logprobs, num_prompt_logprobs=num_prompt_logprobs, on_token=on_token,
            keep=keep,
        )  # fmt: skip

    def pieces(self) -> Bytes:
        return Bytes()

    def fill(self, text: str, settings: Settings, max_tokens: int) -> Any:
        """Blanks are "_"; each answer is the text before its blank."""
        parts, found = text.split("_")[:-1], []
        if not parts:
            raise ArgumentError("the text has no blanks")
        for part in parts:
            asked = self._asked([*f">{part}".encode(), START])
            done = yield self.request(asked, settings, max_tokens)
            found.append({"position": len(part), "text": self.decode(done.tokens)})
        return found
