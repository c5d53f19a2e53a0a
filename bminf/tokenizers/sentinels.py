"""Sentinels: the tokens `<s_0>`, `<s_1>`, ... of the T5 family, which stand for spans of text."""

from __future__ import annotations

import re

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.vocabulary import Vocabulary

_SENTINEL = re.compile(r"<s_(0|[1-9][0-9]*)>")


class Sentinels:
    """The sentinels of a vocabulary.

    Raises CheckpointError where it has none, or where one between others is missing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        numbers = sorted(
            int(match[1]) for token in vocabulary.tokens if (match := _SENTINEL.fullmatch(token))
        )
        for k, number in enumerate(numbers or [-1]):
            if k != number:
                raise CheckpointError(_missing(vocabulary, k, number))
        self.ids = tuple(vocabulary.ids[f"<s_{k}>"] for k in numbers)

    def id(self, k: int) -> int:
        if type(k) is not int or not 0 <= k < len(self.ids):
            raise ArgumentError(
                f"k={k!r}; the vocabulary has the sentinels <s_0> to <s_{len(self.ids) - 1}>"
            )
        return self.ids[k]


def _missing(vocabulary: Vocabulary, k: int, following: int) -> str:
    where = "; it has no sentinel at all"
    if following > 0:
        line = vocabulary.ids[f"<s_{following}>"] + 1
        where = f", but <s_{following}> in line {line}"
    return f"{vocabulary.path} has no line '<s_{k}>'{where}; is this the right file?"
