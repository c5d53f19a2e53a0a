"""CPM-1 without its sentencepiece model: the tokenizer of a folder of BMInf 1.x."""

from __future__ import annotations

from bminf.tokenizers.characters import HALF_WIDTH, WORD_START
from bminf.tokenizers.line_tokenizer import LineTokenizer

_FOLDED = HALF_WIDTH | {ord("…"): "..."}


class CPM1WordTokenizer(LineTokenizer):
    """CPM-1 by its list of pieces alone: U+2581 before each word, then the longest pieces.

    vocab_file: vocab.txt, the pieces of CPM-1's sentencepiece model, one a line.

    For about a third of texts (digits, English, some ambiguous words) the ids are not those that
    the model was trained with; CPM1Tokenizer gives those. Characters that are not in the file
    become `<unk>`. Raises CheckpointError for a file that is no such list.
    Source: OpenBMB/BMInf 1.0.2, bminf/arch/gpt/tokenizer.py.
    """

    def _folded(self, text: str) -> str:
        return text.translate(_FOLDED)

    def _word(self, word: str) -> str:
        return WORD_START + super()._word(word)

    def _text(self, token: str) -> str:
        return super()._text(token).replace(WORD_START, "")
