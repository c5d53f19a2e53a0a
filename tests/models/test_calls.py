"""bminf/models/calls.py: what comes before the arguments of a call, a closed model, unknown
keywords and other names; and bminf/keywords.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import bminf
from bminf.errors import ArgumentError, UnknownKeywordError, UnsupportedModelError
from bminf.keywords import check_keywords, keywords_of, known_keywords
from bminf.models import CPM1, CPM2, EVA, GLM, convert, plan_glm
from bminf.models.arguments import present_ids
from bminf.models.options import GLMOptions, Options

Loader = Callable[..., Any]
CANDIDATES = ["。", "a", "b", "e", "▁"]  # one that a vocabulary has
STEPS = {"temperature": 0}


def uses(model: Any, **options: Any) -> dict[str, Any]:
    """What each method that generates gives with these options."""
    found = {
        "generate": model.generate("a", **options),
        "generate_iter": "".join(model.generate_iter("a", **options)),
        "generate_batch": model.generate_batch(["a"], **options),
    }
    if isinstance(model, CPM2):
        found["fill_blank"] = model.fill_blank("a<span>", **options)
    if isinstance(model, GLM):
        found["fill_blank"] = model.fill_blank("a[MASK]", **options)
    if isinstance(model, EVA):
        found["dialogue"] = model.dialogue(["a"], **options)
    return found


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom"])
def test_max_new_tokens_is_max_tokens_and_stop_takes_tokens_too(load: Loader, name: str) -> None:
    model = load(name)
    stop = [next(token for token in CANDIDATES if present_ids(model.tokenizer, [token]))]
    ours = uses(model, max_tokens=3, stop_tokens=stop, **STEPS)
    assert uses(model, max_new_tokens=3, stop=tuple(stop), **STEPS) == ours
    assert uses(model, max_tokens=3, stop=stop[0], **STEPS) == ours
    both = {"max_tokens": 3, "max_new_tokens": 3, "stop": stop, "stop_tokens": stop}
    assert uses(model, **both, **STEPS) == ours
    nothing = {"max_tokens": 3, "max_new_tokens": None, "stop_tokens": stop, "stop": None}
    assert uses(model, **nothing, **STEPS) == ours
    assert len(uses(model, max_tokens=1, **STEPS)["generate"][0]) <= len(ours["generate"][0])


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm10b"])
def test_two_names_with_different_values_are_an_error(load: Loader, name: str) -> None:
    model = load(name)
    words = "max_new_tokens=4 and max_tokens=3 are two names of one option"
    for use in (
        lambda: model.generate("a", max_tokens=3, max_new_tokens=4),
        lambda: model.generate("a", 3, max_new_tokens=4),
        lambda: model.generate_iter("a", max_tokens=3, max_new_tokens=4),
        lambda: model.generate_batch(["a"], max_tokens=3, max_new_tokens=4),
    ):
        with pytest.raises(ArgumentError, match=words):
            use()
    with pytest.raises(ArgumentError, match="max_new_tokens=4 and max_tokens=128 are two names"):
        model.generate("a", max_tokens=128, max_new_tokens=4)  # the default, but it was said
    with pytest.raises(ArgumentError, match="max_tokens=0"):
        model.generate("a", max_new_tokens=0)


def test_unknown_keywords_name_the_nearest_one() -> None:
    for make, words in (
        (
            lambda: CPM1("x", memory_limt=1),
            r"CPM1\(\) has no keyword 'memory_limt'; .*'memory_limit'",
        ),
        (lambda: CPM2("x", max_len=1), r"CPM2\(\) has no keyword 'max_len'; did you mean"),
        (lambda: EVA("x", quantisation=None), "did you mean 'quantization'"),
        (lambda: GLM("x", head_quantisation=None), r"GLM\(\) .*did you mean 'head_quantization'"),
        (lambda: convert("x", "y", quantisation=None), r"convert\(\) .*mean 'quantization'"),
        (lambda: plan_glm("GLM-2B", "6GB", max_lenght=1), r"plan_glm\(\) .*mean 'max_length'"),
        (lambda: bminf.wrapper(None, memory_limt=1), r"wrapper\(\) .*mean 'memory_limit'"),
    ):
        with pytest.raises(UnknownKeywordError, match=words):
            make()


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom"])
def test_unknown_options_name_the_nearest_one(load: Loader, name: str) -> None:
    model = load(name)
    own = type(model).__name__
    asked: list[tuple[Any, str]] = [
        (lambda: model.generate("a", max_token=3), rf"{own}\.generate\(\) .*mean 'max_tokens'"),
        (lambda: model.generate_iter("a", stops=["a"]), "generate_iter.*did you mean 'stop"),
        (lambda: model.generate_batch(["a"], temprature=1), "did you mean 'temperature'"),
        (lambda: model.logits("a", txt="a"), r"logits\(\) has no keyword 'txt'; did you mean"),
    ]
    if hasattr(model, "fill_blank"):
        asked.append((lambda: model.fill_blank("a", max_tokns=3), r"fill_blank\(\).*'max_tokens'"))
    if isinstance(model, EVA):
        asked.append((lambda: model.dialogue(["a"], truncation=3), "mean 'truncation_length'"))
    if isinstance(model, GLM):
        asked.append((lambda: model.score("a", ["b"], msk="a"), "mean 'mask'"))
        asked.append((lambda: model.perplexity("a", generation_len=3), "'generation_length'"))
    for ask, words in asked:
        with pytest.raises(UnknownKeywordError, match=words):
            ask()


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom"])
def test_any_use_of_a_closed_model_says_that_it_was_closed(load: Loader, name: str) -> None:
    model = load(name)
    model.close()
    asked = [
        lambda: model.generate("a"),
        lambda: model.generate(),
        lambda: model.generate(3, max_tokens=-1),
        lambda: model.generate("a", max_tokens=10**9),
        lambda: model.generate("a", no_such_thing=3),
        lambda: model.generate_iter(None),
        lambda: model.generate_batch("a"),
        lambda: model.generate_batch([], num_beams=0),
        lambda: model.logits(None),
        lambda: model.plan,
        lambda: model.stats,
        lambda: model.__enter__(),
    ]
    more = {CPM2: ["fill_blank"], EVA: ["dialogue"], GLM: ["fill_blank", "score", "perplexity"]}
    asked += [getattr(model, method) for method in more.get(type(model), [])]
    for ask in asked:
        with pytest.raises(UnsupportedModelError, match="was closed; load it again"):
            ask()


def test_a_text_under_way_ends_when_the_model_is_closed(load: Loader) -> None:
    model = load("cpm1")
    pieces = model.generate_iter("a", max_tokens=3)
    model.close()
    with pytest.raises(UnsupportedModelError, match="closed"):
        next(pieces)


def test_every_public_method_of_a_model_is_checked() -> None:
    """A method that is added must not be forgotten."""
    for kind in (CPM1, CPM2, EVA, GLM):
        for name in dir(kind):
            method = getattr(kind, name)
            if name.startswith("_") or name in ("close", "follow") or not callable(method):
                continue
            assert hasattr(method, "__wrapped__"), f"{kind.__name__}.{name}"


def test_check_keywords_and_its_likes() -> None:
    def function(one: int, *, two: int = 2, **more: int) -> int:
        return one + two

    assert keywords_of(function) == ["one", "two"]
    assert known_keywords(function)(1, two=3) == 4
    with pytest.raises(UnknownKeywordError, match=r"function\(\) has no keyword 'x' \(accepted: o"):
        known_keywords(function)(1, x=3)
    with pytest.raises(TypeError, match=r"missing .* 'one'"):
        known_keywords(function)()  # what is lacking stays Python's affair
    check_keywords("f", ["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bminf.Request([1], max_tokens=2), "Request.. .*'max_tokens'.*'max_new_tokens'"),
        (lambda: bminf.Sampling(temprature=1), "Sampling.. .* did you mean 'temperature'"),
        (lambda: bminf.Format(bit=4), "Format.. has no keyword 'bit'; did you mean 'bits'"),
        (lambda: Options(max_token=3), "Options.. .* did you mean 'max_tokens'"),
        (lambda: GLMOptions(min_lenght=3), "GLMOptions.. .* did you mean 'min_length'"),
        (lambda: bminf.plot.Recording(None, name="x"), "Recording.. .*accepted: model"),
    ],
)
def test_what_users_make_knows_its_keywords(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnknownKeywordError, match=words):
        make()
