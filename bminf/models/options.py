"""How a text is generated: the options of all built-in models, and those of GLM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from bminf.checks import (
    check_bool,
    check_ids,
    check_int,
    check_positive,
    is_number,
    make_plain,
)
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError
from bminf.keywords import check_keywords, known_fields
from bminf.models.arguments import present_ids
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.stop_strings import check_stop

ALIASES = {"max_new_tokens": "max_tokens"}
"""Other libraries' names of options -> their names here; all methods accept both."""


@known_fields
@dataclass(frozen=True)
class Options:
    """The keywords of generate(), generate_iter() and generate_batch().

    max_tokens: the most tokens of the answer (also called max_new_tokens).   top_n: sample only
    from this many of the most probable tokens (also called top_k).   top_p: sample only from the
    most probable tokens whose probabilities together exceed it; a token has to pass both.
    temperature: 0 always takes the most probable token (greedy).
    frequency_penalty, presence_penalty: subtracted from the logits of tokens that occurred in the
    prompt or the answer, for each occurrence and once.   stop_tokens: tokens of the vocabulary that
    end the answer, or one of them.   banned_tokens: tokens that are never generated.   seed: the
    same seed gives the same text.
    num_beams: more than 1 searches for the most probable answer instead of sampling one, and
    ignores temperature.   length_penalty: beam scores are divided by length ** length_penalty.
    stop: a text before which the answer ends, or up to 64 of them, whatever tokens they lie in; a
    special token such as "<eod>" ends it, too. For a beam search and fill_blank(), which end at
    tokens alone, each has to be a token.
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
    stop: Sequence[str] | str | None = field(default=(), kw_only=True)
    _of_beams: ClassVar[Sequence[str]] = ("length_penalty",)

    def __post_init__(self) -> None:
        make_plain(self)
        check_positive("max_tokens", self.max_tokens)
        check_positive("num_beams", self.num_beams)
        check_positive("top_n", self.top_n, none="None for all tokens")
        if self.top_n is not None and self.top_k is not None:
            raise ArgumentError("top_n and top_k are two names of one option; give one of them")
        if isinstance(self.stop_tokens, str):  # as other libraries take it: one token
            object.__setattr__(self, "stop_tokens", [self.stop_tokens])
        object.__setattr__(self, "stop", check_stop(self.stop))
        for name in ("stop_tokens", "banned_tokens"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Collection | None):
                raise ArgumentError(f"{name}={value!r}; give a list of tokens")
        self.sampling((), ())  # which checks the options of sampling
        if not is_number(self.length_penalty):
            raise ArgumentError(
                f"length_penalty={self.length_penalty!r}; accepted: a finite number"
            )
        if self.num_beams > 1 and (given := self._given(self._of_sampling())):
            raise ArgumentError(
                f"num_beams={self.num_beams} searches for the most probable text, and {given[0]} "
                "is for sampling one; leave one of them out"
            )
        if self.num_beams == 1 and (given := self._given(self._of_beams)):
            raise ArgumentError(f"{given[0]} is for num_beams above 1; leave it out")

    def with_keywords(self, keywords: dict[str, Any]) -> Options:
        """These options with `keywords` replaced.   Raises UnknownKeywordError."""
        check_keywords(type(self).__name__, keywords, self.names())
        return replace(self, **keywords)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the options, in order."""
        return [one.name for one in fields(cls)]

    def check(self, vocab_size: int) -> None:
        """Raise ArgumentError for options that do not fit a vocabulary of this size."""
        self.sampling((), ()).check(vocab_size)

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        ids = _ids("stop_tokens", self.stop_tokens, tokenizer)
        return [*ids, *(token for one in self.stop or () for token in _unseen(one, tokenizer))]

    def with_stop_tokens(self) -> Options:
        """These options where an answer can end at tokens alone."""
        return replace(self, stop_tokens=[*(self.stop_tokens or ()), *(self.stop or ())], stop=())

    def banned_ids(self, tokenizer: Tokenizer) -> list[int]:
        return _ids("banned_tokens", self.banned_tokens, tokenizer)

    def sampling(self, banned_ids: Sequence[int], unpenalized_ids: Sequence[int]) -> Sampling:
        """These options as a Sampling.   Raises ArgumentError."""
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

    def _of_sampling(self) -> Sequence[str]:
        """The options of sampling, which a beam search does not use."""
        return ("top_n", "top_k", "top_p", "seed", "frequency_penalty", "presence_penalty")

    def _given(self, names: Sequence[str]) -> list[str]:
        """Those of `names` whose value is not the default."""
        chosen = [one for one in fields(self) if one.name in names]
        return [one.name for one in chosen if getattr(self, one.name) != one.default]


@known_fields
@dataclass(frozen=True)
class GLMOptions(Options):
    """The keywords of a GLM's generate(), generate_iter(), generate_batch() and fill_blank().

    In addition to those of Options:
    out_seq_length: tokens of text and answer together, in place of max_tokens.
    end_tokens: ids that end an answer, in place of eop and eos.
    min_length: the fewest tokens of an answer.   no_repeat_ngram_size: n-grams of this many tokens
    occur only once in an answer; 0 for no such rule.   deterministic: False samples the sequences
    that a beam search continues; `seed` then makes them repeatable. (Not that of GLM(...), which is
    about the company of a text.)
    num_return_sequences: how many of the num_beams sequences are returned.
    The last four are for num_beams above 1, and the first three of these only for GLM-130B.
    length_penalty: GLM-130B's scores are divided by ((5 + tokens, text included) / 6) to its power.
    top_k and top_p: top_k is applied first, keeping ties with the last token, then top_p.
    """

    temperature: float = 1.0
    length_penalty: float = 0.0
    out_seq_length: int | None = None
    end_tokens: Sequence[int] | None = None
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    deterministic: bool = True
    num_return_sequences: int | None = None
    _of_beams: ClassVar[Sequence[str]] = (
        *Options._of_beams,
        *("min_length", "no_repeat_ngram_size", "deterministic", "num_return_sequences"),
    )

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("out_seq_length", "num_return_sequences"):
            check_positive(name, getattr(self, name), none="None")
        for name in ("min_length", "no_repeat_ngram_size"):
            check_int(name, getattr(self, name), minimum=0)
        check_bool("deterministic", self.deterministic)
        super().__post_init__()
        wanted = self.num_return_sequences
        if wanted is not None and wanted > self.num_beams:
            raise ArgumentError(
                f"num_return_sequences={wanted} is more than num_beams={self.num_beams}; a search "
                "finds at most that many"
            )

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        if self.end_tokens is not None:
            is_list = isinstance(self.end_tokens, Sequence) and not isinstance(self.end_tokens, str)
            if not is_list or not self.end_tokens:
                raise ArgumentError(
                    f"end_tokens={self.end_tokens!r}; give a list of token ids, at least one"
                )
            check_ids("end_tokens", self.end_tokens, vocab_size)

    def _of_sampling(self) -> Sequence[str]:
        names = super()._of_sampling()
        return names if self.deterministic else [name for name in names if name != "seed"]


def _unseen(text: str, tokenizer: Tokenizer) -> list[int]:
    """The id of a token that is called so, and is not that in a text, as special tokens are."""
    return [one for one in present_ids(tokenizer, [text]) if text not in tokenizer.decode([one])]


def _ids(name: str, tokens: Collection[str] | None, tokenizer: Tokenizer) -> list[int]:
    try:
        return [tokenizer.token_id(token) for token in tokens or ()]
    except ArgumentError as error:
        raise ArgumentError(f"{name}={list(tokens or ())!r}: {error}") from error
