"""Tokenizers of a vocabulary of lines: jieba's words, cut into the longest tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import ConcatDetokenizer, Detokenizer, VocabularyTokenizer
from bminf.tokenizers.vocabulary import Vocabulary
from bminf.tokenizers.words import jieba_words

SPACE, NEWLINE = "\u2582", "\u2583"
"""The characters that a space and a newline are in every vocabulary of the CPM family."""

WORD_START = "\u2581"

TO_SYMBOLS = str.maketrans(" \n", SPACE + NEWLINE)
FROM_SYMBOLS = str.maketrans(SPACE + NEWLINE, " \n")

HALF_WIDTH = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF00, 0xFF5F)}
"""Full-width forms to ASCII, and the ideographic space to a space; for str.translate."""


def has_chinese(text: str) -> bool:
    """Whether a character of the text is in the block of CJK ideographs, without extensions."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


MAX_WORD_LENGTH = 200
"""A longer word is unknown as a whole."""


_SENTINEL = re.compile(r"<s_(0|[1-9][0-9]*)>")


def sentinel_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The ids of `<s_0>`, `<s_1>`, ..., which stand for spans of text.

    Raises CheckpointError where there is none, or where one between others is missing.
    """
    indices = sorted(
        int(match[1]) for token in vocabulary.tokens if (match := _SENTINEL.fullmatch(token))
    )
    for k, index in enumerate(indices or [-1]):
        if k != index:
            where = "; it has no sentinel at all"
            if index > 0:
                where = f", but <s_{index}> in line {vocabulary.ids[f'<s_{index}>'] + 1}"
            raise CheckpointError(
                f"{vocabulary.path} has no line '<s_{k}>'{where}; is this the right file?"
            )
    return tuple(vocabulary.ids[f"<s_{k}>"] for k in indices)


class LineTokenizer(VocabularyTokenizer):
    """A file of lines; spaces and newlines are tokens; text is what the tokens spell.

    vocab_file: UTF-8, one token a line; a token's id is the number of its line, from 0.
    """

    _needed: ClassVar[Mapping[str, int]] = {"<unk>": 0, NEWLINE: 3, "<eod>": 7, SPACE: 10}
    """What the file must hold, with the ids that the published one gives it."""

    def __init__(self, vocab_file: str | Path) -> None:
        vocabulary = Vocabulary.read(Path(vocab_file).absolute())
        vocabulary.require(self._needed)
        super().__init__(vocabulary)
        self._unknown = vocabulary.ids["<unk>"]
        self._longest_token = max(map(len, vocabulary.ids))
        self._texts = [self._text(token) for token in vocabulary.tokens]

    def detokenizer(self) -> Detokenizer:
        return ConcatDetokenizer(self._texts)

    def _text(self, token: str) -> str:
        """What a token is in a text."""
        return token.translate(FROM_SYMBOLS)

    def _tokenize(self, text: str) -> list[int]:
        words = jieba_words().cut(self._normalized(text))
        return [token_id for word in words for token_id in self._ids_of(self._word(word))]

    def _ids_of(self, word: str) -> list[int]:
        """The longest tokens from left to right; a character that begins none is `<unk>`."""
        if len(word) > MAX_WORD_LENGTH:
            return [self._unknown]
        ids: list[int] = []
        start = 0
        while start < len(word):
            token_id, start = self._longest(word, start)
            ids.append(token_id)
        return ids

    def _longest(self, word: str, start: int) -> tuple[int, int]:
        """The id of the longest token at `start`, and where it ends."""
        for end in range(min(len(word), start + self._longest_token), start, -1):
            token_id = self._vocabulary.ids.get(self._spelling(word[start:end], start))
            if token_id is not None:
                return token_id, end
        return self._unknown, start + 1

    def _spelling(self, piece: str, start: int) -> str:
        """How the vocabulary spells a piece that stands at `start` in its word."""
        return piece

    def _normalized(self, text: str) -> str:
        """The text with characters replaced that the vocabulary does without."""
        return text

    def _word(self, word: str) -> str:
        """How the vocabulary spells a word."""
        return word.translate(TO_SYMBOLS)


class SpanTokenizer(LineTokenizer):
    """A LineTokenizer with sentinels `<s_0>`, `<s_1>`, ...; see SentinelTokenizer."""

    _needed: ClassVar[Mapping[str, int]] = {**LineTokenizer._needed, "<s>": 1}

    def __init__(self, vocab_file: str | Path) -> None:
        super().__init__(vocab_file)
        self.sentinel_ids = sentinel_ids(self._vocabulary)
        self.num_sentinels = len(self.sentinel_ids)

    def sentinel(self, k: int) -> int:
        """The id of `<s_k>`. Raises ArgumentError where there is none."""
        if type(k) is not int or not 0 <= k < self.num_sentinels:
            raise ArgumentError(
                f"k={k!r}; the vocabulary has the sentinels <s_0> to <s_{self.num_sentinels - 1}>"
            )
        return self.sentinel_ids[k]
