from __future__ import annotations

import itertools
import random

from bminf.engine.token_pool import Range, TokenPool


class Cells:
    """A pool whose cells hold the number of their range."""

    def __init__(self, num_tokens: int, alignment: int = 1) -> None:
        self.cells: list[object] = [None] * num_tokens
        self.pool = TokenPool(num_tokens, self.move, alignment)
        self.num_moved = 0

    def move(self, start: int, target: int, count: int) -> None:
        assert target != start
        self.cells[target : target + count] = self.cells[start : start + count]
        self.num_moved += count

    def fill(self, taken: Range, number: int, used: int) -> None:
        taken.used = used
        self.cells[taken.start : taken.start + used] = [number] * used

    def holds(self, taken: Range, number: int) -> bool:
        return self.cells[taken.start : taken.start + taken.used] == [number] * taken.used


def test_ranges_keep_what_they_hold_wherever_they_are_moved() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        own = Cells(chance.randint(1, 60))
        held: dict[int, Range] = {}
        for number in range(60):
            if held and chance.random() < 0.45:
                own.pool.give(held.pop(chance.choice(list(held))))
            size = chance.randint(1, 20)
            is_free = sum(one.size for one in held.values()) + size <= len(own.cells)
            taken = own.pool.take(size)
            assert (taken is not None) == is_free
            if taken is not None:
                held[number] = taken
                own.fill(taken, number, chance.randint(0, size))
            if held and chance.random() < 0.4:
                check_resized(own, held, chance)
            cells = sorted((one.start, one.start + one.size) for one in held.values())
            assert all(0 <= start < end <= len(own.cells) for start, end in cells)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(cells))
            assert all(own.holds(one, other) for other, one in held.items())
        assert own.pool.num_free == len(own.cells) - sum(one.size for one in held.values())


def check_resized(own: Cells, held: dict[int, Range], chance: random.Random) -> None:
    number = chance.choice(list(held))
    one, size = held[number], chance.randint(max(1, held[number].used), 30)
    before, others = one.size, sum(one.size for one in held.values()) - one.size
    is_free = others + size <= len(own.cells)
    assert own.pool.resize(one, size) == is_free
    assert one.size == (size if is_free else before)
    own.fill(one, number, chance.randint(one.used, one.size))


def test_a_range_grows_into_all_that_is_free_wherever_that_lies() -> None:
    own = Cells(20)
    first, second, third, last = (own.pool.take(4) for _ in range(4))
    assert first is not None and second is not None and third is not None and last is not None
    for number, one in enumerate((second, third, last)):
        own.fill(one, number, 3)
    own.pool.give(first)
    assert not own.pool.resize(third, 13) and own.num_moved == 0
    assert own.pool.resize(third, 12) and own.pool.num_free == 0
    assert (second.start, third.start, last.start) == (0, 4, 16)
    assert all(own.holds(one, number) for number, one in enumerate((second, third, last)))
    assert own.pool.resize(third, 3) and own.pool.num_free == 9


def test_only_what_is_used_is_moved_and_only_where_it_has_to_be() -> None:
    own = Cells(10)
    first, second, third = (own.pool.take(3) for _ in range(3))
    assert first is not None and second is not None and third is not None
    own.fill(third, 3, 2)
    own.pool.give(first)
    assert own.pool.take(3) is not None and own.num_moved == 0
    own.pool.give(second)
    assert own.pool.take(4) is not None and own.num_moved == 2


def test_ranges_begin_where_they_are_to() -> None:
    grown = Cells(45, alignment=8)
    first, second = grown.pool.take(8), grown.pool.take(8)
    assert first is not None and second is not None
    assert grown.pool.resize(first, 25) and (first.size, second.start) == (32, 32)
    own = Cells(40, alignment=8)
    assert [own.pool.take(size) and True for size in (1, 9, 17)] == [True, True, None]
    assert own.pool.could_take(40) and not own.pool.could_take(41)
    assert own.pool.num_free == 40 - 8 - 16
