"""A small knapsack solved exactly, by meeting in the middle.

Every sum over half of the kinds is met with its best partner among the sums, sorted, over the
other half: as many steps as the square root of the choices.
Source: Horowitz and Sahni 1974, "Computing partitions with applications to the knapsack problem".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]  # int64, or float64 for values beyond it

_CHUNK = 1 << 18  # sums met at a time
_CACHED = 1 << 14  # sums that a processor's cache holds


class Kind(NamedTuple):
    """Blocks of the same bytes and uses (here an integer, whatever its unit)."""

    nbytes: int
    uses: int

    @property
    def cost(self) -> int:
        return self.nbytes * self.uses


class _Part(NamedTuple):
    """Counts to try of one kind; `price` is its uses, an integer or, beyond int64, a float."""

    nbytes: int
    price: int | float
    span: range


def best_counts(kinds: Sequence[Kind], spans: Sequence[range], room: int) -> list[int] | None:
    """The best counts within `spans` of at most `room` bytes; None if even the least are more."""
    found = [span.start for span in spans]
    moving = [at for at, span in enumerate(spans) if len(span) > 1]
    room -= sum(kinds[at].nbytes * n for at, n in enumerate(found) if at not in moving)
    halves = [[moving[at] for at in half] for half in _split([len(spans[at]) for at in moving])]
    prices = _prices(kinds, spans, moving)
    first, second = (
        _Half([_Part(kinds[at].nbytes, prices[at], spans[at]) for at in half]) for half in halves
    )
    second.sort()
    if len(second.weights) > _CACHED:  # then searching for what is sorted is several times faster
        first.sort()
    best, pair = -1, (0, 0)
    for start in range(0, len(first.weights), _CHUNK):  # in chunks, to spare memory
        chunk = slice(start, start + _CHUNK)
        partner = np.searchsorted(second.weights, room - first.weights[chunk], side="right") - 1
        total = first.values(chunk) + second.values(partner)
        total[partner < 0] = -1
        at = int(total.argmax())
        if total[at] > best:
            best, pair = total[at], (start + at, int(partner[at]))
    if best < 0:
        return None
    for half, sums, at in zip(halves, (first, second), pair, strict=True):
        for kind, count in zip(half, sums.counts(at), strict=True):
            found[kind] = count
    return found


def _prices(
    kinds: Sequence[Kind], spans: Sequence[range], moving: Sequence[int]
) -> dict[int, int] | dict[int, float]:
    """Uses of the moving kinds: integers where sums stay in int64, else parts of the largest."""
    if sum(kinds[at].cost * spans[at].stop for at in moving) < 2**62:
        return {at: kinds[at].uses for at in moving}
    top = max(kinds[at].uses for at in moving)
    return {at: kinds[at].uses / top for at in moving}


def _split(widths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two halves of the kinds with about as many sums in each, the one with more first."""
    halves: tuple[list[int], list[int]] = ([], [])
    sizes = [1, 1]
    for at in sorted(range(len(widths)), key=lambda at: -widths[at]):
        smaller = int(sizes[1] < sizes[0])
        halves[smaller].append(at)
        sizes[smaller] *= widths[at]
    return halves if sizes[0] >= sizes[1] else halves[::-1]


def sums_needed(counts: Sequence[int]) -> int:
    """Sums over the larger half of kinds, of which 0 to `counts` blocks stay."""
    first, _ = _split([n + 1 for n in counts])
    return math.prod(counts[at] + 1 for at in first)


class _Half:
    """All sums of bytes and values over the counts of some kinds."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        prices = {part.price for part in parts}
        self._price = prices.pop() if len(prices) == 1 else None  # of all, if it is the same
        self._values = _values(parts) if self._price is None else None
        self.weights = _weights(parts)

    def values(self, at: slice | _Array) -> _Array:
        """Values of the sums at these places."""
        if self._values is None:
            return self.weights[at] * self._price
        return self._values[at]

    def sort(self) -> None:
        """Order by bytes, and drop what is worth no more than something lighter."""
        if self._values is None:  # then nothing is
            self.weights.sort()
            return
        order = np.argsort(self.weights, kind="stable")
        weights, values = self.weights[order], self._values[order]
        better = np.flatnonzero(values[1:] > np.maximum.accumulate(values)[:-1]) + 1
        kept = np.concatenate([[0], better])
        self.weights, self._values = weights[kept], values[kept]

    def counts(self, at: int) -> list[int]:
        """Counts of each kind behind the sum at that place; the last follows from the others."""
        if not self._parts:
            return []
        *others, last = self._parts
        count, rest = np.divmod(self.weights[at] - _weights(others), last.nbytes)
        right = (rest == 0) & (count >= last.span.start) & (count < last.span.stop)
        if self._values is not None:
            right &= _values(others) + count * (last.nbytes * last.price) == self._values[at]
        place = int(right.argmax())
        offsets = np.unravel_index(place, [len(part.span) for part in others])
        found = [part.span[int(offset)] for part, offset in zip(others, offsets, strict=True)]
        return [*found, int(count[place])]


def _weights(parts: Sequence[_Part]) -> _Array:
    return _sums([(part.span, part.nbytes) for part in parts])


def _values(parts: Sequence[_Part]) -> _Array:
    return _sums([(part.span, part.nbytes * part.price) for part in parts])


def _sums(terms: Sequence[tuple[range, int | float]]) -> _Array:
    """All sums of a count from each range times its factor, the last count running fastest."""
    sums: _Array = np.zeros(1, np.int64)
    for span, factor in terms:
        sums = np.add.outer(sums, np.arange(span.start, span.stop) * factor).ravel()
    return sums
