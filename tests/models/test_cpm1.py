"""bminf/models/cpm1.py: what generate() makes of the tokens that a CPM-1 writes, and logits()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scripted import say

Loader = Callable[..., Any]


def test_cpm1_gives_the_continuation_up_to_the_end(load: Loader) -> None:
    model = load("cpm1")
    fed = say(model, ["很", "好", "<eod>"])
    assert model.generate("今天天气", temperature=0) == ("很好", True)
    assert fed[0] == [model.tokenizer.encode("今天天气")]
    assert fed[1:] == [[[model.tokenizer.token_id("很")]], [[model.tokenizer.token_id("好")]]]


def test_cpm1_stops_at_max_tokens(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["很", "好", "，", "我们"])
    assert model.generate("今天天气", max_tokens=3, temperature=0) == ("很好，", False)


def test_an_unknown_token_is_never_written(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["<unk>", "<eod>"])
    text, stopped = model.generate("今天", temperature=0, max_tokens=2)
    assert stopped and "<unk>" not in text


def test_penalties_count_the_prompt(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["今天", "<eod>"])
    text, _ = model.generate("今天", temperature=0, max_tokens=1, frequency_penalty=60)
    assert text != "今天"


def test_logits_score_a_text(load: Loader) -> None:
    model = load("cpm1")
    ids = model.tokenizer.encode("今天天气很好")
    logits = model.logits("今天天气很好")
    assert logits.shape == (len(ids), model.config.vocab_size) and logits.dtype == torch.float32
    assert torch.equal(model.logits(ids), logits)
    greedy, _ = model.generate("今天天气很好", max_tokens=1, temperature=0)
    assert model.tokenizer.decode([int(logits[-1].argmax())]) == greedy
