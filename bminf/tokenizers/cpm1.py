"""The tokenizers of CPM-1: jieba's words, then the pieces of a sentencepiece model."""

from __future__ import annotations

from pathlib import Path

from bminf.errors import CheckpointError
from bminf.tokenizers.base import ConcatDetokenizer, Detokenizer, VocabularyTokenizer
from bminf.tokenizers.line_tokenizer import (
    FROM_SYMBOLS,
    HALF_WIDTH,
    NEWLINE,
    SPACE,
    TO_SYMBOLS,
    WORD_START,
    LineTokenizer,
)
from bminf.tokenizers.pieces import PieceModel, is_byte
from bminf.tokenizers.vocabulary import Vocabulary
from bminf.tokenizers.words import jieba_words

_NORMALIZATION = HALF_WIDTH | {ord("…"): "..."}


class CPM1Tokenizer(VocabularyTokenizer):
    """CPM-1's tokenizer.

    model_file: a sentencepiece model, `chinese_vocab.model` of the authors or `spiece.model` of the
    Hugging Face folder. Ids are the model's own.

    Words are joined by spaces and given to the model, which normalizes them as it was built to
    (full-width forms become ASCII, tabs are blanks, "..." stands for an ellipsis). Decoding joins
    the pieces without spaces, those that stood for a space or a newline being tokens of their own;
    control pieces (`<s>`, `<sep>`, `<pad>`, `<mask>`) have no text.

    Raises CheckpointError for a file that is not such a model, or lacks a special token.
    Source: TsinghuaAI/CPM-1-Generate, data_utils/tokenization_gpt2.py.
    """

    def __init__(self, model_file: str | Path) -> None:
        path = Path(model_file).absolute()
        self._pieces = PieceModel(path)
        for token_id, token in enumerate(self._pieces.tokens):
            if is_byte(token):
                raise CheckpointError(
                    f"{path}, piece {token_id + 1}: {token!r} is a byte; "
                    "CPM-1's model has none, so this is the model of something else"
                )
        vocabulary = Vocabulary(self._pieces.tokens, path, entry="piece")
        vocabulary.require({"<unk>": 0, NEWLINE: 3, "<eod>": 7, SPACE: 10})
        super().__init__(vocabulary)
        self._texts = [
            self._pieces.decode([token_id]).replace(" ", "").translate(FROM_SYMBOLS)
            for token_id in range(self.vocab_size)
        ]

    def detokenizer(self) -> Detokenizer:
        return ConcatDetokenizer(self._texts)

    def _tokenize(self, text: str) -> list[int]:
        words = (word.translate(TO_SYMBOLS) for word in jieba_words().cut(text))
        return self._pieces.encode(" ".join(words))


class CPM1WordTokenizer(LineTokenizer):
    """CPM-1 by its list of pieces alone: U+2581 before each word, then the longest pieces.

    vocab_file: vocab.txt, the pieces of CPM-1's sentencepiece model, one a line.

    For about a third of texts (digits, English, some ambiguous words) the ids are not those that
    the model was trained with; CPM1Tokenizer gives those. Characters that are not in the file
    become `<unk>`. Raises CheckpointError for a file that is no such list.
    Source: OpenBMB/BMInf 1.0.2, bminf/arch/gpt/tokenizer.py.
    """

    def _normalized(self, text: str) -> str:
        return text.translate(_NORMALIZATION)

    def _word(self, word: str) -> str:
        return WORD_START + super()._word(word)

    def _text(self, token: str) -> str:
        return super()._text(token).replace(WORD_START, "")
