"""The choice of streamed blocks where there are too many ways to look at each."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import tiny_models
from work import CountingNumpy, executed_lines

from bminf.models import plan_model
from bminf.offload import choose
from bminf.offload.choose import Kind, streamed_counts
from bminf.wrapping import plan_for

ZOO = [(name, form) for name in ("cpm2", "glm-130b", "glm-10b") for form in ("int8", "int4")]


def cost_of(kinds, counts):
    return sum(kind.cost * n for kind, n in zip(kinds, counts, strict=True))


def missing_of(kinds, counts, num):
    """So many amounts of bytes to free, from the least to the most that can be."""
    up_to, most = 0, 0
    for kind, n in zip(kinds, counts, strict=True):
        up_to += kind.nbytes * n
        most = max(most, up_to - 2 * kind.nbytes)
    return [1 + (most - 1) * at // (num - 1) for at in range(num)] if most > 1 else []


def assert_enough(kinds, counts, streamed, missing):
    freed = sum(kind.nbytes * n for kind, n in zip(kinds, streamed, strict=True))
    slot = max(kind.nbytes for kind, n in zip(kinds, streamed, strict=True) if n)
    assert freed - 2 * slot >= missing
    assert all(0 <= n <= most for n, most in zip(streamed, counts, strict=True))


def if_cut(kinds, counts, missing):
    """Least cost if blocks could be cut, over all slot sizes."""
    best = None
    for slot in {kind.nbytes for kind in kinds}:
        left, cost = Fraction(missing + 2 * slot), Fraction(0)
        pairs = [pair for pair in zip(kinds, counts, strict=True) if pair[0].nbytes <= slot]
        for kind, n in sorted(pairs, key=lambda pair: pair[0].uses):
            freed = min(left, Fraction(kind.nbytes * n))
            left, cost = left - freed, cost + freed * kind.uses
        if not left:
            best = cost if best is None else min(best, cost)
    return best


def drawn(seed, num):
    """`num` kinds of sizes that differ by up to six powers of ten, and their counts."""
    rng = random.Random(seed)
    top = rng.choice([4, 6, 9])
    values = rng.choice([[1], [1, 2, 128, 256], range(100, 200)])
    kinds = {Kind(int(10 ** rng.uniform(3, top)), rng.choice(values)) for _ in range(num)}
    return sorted(kinds), [rng.choice([1, 1, 2, 5, 60]) for _ in kinds]


def kinds_of(made):
    drawn = [Kind(block.nbytes, int(made.uses[block.name])) for block in made.blocks]
    kinds = sorted(set(drawn))
    return kinds, [drawn.count(kind) for kind in kinds]


def cheapest_of_equal_uses(kinds, counts, missing):
    """Exactly, of kinds used equally: over slot sizes, the least sum of bytes that is enough."""
    unit = math.gcd(*(kind.nbytes for kind in kinds))
    sums, best = 1, []  # bit n: some blocks have n units
    for kind, n in zip(kinds, counts, strict=True):
        for _ in range(n):
            sums |= sums << kind.nbytes // unit
        least = -(-(missing + 2 * kind.nbytes) // unit)
        if enough := sums >> least:
            best.append(least + (enough & -enough).bit_length() - 1)
    return min(best) * unit * kinds[0].uses


def cheapest_of_all(kinds, counts, missing):
    costs = []
    for streamed in itertools.product(*(range(n + 1) for n in counts)):
        pairs = list(zip(kinds, streamed, strict=True))
        slot = max((kind.nbytes for kind, n in pairs if n), default=0)
        if sum(kind.nbytes * n for kind, n in pairs) - 2 * slot >= missing:
            costs.append(cost_of(kinds, streamed))
    return min(costs)


def assert_least(kinds, counts, num, least=cheapest_of_all):
    """That the choice is the cheapest, for so many amounts of bytes to free."""
    for missing in missing_of(kinds, counts, num):
        streamed = streamed_counts(kinds, counts, missing)
        assert_enough(kinds, counts, streamed, missing)
        assert cost_of(kinds, streamed) == least(kinds, counts, missing)


@pytest.mark.parametrize(("name", "form"), ZOO)
def test_models_of_the_zoo_stream_the_least_there_is(name, form):
    kinds, counts = kinds_of(plan_model(name, quantization=form))
    assert_least(kinds, counts, 4, cheapest_of_all if len(kinds) < 4 else cheapest_of_equal_uses)


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_wrapped_models_stream_the_least_there_is(name):
    assert_least(*kinds_of(plan_for(tiny_models.make(name), False, device="cpu")), 40)


@pytest.mark.parametrize("seed", range(30))
def test_four_kinds_of_awkward_sizes_stream_the_least_there_is(seed):
    """Uses are whole numbers of some unit; of 0.3 and 1 they are beyond 2**50."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 10 ** rng.choice([2, 6, 9, 12])) for _ in range(4)]
    uses = rng.choice([[1], [1, 2, 128], [5404319552844595, 2**54]])
    kinds = sorted({Kind(size, rng.choice(uses)) for size in sizes})
    assert_least(kinds, [rng.randrange(1, 10) for _ in kinds], 2)


@pytest.mark.parametrize("num", [20, 50, 100])
def test_many_kinds_stay_near_what_cutting_blocks_would_cost(num):
    kinds, counts = drawn(num, num)
    for missing in missing_of(kinds, counts, 12)[3:]:  # fewer bytes make single blocks count
        streamed = streamed_counts(kinds, counts, missing)
        assert_enough(kinds, counts, streamed, missing)
        assert cost_of(kinds, streamed) <= if_cut(kinds, counts, missing) * Fraction(101, 100)


@pytest.mark.parametrize("seed", range(8))
def test_more_room_never_streams_more(seed, monkeypatch):
    """Also where ways are thinned out to a few."""
    if seed % 2:
        monkeypatch.setattr(choose, "_EXACT_CHOICES", 0)
        monkeypatch.setattr(choose, "_MAX_POINTS", [2, 5, 20, 100][seed // 2 % 4])
    kinds, counts = drawn(seed, 4 * (seed + 1))
    costs = [
        cost_of(kinds, streamed_counts(kinds, counts, missing))
        for missing in missing_of(kinds, counts, 40)
    ]
    assert costs == sorted(costs)


def test_of_equal_cost_fewer_larger_blocks_stream():
    kinds, counts = [Kind(10, 1), Kind(20, 1), Kind(40, 1)], [4, 2, 10]
    assert streamed_counts(kinds, counts, 320) == [0, 0, 10]


@pytest.mark.parametrize("num", [5, 50, 500, 5000])
def test_kinds_are_chosen_in_few_steps(num, monkeypatch):
    """All combinations of counts would be beyond any number."""
    kinds, counts = drawn(num, num)
    missing, numpy = missing_of(kinds, counts, 3)[1], CountingNumpy()
    monkeypatch.setattr(choose, "np", numpy)
    assert executed_lines(lambda: streamed_counts(kinds, counts, missing)) < 5e5
    assert numpy.num_elements < 2e7
