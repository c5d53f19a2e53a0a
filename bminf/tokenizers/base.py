"""What a tokenizer is: text into the ids of a model's vocabulary, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from bminf.errors import ArgumentError
from bminf.tokenizers.joining import Joiner
from bminf.tokenizers.vocabulary import Vocabulary


class Tokenizer(Protocol):
    """What the models ask of a tokenizer; any object that has all of it will do.

    vocab_size: number of ids.   files: what it was read from, for a converted folder to carry.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises ArgumentError for what is not text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Raises ArgumentError for an id out of range."""
        ...

    def token_id(self, token: str) -> int:
        """The id of exactly this token, such as "<eod>". Raises ArgumentError, naming near ones."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own strings. Raises ArgumentError for an id out of range."""
        ...


class SentinelTokenizer(Tokenizer, Protocol):
    """A tokenizer of the T5 family: it has sentinels `<s_0>`, `<s_1>`, ..., which stand for
    spans of text."""

    @property
    def num_sentinels(self) -> int: ...

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of `<s_0>`, `<s_1>`, ..., in this order."""
        ...

    def sentinel(self, k: int) -> int:
        """The id of `<s_k>`. Raises ArgumentError where there is none."""
        ...


class GLMTokenizer(Tokenizer, Protocol):
    """A tokenizer of the GLM family: it has masks, which stand for the blanks of a text.

    `encode` finds no masks in a text: who fills blanks cuts the text at them first, and puts their
    ids between the pieces.
    """

    @property
    def masks(self) -> Mapping[str, int]:
        """The ids of the masks that there are of "[MASK]", "[sMASK]", "[gMASK]", in this order."""
        ...

    @property
    def sop_id(self) -> int:
        """The id that begins the piece of text that fills a blank."""
        ...

    @property
    def eop_id(self) -> int:
        """The id that ends the piece of text that fills a blank."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        ...

    @property
    def pad_id(self) -> int:
        """The id that fills up the shorter rows of a batch."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that every prompt begins with."""
        ...

    @property
    def strips_before_masks(self) -> bool:
        """Whether a mask swallows the blanks on its left."""
        ...

    @property
    def unspoken_ids(self) -> tuple[int, ...]:
        """The ids of the vocabulary that no answer may hold, ascending; never eop or eos."""
        ...


class VocabularyTokenizer:
    """What the tokenizers here share. One of them says how a text is cut, and how ids are joined.

    Special tokens are never found in a text: `<eod>` typed by somebody is five characters.
    settings: what it was made with beside its files, for a converted folder to carry.
    """

    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        self.files: tuple[Path, ...] = (vocabulary.path,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; none for an empty one.

        Raises ArgumentError for what is not a str, and for half a surrogate pair.
        """
        check_text(text)
        return self._cut(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Raises ArgumentError for an id out of range."""
        joiner = self.joiner()
        return "".join(map(joiner.add, self._vocabulary.check_ids(ids))) + joiner.end()

    def token_id(self, token: str) -> int:
        """The id of exactly this token, such as "<eod>". Raises ArgumentError, naming near ones."""
        return self._vocabulary.token_id(token)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own strings. Raises ArgumentError for an id out of range."""
        return [self._vocabulary.tokens[number] for number in self._vocabulary.check_ids(ids)]

    def joiner(self) -> Joiner:
        """A fresh joiner of ids that are in range."""
        raise NotImplementedError

    def _cut(self, text: str) -> list[int]:
        raise NotImplementedError


def check_text(text: str) -> None:
    """Raise ArgumentError for what is not a str, and for half a surrogate pair."""
    if not isinstance(text, str):
        raise ArgumentError(f"text={text!r} is a {type(text).__name__}; give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"text has half a surrogate pair, {text[error.start]!r}, at {error.start}: it was "
            "decoded wrongly; decode its bytes anew, or leave that character out"
        ) from error
