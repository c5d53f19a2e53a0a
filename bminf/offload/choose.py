"""Which blocks stream: the fewest bytes x uses over the bus per request, then evenly spaced.

A kind is all blocks of the same bytes and uses; within one it does not matter for the cost which of
them stream, so how many do is chosen first: a knapsack problem, in which the streamed blocks have
to free the missing bytes, and two slots of the largest of them besides. Which solutions are
considered does not depend on the limit: a larger limit allows all that a smaller one does, so it
never streams more. They are

* meet in the middle: of the smaller kinds the Pareto front (every choice that no other beats in
  both bytes and cost), each with each choice on the front of the larger kinds. These are added from
  the largest on, so that the size of the slots is known from the first block, and counts as bytes
  that are not freed. Where the largest blocks all stay, the same again without them;
* greedy: for each size of slots the blocks up to it by rising uses, then rising bytes, until it is
  enough. That costs less than one block more than if blocks could be cut, of however many kinds.

The first hold the optimum. Where a front has too many points it is thinned: of each small range of
cost the choice that frees most is kept.
Sources: Nemhauser and Ullmann 1969, "Discrete dynamic programming and capital allocation" (Pareto
front); Horowitz and Sahni 1974, "Computing partitions with applications to the knapsack problem"
(meet in the middle); Ibarra and Kim 1975, "Fast approximation algorithms for the knapsack and sum
of subset problems" (thinning).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

_EXACT_CHOICES = 10**6  # combinations of counts up to which nothing is thinned
_MAX_POINTS = 1 << 16  # of a front, beyond
_MAX_STEPS = 1 << 19  # points times kinds, beyond
_MAX_KINDS = 500  # above, only the greedy choice is considered: one block hardly counts then
_SHIFTS = 32  # of a pattern, that are tried
_ROUNDING = 1e-12  # more than all sums of floats here are off, in proportion


class Kind(NamedTuple):
    """Blocks of the same bytes and uses (here an integer, whatever its unit)."""

    nbytes: int
    uses: int

    @property
    def cost(self) -> int:
        return self.nbytes * self.uses


def choose(
    sizes: Sequence[int], uses: Sequence[float], lists: Sequence[Sequence[int]], capacity: int
) -> set[int]:
    """Indices of the blocks that stream when `capacity` bytes cannot hold all.

    sizes, uses: of each block.   lists: the indices of the blocks of each list, in order.
    capacity: for the resident blocks and two slots of the largest streamed one, in bytes; enough
    for some choice.
    """
    kind_of = [Kind(*pair) for pair in zip(sizes, _as_integers(uses), strict=True)]
    members = Counter(kind for kind in kind_of if kind.nbytes)
    kinds = sorted(members)
    counts = streamed_counts(kinds, [members[kind] for kind in kinds], sum(sizes) - capacity)
    streams = dict(zip(kinds, counts, strict=True))
    indices = spread([[kind_of[index] for index in order] for order in lists], streams)
    return {order[index] for order, some in zip(lists, indices, strict=True) for index in some}


def _as_integers(uses: Sequence[float]) -> list[int]:
    """The uses times one common factor, so that equal costs compare equal, exactly."""
    exact = {value: Fraction(value) for value in set(uses)}
    factor = math.lcm(*(value.denominator for value in exact.values()))
    whole = {value: int(fraction * factor) for value, fraction in exact.items()}
    common = math.gcd(*whole.values())
    return [whole[value] // common for value in uses]


def streamed_counts(kinds: Sequence[Kind], counts: Sequence[int], missing: int) -> list[int]:
    """How many blocks of each kind stream, for the least cost.

    kinds: by rising bytes.   counts: blocks of each.
    missing: bytes, above 0, that they have to free beside two slots of the largest of them.
    """
    best = _greedy(kinds, counts, missing)
    if len(kinds) <= _MAX_KINDS:
        best = _MeetInTheMiddle(kinds, counts, missing).best(best)
    return best


def _cost_of(kinds: Sequence[Kind], counts: Sequence[int]) -> int:
    return sum(kind.cost * n for kind, n in zip(kinds, counts, strict=True))


def _dtype(kinds: Sequence[Kind], counts: Sequence[int]) -> np.dtype[Any]:
    """Of sums of costs: Python's integers, which have no end, where 64 bits are too few."""
    return np.dtype(np.int64 if _cost_of(kinds, counts) < 2**62 else object)


def _greedy(kinds: Sequence[Kind], counts: Sequence[int], missing: int) -> list[int]:
    """The best greedy choice, as counts."""
    order = sorted(range(len(kinds)), key=lambda index: (kinds[index].uses, index))
    sizes = np.array([kind.nbytes for kind in kinds], np.int64)
    ends = np.searchsorted(sizes, sizes, side="right")  # kinds up to each size
    possible = np.cumsum(sizes * counts)[ends - 1] >= missing + 2 * sizes
    ends, left = ends[possible], missing + 2 * sizes[possible]
    first, left, spent = _first_enough(kinds, counts, np.array(order), ends, left)
    cut = np.array(order)[first]
    times = -(-left // sizes[cut])
    spent = spent + times * np.array([kind.cost for kind in kinds], spent.dtype)[cut]
    best = int(spent.argmin())
    streams = [0] * len(kinds)
    for index in order[: first[best]]:
        streams[index] = counts[index] if index < ends[best] else 0
    streams[int(cut[best])] = int(times[best])
    return streams


def _first_enough(
    kinds: Sequence[Kind], counts: Sequence[int], order: _Array, ends: _Array, left: _Array
) -> tuple[_Array, _Array, _Array]:
    """For each slot size the index in `order` of the kind with which it is enough; what is left for
    that kind to free; and the cost of those before.

    order: indices of the kinds.   ends: kinds that may stream.   left: bytes to free.
    All go down a binary tree over the order at once: where the first half of a node is not enough,
    it streams whole, and the second is looked at.
    """
    num, dtype = len(kinds), _dtype(kinds, counts)
    freed = np.array([kind.nbytes * n for kind, n in zip(kinds, counts, strict=True)], np.int64)
    cost = np.array([kind.cost * n for kind, n in zip(kinds, counts, strict=True)], dtype)
    first, spent = np.zeros(len(left), np.int64), np.zeros(len(left), dtype)
    width, rank = 1 << (num - 1).bit_length(), np.argsort(order)
    while width := width // 2:
        keys = rank // width * num + np.arange(num)
        by_key = np.argsort(keys)
        node = first // width * num
        start, stop = (np.searchsorted(keys[by_key], node + end) for end in (0, ends))
        freed_by, cost_by = (
            np.concatenate([np.zeros_like(values[:1]), np.cumsum(values[by_key])])
            for values in (freed, cost)
        )
        whole = freed_by[stop] - freed_by[start] < left
        left = left - whole * (freed_by[stop] - freed_by[start])
        spent = spent + whole * (cost_by[stop] - cost_by[start])
        first = first + whole * width
    return first, left, spent


class _ParetoFront:
    """Choices of blocks to stream, by rising bytes and so by rising cost; the first: none of them.

    A choice that frees no more than another, and costs no less, is left out.
    nbytes: what each frees.   cost: of each.   Both as of after any number of `steps`.
    """

    def __init__(self, dtype: np.dtype[Any], max_points: int, descending: bool = False) -> None:
        """descending: by falling bytes kinds are added.   max_points: above, they are thinned."""
        self.nbytes: list[_Array] = [np.zeros(1, np.int64)]
        self.cost: list[_Array] = [np.zeros(1, dtype)]
        self._max_points = max_points
        self._descending = descending
        self.steps: list[tuple[int, _Array, _Array]] = []

    def add(self, index: int, nbytes: int, cost: float, count: int, floor: float) -> None:
        """Let up to `count` blocks of the kind `index` stream as well, in pieces of 1, 4, 16, ...

        floor: what every solution costs at least that has one of these choices.
        """
        times = 1
        while count:
            times = min(times, count)
            copies = min(3, count // times)
            added = times * np.arange(copies + 1)
            # Of choices that free and cost the same the last is kept: it is to have fewer blocks.
            self._step(index, added[::-1] if self._descending else added, nbytes, cost, floor)
            count, times = count - times * copies, 4 * times

    def _step(self, index: int, added: _Array, nbytes: int, cost: float, floor: float) -> None:
        all_nbytes = np.add.outer(added * nbytes, self.nbytes[-1]).ravel()
        all_cost = np.add.outer(added.astype(self.cost[0].dtype) * cost, self.cost[-1]).ravel()
        order = all_nbytes.argsort(kind="stable")  # sorted runs: a merge
        ordered = all_cost[order]
        cheapest = np.minimum.accumulate(ordered[::-1])[::-1]
        order = order[np.append(ordered[:-1] < cheapest[1:], True)]
        if len(order) > self._max_points:
            order = order[_thinned(all_cost[order] + floor, self._max_points)]
        self.steps.append((index, added, order))
        self.nbytes.append(all_nbytes[order])
        self.cost.append(all_cost[order])

    def counts(self, points: _Array, steps: int) -> dict[int, _Array]:
        """Index of a kind -> how many of its blocks stream at each of the points after `steps`."""
        counts: dict[int, _Array] = {}
        for step in range(steps)[::-1]:
            index, added, order = self.steps[step]
            number, points = np.divmod(order[points], len(self.nbytes[step]))
            counts[index] = counts.get(index, 0) + added[number]
        return counts


def _thinned(costs: _Array, max_points: int) -> _Array:
    """Which of rising costs to keep: the first, and of `max_points` equal ratios the last."""
    logs = np.log(costs)
    ranges = ((logs - logs[0]) * (max_points / (logs[-1] - logs[0]))).astype(np.int64)
    return np.concatenate([[True], ranges[2:] > ranges[1:-1], [True]])


class _MeetInTheMiddle:
    """The choices of smaller kinds combined with those of larger ones."""

    def __init__(self, kinds: Sequence[Kind], counts: Sequence[int], missing: int) -> None:
        self._kinds, self._counts, self._missing = kinds, counts, missing
        choices = math.prod(n + 1 for n in counts)
        self._max_points, self._dtype = choices, _dtype(kinds, counts)
        self._costs: list[float] = [kind.cost for kind in kinds]
        self._price = 0.0  # the lowest of a byte; for thinning
        self._best_cost = math.inf  # of what was found so far
        if choices > _EXACT_CHOICES:
            self._max_points = min(_MAX_POINTS, _MAX_STEPS // len(kinds))
            if self._dtype.hasobject:  # too slow for so many
                top = max(self._costs)
                self._dtype = np.dtype(np.float64)
                self._costs = [max(kind.cost / top, 1e-300) for kind in kinds]
            costs = zip(self._costs, kinds, strict=True)
            self._price = min(cost / kind.nbytes for cost, kind in costs)

    def best(self, incumbent: list[int]) -> list[int]:
        """The counts of the cheapest solution, or `incumbent`; of equals, of fewest blocks."""
        levels = list(self._levels(_cost_of(self._kinds, incumbent)))
        small, steps = _ParetoFront(self._dtype, self._max_points), [0]
        for index in range(max((start for start, _ in levels), default=0)):
            self._add(small, index)
            steps.append(len(small.steps))
        found = (
            self._combined(small, steps[start], self._large(start, end)) for start, end in levels
        )
        return min(
            [incumbent, *filter(None, found)],
            key=lambda each: (_cost_of(self._kinds, each), sum(each)),
        )

    def _levels(self, incumbent: int) -> Iterator[tuple[int, int]]:
        """Kinds from `start` to before `end`, of which the largest streamed block is to be; those
        without a solution that costs at most `incumbent` are left out."""
        kinds, end = self._kinds, len(self._kinds)
        freed = list(accumulate(k.nbytes * n for k, n in zip(kinds, self._counts, strict=True)))
        min_uses = min(kind.uses for kind in kinds)
        below = np.cumsum([0.0, *(math.log(n + 1) for n in self._counts)])
        while end:
            start = _split_point(below, end, self._max_points)
            left = self._missing + 2 * kinds[start].nbytes
            if freed[end - 1] >= left and left * min_uses <= incumbent:
                yield start, end
            end = start

    def _add(self, front: _ParetoFront, index: int) -> None:
        nbytes = self._kinds[index].nbytes
        front.add(index, nbytes, self._costs[index], self._counts[index], nbytes * self._price)

    def _large(self, start: int, end: int) -> _ParetoFront:
        """The front of the kinds from `start` to before `end`; what they free is less the slots."""
        large = _ParetoFront(self._dtype, self._max_points, descending=True)
        for index in range(start, end)[::-1]:
            large.nbytes[-1][0] = -2 * self._kinds[index].nbytes  # if no larger block streams
            self._add(large, index)
        return large

    def _combined(self, small: _ParetoFront, steps: int, large: _ParetoFront) -> list[int] | None:
        """The cheapest choice of `small` after `steps` with one of `large`; None if none frees
        enough, or an earlier one costs less."""
        nbytes, cost = small.nbytes[steps], small.cost[steps]
        partner = np.searchsorted(nbytes, self._missing - large.nbytes[-1])
        enough = np.flatnonzero(partner < len(nbytes))
        if not len(enough):
            return None
        total = large.cost[-1][enough] + cost[partner[enough]]
        rounding = total.min() * _ROUNDING if total.dtype == np.float64 else 0
        if total.min() - 2 * rounding > self._best_cost:
            return None
        self._best_cost = min(self._best_cost, total.min())
        near = enough[total <= total.min() + rounding]
        return self._cheapest(
            small.counts(partner[near], steps), large.counts(near, len(large.steps))
        )

    def _cheapest(self, small: Mapping[int, _Array], large: Mapping[int, _Array]) -> list[int]:
        """Counts of the exactly cheapest of some solutions; of equals, of fewest blocks."""
        counts = {**small, **large}
        costs = np.sum(
            [self._kinds[index].cost * n.astype(object) for index, n in counts.items()], axis=0
        )
        equal = np.flatnonzero(costs == costs.min())
        best = equal[np.sum(list(counts.values()), axis=0)[equal].argmin()]
        return [
            int(counts[index][best]) if index in counts else 0 for index in range(len(self._kinds))
        ]


def _split_point(below: _Array, end: int, max_points: int) -> int:
    """Where to cut the kinds before `end`, so that neither half has more choices than need be.

    below: the logarithm of the choices of the first kinds, for each number of them.
    The larger kinds get `max_points` at most: thinned, they would leave gaps too wide to fill.
    """
    above = below[end] - below[:end]
    halves = np.maximum(above, below[:end])
    halves[:-1][above[:-1] > math.log(max_points) + _ROUNDING] = math.inf
    return int(halves.argmin())


def spread(lists: Sequence[Sequence[Kind]], streams: Mapping[Kind, int]) -> list[list[int]]:
    """Indices of the streamed blocks in each list, ascending.

    Each list streams its part of every kind, spread evenly over its own blocks of that kind.
    streams: blocks of each kind over all lists.
    """
    members = Counter(kind for order in lists for kind in order)
    before = Counter[Kind]()
    indices = []
    for order in lists:
        shares: dict[Kind, int] = {}
        for kind, n in Counter(order).items():
            out, start = streams.get(kind, 0), before[kind]
            before[kind] += n
            shares[kind] = before[kind] * out // members[kind] - start * out // members[kind]
        indices.append(_spread_in(order, shares))
    return indices


def _spread_in(order: Sequence[Kind], shares: Mapping[Kind, int]) -> list[int]:
    """Indices in one list to stream. Of each kind in turn, from that which frees most, the even
    pattern is shifted to where what streams by then keeps best in step with the computation."""
    members: dict[Kind, list[int]] = {}
    for index, kind in enumerate(order):
        members.setdefault(kind, []).append(index)
    nbytes = np.array([kind.nbytes for kind in order], np.float64)
    done = np.cumsum(nbytes) - nbytes / 2
    streams = np.zeros(len(order), np.bool_)
    streams[
        [index for kind, its in members.items() if len(its) == shares[kind] for index in its]
    ] = True
    in_part = [kind for kind, its in members.items() if 0 < shares[kind] < len(its)]
    for kind in sorted(in_part, key=lambda kind: -kind.nbytes * shares[kind]):
        its, share = np.array(members[kind]), shares[kind]
        shifts = range(0, len(its) if streams.any() else 1, -(-len(its) // _SHIFTS))
        even = np.arange(share) * len(its) // share
        shifted = [its[(even + shift) % len(its)] for shift in shifts]
        best = min(shifted, key=lambda indices: _lag(nbytes, done, streams, indices))
        streams[best] = True
    return [int(index) for index in np.flatnonzero(streams)]


def _lag(nbytes: _Array, done: _Array, streams: _Array, indices: _Array) -> float:
    """How far copying strays from keeping in step with the computation; both go by the bytes."""
    moved = np.where(streams, nbytes, 0.0)
    moved[indices] = nbytes[indices]
    copied = np.cumsum(moved)
    return float(np.var((copied - moved / 2) / copied[-1] - done / done[-1]))
