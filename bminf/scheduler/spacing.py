"""Which of equal blocks stream: spaced as evenly as possible round the pass, in each list.

Within a list the streamed blocks, taken in a circle (the last is followed by the first), leave gaps
counted in blocks. The smallest gap over all lists shall be as large as possible, then the sum of
all squared gaps as small as possible.

Lists that share no kind of block share only the smallest gap: it is found for each group of lists
that do, and then each group gets the least squares with no gap below the worst of them. A list of
one kind takes k of n blocks at gaps of n // k and one more, and how many each of several such lists
streams is found by adding up their tables of least squares. A list of mixed kinds gets such a table
from a search over its streamed blocks one after the other, if it is short; a long one keeps its
share of each kind and takes the best of a few patterns.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Order = Sequence[int]
"""A list: the kind of each of its blocks in turn; STAYS for one that never streams."""
STAYS = -1

_STREAMS = -2  # a block of a kind that streams altogether
_MOST_STEPS = 10_000_000  # elementary steps to search one list of mixed kinds for one gap
_MOST_PICKS = 50_000  # blocks picked while trying patterns on one list
_Array = npt.NDArray[np.float64]


class Spacing(NamedTuple):
    """How well streamed blocks are spaced; the lower of two is the better."""

    crowding: float  # minus the smallest gap, in blocks
    squares: int
    unrest: int = 0  # how far the same gaps, in this order, are from even places


def spacing(places: Sequence[Sequence[int]], lengths: Sequence[int]) -> Spacing:
    """The spacing of streamed blocks at `places` (ascending) in each list of `lengths` blocks."""
    gaps = [
        (after - before - 1) % length + 1
        for some, length in zip(places, lengths, strict=True)
        for before, after in zip(some, [*some[1:], *some[:1]], strict=True)
    ]
    return Spacing(
        -min(gaps, default=math.inf),
        sum(gap * gap for gap in gaps),
        sum(_unrest(some, length) for some, length in zip(places, lengths, strict=True)),
    )


def _unrest(places: Sequence[int], length: int) -> int:
    """The variance of the distances to exactly even places, times a constant."""
    count = len(places)
    distances = [place * count - number * length for number, place in enumerate(places)]
    return count * sum(distance**2 for distance in distances) - sum(distances) ** 2


def spread(lists: Sequence[Order], counts: Sequence[int]) -> list[list[int]]:
    """Places of the streamed blocks in each list, ascending: `counts` of each kind over all."""
    lists = _settled(lists, counts)
    linked = list(_linked(lists))
    groups = [_group([lists[at] for at in members], counts) for members in linked]
    gap = min(group.widest_gap() for group in groups)
    places: list[list[int]] = [[] for _ in lists]
    for members, group in zip(linked, groups, strict=True):
        for at, some in zip(members, group.places(gap), strict=True):
            places[at] = sorted(some)
    return places


def _settled(lists: Sequence[Order], counts: Sequence[int]) -> list[list[int]]:
    """The lists, with kinds that stream altogether or not at all told apart from the others."""
    members = Counter(kind for order in lists for kind in order)
    settled = {kind: _STREAMS if counts[kind] else STAYS for kind in members if kind >= 0}
    settled |= {kind: kind for kind in settled if 0 < counts[kind] < members[kind]}
    return [[settled.get(kind, STAYS) for kind in order] for order in lists]


def _linked(lists: Sequence[Order]) -> Iterator[list[int]]:
    """Groups of lists, as their places, that share kinds whose blocks stream in part."""
    open_groups: list[tuple[set[int], list[int]]] = []
    for at, order in enumerate(lists):
        kinds, members = {kind for kind in order if kind >= 0}, [at]
        if not kinds:
            yield members
            continue
        for group in [group for group in open_groups if group[0] & kinds]:
            open_groups.remove(group)
            kinds, members = kinds | group[0], group[1] + members
        open_groups.append((kinds, members))
    yield from (sorted(members) for _, members in open_groups)


def _group(lists: Sequence[Order], counts: Sequence[int]) -> _Group:
    """The best way to place the blocks of linked lists that their size allows."""
    kinds = sorted({kind for order in lists for kind in order if kind >= 0})
    renamed = {kind: at for at, kind in enumerate(kinds)}
    lists = [[renamed.get(kind, kind) for kind in order] for order in lists]
    need = tuple(counts[kind] for kind in kinds)
    entries = math.prod(n + 1 for n in need)
    if not kinds:
        return _PatternGroup(lists, need)
    if all(set(order) == {0} for order in lists) and entries * len(lists) <= _MOST_STEPS:
        return _EvenGroup([len(order) for order in lists], need[0])
    steps = sum((len(order) ** 3 + entries) * entries for order in lists)
    return (_SearchedGroup if steps <= _MOST_STEPS else _PatternGroup)(lists, need)


class _Group(Protocol):
    def widest_gap(self) -> float:
        """The smallest gap of the placing in which it is largest."""

    def places(self, gap: float) -> list[list[int]]:
        """Places of the streamed blocks in each list: the least squares with no gap below `gap`."""


class _EvenGroup:
    """Lists of blocks of one and the same kind, of which `need` stream in all."""

    def __init__(self, lengths: list[int], need: int) -> None:
        self._lengths = lengths
        self._need = need

    def widest_gap(self) -> float:
        gap = min(max(self._lengths), sum(self._lengths) // self._need)
        while sum(length // gap for length in self._lengths) < self._need:
            gap -= 1
        return gap

    def places(self, gap: float) -> list[list[int]]:
        shares: list[tuple[int, ...]] = [(self._need,)]
        if len(self._lengths) > 1:
            shares = _shares([self._table(length, gap) for length in self._lengths], (self._need,))
        return [
            [at * length // share for at in range(share)]
            for length, (share,) in zip(self._lengths, shares, strict=True)
        ]

    def _table(self, length: int, gap: float) -> _Array:
        most = min(self._need, int(length // gap))
        return np.array([_even_squares(length, share) for share in range(most + 1)], np.float64)


def _even_squares(length: int, share: int) -> int:
    """Sum of squared gaps when `share` of `length` blocks stream, evenly spaced."""
    if not share:
        return 0
    gap, longer = divmod(length, share)
    return (share - longer) * gap**2 + longer * (gap + 1) ** 2


def _shares(tables: Sequence[_Array], need: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For each list the count of each kind: `need` over all, at the least sum of table entries.

    Empty if there is no such sum.
    """
    sums = [np.full([n + 1 for n in need], np.inf)]
    sums[0][(0,) * len(need)] = 0
    for table in tables:
        total = np.full_like(sums[0], np.inf)
        for share in _finite(table):
            to = tuple(slice(one, None) for one in share)
            rest = tuple(slice(n + 1 - one) for n, one in zip(need, share, strict=True))
            np.minimum(total[to], sums[-1][rest] + table[share], out=total[to])
        sums.append(total)
    if not np.isfinite(sums[-1][need]):
        return []
    shares = []
    for table, before, after in zip(tables[::-1], sums[-2::-1], sums[:0:-1], strict=True):
        for share in _finite(table):
            rest_need = tuple(n - one for n, one in zip(need, share, strict=True))
            if min(rest_need) >= 0 and before[rest_need] + table[share] == after[need]:
                break
        shares.append(share)
        need = rest_need
    return shares[::-1]


def _finite(table: _Array) -> list[tuple[int, ...]]:
    return [tuple(place) for place in np.argwhere(np.isfinite(table)).tolist()]


class _SearchedGroup:
    """Short lists of mixed kinds, of which `need` of each stream in all."""

    def __init__(self, lists: Sequence[Order], need: tuple[int, ...]) -> None:
        self._lists = lists
        self._need = need

    def widest_gap(self) -> float:
        """Found by halving: what can be had with one gap can be had with every smaller one."""
        low, high = 1, max(len(order) for order in self._lists)
        while low < high:
            middle = (low + high + 1) // 2
            if self._shares(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def places(self, gap: float) -> list[list[int]]:
        searches = self._searches(int(gap))
        shares = _shares([search.table for search in searches], self._need)
        return [search.places(share) for search, share in zip(searches, shares, strict=True)]

    def _shares(self, gap: int) -> list[tuple[int, ...]]:
        return _shares([search.table for search in self._searches(gap)], self._need)

    def _searches(self, gap: int) -> list[_Search]:
        return [_Search(order, [n + 1 for n in self._need], gap) for order in self._lists]


class _Search:
    """The least squares for every count of each kind in one list, with no gap below `gap`.

    _squares[last, first, counts...]: of the gaps from the first streamed block to the last so far.
    table[counts...]: with the gap that closes the circle.
    """

    def __init__(self, order: Order, shape: Sequence[int], gap: int) -> None:
        self._order = order
        self._gap = gap
        self._squares = np.full([len(order), len(order), *shape], np.inf)
        for at, kind in enumerate(order):
            if kind != STAYS:
                self._reach(at, kind)
        self._closing = self._closed()
        self.table: _Array = self._closing.min(axis=(0, 1))
        if _STREAMS not in order:
            self.table[(0,) * len(shape)] = 0

    def _sources(self, at: int) -> range:
        """Places the streamed block before `at` can have: far enough, passing none that streams."""
        return range(self._last_streamed(at), at - self._gap + 1)

    def _reach(self, at: int, kind: int) -> None:
        squares = np.full_like(self._squares[at], np.inf)
        if _STREAMS not in self._order[:at]:
            squares[at, ...].reshape(-1)[0] = 0
        if sources := self._sources(at):
            steps = (at - np.array(sources)) ** 2
            reached = self._squares[sources.start : sources.stop] + _spaced(steps, squares.ndim)
            squares = np.minimum(squares, reached.min(axis=0))
        if kind == _STREAMS:
            self._squares[at] = squares
        else:  # one more of its kind
            more, fewer = (
                np.moveaxis(self._squares[at], kind + 1, 0),
                np.moveaxis(squares, kind + 1, 0),
            )
            more[1:] = fewer[:-1]

    def _closed(self) -> _Array:
        length = len(self._order)
        gaps = length - np.arange(length)[:, None] + np.arange(length)
        squares = np.where(gaps >= self._gap, gaps**2.0, np.inf)
        squares[: self._last_streamed(length)] = np.inf
        closed: _Array = self._squares + _spaced(squares, self._squares.ndim - 2)
        return closed

    def _last_streamed(self, end: int) -> int:
        """Last place before `end` that has to stream, or 0."""
        return max((at for at in range(end) if self._order[at] == _STREAMS), default=0)

    def places(self, share: tuple[int, ...]) -> list[int]:
        """Places of the streamed blocks for one entry of the table, from the last to the first."""
        if not any(share) and _STREAMS not in self._order:
            return []
        entry = np.ravel_multi_index(share, self.table.shape)
        closing = self._closing.reshape(*self._closing.shape[:2], -1)[:, :, entry]
        at, first = (int(place) for place in np.unravel_index(closing.argmin(), closing.shape))
        places = [at]
        while at != first:
            squares = self._squares[at, first][share]
            share = tuple(n - (self._order[at] == kind) for kind, n in enumerate(share))
            at = next(
                source
                for source in self._sources(at)
                if self._squares[source, first][share] + (at - source) ** 2 == squares
            )
            places.append(at)
        return places


def _spaced(values: npt.NDArray[Any], axes: int) -> npt.NDArray[Any]:
    """`values` with that many axes of one appended."""
    return values.reshape(values.shape + (1,) * axes)


class _PatternGroup:
    """Lists too long for a search: each streams its share of each kind, by the best pattern."""

    def __init__(self, lists: Sequence[Order], need: tuple[int, ...]) -> None:
        shares = _proportional(lists, need)
        self._lengths = [len(order) for order in lists]
        self._places = [_pattern(order, share) for order, share in zip(lists, shares, strict=True)]

    def widest_gap(self) -> float:
        return -spacing(self._places, self._lengths).crowding

    def places(self, gap: float) -> list[list[int]]:
        return self._places


def _proportional(lists: Sequence[Order], need: tuple[int, ...]) -> list[Counter[int]]:
    """For each list how many blocks of each kind stream, in proportion to how many it has."""
    members = [Counter(order) for order in lists]
    shares = [Counter({_STREAMS: its[_STREAMS]}) for its in members]
    for kind, n in enumerate(need):
        total = sum(its[kind] for its in members)
        before = 0
        for its, share in zip(members, shares, strict=True):
            share[kind] = (before + its[kind]) * n // total - before * n // total
            before += its[kind]
    return shares


def _pattern(order: Order, share: Counter[int]) -> list[int]:
    """Places to stream: each kind spread over its own blocks, or all kinds over the whole list."""
    length, count = len(order), sum(share.values())
    own = {kind: [at for at in range(length) if order[at] == kind] for kind in share}
    patterns = [sorted(at for kind, n in share.items() for at in _evenly(own[kind], n))]
    mixed = max(order) >= 0 and len(set(order)) > 1
    turns = min(length, _MOST_PICKS // length + 1) if mixed else 0
    for turn in range(turns):
        even = [int((at + turn / turns) * length / count) for at in range(count)]
        patterns.append(sorted(_nearest(order, share, even)))
    return min(patterns, key=lambda places: spacing([places], [length]))


def _evenly(places: Sequence[int], count: int) -> list[int]:
    return [places[at * len(places) // count] for at in range(count)]


def _nearest(order: Order, share: Counter[int], even: Sequence[int]) -> set[int]:
    """For each place in `even` the nearest of a kind still wanted; what fits exactly goes first."""
    wanted, taken = Counter(share), set[int]()
    for at in even:
        if wanted[order[at]]:
            wanted[order[at]] -= 1
            taken.add(at)
    free = {
        kind: [at for at, its in enumerate(order) if its == kind and at not in taken]
        for kind in wanted
    }
    for at in (at for at in even if at not in taken):
        near = [_closest(free[kind], at) for kind, n in wanted.items() if n]
        _, place = min((abs(place - at), place) for place in near)
        wanted[order[place]] -= 1
        free[order[place]].remove(place)
        taken.add(place)
    return taken


def _closest(places: Sequence[int], at: int) -> int:
    """The one of the ascending `places` that is closest to `at`."""
    right = bisect_left(places, at)
    return min(places[max(0, right - 1) : right + 1], key=lambda place: abs(place - at))
