"""The pool of experts on the simulated backend: right bytes, and the hits of a cache that forgets
what was used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring import check

from bminf.offload.pool import ExpertPool
from bminf.offload.predict import SimulatedBackend

LINK, FIRST_BLOCK, FIRST_SLOT = 1e9, 3, 2


def make(num_experts: int, num_slots: int) -> tuple[ExpertPool, SimulatedBackend]:
    sizes = [10**6 + number for number in range(FIRST_BLOCK + num_experts)]
    backend = SimulatedBackend(sizes, LINK)
    return ExpertPool(sizes[FIRST_BLOCK:], num_slots, backend, FIRST_BLOCK, FIRST_SLOT), backend


def run_layer(
    pool: ExpertPool, backend: SimulatedBackend, order: Iterable[int], seconds: float = 1e-4
) -> None:
    for expert in order:
        slot = pool.enter(expert)
        backend.read(FIRST_BLOCK + expert, FIRST_SLOT + slot, seconds)
        pool.leave(expert)


class Lru:
    """A cache of its own: hits of experts that come one after another."""

    def __init__(self, num_slots: int) -> None:
        self._held: OrderedDict[int, None] = OrderedDict()
        self._num_slots, self.hits = num_slots, 0

    def use(self, expert: int) -> None:
        self.hits += expert in self._held
        self._held[expert] = None
        self._held.move_to_end(expert)
        if len(self._held) > self._num_slots:
            self._held.popitem(last=False)


LAYERS = st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=6), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(2, 12))
def test_it_hits_what_a_cache_hits_and_computes_with_the_right_bytes(
    layers: Sequence[set[int]], num_slots: int
) -> None:
    pool, backend = make(12, num_slots)
    cache = Lru(num_slots)
    for wanted in layers:
        order = pool.want(sorted(wanted))
        assert set(order) == wanted
        run_layer(pool, backend, order)
        for expert in sorted(wanted):
            cache.use(expert)
    check(backend)
    assert pool.hits + pool.misses == sum(map(len, layers))
    if num_slots >= max(map(len, layers)):  # or the copy of what has no room begins early
        assert pool.hits >= cache.hits
    assert len(backend.copies) == pool.misses
    assert pool.bytes_copied == sum(10**6 + copy.block for copy in backend.copies)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(2, 12), st.randoms())
def test_what_is_expected_costs_time_alone(
    layers: Sequence[set[int]], num_slots: int, random: Any
) -> None:
    """Guesses for the next layer, right and wrong: each expert is right when it is read, and every
    byte is counted once."""
    pool, backend = make(24, num_slots)
    for turn, wanted in enumerate(layers):
        layer, next_layer = (range(12 * (at % 2), 12 * (at % 2) + 12) for at in (turn, turn + 1))
        numbers = [layer[expert] for expert in sorted(wanted)]
        if random.random() < 0.7:
            pool.expect(numbers, layer)
        order = pool.want(numbers)
        pool.expect(sorted(random.sample(next_layer, 3)), next_layer, is_guess=True)
        run_layer(pool, backend, order)
        pool.settle(layer)
    pool.clear()
    check(backend)
    copied = [10**6 + copy.block for copy in backend.copies]
    assert pool.bytes_copied == sum(copied)
    assert pool.hits + pool.misses == sum(map(len, layers))
    assert pool.bytes_unused <= pool.bytes_copied and pool.bytes_guessed <= pool.bytes_copied
    assert len(copied) >= pool.misses


def test_copies_begin_when_the_host_knows_what_is_wanted() -> None:
    pool, backend = make(6, 4)
    run_layer(pool, backend, pool.want([0, 1]))
    backend.compute(5e-3)
    backend.synchronize(2e-5)
    asked_s = backend.now_s
    run_layer(pool, backend, pool.want([1, 2, 3]), seconds=1e-4)
    late = [copy for copy in backend.copies if copy.block - FIRST_BLOCK in (2, 3)]
    assert [copy.start_s for copy in late] == pytest.approx([asked_s, late[0].end_s])
    # The hit is computed meanwhile, and each of the others when it is there.
    assert backend.now_s == pytest.approx(late[1].end_s + 1e-4)
    check(backend)


@settings(max_examples=40, deadline=None)
@given(LAYERS, st.integers(2, 5), st.randoms())
def test_any_other_order_costs_time_and_never_a_value(
    layers: Sequence[set[int]], num_slots: int, random: Any
) -> None:
    """Also experts that were not said to be wanted, and a layer that is cut short."""
    pool, backend = make(12, num_slots)
    for wanted in layers:
        said = pool.want(expert for expert in sorted(wanted) if random.random() < 0.8)
        order = random.sample(sorted(wanted), len(wanted))
        run_layer(pool, backend, order[: random.randint(0, len(order))])
        assert set(said) <= wanted
    check(backend)


def test_hits_are_computed_while_misses_are_copied() -> None:
    pool, backend = make(6, 4)
    run_layer(pool, backend, pool.want([0, 1]))
    num_before = len(backend.copies)
    assert pool.want([0, 1, 4, 5]) == [0, 1, 4, 5]
    assert [copy.block - FIRST_BLOCK for copy in backend.copies[num_before:]] == [4, 5]
    run_layer(pool, backend, [0, 1, 4, 5], seconds=1e-2)
    check(backend)
    # The first of them waits for nothing, and the last for nothing either: all was copied by then.
    reads = backend.reads[-4:]
    assert all(one.end_s == after.start_s for one, after in pairwise(reads))


def test_those_that_have_come_are_told_from_those_on_their_way() -> None:
    pool, backend = make(6, 4)
    assert pool.want([0, 1, 2, 3]) == [0, 1, 2, 3]
    backend.compute(2.5e-3)  # two copies have ended, and one that is waited for
    assert pool.arrived([2, 3]) == [2]
    assert pool.arrived([0, 1, 2, 3]) == [0, 1, 2]
    backend.compute(2e-3)
    assert pool.arrived([3]) == [3]
    run_layer(pool, backend, range(4))
    assert pool.misses == len(backend.copies) == 4
    check(backend)


def test_a_layer_of_more_than_the_pool_holds_comes_in_turns_each_expert_once() -> None:
    pool, backend = make(12, 2)
    run_layer(pool, backend, pool.want(range(12)))
    check(backend)
    assert [copy.block - FIRST_BLOCK for copy in backend.copies] == list(range(12))
    waited = backend.reads[-1].end_s
    # Double-buffered: the link does not rest, though each expert takes a tenth of its copy's time.
    assert waited < 12 * 1e-3 + 3 * 1e-4


def test_what_is_forgotten_is_copied_anew() -> None:
    pool, backend = make(4, 3)
    run_layer(pool, backend, pool.want([0, 1]))
    pool.forget(0)
    pool.forget(3)
    run_layer(pool, backend, pool.want([0, 1]))
    assert (pool.hits, pool.misses) == (1, 3)
    check(backend)


class _Failing(SimulatedBackend):
    fails = False

    def wait(self, copied: Any) -> None:
        if self.fails:
            raise OSError("no disk")
        super().wait(copied)


def test_a_failed_copy_is_not_kept() -> None:
    backend = _Failing([10**6] * 4, LINK)
    pool = ExpertPool([10**6] * 4, 2, backend, 0, 0)
    pool.want([0, 1])
    backend.fails = True
    with pytest.raises(OSError, match="no disk"):
        pool.enter(0)
    backend.fails = False
    for expert in pool.want([0, 1]):
        slot = pool.enter(expert)
        backend.read(expert, slot, 1e-4)
        pool.leave(expert)
    check(backend)
    assert pool.misses == 3
