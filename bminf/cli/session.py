"""A model as the verbs use it: found, loaded, asked. How it generates only sessions know."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bminf.cli.wording import in_flags
from bminf.errors import ArgumentError, CheckpointError, UnsupportedModelError
from bminf.offload.phase import Phase, phase_between
from bminf.progress import spinner
from bminf.units import format_bytes

if TYPE_CHECKING:
    from bminf.evaluation.scorers import TextScorer, TokenScorer
    from bminf.models import GLM
    from bminf.offload.hooks import Stats
    from bminf.offload.plan import Plan
    from bminf.server.texts import Texts

Options = Mapping[str, Any]
"""Options of generating, under the names of bminf.models.Options; those that were given."""

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""

Write = Callable[[str], None]
"""What takes a text as it comes, piece by piece."""

NEW_TOKENS = 256
"""The most tokens of an answer, unless it was said."""


@dataclass(frozen=True)
class AnswerStats:
    """Counters of one answer. Times in seconds; sizes in bytes.

    prefill: until its first text came.   decode: after that.   decode_tokens: of the new ones,
    those that were generated then.
    """

    prompt_tokens: int
    new_tokens: int
    decode_tokens: int
    prefill: Phase
    decode: Phase

    @property
    def first_text_s(self) -> float:
        return self.prefill.seconds

    @property
    def total_s(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def bytes_copied(self) -> int:
        return self.prefill.bytes_copied + self.decode.bytes_copied

    @property
    def decode_bytes(self) -> int:
        return self.decode.bytes_copied

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None where there was no token after the first text."""
        return self.decode_tokens / self.decode.seconds if self.decode_tokens else None

    @property
    def decode_bytes_per_token(self) -> float | None:
        return self.decode_bytes / self.decode_tokens if self.decode_tokens else None

    def as_json(self) -> dict[str, Any]:
        names = (
            *("prompt_tokens", "new_tokens", "first_text_s", "total_s", "bytes_copied"),
            *("decode_tokens", "decode_bytes", "decode_tokens_per_s", "decode_bytes_per_token"),
        )
        phases = {"prefill": self.prefill.as_json(), "decode": self.decode.as_json()}
        return {name: getattr(self, name) for name in names} | phases

    def __str__(self) -> str:
        line = (
            f"{self.prompt_tokens} tokens read and {self.new_tokens} generated in "
            f"{self.total_s:.2f} s, the first text after {self.first_text_s:.2f} s"
        )
        if self.decode_tokens_per_s is None or self.decode_bytes_per_token is None:
            return f"{line}\nprefill  {self.prefill}"
        copied = format_bytes(self.decode_bytes_per_token)
        line += f"; then {self.decode_tokens_per_s:.1f} tokens/s, {copied} copied a token"
        return f"{line}\nprefill  {self.prefill}\ndecode   {self.decode}"


@dataclass(frozen=True)
class Answer:
    """finish_reason: "length" where as many tokens came as were allowed, and none of them, nor the
    text, ended it; else "stop"."""

    text: str
    finish_reason: Literal["stop", "length"]
    stats: AnswerStats

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_json(),
        }


def find(arguments: argparse.Namespace) -> Session:
    """What MODEL is: its tokenizer can be read by then, but no weight.

    Raises ArgumentError or CheckpointError.
    """
    path = Path(arguments.model).expanduser()
    if path.suffix == ".gguf":
        from bminf.cli.session_pretrained import GGUFSession

        return GGUFSession(arguments, path)
    _check_holds_no_gguf(path)
    with spinner("importing torch"):
        from bminf.loading import zoo_class
    kind, folder = zoo_class(
        arguments.model, arguments.built_in, trust_remote_code=arguments.trust_remote_code
    )
    if kind is None:
        from bminf.cli.session_pretrained import PretrainedSession

        return PretrainedSession(arguments, folder)
    from bminf.cli.session_zoo import ZooSession

    return ZooSession(arguments, folder, kind)


def _check_holds_no_gguf(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.gguf")) if folder.is_dir() else []
    if names and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; name one of {', '.join(names)}")


class Session:
    """One model. A prompt is what prompt(), dialogue() or blanks() makes of a text.

    title: for people.
    Once it is loaded: plan, device, max_length: tokens of prompt and answer together; where there
    is an encoder (has_encoder), of each. None where nothing bounds them.
    """

    title: str
    plan: Plan
    device: str
    max_length: int | None
    has_encoder: bool
    _not_taken: Mapping[str, str] = {}  # options of generating -> what to give instead

    def __init__(self, arguments: argparse.Namespace) -> None:
        for name, instead in self._not_taken.items():
            if getattr(arguments, name, None) is not None:
                raise ArgumentError(
                    f"--{name.replace('_', '-')} is not for this model; give {instead}"
                )
        self._arguments = arguments

    def prompt(self, text: str) -> Any:
        """To be continued.   Raises ArgumentError."""
        raise NotImplementedError

    def dialogue(self, messages: Sequence[Message], template: str | None = None) -> Any:
        """To be answered.   template: in place of the model's own chat template.

        Raises ArgumentError, or UnsupportedModelError for a model that answers none.
        """
        raise NotImplementedError

    def blanks(self, text: str) -> Any:
        """To be filled.   Raises UnsupportedModelError for a model that fills no blanks."""
        raise UnsupportedModelError(
            f"{self.title} fills no blanks; CPM-2 and GLM do: use bminf generate to continue a text"
        )

    def count(self, prompt: Any) -> int:
        """Its tokens; of a built-in model, once it is loaded."""
        raise NotImplementedError

    def length_for(self, prompt: Any, options: Options) -> int | None:
        """The length to load() for one answer; None is the model's own."""
        raise NotImplementedError

    def room(self, prompt: Any) -> int | None:
        """The most tokens that an answer has room for; None where the prompt takes none of it."""
        return None

    @property
    def plan_text(self) -> str:
        return in_flags(str(self.plan), self._arguments.flags)

    @property
    def room_line(self) -> str:
        """For how many tokens there is room, in the user's words; once it is loaded."""
        if self.max_length is None:
            return "room for as many tokens as memory has"
        what = (
            "for each, prompt and answer" if self.has_encoder else "of prompt and answer together"
        )
        return f"room for {self.max_length:,} tokens {what}; --max-length sets it"

    def load(self, usual_length: int | None) -> None:
        """Read the weights.

        usual_length: tokens of prompt and answer that memory is set aside for, unless --max-length
        says it; built-in models have a usual length of their own.
        """
        raise NotImplementedError

    def answer(
        self,
        prompt: Any,
        options: Options,
        write: Write,
        ignores_end: bool = False,
        goes_on: bool = False,
    ) -> Answer:
        """Generate, and give the text to `write` as it comes.

        ignores_end: never end before the most tokens that are allowed.   goes_on: whether the next
        prompt may begin with this one and its answer, which is then not read again if it can be.
        Raises ArgumentError or UnsupportedModelError.
        """
        raise NotImplementedError

    def fill(self, prompt: Any, options: Options) -> tuple[list[dict[str, Any]], AnswerStats]:
        """{"position", "text"} of each blank."""
        raise NotImplementedError

    def served(self, template: str | None, deterministic: bool) -> Texts:
        """The loaded model as a server uses it.   template: as of dialogue().   deterministic: see
        bminf.Engine."""
        raise NotImplementedError

    def scorer(self) -> TokenScorer | TextScorer:
        """What tells how probable the loaded model finds texts."""
        raise NotImplementedError

    def glm(self) -> GLM:
        """The loaded model, if it is a GLM.   Raises ArgumentError for any other."""
        raise ArgumentError(
            f"{self.title} is no GLM, and a task of this form is for one; give a task of "
            "lm-evaluation-harness"
        )

    def plain(self) -> tuple[Any, Any]:
        """The model as its files have it, not wrapped, and its tokenizer, which a built-in model
        has itself; in place of load()."""
        raise NotImplementedError

    def follow(self) -> None:
        """On a rank other than 0: compute with that, until it closes its model."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what close() of a built-in model does."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Meter:
    """Measures one answer.   read: tokens, and what was copied, since any time before it."""

    def __init__(self, read: Callable[[], tuple[int, Stats]]) -> None:
        self._read = read
        self._first: tuple[float, int, Stats] | None = None
        self._start = self._now()

    def text_came(self) -> None:
        if self._first is None:
            self._first = self._now()

    def stats(self, prompt_tokens: int) -> AnswerStats:
        start_s, old_tokens, old = self._start
        end_s, tokens, new = end = self._now()
        first_s, first_tokens, first = self._first or end
        return AnswerStats(
            prompt_tokens,
            tokens - old_tokens,
            tokens - first_tokens,
            phase_between(old, first, first_s - start_s),
            phase_between(first, new, end_s - first_s),
        )

    def _now(self) -> tuple[float, int, Stats]:
        return (time.perf_counter(), *self._read())
