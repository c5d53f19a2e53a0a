"""The tokenizer that CPM-1 was trained with: jieba's words, then a sentencepiece unigram model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bminf.errors import CheckpointError
from bminf.tokenizers.base import VocabularyTokenizer
from bminf.tokenizers.characters import FROM_SYMBOLS, NEWLINE, SPACE, TO_SYMBOLS
from bminf.tokenizers.joining import Concatenation, Joiner
from bminf.tokenizers.pieces import load_processor
from bminf.tokenizers.vocabulary import Vocabulary
from bminf.tokenizers.words import jieba_words


class CPM1Tokenizer(VocabularyTokenizer):
    """CPM-1's tokenizer.

    model_file: a sentencepiece model, `chinese_vocab.model` of the authors or `spiece.model` of the
    Hugging Face folder. Ids are the model's own.

    Words are joined by spaces and given to the model, which normalises them as it was built to
    (full-width forms become ASCII, tabs are blanks, "..." stands for an ellipsis). Decoding joins
    the pieces without spaces, those that stood for a space or a newline being tokens of their own;
    control pieces (`<s>`, `<sep>`, `<pad>`, `<mask>`) have no text.

    Raises CheckpointError for a file that is not such a model, or lacks a special token.
    Source: TsinghuaAI/CPM-1-Generate, data_utils/tokenization_gpt2.py.
    """

    def __init__(self, model_file: str | Path) -> None:
        path = Path(model_file).absolute()
        self._pieces = _load(path)
        count = self._pieces.get_piece_size()
        tokens = [self._pieces.id_to_piece(number) for number in range(count)]
        vocabulary = Vocabulary(tokens, path, entry="piece")
        vocabulary.require({"<unk>": 0, NEWLINE: 3, "<eod>": 7, SPACE: 10})
        super().__init__(vocabulary)
        self._texts = [self._text(token) for token in tokens]

    def joiner(self) -> Joiner:
        return Concatenation(self._texts)

    def _text(self, token: str) -> str:
        text: str = self._pieces.decode([token])
        return text.replace(" ", "").translate(FROM_SYMBOLS)

    def _cut(self, text: str) -> list[int]:
        words = (word.translate(TO_SYMBOLS) for word in jieba_words().cut(text))
        ids: list[int] = self._pieces.encode(" ".join(words))
        return ids


def _load(path: Path) -> Any:
    processor = load_processor(path)
    for number in range(processor.get_piece_size()):
        if processor.is_byte(number):
            raise CheckpointError(
                f"{path}, piece {number + 1}: {processor.id_to_piece(number)!r} is a byte; "
                "CPM-1's model has none, so this is the model of something else"
            )
    return processor
