"""Tokenizers of a vocabulary of lines: jieba's words, cut into the longest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bminf.tokenizers.base import VocabularyTokenizer
from bminf.tokenizers.characters import FROM_SYMBOLS, NEWLINE, SPACE, TO_SYMBOLS
from bminf.tokenizers.joining import Concatenation, Joiner
from bminf.tokenizers.longest_match import LongestMatch
from bminf.tokenizers.sentinels import Sentinels
from bminf.tokenizers.vocabulary import Vocabulary
from bminf.tokenizers.words import jieba_words


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
        self._matcher = self._make_matcher(vocabulary)
        self._texts = [self._text(token) for token in vocabulary.tokens]

    def joiner(self) -> Joiner:
        return Concatenation(self._texts)

    def _make_matcher(self, vocabulary: Vocabulary) -> LongestMatch:
        return LongestMatch(vocabulary.ids, vocabulary.ids["<unk>"])

    def _text(self, token: str) -> str:
        """What a token is in a text."""
        return token.translate(FROM_SYMBOLS)

    def _cut(self, text: str) -> list[int]:
        words = jieba_words().cut(self._folded(text))
        return [number for word in words for number in self._matcher.ids(self._word(word))]

    def _folded(self, text: str) -> str:
        """The text with characters put for those that the vocabulary does without."""
        return text

    def _word(self, word: str) -> str:
        """How the vocabulary spells a word."""
        return word.translate(TO_SYMBOLS)


class SpanTokenizer(LineTokenizer):
    """A LineTokenizer with sentinels `<s_0>`, `<s_1>`, ..."""

    _needed: ClassVar[Mapping[str, int]] = {**LineTokenizer._needed, "<s>": 1}

    def __init__(self, vocab_file: str | Path) -> None:
        super().__init__(vocab_file)
        self._sentinels = Sentinels(self._vocabulary)

    @property
    def num_sentinels(self) -> int:
        return len(self._sentinels.ids)

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of `<s_0>`, `<s_1>`, ..., in this order."""
        return self._sentinels.ids

    def sentinel(self, k: int) -> int:
        """The id of `<s_k>`. Raises ArgumentError where there is none."""
        return self._sentinels.id(k)
