"""How a text is generated: one set of names and defaults for all methods of the zoo."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from bminf.checks import check_positive, is_number
from bminf.errors import ArgumentError
from bminf.generation.sampling import Sampling
from bminf.keywords import check_keywords
from bminf.tokenizers.base import Tokenizer

OTHER_NAMES = {"max_new_tokens": "max_tokens", "stop": "stop_tokens"}
"""What other libraries call an option -> its name here; all methods take both."""


@dataclass(frozen=True)
class Options:
    """The keywords of generate(), generate_iter() and generate_batch().

    max_tokens: most tokens of the answer (also called max_new_tokens).   top_n: only this many of
    the likeliest tokens are drawn from (also called top_k).   top_p: only the likeliest ones whose
    probabilities exceed it together; of both, the stricter counts.   temperature: 0 always takes
    the likeliest.
    frequency_penalty, presence_penalty: taken off the logits of tokens that occurred, prompt
    included, each time and once.   stop_tokens: tokens of the vocabulary that end the answer, or
    one of them (also called stop).   banned_tokens: tokens that are never drawn.   seed: the same
    seed, the same text.
    num_beams: more than 1 searches for the likeliest answer instead of drawing one; temperature
    then has no meaning.   length_penalty: beam scores are divided by length ** length_penalty.
    Raises ArgumentError.
    """

    max_tokens: int = 128
    top_n: int | None = None
    top_p: float | None = None
    temperature: float = 0.9
    frequency_penalty: float = 0
    presence_penalty: float = 0
    stop_tokens: Sequence[str] | str | None = None
    top_k: int | None = None
    banned_tokens: Sequence[str] | None = None
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "num_beams", "top_n", "top_k"):
            value = getattr(self, name)
            if value is not None or name in ("max_tokens", "num_beams"):
                check_positive(name, value)
        if self.top_n is not None and self.top_k is not None:
            raise ArgumentError("top_n and top_k are two names of one thing; give one of them")
        if isinstance(self.stop_tokens, str):  # as other libraries take it: one token
            object.__setattr__(self, "stop_tokens", [self.stop_tokens])
        for name in ("stop_tokens", "banned_tokens"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Collection | None):
                raise ArgumentError(f"{name}={value!r}; give a list of tokens")
        self.sampling((), ())  # which refuses what cannot be sampled with
        self._check_beams()

    def with_keywords(self, keywords: dict[str, Any]) -> Options:
        """These options but for `keywords`. Raises UnknownKeywordError for one that is none."""
        check_keywords(type(self).__name__, keywords, self.names())
        return replace(self, **keywords)

    @classmethod
    def names(cls) -> list[str]:
        """Of the options, in order."""
        return [field.name for field in fields(cls)]

    def check(self, vocab_size: int) -> None:
        """Raise ArgumentError for what does not go together with a vocabulary of this size."""
        for name in ("top_n", "top_k"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ArgumentError(
                    f"{name}={getattr(self, name)} is more than the {vocab_size} tokens of the "
                    "vocabulary; accepted: at most that many, or None for all"
                )

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        return _ids("stop_tokens", self.stop_tokens, tokenizer)

    def banned_ids(self, tokenizer: Tokenizer) -> list[int]:
        return _ids("banned_tokens", self.banned_tokens, tokenizer)

    def sampling(self, banned_ids: Sequence[int], unpenalized_ids: Sequence[int]) -> Sampling:
        """As generation/ understands it.   Raises ArgumentError."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k if self.top_n is None else self.top_n,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            banned_ids=tuple(banned_ids),
            unpenalized_ids=tuple(unpenalized_ids),
            seed=self.seed,
        )

    def _check_beams(self) -> None:
        if not is_number(self.length_penalty):
            raise ArgumentError(
                f"length_penalty={self.length_penalty!r}; accepted: a finite number"
            )
        if self.num_beams == 1:
            for name, default in self._only_for_beams().items():
                if getattr(self, name) != default:
                    raise ArgumentError(f"{name} is for num_beams above 1; leave it out")
            return
        given = [n for n, none in self._only_without_beams().items() if getattr(self, n) != none]
        if given:
            raise ArgumentError(
                f"num_beams={self.num_beams} searches for the likeliest text, and {given[0]} is "
                "for drawing one; leave one of them out"
            )

    def _only_for_beams(self) -> dict[str, Any]:
        """Name -> the value that says nothing."""
        defaults = {field.name: field.default for field in fields(self)}
        return {"length_penalty": defaults["length_penalty"]}

    def _only_without_beams(self) -> dict[str, Any]:
        unset = dict.fromkeys(("top_n", "top_k", "top_p", "seed"))
        return {**unset, "frequency_penalty": 0, "presence_penalty": 0}


def _ids(name: str, tokens: Collection[str] | None, tokenizer: Tokenizer) -> list[int]:
    try:
        return [tokenizer.token_id(token) for token in tokens or ()]
    except ArgumentError as error:
        raise ArgumentError(f"{name}={list(tokens or ())!r}: {error}") from error
