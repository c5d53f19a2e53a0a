"""A built-in model behind the verbs of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bminf.cli import sources
from bminf.cli.session import Answer, AnswerStats, Message, Meter, Options, Session, Write
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.progress import spinner

if TYPE_CHECKING:
    from bminf.evaluation.scorers import TextScorer, TokenScorer
    from bminf.models import GLM, LanguageModel
    from bminf.offload.hooks import Stats
    from bminf.server.texts import Texts


class ZooSession(Session):
    """A prompt is a text; of a dialogue, the utterances."""

    _not_taken: Mapping[str, str] = {
        "repetition_penalty": "--frequency-penalty or --presence-penalty"
    }

    def __init__(
        self, arguments: argparse.Namespace, folder: Path, kind: type[LanguageModel]
    ) -> None:
        super().__init__(arguments)
        sources.check_format(arguments.quantization, is_glm=kind.__name__ == "GLM")
        self._folder, self._kind = folder, kind
        self._model: LanguageModel | None = None
        self.title = kind.__name__

    def prompt(self, text: str) -> str:
        return text

    def dialogue(self, messages: Sequence[Message], template: str | None = None) -> list[str]:
        if not hasattr(self._kind, "dialogue"):
            raise UnsupportedModelError(
                f"{self.title} is a base model, which holds no dialogue; use bminf generate"
                + (" or bminf fill" if hasattr(self._kind, "fill_blank") else "")
            )
        if template is not None or any(message["role"] == "system" for message in messages):
            raise ArgumentError(
                f"{self.title} reads utterances without roles; leave out --system and "
                "--chat-template"
            )
        # An utterance has tokens, and an answer may have none but its end.
        return [message["content"] or "。" for message in messages]

    def blanks(self, text: str) -> str:
        return text if hasattr(self._kind, "fill_blank") else super().blanks(text)

    def count(self, prompt: str | list[str]) -> int:
        return len(self._loaded._prompt(prompt).input_ids)

    def length_for(self, prompt: Any, options: Options) -> None:
        return None

    def load(self, usual_length: int | None) -> None:
        given = self._arguments
        from bminf.models.t5 import T5Model

        more: dict[str, Any] = {}
        if getattr(given, "deterministic", None):
            more["deterministic"] = True
        if getattr(given, "no_fused_kernels", None):
            more["fused_kernels"] = False
        if given.quantization is not None:
            more["quantization"] = None if given.quantization == "none" else given.quantization
        with spinner(f"loading {self._folder.name}"):
            self._model = self._kind(
                self._folder, given.memory_limit, device=given.device,
                max_length=given.max_length, max_batch_size=given.max_batch_size,
                offload_dir=given.offload_dir, **more,
            )  # fmt: skip
        self.plan, self.device = self._model.plan, str(self._model.device)
        self.max_length = self._model.max_length
        self.has_encoder = isinstance(self._model, T5Model)

    def answer(
        self,
        prompt: Any,
        options: Options,
        write: Write,
        ignores_end: bool = False,
        goes_on: bool = False,
    ) -> Answer:
        model = self._loaded
        if ignores_end:
            ends = sorted(set(model._end_ids()))
            options = {**options, "banned_tokens": model.tokenizer.tokens(ends)}
        pieces = []
        meter = Meter(self._counters)
        text = model.generate_iter(prompt, **options)
        for piece in text:
            meter.text_came()
            pieces.append(piece)
            write(piece)
        stats = meter.stats(self.count(prompt))
        reason: Literal["stop", "length"] = "length" if text.finish_reason == "length" else "stop"
        return Answer("".join(pieces), reason, stats)

    def fill(self, prompt: Any, options: Options) -> tuple[list[dict[str, Any]], AnswerStats]:
        model: Any = self._loaded
        old = model.stats
        blanks = model.fill_blank(prompt, **options)
        new, num_read = model.stats, len(model.tokenizer.encode(prompt))
        num_tokens, num_first = new.num_tokens - old.num_tokens, new.num_requests - old.num_requests
        return blanks, AnswerStats(
            num_read, num_tokens, num_tokens - num_first, new.prefill - old.prefill,
            new.decode - old.decode,
        )  # fmt: skip

    def served(self, template: str | None, deterministic: bool) -> Texts:
        from bminf.server.zoo import ZooTexts

        dialogue = partial(self.dialogue, template=template)
        return ZooTexts(self._loaded, dialogue, deterministic)

    def scorer(self) -> TokenScorer | TextScorer:
        from bminf.evaluation.scorers import scorer_of

        return scorer_of(self._loaded)

    def glm(self) -> GLM:
        from bminf.models import GLM

        return self._loaded if isinstance(self._loaded, GLM) else super().glm()

    def plain(self) -> tuple[Any, None]:
        self.load(None)
        return self._loaded, None

    def follow(self) -> None:
        self._loaded.follow()

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

    @property
    def _loaded(self) -> LanguageModel:
        assert self._model is not None, "load() comes first"
        return self._model

    def _counters(self) -> tuple[int, Stats]:
        stats = self._loaded.stats
        return stats.num_tokens, stats
