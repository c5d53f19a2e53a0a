"""Which cells of a pool of tokens belong to which row: each row holds one range of them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Range:
    """Cells of a pool, which may be moved whenever another range is taken.

    used: of them, from the first on, how many hold something.
    """

    start: int
    size: int
    used: int = 0


class TokenPool:
    """Hands out ranges of `num_tokens` cells. Where what is free is scattered, ranges are moved.

    move: (from, to, number) of cells to copy; they may overlap.
    alignment: every range begins at a multiple of it.
    """

    def __init__(
        self, num_tokens: int, move: Callable[[int, int, int], object], alignment: int = 1
    ) -> None:
        self.num_tokens, self._move, self._alignment = num_tokens, move, alignment
        self._ranges: list[Range] = []  # by start
        self.num_free = num_tokens

    def could_take(self, size: int) -> bool:
        """Whether a range of that size has room in an empty pool."""
        return self._rounded(size) <= self.num_tokens

    def take(self, size: int) -> Range | None:
        """A range of at least `size` cells; None where too few are free."""
        size = self._rounded(size)
        if size > self.num_free:
            return None
        start = self._gap(size)
        if start is None:
            self._compact()
            start = self._gap(size)
            assert start is not None, "all that is free lies at the end"
        taken = Range(start, size)
        insort(self._ranges, taken, key=lambda one: one.start)
        self.num_free -= size
        return taken

    def give(self, taken: Range) -> None:
        """Give a range back; what is in it is lost."""
        self._ranges.remove(taken)
        self.num_free += taken.size

    def resize(self, taken: Range, size: int) -> bool:
        """Make a range longer, or shorter, but no shorter than what it holds; False, and nothing is
        done, where too few cells are free."""
        more = self._rounded(size) - taken.size
        if more > self.num_free:
            return False
        behind = self._ranges.index(taken) + 1
        end = self._ranges[behind].start if behind < len(self._ranges) else self.num_tokens
        if taken.start + taken.size + more > end:
            self._part(behind)
        taken.size += more
        self.num_free -= more
        return True

    def _rounded(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment

    def _gap(self, size: int) -> int | None:
        end = 0
        for one in self._ranges:
            if one.start - end >= size:
                return end
            end = one.start + one.size
        return end if self.num_tokens - end >= size else None

    def _compact(self, number: int | None = None) -> None:
        """Move the first ranges to the beginning; None is all of them."""
        end = 0
        for one in self._ranges[:number]:
            self._shift(one, end)
            end += one.size

    def _part(self, number: int) -> None:
        """Move the first ranges to the beginning and all others to the end."""
        self._compact(number)
        end = self.num_tokens - self.num_tokens % self._alignment
        for one in reversed(self._ranges[number:]):
            end -= one.size
            self._shift(one, end)

    def _shift(self, one: Range, start: int) -> None:
        if one.start != start:
            self._move(one.start, start, one.used)
            one.start = start
