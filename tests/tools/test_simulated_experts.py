"""Mixtures of experts on cards that are not here: the pool on a virtual clock, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from test_routing import hits_of_a_cache

from bminf.errors import ArgumentError
from bminf.offload.hit_rates import PUBLISHED
from bminf.offload.plan import Block, Experts, Plan, plan
from bminf.offload.predict import predict
from tools import simulated_experts
from tools.routing import Routing
from tools.simulated_experts import (
    CARDS,
    CASES,
    GPT_OSS,
    HOST_WAIT_S,
    QWEN,
    ROUTINGS,
    Card,
    Simulated,
    main,
    plan_of,
    simulate,
)

CARD = Card("card", 10**9, link=1e9, memory=1e10)
ROUTING = Routing(layers=2, experts=8, chosen=2, eighth=0.5, quarter=0.7)
EXPERT_BYTES = 10**6


def small(num_slots: int) -> Plan:
    """Three layers, of which the last two have experts."""
    blocks = [Block(f"layers.{at}", 10**6 * (at + 1), "layers") for at in range(3)]
    experts = Experts(16, 16 * EXPERT_BYTES, EXPERT_BYTES, num_slots, 4 * EXPERT_BYTES)
    return replace(plan(blocks, 10**9, outside_bytes=2 * 10**6), experts=experts)


DENSE_S = (1 + 2 + 3 + 2) * 1e-4  # at 1e10 bytes a second


def test_with_room_for_all_nothing_is_copied() -> None:
    found = simulate(small(16), ROUTING, CARD)
    assert found.hit_rate == 1 and found.missed_bytes == found.copy_s == 0
    assert found.memory_s == pytest.approx(DENSE_S + 4e-4)
    assert found.token_s == pytest.approx(found.memory_s + 2 * HOST_WAIT_S)
    assert found.binds == "device memory"


def test_with_the_least_room_all_is_copied_after_the_router_has_chosen() -> None:
    found = simulate(small(2), ROUTING, CARD)
    assert found.hit_rate == 0 and found.missed_bytes == 4 * EXPERT_BYTES
    # A layer: two copies, one after another, and the product with the second one.
    assert found.token_s == pytest.approx(DENSE_S + 2 * (HOST_WAIT_S + 2e-3 + 1e-4))
    assert found.binds == "link"
    fast = simulate(small(2), ROUTING, replace(CARD, link=1e15, memory=1e15))
    assert fast.binds == "host" and fast.token_s == pytest.approx(2 * HOST_WAIT_S, rel=1e-3)


def test_right_guesses_save_time_and_wrong_ones_take_it() -> None:
    without, perfect, wrong = (simulate(small(8), ROUTING, CARD, part) for part in (None, 1.0, 0.0))
    assert perfect.missed_bytes == without.missed_bytes and perfect.unused_bytes == 0
    assert perfect.hit_rate == without.hit_rate
    assert wrong.missed_bytes > without.missed_bytes and wrong.unused_bytes > 0
    assert perfect.token_s < without.token_s < wrong.token_s


def test_it_refuses_what_it_does_not_simulate() -> None:
    whole = small(16)
    with pytest.raises(ArgumentError, match="not by need"):
        simulate(replace(whole, experts=None), ROUTING, CARD)
    with pytest.raises(ArgumentError, match="not of Routing"):
        simulate(whole, replace(ROUTING, experts=9), CARD)
    assert whole.experts is not None
    on_disk = replace(whole, experts=replace(whole.experts, on_disk=(14, 15)))
    with pytest.raises(ArgumentError, match="2 experts wait on disk"):
        simulate(on_disk, ROUTING, CARD)
    with pytest.raises(ArgumentError, match="1 blocks stream"):
        simulate(replace(whole, streamed=("layers.0",)), ROUTING, CARD)


PAGE = Path(simulated_experts.__file__).with_name("README.md")

planned = cache(plan_of)


@cache
def simulated(model: str, card: str, routing: str) -> Simulated:
    return simulate(planned(model, CARDS[card]), ROUTINGS[model][routing], CARDS[card])


LEAST = {(QWEN, "GTX 1060 6 GB"): 25, (QWEN, "RTX 3060 12 GB"): 60, (GPT_OSS, "24 GB"): 25}


@pytest.mark.parametrize(("model", "card"), CASES)
def test_small_cards_run_large_mixtures_of_experts(model: str, card: str) -> None:
    found, of_all = simulated(model, card, "81%"), planned(model, CARDS[card])
    assert found.tokens_per_s >= LEAST[model, card]
    assert found.tokens_per_s > simulated(model, card, "46%").tokens_per_s
    assert of_all.experts is not None and of_all.total_bytes <= CARDS[card].memory_bytes
    # The formula of predict() has no trace, but the two published points.
    rates = CARDS[card].link, CARDS[card].memory
    formula = predict(of_all, *rates, hit_rates=PUBLISHED)
    assert found.token_s - found.host_s == pytest.approx(formula.pass_s, rel=0.15)


@pytest.mark.parametrize("routing", ["81%", "46%"])
@pytest.mark.parametrize(("model", "card"), CASES)
def test_what_it_is_made_of(model: str, card: str, routing: str) -> None:
    found, experts = simulated(model, card, routing), planned(model, CARDS[card]).experts
    assert experts is not None
    hits = hits_of_a_cache(ROUTINGS[model][routing], experts.num_slots)
    assert hits <= found.hit_rate < hits + 0.01
    assert found.missed_bytes == pytest.approx((1 - found.hit_rate) * experts.bytes_per_token)
    parts = [found.memory_s, found.copy_s, found.host_s]
    assert found.host_s == ROUTINGS[model][routing].layers * HOST_WAIT_S
    # Hits are computed while misses are copied; nothing else hides.
    assert max(parts) < found.token_s < sum(parts)
    assert found.binds == ["device memory", "link", "host"][parts.index(max(parts))]
    slots = f"{experts.num_slots:,} of {experts.number:,}"
    told = f"{found.hit_rate:.0%} | {found.tokens_per_s:.1f} | {found.binds}"
    assert f"| {model}, {card} | {slots} | {routing} | {told} |" in PAGE.read_text()


def test_it_prints_each_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.simulated_experts.CASES", [(QWEN, "GTX 1060 6 GB")])
    assert main([]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["model"] for line in lines] == [QWEN, QWEN]
    best = simulated(QWEN, "GTX 1060 6 GB", "81%")
    assert lines[0]["tokens_per_s"] == best.tokens_per_s and lines[0]["binds"] == best.binds
    assert lines[0]["slots"] < lines[0]["experts"] == 10240
