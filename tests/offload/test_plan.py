"""The planner against brute force: small integers everywhere, so that ties are frequent."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import CountingNumpy, executed_lines

from bminf.errors import ArgumentError, BudgetError
from bminf.offload import choose
from bminf.offload.plan import DEFAULT_USES, Block, Plan, least_budget, plan


def make(sizes, lists=None):
    lists = lists or [""] * len(sizes)
    return [
        Block(f"{name}.{at}", size, name)
        for at, (size, name) in enumerate(zip(sizes, lists, strict=True))
    ]


def plan_or_none(blocks, budget, uses=None, **keywords):
    try:
        return plan(blocks, budget, uses, **keywords)
    except BudgetError:
        return None


def cost_of(names, blocks, uses):
    return sum(
        Fraction(uses.get(block.name, uses.get(block.list_name, DEFAULT_USES))) * block.nbytes
        for block in blocks
        if block.name in names
    )


def spacing_of(streams):
    """(minus the smallest gap, sum of squared gaps) of the true ones, taken in a circle."""
    gaps = []
    for place in (at for at, moves in enumerate(streams) if moves):
        gap = 1
        while not streams[(place + gap) % len(streams)]:
            gap += 1
        gaps.append(gap)
    return -min(gaps, default=0), sum(gap * gap for gap in gaps)


def assert_spread(names, blocks, uses):
    """Each list streams its part of every kind, spaced as well as any choice among its own."""
    lists, kinds = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for block in blocks:
        used = uses.get(block.name, uses.get(block.list_name, DEFAULT_USES))
        lists[block.list_name][block.nbytes, used].append(block.name in names)
        kinds[block.nbytes, used].append(block.name in names)
    for own in lists.values():
        for kind, streams in own.items():
            part = Fraction(sum(kinds[kind]), len(kinds[kind])) * len(streams)
            assert abs(sum(streams) - part) < 1
            assert spacing_of(streams) == best_spacing(len(streams), sum(streams))


@functools.cache
def best_spacing(length, count):
    """The best of all choices of so many."""
    choices = (set(places) for places in itertools.combinations(range(length), count))
    return min(spacing_of([at in places for at in range(length)]) for places in choices)


def fits(names, blocks, budget):
    resident = sum(block.nbytes for block in blocks if block.name not in names)
    largest = max((block.nbytes for block in blocks if block.name in names), default=0)
    return resident + 2 * largest <= budget


def subsets(blocks):
    movable = [block.name for block in blocks if block.nbytes]
    for count in range(len(movable) + 1):
        yield from map(set, itertools.combinations(movable, count))


def best_of_all(blocks, budget, uses):
    """The cost of the best of all subsets; None if there is none."""
    fitting = (names for names in subsets(blocks) if fits(names, blocks, budget))
    return min((cost_of(names, blocks, uses) for names in fitting), default=None)


def assert_sound(made: Plan, blocks, uses):
    assert made.total_bytes <= made.budget
    assert made.total_bytes == made.resident_bytes + made.slot_bytes + made.reserved_bytes
    placed = Counter(made.resident) + Counter(made.streamed)
    assert placed == Counter(block.name for block in blocks)
    order = {block.name: at for at, block in enumerate(blocks)}
    for names in (made.resident, made.streamed):
        assert list(names) == sorted(names, key=order.__getitem__)
    size = {block.name: block.nbytes for block in blocks}
    assert made.resident_bytes == made.outside_bytes + sum(size[name] for name in made.resident)
    assert made.slot_bytes == 2 * max((size[name] for name in made.streamed), default=0)
    assert made.streamed_bytes == sum(size[name] for name in made.streamed)
    assert made.streamed_bytes_per_request == cost_of(set(made.streamed), blocks, uses)
    assert all(size[name] > 0 for name in made.streamed)


@st.composite
def problems(draw, most=9, size=6, kinds=None):
    """(blocks in up to three lists, uses of some lists and blocks)."""
    count = draw(st.integers(1, most))
    values = st.integers(0, size)
    if kinds:
        values = st.sampled_from(draw(st.lists(st.integers(1, size), min_size=1, max_size=kinds)))
    lists = draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    blocks = make(draw(st.lists(values, min_size=count, max_size=count)), lists)
    number = st.sampled_from([1, 2, 3, 0.5, 1.5, 1 + 2**-30])
    keys = st.sampled_from(
        sorted({*lists, *(block.name for block in blocks)} if not kinds else "a")
    )
    uses = draw(st.dictionaries(keys, number, max_size=4))
    return blocks, {key: value for key, value in uses.items() if key in lists or not kinds}


@given(problems(), st.integers(0, 60))
@settings(max_examples=400, deadline=None)
def test_few_blocks_equal_brute_force(problem, budget):
    blocks, uses = problem
    expected = best_of_all(blocks, budget, uses)
    made = plan_or_none(blocks, budget, uses)
    assert (made is None) == (expected is None)
    if made is None:
        return
    assert_sound(made, blocks, uses)
    assert made.streamed_bytes_per_request == expected
    assert_spread(set(made.streamed), blocks, uses)


@given(problems(most=6, size=4), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_outside_and_reserved_bytes_come_off_the_budget(problem, outside, reserved):
    blocks, uses = problem
    for room in range(0, 30, 3):
        budget = outside + reserved + room
        plain = plan_or_none(blocks, room, uses)
        made = plan_or_none(blocks, budget, uses, outside_bytes=outside, reserved_bytes=reserved)
        assert (made is None) == (plain is None)
        if made is not None:
            assert_sound(made, blocks, uses)
            assert made.streamed == plain.streamed
            assert made.total_bytes == plain.total_bytes + outside + reserved


def gaps_of(places, length):
    return [
        (after - before - 1) % length + 1
        for before, after in zip(places, [*places[1:], places[0]], strict=True)
    ]


@pytest.mark.parametrize(
    "lengths",
    [(13,), (24,), (63,), (100,), (12, 12), (24, 12), (7, 30), (5, 9, 14), (1, 1, 40)],
)
def test_equal_blocks_stream_evenly_and_of_several_lists_in_proportion(lengths):
    names = [name for name, length in zip("abc", lengths, strict=False) for _ in range(length)]
    blocks = make([10] * len(names), names)
    for resident in range(len(names) - 2):
        streamed = plan(blocks, 20 + 10 * resident).streamed
        shares = Counter(name.split(".")[0] for name in streamed)
        assert sum(shares.values()) == len(names) - resident
        for name, length in zip("abc", lengths, strict=False):
            assert abs(shares[name] - Fraction(length * len(streamed), len(names))) < 1
            first = names.index(name)
            places = [int(n.split(".")[1]) - first for n in streamed if n.split(".")[0] == name]
            even = {length // len(places), -(-length // len(places))} if places else set()
            assert not places or set(gaps_of(places, length)) <= even


@pytest.mark.parametrize("seed", range(25))
def test_mixed_kinds_are_each_spread_over_their_own(seed):
    rng = random.Random(seed)
    count = rng.choice([13, 13, 14])
    lists = rng.choice(["a" * count, "ab" * count, "aab" * count])[:count]
    blocks = make([rng.choice([10, 10, 15, 33]) for _ in range(count)], lists)
    made = plan_or_none(blocks, rng.randrange(66, sum(block.nbytes for block in blocks)))
    if made is not None:
        assert_spread(set(made.streamed), blocks, {})


def test_two_kinds_in_turn_do_not_stream_side_by_side():
    """Half of each: spread alike, they would stream in pairs."""
    blocks = make([10 if at % 2 else 11 for at in range(80)])
    places = choose.spread([[choose.Kind(b.nbytes, 1) for b in blocks]], SHARES)[0]
    assert len(places) == 40
    assert max(gaps_of(places, 80)) <= 3


SHARES = {choose.Kind(10, 1): 20, choose.Kind(11, 1): 20}


def test_long_lists_of_mixed_kinds_keep_their_streamed_blocks_apart():
    blocks = make([10 if at % 2 else 15 for at in range(400)])
    uses = {block.name: 1 for block in blocks if block.nbytes == 10}
    made = plan(blocks, sum(block.nbytes for block in blocks) - 980, uses)
    assert {blocks[int(name.split(".")[1])].nbytes for name in made.streamed} == {10}
    assert len(made.streamed) == 100
    assert spacing_of([block.name in made.streamed for block in blocks]) == (-4, 1600)


@given(problems(most=7, size=6))
@settings(max_examples=60, deadline=None)
def test_refusal_names_the_least_limit_that_would_do(problem):
    blocks, uses = problem
    least = next(b for b in itertools.count() if plan_or_none(blocks, b, uses, outside_bytes=3))
    if least:
        with pytest.raises(BudgetError, match=rf"\({least - 1} bytes\).*\({least} bytes"):
            plan(blocks, least - 1, uses, outside_bytes=3)
    made = plan(blocks, least, uses, outside_bytes=3)
    assert made.total_bytes <= least == least_budget(made)


S = (1234577, 2345699, 987654323, 55555557)
MANY = {
    "all the same": make([1234577] * 10_000),
    "two lists": make([1234577] * 10_000, ["a"] * 4000 + ["b"] * 6000),
    "four kinds": make([S[at % 4] for at in range(10_000)]),
    "four kinds, four lists": make([S[at % 4] for at in range(10_000)], "abcd" * 2500),
    "all different": make([10**8 + at * 7919 for at in range(10_000)], ["a", "b"] * 5000),
}


@pytest.mark.parametrize("case", MANY)
@pytest.mark.parametrize("part", [0.495, 0.935])
def test_ten_thousand_blocks_are_planned_in_few_steps(case, part, monkeypatch):
    """A square of their number would be 100 million lines, or elements of arrays; these bounds
    are less than a second."""
    blocks, numpy = MANY[case], CountingNumpy()
    budget = int(part * sum(block.nbytes for block in blocks))
    monkeypatch.setattr(choose, "np", numpy)
    results = []
    assert executed_lines(lambda: results.append(plan(blocks, budget))) < 4e6
    assert numpy.num_elements < 5e7
    [made] = results
    assert made.total_bytes <= budget
    assert len(made.resident) + len(made.streamed) == 10_000


def test_everything_fits_without_slots():
    made = plan(
        make([5, 7, 0], "aab"), 112, {"a": 1, "b.2": 2}, outside_bytes=60, reserved_bytes=40
    )
    assert made.resident == ("a.0", "a.1", "b.2")
    assert (made.streamed, made.slot_bytes, made.streamed_bytes_per_request) == ((), 0, 0)
    assert (made.resident_bytes, made.total_bytes) == (72, 112)
    assert dict(made.uses) == {"a.0": 1, "a.1": 1, "b.2": 2}
    with pytest.raises(TypeError):
        made.uses["a.0"] = 3
    assert "fits entirely: nothing is streamed" in str(made)
    assert plan([], 0).total_bytes == 0


def test_a_plan_that_keeps_tables_on_the_host_does_not_say_that_all_fits():
    settings = {"outside_bytes": 60, "table_bytes": 20, "tables": ["embed.weight"]}
    all_but_rows = plan(make([5, 7]), 72, **settings)
    assert (all_but_rows.tables, all_but_rows.streamed) == (("embed.weight",), ())
    assert "all blocks fit: nothing is streamed but rows" in str(all_but_rows)
    assert "fits entirely" in str(plan(make([5, 7]), 92, **settings))


def test_a_plan_can_be_copied_and_pickled():
    made = plan(make([4, 5, 6, 7]), 20, {".1": 2})
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin == made
        with pytest.raises(TypeError):
            twin.uses[".1"] = 3


def test_picture_shows_every_block_and_its_numbers():
    blocks = make([1 << 20] * 70 + [1 << 19] * 3, ["decoder.layers"] * 70 + ["head"] * 3)
    text = str(plan(blocks, 40 << 20, {"decoder.layers.0": 1, "head": 2.5}, reserved_bytes=1 << 20))
    rows = text.splitlines()
    made = plan(blocks, 40 << 20, {"decoder.layers.0": 1, "head": 2.5}, reserved_bytes=1 << 20)
    signs = "".join(row.strip() for row in rows if set(row.strip()) <= {"#", "."})
    assert signs == "".join("." if b.name in made.streamed else "#" for b in blocks)
    assert any(row.startswith("decoder.layers:") and "uses 1 to 128" in row for row in rows)
    assert any(row.startswith("head:") and "uses 2.5" in row for row in rows)
    assert "40.0 MiB" in text and "fits entirely" not in text
    assert max(map(len, rows)) <= 100


# Blobs that host memory has no room for


@given(problems(most=8), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_least_is_read_from_disk_and_spread_evenly(problem, budget, host_bytes):
    """Against every choice there is: two staging buffers, and the rest, within `host_bytes`."""
    blocks, uses = problem
    everywhere = plan_or_none(blocks, budget, uses)
    if everywhere is None:
        return
    streamed = [block for block in blocks if block.name in everywhere.streamed]
    best = best_of_all(streamed, host_bytes, uses)
    made = plan_or_none(blocks, budget, uses, host_bytes=host_bytes)
    if best is None:
        assert made is None
        return
    assert made.streamed == everywhere.streamed and made.resident == everywhere.resident
    assert list(made.on_disk) == [name for name in made.streamed if name in made.on_disk]
    assert made.host_bytes <= host_bytes
    assert cost_of(set(made.on_disk), blocks, uses) == best
    assert_spread(set(made.on_disk), streamed, uses)
    assert [made.streamed[at] for at in made.disk_places] == list(made.on_disk)


@given(problems(most=40, size=9, kinds=3), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_more_host_memory_never_reads_more(problem, budget):
    blocks, uses = problem
    whole = plan_or_none(blocks, budget, uses)
    if whole is None:
        return
    read = [
        cost_of(set(made.on_disk), blocks, uses)
        for host_bytes in range(0, whole.streamed_bytes + 2, 3)
        if (made := plan_or_none(blocks, budget, uses, host_bytes=host_bytes)) is not None
    ]
    assert read == sorted(read, reverse=True)
    enough = plan(blocks, budget, uses, host_bytes=whole.streamed_bytes)
    assert enough == whole and enough.on_disk == () and enough.staging_bytes == 0


def test_equal_blobs_on_disk_are_spread_among_the_streamed_ones():
    made = plan(make([10] * 100), 20, host_bytes=10 * (75 + 2))
    assert len(made.streamed) == 100 and len(made.on_disk) == 25
    assert made.disk_places == tuple(range(0, 100, 4))
    assert (made.disk_bytes, made.staging_bytes, made.host_bytes) == (250, 20, 770)


def test_picture_shows_three_tiers():
    blocks = make([1 << 20] * 50, ["layers"] * 50)
    made = plan(blocks, 22 << 20, host_bytes=20 << 20)
    assert (len(made.resident), len(made.streamed), len(made.on_disk)) == (20, 30, 12)
    rows = str(made).splitlines()
    signs = "".join(row.strip() for row in rows if set(row.strip()) <= {"#", ".", ":"})
    assert [signs.count(sign) for sign in "#.:"] == [20, 18, 12]
    assert [name for name, sign in zip(made.uses, signs, strict=True) if sign == ":"] == list(
        made.on_disk
    )
    text = " ".join(" ".join(rows).split())
    assert "in host 20.0 MiB 18 streamed blocks, and two staging buffers of 1.0 MiB" in text
    assert "on disk 12.0 MiB 12 streamed blocks, 1.5 GiB read per request" in text
    assert "20 stay (#), 18 stream (.), 12 from disk (:)" in text
    assert max(map(len, rows)) <= 100
    assert pickle.loads(pickle.dumps(made)) == made
    without = str(plan(blocks, 22 << 20))
    assert "disk" not in without and ":" not in without.splitlines()[-1]


def test_too_little_host_memory_is_refused_with_the_least_that_would_do():
    with pytest.raises(BudgetError, match=r"\(19 bytes\) of host memory.*\(20 bytes: two staging"):
        plan(make([10] * 9), 20, host_bytes=19)
    assert len(plan(make([10] * 9), 20, host_bytes=20).on_disk) == 9


BLOCKS = make([4, 5, 6])


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((BLOCKS, 99, {"nope": 1}), {}, "'nope'; accepted"),
        ((BLOCKS, 99, {".1": 0}), {}, r"uses\['.1'\]=0"),
        ((BLOCKS, 99, {".1": -1.5}), {}, "above 0"),
        ((BLOCKS, 99, {".1": float("nan")}), {}, "finite"),
        ((BLOCKS, 99, {".1": float("inf")}), {}, "finite"),
        ((BLOCKS, 99, {".1": "2"}), {}, "finite"),
        ((BLOCKS, -1), {}, "budget=-1"),
        ((BLOCKS, 1.5), {}, "budget=1.5"),
        ((BLOCKS, 99), {"outside_bytes": -1}, "outside_bytes=-1"),
        ((BLOCKS, 99), {"reserved_bytes": -1}, "reserved_bytes=-1"),
        ((BLOCKS, 99), {"host_bytes": -1}, "host_bytes=-1"),
        (([Block("a", -1)], 99), {}, "block 'a'=-1"),
        (([Block("a", 1), Block("a", 2)], 99), {}, "two blocks are named 'a'"),
        (([Block("a", 2**61)], 99), {}, "at most"),
    ],
)
def test_wrong_arguments_are_refused(arguments, keywords, message):
    with pytest.raises(ArgumentError, match=message):
        plan(*arguments, **keywords)


@pytest.mark.parametrize("uses", [5e-324, 1e-300, 1e300])
def test_extreme_uses_are_planned_too(uses):
    blocks = make([3, 5, 7, 11] * 2, "abcd" * 2)
    made = plan(blocks, 36, {"a": uses})
    assert made.total_bytes <= 36
    cost = cost_of(set(made.streamed), blocks, {"a": uses})
    assert cost <= best_of_all(blocks, 36, {"a": uses}) * Fraction(1 + 1e-12)
