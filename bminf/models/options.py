"""How a text is generated: one set of names and defaults for all methods of the zoo."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from bminf.errors import ArgumentError, UnknownKeywordError
from bminf.generation.sampling import Sampling
from bminf.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Options:
    """The keywords of generate(), generate_iter() and generate_batch().

    max_tokens: most tokens of the answer.   top_n: only this many of the likeliest tokens are drawn
    from (also called top_k).   top_p: only the likeliest ones whose probabilities exceed it
    together; of both, the stricter counts.   temperature: 0 always takes the likeliest.
    frequency_penalty, presence_penalty: taken off the logits of tokens that occurred, prompt
    included, each time and once.   stop_tokens: tokens of the vocabulary that end the answer.
    banned_tokens: tokens that are never drawn.   seed: the same seed, the same text.
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
    stop_tokens: Sequence[str] | None = None
    top_k: int | None = None
    banned_tokens: Sequence[str] | None = None
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "num_beams"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name}={value!r}; accepted: an int of at least 1")
        if self.top_n is not None and self.top_k is not None:
            raise ArgumentError("top_n and top_k are two names of one thing; give one of them")
        for name in ("stop_tokens", "banned_tokens"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Collection | None):
                raise ArgumentError(f"{name}={value!r}; give a list of tokens")
        if self.num_beams > 1:
            self._check_beams()

    def with_keywords(self, keywords: dict[str, Any]) -> Options:
        """These options but for `keywords`. Raises UnknownKeywordError for one that is none."""
        names = [field.name for field in fields(self)]
        unknown = [name for name in keywords if name not in names]
        if unknown:
            raise UnknownKeywordError(f"{unknown[0]!r} is no option; accepted: {', '.join(names)}")
        is_search = keywords.get("num_beams", 1) != 1
        if (is_search or keywords.get("top_k") is not None) and "top_n" not in keywords:
            keywords = {**keywords, "top_n": None}  # a default that does not go with what was asked
        return replace(self, **keywords)

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.token_id(token) for token in self.stop_tokens or ()]

    def banned_ids(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.token_id(token) for token in self.banned_tokens or ()]

    def sampling(self, banned_ids: Sequence[int], unpenalized_ids: Sequence[int]) -> Sampling:
        """As generation/ understands it.   Raises ArgumentError."""
        if self.top_n is not None and (type(self.top_n) is not int or self.top_n < 1):
            raise ArgumentError(f"top_n={self.top_n!r}; accepted: an int of at least 1, or None")
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
        sampled = ("top_n", "top_k", "top_p", "frequency_penalty", "presence_penalty", "seed")
        given = [name for name in sampled if getattr(self, name) not in (None, 0)]
        if given:
            raise ArgumentError(
                f"num_beams={self.num_beams} searches for the likeliest text, and {given[0]} is "
                "for drawing one; leave one of them out"
            )
