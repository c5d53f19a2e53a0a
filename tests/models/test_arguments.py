"""bminf/models/arguments.py: texts and token ids, and that every method of every model checks them
before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny_vocabularies import PIECES, write_lines

from bminf.errors import ArgumentError
from bminf.models import GLM
from bminf.models.arguments import ids_of, ids_of_str, present_ids
from bminf.tokenizers import CPM1WordTokenizer

Loader = Callable[..., Any]
MODELS = ["cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom"]
SIZE = len(PIECES)
OUTSIDE = f"text has ids outside the vocabulary; .*ids from 0 to {SIZE - 1}"
NO_TOKENS = f"text has no tokens; give a text that is not empty, or ids from 0 to {SIZE - 1}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> CPM1WordTokenizer:
    return CPM1WordTokenizer(write_lines(tmp_path / "vocab.txt", PIECES))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", NO_TOKENS),
        ([], NO_TOKENS),
        (torch.tensor([], dtype=torch.long), NO_TOKENS),
        ([SIZE], OUTSIDE),
        ([3, -1], OUTSIDE),
        ([1.5], "text holds a float; give a str, or token ids as ints"),
        ([True], "text holds a bool; .*ids as ints"),
        ([None], "text holds a NoneType; .*ids as ints"),
        (["a", 1], "text holds a str; .*ids as ints"),
        (torch.tensor([0.5]), r"text is torch.float32 .*whole numbers \(T,\)"),
        (torch.tensor([True]), r"text is torch.bool .*whole numbers \(T,\)"),
        (torch.ones(2, 3, dtype=torch.long), r"of shape \(2, 3\); .*whole numbers \(T,\)"),
        (torch.tensor(1), r"of shape \(\); .*whole numbers \(T,\)"),
        (None, "text is a NoneType; give a str, or token ids"),
        (3, "text is a int; give a str, or token ids"),
        ("\ud800", "surrogate"),
    ],
    ids=repr,
)
def test_what_is_neither_text_nor_ids(text: Any, words: str, tokenizer: CPM1WordTokenizer) -> None:
    with pytest.raises(ArgumentError, match=words):
        ids_of(text, "text", tokenizer)


@pytest.mark.parametrize("text", [b"bytes", [3], torch.tensor([3]), None, 3], ids=repr)
def test_what_is_no_text(text: Any, tokenizer: CPM1WordTokenizer) -> None:
    with pytest.raises(ArgumentError, match=f"text is a {type(text).__name__}; give a str"):
        ids_of_str(text, "text", tokenizer)


def test_ids_come_in_any_form(tokenizer: CPM1WordTokenizer) -> None:
    ids = tokenizer.encode("中国")
    whole = torch.tensor(ids)
    for text in ("中国", ids, tuple(ids), whole, whole.to(torch.int32), numpy.array(ids)):
        assert ids_of(text, "text", tokenizer) == ids
    assert ids_of_str("中国", "text", tokenizer) == ids
    assert present_ids(tokenizer, ["<eod>", "龙"]) == [tokenizer.token_id("<eod>")]


# ---- every method of every model -----------------------------------------------------------------


def uses_of(model: Any) -> list[Callable[[Any], Any]]:
    """What takes a text, which is the second one of a batch."""
    uses = [
        lambda text: model.generate(text, max_tokens=3),
        lambda text: model.generate(text, max_tokens=3, num_beams=2),
        lambda text: model.generate_iter(text, max_tokens=3),
        lambda text: model.generate_batch(["a", text], max_tokens=3),
    ]
    if isinstance(model, GLM):
        uses.append(lambda text: model.fill_blank(text, max_tokens=3))
        uses.append(lambda text: model.logits(text))
    return uses


@pytest.mark.parametrize("name", MODELS)
def test_every_method_checks_its_text_first(name: str, silent: Loader) -> None:
    model = silent(name)
    wrong: list[tuple[Any, str]] = [
        ("", "no tokens; give a text that is not empty|text is empty; give a text"),
        (3, "give a (str|list of utterances)"),
        (None, "give a (str|list of utterances)"),
        ("a " * 90, "has .* tokens, more than max_length=40; .*shorten"),
        ("\ud800", "surrogate"),
    ]
    if name != "eva":  # to which bytes are utterances that are no texts
        wrong.append((b"bytes", "is a bytes; give a str"))
    if name != "bloom":  # which takes token ids
        wrong.append(([3], "give a str"))
    if name.startswith("glm"):
        wrong.append((" \n ", "text is empty; give a text, with or without"))
    for text, words in wrong:
        for use in uses_of(model):
            with pytest.raises(ArgumentError, match=words):
                use(text)
    for texts in ("a", [], 3, None):
        with pytest.raises(ArgumentError, match=r"texts=.*; give a list with at least one text"):
            model.generate_batch(texts)


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva", "bloom"])
def test_logits_check_their_ids_first(name: str, silent: Loader) -> None:
    model = silent(name)
    for wrong, words in [
        ("", "no tokens"),
        ([model.config.vocab_size], f"ids from 0 to {model.config.vocab_size - 1}"),
        ([True], "a bool"),
        (b"ab", "a bytes"),
        (None, "a NoneType; give a str, or token ids"),
    ]:
        for arguments in [[wrong]] if name in ("cpm1", "bloom") else [[wrong, [1]], [[1], wrong]]:
            with pytest.raises(ArgumentError, match=f"(text|target|utterance) .*{words}"):
                model.logits(*arguments)
    with pytest.raises(ArgumentError, match="text has 41 tokens, more than max_length=40"):
        model.logits(*([[1] * 41] if name in ("cpm1", "bloom") else [[1] * 41, [1]]))


@pytest.mark.parametrize("name", ["cpm1", "glm130b", "glm10b"])
def test_a_text_longer_than_the_positions(name: str, silent: Loader) -> None:
    model = silent(name, max_length=None)
    remedy = re.escape("take a model with more positions")
    with pytest.raises(ArgumentError, match=f"more than max_length={model.max_length}; .*{remedy}"):
        model.generate("a b " * 300, max_tokens=3)
    with pytest.raises(ArgumentError, match=f"max_tokens=.* are more than max_l.*{remedy}"):
        model.generate("a", max_tokens=model.max_length)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "0 blanks; accepted: 1 to 16"),
        ("<span>" * 17, "17 blanks; accepted: 1 to 16"),
        (["<span>"], "give a str"),
        ("a" * 60 + "<span>", "61 tokens, more than max_length=40"),
    ],
)
def test_blanks_of_cpm2(text: Any, words: str, silent: Loader) -> None:
    with pytest.raises(ArgumentError, match=words):
        silent("cpm2").fill_blank(text, max_tokens=3)


def test_dialogues(silent: Loader) -> None:
    model = silent("eva")
    for context, words in [
        ([""], "an utterance"),
        (["今天", ""], "an utterance"),
        ([3], "an utterance"),
        ("你是谁", "give a list of utterances"),
        ([], "at least one utterance"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            model.dialogue(context, max_tokens=3)
    with pytest.raises(ArgumentError, match="truncation_length=0"):
        model.dialogue(["你"], truncation_length=0)
    with pytest.raises(ArgumentError, match="more than max_length=40"):
        model.dialogue(["今天天气"] * 20, max_tokens=3, truncation_length=None)
