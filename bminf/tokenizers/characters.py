"""Characters that stand for others: blanks as tokens, full-width forms, words of Chinese."""

from __future__ import annotations

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
