"""bminf/models/options.py: what each option may be, and that every method of every model checks its
options before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from bminf.engine.request import Request
from bminf.errors import ArgumentError, UnknownKeywordError
from bminf.models import CPM2, EVA, GLM
from bminf.models.options import GLMOptions, Options

Loader = Callable[..., Any]
MODELS = ["cpm1", "cpm2", "eva", "glm130b", "glm10b"]
BEAMS = {"num_beams": 2}
VOCAB_SIZE = 40

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens=0; accepted: an int of at least 1"),
    ({"top_n": 0}, "top_n=0; accepted: an int of at least 1"),
    ({"top_n": 999}, "=999 is more than the 40 tokens of the vocabulary"),
    ({"top_n": 3, "top_k": 3}, "two names of one option"),
    ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.5}, r"top_p=1\.5"),
    ({"temperature": -1}, "temperature=-1; accepted: a finite number from 0 on"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
    ({"presence_penalty": "1"}, "presence_penalty='1'"),
    ({"seed": -1}, "seed=-1"),
    ({"stop_tokens": 5}, "stop_tokens=5; give a list"),
    ({"banned_tokens": 3}, "banned_tokens=3; give a list"),
    ({"banned_tokens": "a"}, "banned_tokens='a'; give a list"),
    ({"num_beams": 0}, "num_beams=0"),
    ({"length_penalty": 2.0}, "length_penalty is for num_beams above 1"),
    ({**BEAMS, "length_penalty": "x"}, "length_penalty='x'"),
    ({**BEAMS, "temperature": -1}, "temperature=-1"),
    ({**BEAMS, "top_p": 0}, "top_p=0"),
    ({**BEAMS, "top_p": 0.5}, "num_beams=2 searches .* top_p"),
    ({**BEAMS, "top_n": 5}, "num_beams=2 searches .* top_n is for sampling"),
    ({**BEAMS, "seed": 0}, "num_beams=2 searches .* seed is for sampling"),
    ({**BEAMS, "frequency_penalty": 1.0}, "num_beams=2 searches .* frequency_penalty"),
]
WRONG_FOR_GLM: list[tuple[dict[str, Any], str]] = [
    ({"end_tokens": []}, r"end_tokens=\[\]; give a list of token ids, at least one"),
    ({"end_tokens": 3}, "end_tokens=3; give a list"),
    ({"end_tokens": "a"}, "end_tokens='a'; give a list"),
    ({"end_tokens": [9999]}, "end_tokens holds 9999; accepted: ids"),
    ({"end_tokens": [True]}, "end_tokens holds True"),
    ({"end_tokens": ["a"]}, "end_tokens holds 'a'"),
    ({"out_seq_length": 0}, "out_seq_length=0"),
    ({"min_length": -1}, "min_length=-1; accepted: an int of at least 0"),
    ({"min_length": 2}, "min_length is for num_beams above 1"),
    ({"no_repeat_ngram_size": 2.0}, r"no_repeat_ngram_size=2\.0"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is for num_beams above 1"),
    ({"deterministic": 1}, "deterministic=1; accepted: True, False"),
    ({"deterministic": False}, "deterministic is for num_beams above 1"),
    ({"num_return_sequences": 1}, "num_return_sequences is for num_beams above 1"),
    ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ({**BEAMS, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [(kind, *case) for kind in (Options, GLMOptions) for case in WRONG]
    + [(GLMOptions, *case) for case in WRONG_FOR_GLM],
)
def test_an_option_that_means_nothing(kind: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        kind(**given).check(VOCAB_SIZE)


def test_a_number_may_be_one_of_numpys() -> None:
    given = {"max_tokens": 3, "top_k": 5, "temperature": 0.5, "seed": 2**63, "top_p": 0.75}
    kinds = [numpy.int64, numpy.int32, numpy.float32, numpy.uint64, torch.tensor]
    same = {name: kind(given[name]) for name, kind in zip(given, kinds, strict=True)}
    for options in (Options, GLMOptions):
        assert repr(options(**same)) == repr(options(**given))
    for wrong in (numpy.float32(3), numpy.bool_(True), numpy.array([3])):
        with pytest.raises(ArgumentError, match="accepted: an int of at least 1"):
            Options(max_tokens=wrong)


def test_token_ids_may_be_an_array_or_a_tensor() -> None:
    for ids in (numpy.array([4, 2]), torch.tensor([4, 2], dtype=torch.int32)):
        request = Request(ids, numpy.int64(5), stop_ids=ids, num_logprobs=numpy.int64(1))
        assert repr(request.input_ids) == "[4, 2]" and repr(request.max_new_tokens) == "5"
        assert request.stop_ids == {2, 4} and repr(request.num_logprobs) == "1"
    for wrong in (numpy.array([4.0]), torch.tensor([[4, 2]])):
        with pytest.raises(ArgumentError, match="give at least one token id"):
            Request(wrong)


def test_an_unknown_option_is_named() -> None:
    words = "has no keyword 'speed'; did you mean 'seed'.*accepted: max_tokens, "
    with pytest.raises(UnknownKeywordError, match=words):
        Options().with_keywords({"speed": 3})


def uses_of(model: Any) -> list[Callable[..., Any]]:
    """Every method that generates, of one text with a blank where there are blanks."""
    text = "a [MASK]" if isinstance(model, GLM) else "a<span>" if isinstance(model, CPM2) else "a"
    methods = [model.generate, model.generate_iter]
    methods += [getattr(model, n) for n in ("fill_blank",) if hasattr(model, n)]
    uses = [lambda m=method, **options: m(text, **options) for method in methods]
    uses.append(lambda **options: model.generate_batch([text], **options))
    if isinstance(model, EVA):
        uses.append(lambda **options: model.dialogue([text], **options))
    return uses


OF_ANY_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 1.5}, r"top_p=1\.5"),
    ({"top_n": 9999}, "=9999 is more than the .* tokens of the vocabulary"),
    ({"top_n": 3, "top_k": 3}, "two names of one option"),
    ({"stop_tokens": ["not there"]}, r"stop_tokens=\['not there'\]: token='not there' is not one"),
    ({"stop_tokens": [3]}, "token=3"),
    ({"banned_tokens": ["not there"]}, r"banned_tokens=\['not there'\]"),
    ({"max_tokens": 99}, "max_tokens=99 are more than max_length=40"),
    ({"num_beams": 2, "seed": 1}, "num_beams=2 searches .* seed is for sampling"),
    ({"speed": 3}, "has no keyword 'speed'; did you mean 'seed'.*accepted: .*max_tokens"),
]


@pytest.mark.parametrize("name", MODELS)
def test_every_method_checks_its_options_first(name: str, silent: Loader) -> None:
    model = silent(name)
    for use in uses_of(model):
        for options, words in OF_ANY_MODEL:
            with pytest.raises(ArgumentError, match=words):
                use(**{"max_tokens": 3, **options})


@pytest.mark.parametrize("name", MODELS)
def test_more_rows_than_the_model_was_loaded_for(name: str, silent: Loader) -> None:
    model = silent(name)
    with pytest.raises(ArgumentError, match=r"3 rows at once .* max_batch_size is 2"):
        model.generate("a", max_tokens=3, num_beams=3)
    with pytest.raises(ArgumentError, match="3 rows at once"):
        model.generate_batch(["a"] * 3, max_tokens=3)
    with pytest.raises(ArgumentError, match="only at the end; use generate"):
        model.generate_iter("a", max_tokens=3, num_beams=2)


# ---- of a GLM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_every_method_of_a_glm_checks_its_options_first(name: str, silent: Loader) -> None:
    model = silent(name)
    for use in uses_of(model):
        for options, words in [
            ({"end_tokens": [9999]}, "end_tokens holds 9999"),
            ({"out_seq_length": 2}, "out_seq_length=2 counts the text, which has .* tokens with"),
            ({"out_seq_length": 99}, "are more than max_length=40"),
            ({"deterministic": False}, "deterministic is for num_beams above 1"),
        ]:
            with pytest.raises(ArgumentError, match=words):
                use(**{"max_tokens": 3, **options})


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_what_is_for_one_text_or_one_answer(name: str, silent: Loader) -> None:
    model = silent(name)
    candidates = {"max_tokens": 3, "num_beams": 2, "num_return_sequences": 2}
    for use in (model.fill_blank, lambda text, **more: model.generate_batch([text], **more)):
        with pytest.raises(ArgumentError, match=r"num_return_sequences is for generate\(\)"):
            use("a", **candidates)
    with pytest.raises(ArgumentError, match="out_seq_length is for one text; give max_tokens"):
        model.generate_batch(["a"] * 2, out_seq_length=30)


def test_options_of_glm130b_alone(silent: Loader) -> None:
    model = silent("glm10b")
    uses = [model.generate, model.fill_blank]
    uses.append(lambda text, **more: model.generate_batch([text], **more))
    for options in ({"min_length": 2}, {"no_repeat_ngram_size": 2}, {"deterministic": False}):
        for use in uses:
            with pytest.raises(ArgumentError, match=r"are for the beam search of GLM-130B"):
                use("a", max_tokens=3, num_beams=2, **options)
