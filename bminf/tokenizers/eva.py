"""The tokenizer of EVA 1.0 and 2.0."""

# ruff: noqa: RUF001 - quotation marks are what this file is about

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from bminf.tokenizers.line_tokenizer import HALF_WIDTH, SpanTokenizer

_PUNCTUATION = {
    code: half for code, half in HALF_WIDTH.items() if not half.isalnum() and half not in " ."
}
_QUOTES = dict.fromkeys("“”‟〝〞", '"') | dict.fromkeys("‘’‛", "'")
_NORMALIZATION = _PUNCTUATION | str.maketrans({**_QUOTES, "…": "..."})


class EVATokenizer(SpanTokenizer):
    """EVA's tokenizer: Chinese punctuation to ASCII (except 。 and 、), then longest tokens.

    vocab_file: vocab.txt, one token a line; 30000 in the published one, whose ninth line is empty
    and counts: a reader that skips it gives every later token another id.

    Letters, digits and blanks of full width stay as they are. What the file does not hold becomes
    `<unk>`. Raises CheckpointError for a file that lacks a special token or a sentinel.
    Source: thu-coai/EVA, src/tokenization_eva.py.
    """

    _needed: ClassVar[Mapping[str, int]] = {**SpanTokenizer._needed, "<sep>": 4}

    def _normalized(self, text: str) -> str:
        return text.translate(_NORMALIZATION)
