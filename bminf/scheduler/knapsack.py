"""Which blocks stay: the fewest bytes x uses over the bus per request, as counts of each kind.

A kind is all blocks of the same bytes and uses. What is left for resident blocks depends on the
slots, so each possible slot size is tried: with slots of M bytes, blocks above M have to stay, and
the rest is a knapsack (bytes against bytes x uses) for what the slots and those blocks leave. A
streamed set whose largest block is below M only wastes room there; it is met again under its own M.

The fractional optimum fills kinds by falling uses and cuts only one level of them. First the
blocks, by falling uses, then falling bytes, stay up to the first that does not fit: that loses less
than one block against the fractional optimum. What is then searched is

* with few kinds, everything, so that the optimum is found: counts near the fractional optimum
  first, then wider, until nothing outside can be better;
* with more, windows: a few kinds next to each other in any counts, those before them whole, those
  after them not at all. Whether a choice is in a window does not depend on the limit, and a larger
  limit allows all that a smaller one does, so it never streams more. (Filling what is left with
  whatever fits would be simpler, but can stream more for a larger limit.)
* with very many, nothing: one block hardly counts then.

All searches are of one sort, which meet.py holds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from bminf.scheduler.meet import Kind, best_counts, sums_needed

_EXACT_KINDS = 4
_EXACT_SUMS = 50_000  # over half of the kinds, up to which more kinds are searched whole
_WINDOW_KINDS = 500  # up to which windows are searched
_WINDOW_SUMS = 5000  # over half of a window
_RADII = (8, 64, 512)  # blocks around the fractional optimum; then everything


_Search = Callable[[Sequence[Kind], Sequence[int], list[int], int, int], "list[int] | None"]


def cheapest_sets(sizes: Sequence[int], uses: Sequence[int], room: int) -> list[list[int]]:
    """All cheapest sets to stream, by looking at every set: for a dozen blocks.

    sizes: bytes, above 0.   room: bytes for the resident blocks and two slots, less than all need.
    """
    states = [(0, 0, 0)]  # bytes, largest, cost of the set that the bits of the index name
    for size, n in zip(sizes, uses, strict=True):
        states += [
            (nbytes + size, max(most, size), cost + size * n) for nbytes, most, cost in states
        ]
    spare = room - sum(sizes)  # below 0, so the empty set is never feasible
    feasible = [at for at, (nbytes, most, _) in enumerate(states) if 2 * most - nbytes <= spare]
    least = min(states[at][2] for at in feasible)
    cheapest = [at for at in feasible if states[at][2] == least]
    return [[bit for bit in range(len(sizes)) if at >> bit & 1] for at in cheapest]


def resident_counts(kinds: Sequence[Kind], counts: Sequence[int], room: int) -> list[int]:
    """How many blocks of each kind stay, so that the others cost the least to stream.

    kinds: by falling uses, then falling bytes.   counts: blocks of each.
    room: bytes for the resident blocks and two slots; enough for some choice, not for all blocks.
    """
    room -= room % math.gcd(*(kind.nbytes for kind in kinds))  # no blocks and slots use the rest
    tries = list(_tries(kinds, counts, room))
    best = _prefix_counts(kinds, counts, max(tries, key=lambda each: each.value))
    value = _value_of(kinds, best)
    search = _search_for(kinds, counts)
    for each in sorted(tries, key=lambda each: -each.bound):
        if search is None or each.bound <= value:
            break
        above = [kind.nbytes > each.slot for kind in kinds]
        lows = [n if stays else 0 for stays, n in zip(above, counts, strict=True)]
        if found := search(kinds, counts, lows, each.left, value):
            best, value = found, _value_of(kinds, found)
    return best


class _Try(NamedTuple):
    """Blocks above `slot` bytes stay, then in order all of the kinds before `cut`, `part` of it."""

    slot: int
    left: int  # bytes for blocks up to `slot`
    cut: int
    part: int
    value: int
    bound: int  # value that no choice with these slots can pass


def _tries(kinds: Sequence[Kind], counts: Sequence[int], room: int) -> Iterator[_Try]:
    """One for each slot size that leaves enough for the blocks above it."""
    tree = _PrefixSums(kinds, counts)
    above_bytes = above_value = 0
    by_size = sorted(range(len(kinds)), key=lambda at: -kinds[at].nbytes)
    for slot, same in groupby(by_size, key=lambda at: kinds[at].nbytes):
        if (left := room - 2 * slot - above_bytes) >= 0:
            cut, nbytes, value = tree.fill(left)
            part, spare = divmod(left - nbytes, kinds[cut].nbytes)
            value += above_value + part * kinds[cut].cost
            yield _Try(slot, left, cut, part, value, value + spare * kinds[cut].uses)
        for at in same:
            tree.remove(at)
            above_bytes += counts[at] * kinds[at].nbytes
            above_value += counts[at] * kinds[at].cost


def _prefix_counts(kinds: Sequence[Kind], counts: Sequence[int], chosen: _Try) -> list[int]:
    stay = [
        n if at < chosen.cut or kind.nbytes > chosen.slot else 0
        for at, (kind, n) in enumerate(zip(kinds, counts, strict=True))
    ]
    stay[chosen.cut] = chosen.part
    return stay


def _search_for(kinds: Sequence[Kind], counts: Sequence[int]) -> _Search | None:
    """How to search; must not depend on the limit, or a larger one could stream more."""
    if len(kinds) <= _EXACT_KINDS or sums_needed(counts) <= _EXACT_SUMS:
        return _search_all
    return _search_windows if len(kinds) <= _WINDOW_KINDS else None


def _search_all(
    kinds: Sequence[Kind], counts: Sequence[int], lows: list[int], left: int, to_beat: int
) -> list[int] | None:
    """The best counts from `lows` to `counts`, at most `left` bytes more than `lows`, of all.

    None if they are not worth more than `to_beat`.
    """
    free = [kind.nbytes for kind, low, n in zip(kinds, lows, counts, strict=True) if low < n]
    left -= left % math.gcd(*free)  # no sum of these sizes uses the rest
    point, price, spare = _fractional(kinds, counts, lows, left)
    bound = _value_of(kinds, point) + spare * price
    room = left + _bytes_of(kinds, lows)
    best = None
    for radius in (*_RADII, max(counts)):
        if bound <= to_beat:
            break
        open_spans = _open_spans(kinds, lows, counts, point, price, bound - to_beat, room)
        spans = [
            range(max(span.start, at - radius), min(span.stop, at + radius + 1))
            for span, at in zip(open_spans, point, strict=True)
        ]
        found = best_counts(kinds, spans, room) if all(spans) else None
        if found and _value_of(kinds, found) > to_beat:
            best, to_beat = found, _value_of(kinds, found)
        if spans == open_spans:
            break
    return best


def _search_windows(
    kinds: Sequence[Kind], counts: Sequence[int], lows: list[int], left: int, to_beat: int
) -> list[int] | None:
    """The same, but the best of those in a window."""
    free = [at for at in range(len(kinds)) if lows[at] < counts[at]]
    best = None
    for before, window in _windows(kinds, counts, free, left):
        inside, spans = [kinds[at] for at in window], [range(counts[at] + 1) for at in window]
        room = left - sum(counts[at] * kinds[at].nbytes for at in before)
        found = best_counts(inside, spans, room) or []
        whole = [counts[at] for at in before]
        stay = list(lows)
        for at, n in zip([*before, *window], [*whole, *found], strict=True):
            stay[at] = n
        if _value_of(kinds, stay) > to_beat:
            best, to_beat = stay, _value_of(kinds, stay)
    return best


def _windows(
    kinds: Sequence[Kind], counts: Sequence[int], free: list[int], left: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(kinds before, kinds inside) of the windows around the first kind that does not fit whole.

    Windows before it hold nothing better than all kinds before it; those after it do not fit.
    """
    sums = list(accumulate(counts[at] * kinds[at].nbytes for at in free))
    cut = bisect_right(sums, left)
    longest = 2 * _WINDOW_SUMS.bit_length()  # kinds: each doubles the sums of its half at least
    for start in range(max(0, cut - longest), cut + 1):
        stop = start + 1
        while stop < len(free):
            if sums_needed([counts[at] for at in free[start : stop + 1]]) > _WINDOW_SUMS:
                break
            stop += 1
        step = max(1, (stop - start) // 4)  # windows that overlap by more find little more
        if stop > cut and start % step == 0:
            yield free[:start], free[start:stop]


def _fractional(
    kinds: Sequence[Kind], counts: Sequence[int], lows: list[int], left: int
) -> tuple[list[int], int, int]:
    """The fractional optimum: its counts rounded down, uses of the level it cuts, bytes unused."""
    point = list(lows)
    for price, same in groupby(range(len(kinds)), key=lambda at: kinds[at].uses):
        level = [(at, counts[at] - lows[at]) for at in same]
        total = sum(kinds[at].nbytes * n for at, n in level)
        for at, n in level:
            # All ways to cut a level are worth the same; with the same part of each kind, the
            # search around it has room on all sides.
            point[at] += n * left // total if total > left else n
        if total > left:
            used = sum(kinds[at].nbytes * (point[at] - lows[at]) for at, _ in level)
            return point, price, left - used
        left -= total
    return point, 0, left


def _open_spans(
    kinds: Sequence[Kind],
    lows: Sequence[int],
    counts: Sequence[int],
    point: Sequence[int],
    price: int,
    gap: int,
    room: int,
) -> list[range]:
    """Counts of each kind that are possible less than `gap` below the bound.

    Each block away from `point` loses its bytes at the difference of its uses to `price`, and each
    byte left unused loses `price`. So a kind can neither differ much nor leave others much room.
    """
    spans = []
    for kind, low, high, at in zip(kinds, lows, counts, point, strict=True):
        loss = kind.nbytes * abs(kind.uses - price)
        reach = (gap - 1) // loss if loss else high
        spans.append(range(max(low, at - reach), min(high, at + reach) + 1))
    least = sum(kind.nbytes * span.start for kind, span in zip(kinds, spans, strict=True))
    most = sum(kind.nbytes * (span.stop - 1) for kind, span in zip(kinds, spans, strict=True))
    short = room - (gap - 1) // price - most
    return [
        range(
            max(span.start, span.stop - 1 + -(-short // kind.nbytes)),
            min(span.stop, span.start + (room - least) // kind.nbytes + 1),
        )
        for kind, span in zip(kinds, spans, strict=True)
    ]


class _PrefixSums:
    """Bytes and values of the kinds, summed from the first; a change or a search takes O(log n).

    Source: Fenwick 1994, "A new data structure for cumulative frequency tables".
    """

    def __init__(self, kinds: Sequence[Kind], counts: Sequence[int]) -> None:
        self._own = [
            (n * kind.nbytes, n * kind.cost) for kind, n in zip(kinds, counts, strict=True)
        ]
        self._bytes = [0] * (len(kinds) + 1)
        self._value = [0] * (len(kinds) + 1)
        for at, (nbytes, value) in enumerate(self._own):
            self._add(at, nbytes, value)

    def _add(self, at: int, nbytes: int, value: int) -> None:
        at += 1
        while at < len(self._bytes):
            self._bytes[at] += nbytes
            self._value[at] += value
            at += at & -at

    def remove(self, at: int) -> None:
        """Count the kind at that place as nothing."""
        nbytes, value = self._own[at]
        self._add(at, -nbytes, -value)

    def fill(self, left: int) -> tuple[int, int, int]:
        """(first kind that does not fit whole into `left`, bytes and value of those before it)."""
        at = nbytes = value = 0
        step = 1 << (len(self._own).bit_length() - 1)
        while step:
            if (to := at + step) < len(self._bytes) and nbytes + self._bytes[to] <= left:
                at, nbytes, value = to, nbytes + self._bytes[to], value + self._value[to]
            step >>= 1
        return at, nbytes, value


def _bytes_of(kinds: Sequence[Kind], counts: Sequence[int]) -> int:
    return sum(kind.nbytes * n for kind, n in zip(kinds, counts, strict=True))


def _value_of(kinds: Sequence[Kind], counts: Sequence[int]) -> int:
    return sum(kind.cost * n for kind, n in zip(kinds, counts, strict=True))
