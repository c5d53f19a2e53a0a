"""What models that continue a text score, against their own logits.

bminf/models/decoder_only.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bminf.errors import ArgumentError

Loader = Callable[..., Any]
TEXT = "今天天气很好我们去公园散步吧你是谁"


def expected_loss(model: Any, ids: Sequence[int], num_known: int) -> float:
    """Of all tokens behind the first num_known, one text in one pass."""
    logs = model.logits(ids).double().log_softmax(-1)
    return -sum(float(logs[at - 1, ids[at]]) for at in range(num_known, len(ids)))


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_choice_has_the_probability_of_its_tokens(load: Loader, is_deterministic: bool) -> None:
    """All of them in one pass, where there is room; and in any company with the same bits."""
    model = load("cpm1", max_length=12, max_batch_size=4, deterministic=is_deterministic)
    context, choices = model.tokenizer.encode("今天天气"), ["很好", "好", "我们去公园", "好"]
    before = model.stats.num_sweeps
    scores = model.score("今天天气", choices)
    assert is_deterministic or model.stats.num_sweeps == before + 1
    for score, choice in zip(scores, choices, strict=True):
        ids = [*context, *model.tokenizer.encode(choice)]
        assert score == pytest.approx(-expected_loss(model, ids, len(context)), abs=1e-4)
    assert scores[1] == pytest.approx(scores[3], abs=1e-5)
    alone = model.score(context, [model.tokenizer.encode("好")])
    assert alone == (scores[1:2] if is_deterministic else pytest.approx(scores[1:2], abs=1e-5))


@pytest.mark.parametrize("stride", [None, 3, 8])
def test_perplexity_scores_each_token_once(load: Loader, stride: int | None) -> None:
    model = load("cpm1", max_length=8)
    ids = model.tokenizer.encode(TEXT)
    assert len(ids) > 9
    step, loss, count = stride or 8, 0.0, 0
    for start in range(0, len(ids) - 8 + step, step):
        window, known = ids[start : start + 8], 8 - step if start else 0
        loss += expected_loss(model, window, max(1, known))
        count += max(0, len(window) - max(1, known))
    assert count == len(ids) - 1 - (0 if step < 8 else len(ids) // 8)
    found = model.perplexity(TEXT, stride=stride)
    assert found == pytest.approx(math.exp(min(20, loss / count)), rel=1e-4)


def test_a_window_of_one_token_scores_nothing(load: Loader) -> None:
    with pytest.raises(ArgumentError, match="max_length=1 leaves no window"):
        load("cpm1", max_length=1).perplexity(TEXT)


def test_what_cannot_be_scored_is_said(load: Loader) -> None:
    model = load("cpm1", max_length=8)
    for wrong, message in (
        (lambda: model.score("今天", []), "at least one choice"),
        (lambda: model.score("今天", "好"), "give a list"),
        (lambda: model.score("今天", ["好", TEXT]), r"choices\[1\] has .* more than max_length=8"),
        (lambda: model.perplexity([12]), "text has one token"),
        (lambda: model.perplexity(TEXT, stride=9), "stride=9; accepted: 1 to"),
    ):
        with pytest.raises(ArgumentError, match=message):
            wrong()


def test_texts_under_way_go_on(load: Loader) -> None:
    """What is scored shares their passes."""
    model = load("cpm1", max_batch_size=2)
    alone = model.generate(TEXT, max_tokens=9, temperature=0)[0]
    pieces = model.generate_iter(TEXT, max_tokens=9, temperature=0)
    begun = next(pieces)
    (score,) = model.score("今天", ["好"])
    assert score < 0 and begun + "".join(pieces) == alone
