"""bminf/models/t5.py: what generate(), fill_blank() and dialogue() make of the tokens that a model
writes, and logits()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripted import say

from bminf.errors import ArgumentError

Loader = Callable[..., Any]


def test_cpm2_begins_with_the_sentinel_of_the_prompt(load: Loader) -> None:
    """The first token that the model writes is the first of the answer; BMInf 1.x dropped it."""
    model = load("cpm2")
    fed = say(model, ["很", "好", "<eod>"])
    assert model.generate("今天", max_tokens=3, temperature=0) == ("很好", True)
    token_id = model.tokenizer.token_id
    assert fed[0] == [[token_id("<s>"), token_id("<s_189>")]]
    prompt = model._prompt("今天")
    assert prompt.input_ids == [*model.tokenizer.encode("今天"), token_id("<s_189>")]


def test_cpm2_gives_as_many_tokens_as_asked_for(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["今天"] * 12)
    assert model.generate("今天", max_tokens=12, temperature=0) == ("今天" * 12, False)


def test_cpm2_ends_at_any_sentinel(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["很", "<s_3>", "好"])
    assert model.generate("今天", temperature=0) == ("很", True)


BLANKS = "今天<span>很好，我们<span>吧"


def test_fill_blank_gives_each_blank_its_text(load: Loader) -> None:
    model = load("cpm2")
    fed = say(model, ["天气", "<s_1>", "去", "公园", "<s_2>", "人"])
    assert model.fill_blank(BLANKS, temperature=0) == [
        {"position": 2, "text": "天气"},
        {"position": 13, "text": "去公园"},
    ]
    token_id, encode = model.tokenizer.token_id, model.tokenizer.encode
    assert fed[0] == [[token_id("<s>"), token_id("<s_0>")]]
    prompt = model._blanked(BLANKS, [2, 13], [token_id(f"<s_{k}>") for k in range(3)])
    assert prompt.input_ids == [
        *encode("今天"), token_id("<s_0>"), *encode("很好，我们"), token_id("<s_1>"), *encode("吧"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (["天气", "<eod>", "人"], ["天气", ""]),  # it ends early
        (["<s_1>", "公园", "<s_2>"], ["", "公园"]),
        (["天气", "<s_7>", "<s_0>", "好", "<s_1>", "人", "<s_2>"], ["天气好", "人"]),  # stray ones
        (["天气"] * 40, ["天气" * 6, ""]),  # max_tokens is for all blanks
    ],
)
def test_fill_blank_with_odd_answers(load: Loader, answer: list[str], texts: list[str]) -> None:
    model = load("cpm2")
    say(model, answer)
    filled = model.fill_blank(BLANKS, temperature=0, max_tokens=6 if len(answer) > 9 else 20)
    assert [blank["text"] for blank in filled] == texts


def test_fill_blank_at_some_of_the_places(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["公园", "<s_1>"])
    filled = model.fill_blank(BLANKS, spans_position=[13], temperature=0)
    assert filled == [{"position": 13, "text": "公园"}]


@pytest.mark.parametrize("positions", [[1], [2, 2], [2, 99], []])
def test_fill_blank_refuses_places_that_are_none(load: Loader, positions: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"blanks|spans_position"):
        load("cpm2").fill_blank(BLANKS, spans_position=positions)


def test_fill_blank_takes_16(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["天气", "<eod>"])
    assert len(model.fill_blank("今天" + "<span>，" * 16, temperature=0)) == 16


def test_a_stop_token_is_no_part_of_a_blank(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["天气", "。", "人"])
    filled = model.fill_blank(BLANKS, temperature=0, stop_tokens=["。"])
    assert [blank["text"] for blank in filled] == ["天气", ""]


def test_an_answer_may_be_as_long_as_max_length(load: Loader) -> None:
    """What the decoder begins with has room of its own."""
    model = load("cpm2", max_length=16)
    say(model, ["今天"] * 20)
    assert model.generate("今天", max_tokens=16, temperature=0) == ("今天" * 16, False)
    with pytest.raises(ArgumentError, match="max_tokens=17 are more than max_length=16"):
        model.generate("今天", max_tokens=17)


def test_logits_of_a_target_begin_after_the_start(load: Loader) -> None:
    model = load("cpm2")
    start, ids = model._start_ids(), model.tokenizer.encode("很好")
    logits = model.logits("今天", "很好")
    assert len(logits) == len(start) + len(ids)
    assert torch.equal(model.logits(model._prompt("今天").input_ids, [*start, *ids]), logits)


def test_decoding_does_not_touch_the_cross_projections(load: Loader) -> None:
    """Their blocks are copied once a prompt, however many tokens are written."""
    model = load("cpm2", memory_limit=load("cpm2").plan.least_limit)
    assert {"cross_projections.layers.0", "decoder.layers.0"} & set(model.plan.streamed)
    calls = []
    for layer in model.model.cross_projections.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate("今天", max_tokens=9, temperature=0, banned_tokens=["<eod>"])
    assert len(calls) == len(model.model.cross_projections.layers)


def test_beams_leave_keys_of_the_prompt_where_they_are(load: Loader) -> None:
    """They are the same in all beams of a prompt; only another prompt moves them."""
    model = load("cpm2", max_batch_size=4)
    moved = []
    cache = model._cache.cross
    cache.select = lambda rows: moved.append(rows.tolist()) or type(cache).select(cache, rows)
    options = {"num_beams": 2, "max_tokens": 6, "banned_tokens": ["<eod>"]}
    model.generate_batch(["今天", "我们去公园"], **options)
    assert moved[0] == [0, 0, 1, 1] and len(moved) <= 2


# ---- EVA -----------------------------------------------------------------------------------------


def test_dialogue_reads_all_utterances(load: Loader) -> None:
    model = load("eva")
    fed = say(model, ["我们", "去", "<sep>"])
    assert model.dialogue(["你是谁", "人"], temperature=0) == ("我们去", True)
    token_id, encode = model.tokenizer.token_id, model.tokenizer.encode
    sep, start = token_id("<sep>"), token_id("<s_0>")
    assert fed[0] == [[start]]
    assert model._prompt(["你是谁", "人"]).input_ids == [
        *encode("你是谁"), sep, *encode("人"), sep, start,
    ]  # fmt: skip
    assert model.generate(["你是谁", "人"], temperature=0, max_tokens=1)[0]


def test_dialogue_keeps_the_end_of_a_long_one(load: Loader) -> None:
    model = load("eva")
    seen = []
    original = type(model.model).encode_packed

    def encode(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return original(model.model, input_ids, *rest)

    model.model.encode_packed = encode
    utterances = ["今天天气很好"] * 9
    for length in (5, 12, None):
        model.dialogue(utterances, max_tokens=1, truncation_length=length, seed=0)
    assert [len(ids) for ids in seen] == [5, 12, len(seen[2])]
    assert seen[2][-12:] == seen[1] and len(seen[2]) > 40


def test_eva_has_defaults_of_its_own(load: Loader) -> None:
    model = load("eva")
    assert model.dialogue(["你是谁"], seed=3) == model.dialogue(
        ["你是谁"], 128, 10, None, 0.85, 0, 0, 256, seed=3
    )
    assert model._defaults.temperature == 0.85 and model._defaults.top_n == 10
    assert model.generate("你", 5, top_k=3, seed=1) == model.generate("你", 5, 3, seed=1)


def test_a_dialogue_can_be_scored(load: Loader) -> None:
    model = load("eva")
    logits = model.logits(["今天", "天气"], "很好")
    ids = model._prompt(["今天", "天气"]).input_ids
    target = [*model._start_ids(), *model.tokenizer.encode("很好")]
    assert torch.equal(logits, model.logits(ids, target))
