"""The choice of streamed blocks against the one that it is to replace."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.models.planning import plan_zoo, published
from bminf.scheduler import plan as planner
from bminf.scheduler.choose import choose
from bminf.scheduler.plan import Block
from bminf.wrapping import plan_for

ZOO = [(name, form) for name in ("cpm1", "cpm2", "eva", "glm-130b") for form in ("int8", "int4")]


def of_kinds(kinds):
    """Blocks and their uses: (bytes, uses, how many) of each kind, mixed."""
    drawn = [(nbytes, uses) for nbytes, uses, count in kinds for _ in range(count)]
    random.Random(len(drawn)).shuffle(drawn)
    blocks = tuple(Block(f"b.{at}", nbytes, "b") for at, (nbytes, _) in enumerate(drawn))
    return blocks, {block.name: uses for block, (_, uses) in zip(blocks, drawn, strict=True)}


def cost_now(blocks, uses, room):
    lists = list(planner._by_list(blocks).values())
    sizes = [block.nbytes for block in blocks]
    streamed = choose(sizes, [uses[block.name] for block in blocks], lists, room)
    slots = 2 * max(sizes[at] for at in streamed)
    assert sum(size for at, size in enumerate(sizes) if at not in streamed) + slots <= room
    return sum(Fraction(uses[blocks[at].name]) * sizes[at] for at in streamed)


def cost_before(blocks, uses, room):
    streamed = planner._choose(blocks, uses, room)
    return sum(Fraction(uses[blocks[at].name]) * blocks[at].nbytes for at in streamed)


def rooms(blocks, count):
    least, total = min(planner._needs(blocks))[0], sum(block.nbytes for block in blocks)
    return [least + (total - 1 - least) * at // (count - 1) for at in range(count) if least < total]


@pytest.mark.parametrize(("name", "form"), ZOO)
def test_models_of_the_zoo_cost_the_same(name, form):
    made = plan_zoo(published(name), None, form)
    for room in rooms(made.blocks, 40):
        assert cost_now(made.blocks, made.uses, room) == cost_before(made.blocks, made.uses, room)


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_wrapped_models_cost_the_same(name):
    made = plan_for(tiny_models.make(name), quantization=False, device="cpu")
    for room in rooms(made.blocks, 40):
        assert cost_now(made.blocks, made.uses, room) == cost_before(made.blocks, made.uses, room)


@st.composite
def kinds_of_blocks(draw):
    """1 to 4 kinds, at most a million combinations of their counts."""
    num = draw(st.integers(1, 4))
    size = st.integers(1, draw(st.sampled_from([9, 1000, 10**9])))
    uses = st.sampled_from([1, 2, 128, 129, 0.5, 37.4])
    count = st.integers(1, {1: 400, 2: 99, 3: 40, 4: 30}[num])
    return draw(st.lists(st.tuples(size, uses, count), min_size=num, max_size=num))


@given(kinds_of_blocks(), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_up_to_four_kinds_cost_the_same(kinds, part):
    blocks, uses = of_kinds(kinds)
    least, total = min(planner._needs(blocks))[0], sum(block.nbytes for block in blocks)
    room = least + int(part * (total - 1 - least))
    if least <= room < total:
        assert cost_now(blocks, uses, room) == cost_before(blocks, uses, room)


def drawn_kinds(seed, num):
    rng = random.Random(seed)
    top = rng.choice([4, 6, 9])
    values = rng.choice([[128], [1, 2, 128, 256], range(100, 200), [1, 2.3, 128.7]])
    return [
        (int(10 ** rng.uniform(3, top)), rng.choice(values), rng.choice([1, 1, 2, 5, 60]))
        for _ in range(num)
    ]


SIZES = (1234577, 2345699, 987654323, 55555557)
MANY = {
    "10,000 blocks of one kind": [(1234577, 128, 10_000)],
    "10,000 blocks of four sizes": [(size, 128, 2500) for size in SIZES],
    "10,000 blocks of four kinds": [(size, 40 + at, 2500) for at, size in enumerate(SIZES)],
    "10,000 kinds": [(10**8 + at * 7919, 128, 1) for at in range(10_000)],
    **{f"{num} kinds": drawn_kinds(num, num) for num in (6, 10, 20, 50, 100, 200)},
}


@pytest.mark.parametrize("case", MANY)
def test_of_many_blocks_at_most_a_hundredth_more_streams(case):
    blocks, uses = of_kinds(MANY[case])
    for room in rooms(blocks, 4):
        before = cost_before(blocks, uses, room)
        assert cost_now(blocks, uses, room) <= before * Fraction(101, 100)


@pytest.mark.parametrize("seed", range(12))
def test_more_room_never_streams_more(seed):
    blocks, uses = of_kinds(drawn_kinds(seed, 5 * (seed + 1)))
    costs = [cost_now(blocks, uses, room) for room in rooms(blocks, 40)]
    assert costs == sorted(costs, reverse=True)
