"""What the pages predict for cards is what the planner says today; tools/predictions.py."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import read_result, table
from bminf.cli.gpus import Card, Speeds, card_of
from bminf.offload.plan import Block, plan
from tools import predictions
from tools.predictions import CARDS, MODELS, TEXTS, prediction_of

FILE = read_result("predictions.json")


@pytest.mark.parametrize("name", ["Llama 3.1 8B, int4, GTX 1060", "CPM-2, int8, GTX 1060"])
def test_the_file_says_what_the_planner_says(name: str) -> None:
    """Otherwise run `python -m tools.predictions` and `python -m benchmarks.report` again."""
    kept = next(result for result in FILE["results"] if result["name"] == name)
    model = next(model for model in MODELS if model.name == kept["details"]["model"])
    card = card_of(kept["details"]["card"])
    assert predictions._result(model, kept["details"]["format"], card) == kept


def test_the_file_has_all_models_and_cards() -> None:
    found = [result["name"] for result in FILE["results"]]
    expected = [f"{m.name}, {form}, {c}" for m in MODELS for form in m.formats for c in CARDS]
    assert found == expected


def test_figures_are_those_of_today() -> None:
    name = "cpm1_int8_bytes"
    assert FILE["figures"][name] == predictions._FIGURES[name]()
    assert list(FILE["figures"]) == list(predictions._FIGURES)


def small_plan(memory_limit: int) -> Any:
    blocks = [Block(f"block {i}", 1000) for i in range(10)]
    return plan(blocks, memory_limit, {block.name: 128 for block in blocks})


def test_a_prediction_of_a_plan_whose_link_binds() -> None:
    """Four of ten blocks stay, two slots; six blocks cross the link for a token, or for TEXTS."""
    card = Card("a card", 6000, Speeds(link=100, memory=10_000), 1e9)
    found = prediction_of(small_plan(6000), card)
    assert found["copied_bytes_per_token"] == 6000
    assert found["tokens_per_s"] == found["most_tokens_per_s"] == pytest.approx(1 / 60)
    assert found["together_tokens_per_s"] == pytest.approx(TEXTS / 60)
    assert found["bound"] == found["together_bound"] == "link"


def test_pascal_multiplies_in_float32() -> None:
    """16 texts, 2 operations for each of 10,000 weights of 4.5 bits, a quarter of the flops."""
    speeds = Speeds(link=10**12, memory=10**12)
    found = prediction_of(small_plan(10_000), Card("GTX 10", 10_000, speeds, 4e3))
    weights = 10 * int(1000 * 8 / predictions.BITS)
    assert found["together_tokens_per_s"] == pytest.approx(1e3 / (2 * weights))
    assert found["together_bound"] == "arithmetic"


def test_of_a_card_without_known_arithmetic_texts_together_are_left_out() -> None:
    card = Card("a card", 6000, Speeds(link=100, memory=10_000), None)
    assert "together_tokens_per_s" not in prediction_of(small_plan(6000), card)


def test_tables() -> None:
    by_card, compared = table(FILE), table(FILE, "compared")
    assert by_card.count("\n") > len(MODELS) and "RTX 5090 32 GB" in by_card and "**" in by_card
    assert compared.count("\n") == 2 + len(predictions.COMPARED)
