"""The tokenizers of CPM-2: Chinese (and of CPM-2.1), and Chinese and English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bminf.errors import CheckpointError
from bminf.tokenizers.base import Detokenizer
from bminf.tokenizers.line_tokenizer import (
    FROM_SYMBOLS,
    HALF_WIDTH,
    NEWLINE,
    SPACE,
    SpanTokenizer,
    has_chinese,
)

_NORMALIZATION = {
    code: half for code, half in HALF_WIDTH.items() if chr(code) not in "，！（）？；："
}

INSIDE = "##"
"""What a token begins with that goes on with a word instead of beginning one."""


class CPM2Tokenizer(SpanTokenizer):
    """CPM-2's tokenizer: full-width forms become ASCII, then words the longest tokens.

    vocab_file: vocab.txt, one token a line; 26240 of them in the published one.

    The marks ，。！（）？、；： stay as they are. What the file does not hold becomes `<unk>`: such
    text is not got back by decoding.
    Raises CheckpointError for a file that lacks a special token or a sentinel, and for the
    vocabulary of the bilingual model.
    Source: TsinghuaAI/CPM-2-Finetune, tokenization_enc_dec.py.
    """

    def __init__(self, vocab_file: str | Path) -> None:
        super().__init__(vocab_file)
        line = self._vocabulary.ids.get("<go>", -1) + 1
        if line:
            raise CheckpointError(
                f"{self._vocabulary.path}, line {line}: '<go>' is a token of the Chinese and "
                "English CPM-2 only; read this file with CPM2BilingualTokenizer"
            )

    def _normalized(self, text: str) -> str:
        return text.translate(_NORMALIZATION)


class CPM2BilingualTokenizer(SpanTokenizer):
    """The tokenizer of the bilingual CPM-2: longest tokens, `##` before those inside a word.

    vocab_file: vocab.txt, one token a line; 51968 in the published one.

    A space between two words that are not Chinese has no token, and decoding puts it back; so it
    does between any two such words, and many a text comes back with more spaces than it had. Text
    of one single token gets it twice, as from the authors' tokenizer: their filter of spaces keeps
    the first and the last token. Punctuation is not Chinese here; U+2582, the space, is.

    Raises CheckpointError for a file that lacks a special token or a sentinel.
    Source: TsinghuaAI/CPM-2-Finetune, tokenization_enc_dec_encn.py.
    """

    _needed: ClassVar[Mapping[str, int]] = {
        "<unk>": 0, "<s>": 1, NEWLINE: 3, "<go>": 7, "<eod>": 8, SPACE: 11,
    }  # fmt: skip

    def __init__(self, vocab_file: str | Path) -> None:
        super().__init__(vocab_file)
        tokens = self._vocabulary.tokens
        self._space = self._vocabulary.ids[SPACE]
        self._is_chinese = [_is_chinese(token) for token in tokens]
        self._may_become_chinese = any(
            token.startswith(INSIDE) and has_chinese(token) for token in tokens
        )

    def detokenizer(self) -> Detokenizer:
        return _SpacedWords(self._vocabulary.tokens, self._may_become_chinese)

    def _spelling(self, piece: str, start: int) -> str:
        return piece if start == 0 or _is_chinese(piece) else INSIDE + piece

    def _tokenize(self, text: str) -> list[int]:
        ids = super()._tokenize(text)
        inner = [ids[i] for i in range(1, len(ids) - 1) if self._stays(ids, i)]
        return [*ids[:1], *inner, *ids[-1:]]

    def _stays(self, ids: Sequence[int], index: int) -> bool:
        """Whether a token is more than the space between two words that are not Chinese."""
        is_space_between = self._is_chinese[ids[index - 1]] or self._is_chinese[ids[index + 1]]
        return ids[index] != self._space or is_space_between


class _SpacedWords:
    """The detokenizer that puts a space between two words neither of which is Chinese.

    tokens: of each id.   may_become_chinese: whether a token inside a word may make it Chinese.
    A word is held back while it may still become Chinese: the space before it depends on that. So
    is U+2582 alone, which is Chinese until more of its word follows.
    """

    def __init__(self, tokens: Sequence[str], may_become_chinese: bool) -> None:
        self._tokens = tokens
        self._may_become_chinese = may_become_chinese
        self._follows_other = False  # the word before is there, and not Chinese
        self._start_word()
        self._has_word = False

    def add(self, token_id: int) -> str:
        token, text = self._tokens[token_id], ""
        if self._has_word and token.startswith(INSIDE):
            token = token.removeprefix(INSIDE)
        elif self._has_word:
            text = self._end_word()
        self._has_word = True
        return text + self._extend(token)

    def end(self) -> str:
        return self._end_word() if self._has_word else ""

    def _start_word(self) -> None:
        self._held: list[str] = []
        self._head = ""  # its first two characters: enough to tell U+2582 alone
        self._has_chinese = False
        self._is_decided = not self._follows_other

    def _extend(self, part: str) -> str:
        """Add to the word; the text that is certain now."""
        self._head = (self._head + part)[:2]
        self._has_chinese = self._has_chinese or has_chinese(part)
        self._held.append(part)
        if self._is_decided:
            return self._release()
        if self._has_chinese or not (self._may_become_chinese or self._head in ("", SPACE)):
            return self._decide()
        return ""

    def _end_word(self) -> str:
        text = self._release() if self._is_decided else self._decide()
        self._follows_other = not self._is_chinese()
        self._start_word()
        return text

    def _decide(self) -> str:
        self._is_decided = True
        return ("" if self._is_chinese() else " ") + self._release()

    def _release(self) -> str:
        text = "".join(self._held).translate(FROM_SYMBOLS)
        self._held = []
        return text

    def _is_chinese(self) -> bool:
        return self._has_chinese or self._head == SPACE


def _is_chinese(word: str) -> bool:
    return word == SPACE or has_chinese(word)
