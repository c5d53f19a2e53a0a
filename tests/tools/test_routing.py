"""Traces of tools.routing: right sizes, the same in every run, and hits as they were published."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from tools.routing import Routing
from tools.simulated_experts import ROUTINGS

SETTLING, COUNTED = 300, 200  # tokens


def hits_of_a_cache(routing: Routing, num_slots: int) -> float:
    """Of one cache for the experts of all layers, which forgets what was used least recently."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = wanted = 0
    for number, token in enumerate(routing.tokens(SETTLING + COUNTED)):
        for expert in ((layer, one) for layer, chosen in enumerate(token) for one in chosen):
            hits += number >= SETTLING and expert in held
            wanted += number >= SETTLING
            held[expert] = None
            held.move_to_end(expert)
            if len(held) > num_slots:
                held.popitem(last=False)
    assert len(held) == num_slots  # it was full
    return hits / wanted


@pytest.mark.parametrize("model", ROUTINGS)
@pytest.mark.parametrize(("name", "of_an_eighth"), [("81%", 0.67), ("46%", 0.30)])
def test_a_cache_hits_what_was_published(model: str, name: str, of_an_eighth: float) -> None:
    routing = ROUTINGS[model][name]
    number = routing.layers * routing.experts
    assert hits_of_a_cache(routing, number // 8) == pytest.approx(of_an_eighth, abs=0.01)
    of_a_quarter = int(name.removesuffix("%")) / 100
    assert hits_of_a_cache(routing, number // 4) == pytest.approx(of_a_quarter, abs=0.01)


def test_each_layer_chooses_so_many_different_experts() -> None:
    routing = Routing(layers=3, experts=16, chosen=5, eighth=0.5, quarter=0.7)
    tokens = list(routing.tokens(40))
    assert len(tokens) == 40 and {len(token) for token in tokens} == {3}
    for chosen in (chosen for token in tokens for chosen in token):
        assert len(set(chosen)) == 5 and chosen == sorted(chosen)
        assert 0 <= chosen[0] and chosen[-1] < 16
    used = {expert for token in tokens for chosen in token for expert in chosen}
    assert used == set(range(16))


def test_a_trace_is_the_same_in_every_run_and_another_with_another_seed() -> None:
    one, again, other = (Routing(2, 32, 2, 0.5, 0.7, seed) for seed in (1, 1, 2))
    assert list(one.tokens(20)) == list(again.tokens(20)) != list(other.tokens(20))
    assert list(one.tokens(20))[:5] == list(one.tokens(5))
