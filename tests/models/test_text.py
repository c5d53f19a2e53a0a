"""bminf/models/text.py, and what bminf/models/base.py makes of it: answers that end at texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted import say, script

from bminf.errors import ArgumentError
from bminf.tokenizers import TextStream

Loader = Callable[..., Any]
TEXTS = {"cpm1": "今天天气很好", "cpm2": "今天天气很好", "eva": "你是谁"}

each_model = pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm130b", "glm10b"])


def text_of(name: str) -> str:
    return TEXTS.get(name, "the blocks of a layer wait")


def endless(model: Any) -> dict[str, Any]:
    """Options of a text that only its length ends, and in which no token comes twice."""
    ends = model.tokenizer.tokens(sorted({*model._end_ids()}))
    return {"max_tokens": 24, "temperature": 0, "presence_penalty": 1000, "banned_tokens": ends}


def ids_of(model: Any, text: str, **options: Any) -> list[int]:
    prompts, settings = model._checked_prompts([text], model._settings(model._defaults, options))
    return list(model._answers(prompts, settings, model._stop_ids(settings))[0])


def num_tokens_until(model: Any, ids: list[int], stop: str) -> int:
    """After how many of them the stop string is sure to be in the text."""
    stream, text = TextStream(model.tokenizer), ""
    for number, token in enumerate(ids, start=1):
        text += stream.feed(token)
        if stop in text:
            return number
    raise AssertionError(f"{stop!r} does not come")


@each_model
def test_the_text_ends_before_a_stop_string_wherever_it_lies(load: Loader, name: str) -> None:
    """Every piece of three characters of a text, which begin and end within tokens, too."""
    model, text = load(name, max_batch_size=2), text_of(name)
    options = endless(model)
    whole, ids = model.generate_batch([text], **options)[0][0], ids_of(model, text, **options)
    stops = {whole[at : at + 3] for at in range(0, len(whole) - 4, 9)}
    assert len(stops) > 2
    for stop in stops:
        drawn, expected = model.stats.num_tokens, whole[: whole.index(stop)]
        pieces = model.generate_iter(text, stop=["never", stop], **options)
        assert pieces.finish_reason is None
        assert "".join(pieces) == expected and pieces.finish_reason == "stop"
        assert model.stats.num_tokens - drawn == num_tokens_until(model, ids, stop)
        assert model.generate(text, stop=stop, **options) == (expected, True)
        both = model.generate_batch([text, text[:2]], stop=(stop,), **options)
        assert both[0] == (expected, True), "the other one goes on for itself"


@each_model
def test_what_may_begin_a_stop_string_comes_at_the_end(load: Loader, name: str) -> None:
    model, text = load(name), text_of(name)
    whole, _ = model.generate_batch([text], **endless(model))[0]
    options = {**endless(model), "stop": [whole[-2:] + "!!", f"{whole}?"]}
    pieces = model.generate_iter(text, **options)
    assert list(pieces) == [whole] and pieces.finish_reason == "length"
    assert model.generate(text, **options) == (whole, False)


def test_a_stop_string_in_the_last_token_that_is_allowed_is_a_stop(load: Loader) -> None:
    """Also where the text of that token is certain only because no other one follows."""
    model = load("glm10b")
    half = model.tokenizer.encode("é")[0]  # the first of its two bytes
    for ids, stop, expected in (
        (model.tokenizer.encode("ab"), "b", "a"),
        ([*model.tokenizer.encode("ab"), half], "\N{REPLACEMENT CHARACTER}", "ab"),
    ):
        options: Any = {"max_tokens": len(ids), "temperature": 0, "stop": stop}
        script(model, ids)
        pieces = model.generate_iter("the", **options)
        assert ("".join(pieces), pieces.finish_reason) == (expected, "stop")
        script(model, ids)
        assert model.generate("the", **options) == (expected, True)


def test_a_stop_string_over_the_border_of_tokens(load: Loader) -> None:
    model = load("cpm1")
    fed = say(model, ["a", "b", "c", "今天"])
    assert model.generate("今天", stop="bc", max_tokens=9, temperature=0) == ("a", True)
    assert len(fed) == 3, "its request ends with the step in which the stop string is complete"


def test_a_token_that_no_text_shows_ends_the_answer_by_its_name(load: Loader) -> None:
    model = load("glm130b")
    shown = model.tokenizer.decode([model.tokenizer.token_id("▁the")])
    assert "▁the" not in shown
    ids = [*model.tokenizer.encode("a"), model.tokenizer.token_id("▁the")]
    script(model, ids)
    text, stopped = model.generate("the", stop="▁the", max_tokens=5, temperature=0)
    assert (text, stopped) == (model.tokenizer.decode(ids[:1]), True)


def test_a_dialogue_ends_at_stop_strings(load: Loader) -> None:
    model = load("eva")
    options = endless(model)
    whole, _ = model.dialogue(["你是谁", "我是人"], **options)
    stop = whole[2:5]
    answer = model.dialogue(["你是谁", "我是人"], stop=stop, **options)
    assert answer == (whole[: whole.index(stop)], True)


def test_where_an_answer_can_end_at_tokens_alone_a_stop_has_to_be_one(load: Loader) -> None:
    model = load("glm10b", max_batch_size=2)
    for use in (
        lambda stop: model.generate("the", 3, num_beams=2, stop=stop),
        lambda stop: model.fill_blank("the [MASK]", 3, stop=stop),
        lambda stop: load("cpm2").fill_blank("a<span>", max_tokens=3, stop=stop),
    ):
        with pytest.raises(ArgumentError, match=r"stop_tokens=\['no such token'\]"):
            use("no such token")


def test_an_iterator_that_is_closed_is_cancelled(load: Loader) -> None:
    model = load("cpm1")
    pieces = model.generate_iter("今天", **endless(model))
    assert next(pieces) and iter(pieces) is pieces
    pieces.close()
    assert pieces.finish_reason == "cancelled" and list(pieces) == []


@pytest.mark.parametrize("stop", [["x"] * 65, "", [""], [3], 5])
def test_what_is_no_stop_string_is_refused(silent: Loader, stop: Any) -> None:
    model = silent("cpm1")
    for use in (
        model.generate,
        model.generate_iter,
        lambda text, **more: model.generate_batch([text], **more),
    ):
        with pytest.raises(ArgumentError, match="stop"):
            use("今天", stop=stop, max_tokens=3)
