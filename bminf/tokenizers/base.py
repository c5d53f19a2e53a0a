"""What a tokenizer is: text into the ids of a model's vocabulary, and back, at once or id by id."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from bminf.errors import ArgumentError
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

    `encode` finds no masks in a text: to fill blanks, the text is split at them first, and their
    ids are put between the pieces.
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


class Detokenizer(Protocol):
    """Text of ids that come one by one.

    All that `add` and then `end` give, put together, is the text of all ids; what no later id can
    change is given as early as that is certain.
    """

    def add(self, token_id: int) -> str: ...

    def end(self) -> str: ...


class ConcatDetokenizer:
    """The detokenizer of a vocabulary whose tokens do not change one another. texts: of each id."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def add(self, token_id: int) -> str:
        return self._texts[token_id]

    def end(self) -> str:
        return ""


class VocabularyTokenizer:
    """What the tokenizers here share. Each says how a text is tokenized, and detokenized.

    Special tokens are never found in a text: `<eod>` in a prompt is five characters. BLOOM's are.
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
        return self._tokenize(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Raises ArgumentError for an id out of range."""
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.add, self._vocabulary.check_ids(ids))) + detokenizer.end()

    def token_id(self, token: str) -> int:
        """The id of exactly this token, such as "<eod>". Raises ArgumentError, naming near ones."""
        return self._vocabulary.token_id(token)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own strings. Raises ArgumentError for an id out of range."""
        return [self._vocabulary.token(token_id) for token_id in self._vocabulary.check_ids(ids)]

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer of ids that are in range."""
        raise NotImplementedError

    def _tokenize(self, text: str) -> list[int]:
        raise NotImplementedError


class CommandTokenizer(VocabularyTokenizer):
    """What the tokenizers of GLM share; see GLMTokenizer.

    commands: the id of each special token, by how it is spelled. Under that name it is found before
    a token of the vocabulary that is spelled alike.   control_ids: ids of control pieces.
    """

    strips_before_masks = True
    _names = "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>"

    def __init__(
        self, vocabulary: Vocabulary, commands: Mapping[str, int], control_ids: Iterable[int] = ()
    ) -> None:
        super().__init__(vocabulary)
        vocabulary.ids.update(commands)
        self.eos_id, self.sop_id, self.eop_id = (commands[name] for name in self._names)
        self.pad_id = self.eos_id
        self.masks: Mapping[str, int] = {
            name: commands[name] for name in ("[MASK]", "[sMASK]", "[gMASK]")
        }
        first = commands.get("[CLS]")
        self.prefix_ids = () if first is None else (first,)
        unspoken = {*commands.values(), *control_ids} - {self.eos_id, self.eop_id}
        self.unspoken_ids = tuple(sorted(unspoken))


class TextStream:
    """The text of ids that are fed one by one.

    All pieces together, with what `finish` gives, are `tokenizer.decode` of all ids. A piece is
    held back as long as a later id could change it. With a tokenizer of this package the cost of an
    id does not grow with their number. A tokenizer of another kind does not say what is final: its
    text comes as a whole from `finish`, and a warning says so.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_finished = False
        if isinstance(tokenizer, VocabularyTokenizer):
            self._detokenizer = tokenizer.detokenizer()
            return
        self._detokenizer = _WholeTextDetokenizer(tokenizer)
        warnings.warn(
            f"a {type(tokenizer).__name__} does not say which text a later token may change, so "
            "its text comes at the end; a tokenizer of bminf.tokenizers gives it as it comes",
            stacklevel=2,
        )

    def feed(self, token_id: int) -> str:
        """The text that is final now and was not before; it may be empty.

        Raises ArgumentError for an id out of range, and after `finish`.
        """
        if self._is_finished:
            raise ArgumentError("the stream is finished; make a new TextStream for other ids")
        self._tokenizer.tokens([token_id])  # raises for an id out of range
        return self._detokenizer.add(token_id)

    def finish(self) -> str:
        """The rest of the text; nothing when asked again."""
        if self._is_finished:
            return ""
        self._is_finished = True
        return self._detokenizer.end()


class _WholeTextDetokenizer:
    """The detokenizer of a tokenizer of which only `decode` is known."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def end(self) -> str:
        return self._tokenizer.decode(self._ids)


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
