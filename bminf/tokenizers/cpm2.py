"""The tokenizer of CPM-2 and CPM-2.1, Chinese."""

from __future__ import annotations

from pathlib import Path

from bminf.errors import CheckpointError
from bminf.tokenizers.characters import HALF_WIDTH
from bminf.tokenizers.line_tokenizer import SpanTokenizer

_FOLDED = {code: half for code, half in HALF_WIDTH.items() if chr(code) not in "，！（）？；："}


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

    def _folded(self, text: str) -> str:
        return text.translate(_FOLDED)
