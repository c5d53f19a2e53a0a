"""Ids back into text, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Joiner(Protocol):
    """Text of ids that come one by one.

    All that `add` and then `end` give, put together, is the text of all ids; a joiner gives what no
    later id can change, as early as that is certain.
    """

    def add(self, number: int) -> str: ...

    def end(self) -> str: ...


class Concatenation:
    """The joiner of a vocabulary whose tokens do not change one another. texts: of each id."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def add(self, number: int) -> str:
        return self._texts[number]

    def end(self) -> str:
        return ""
