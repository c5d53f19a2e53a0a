"""Ids, pieces and text of GLM-130B's own tokenizer, with the sentencepiece model of the set."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from golden import GoldenSet, for_each, golden

from bminf.tokenizers.base import TextStream
from bminf.tokenizers.icetk import IceTokenizer


def read(of: GoldenSet, file: str) -> Any:
    path = of.path / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def layout(of: GoldenSet) -> dict[str, Any]:
    """What the set says of its tokenizer; nothing where it lacks the model."""
    told = read(of, "config.json").get("tokenizer", {})
    return told if "file" in told and (of.path / told["file"]).is_file() else {}


def recorded(of: GoldenSet) -> list[dict[str, Any]]:
    return list(read(of, "tokenizer.json")) if layout(of) else []


def cases_of(of: GoldenSet) -> Iterable[str]:
    return [str(number) for number in range(len(recorded(of)))]


def specials_of(of: GoldenSet) -> Iterable[str]:
    return layout(of).get("special_tokens", {})


def sizes_of(of: GoldenSet) -> Iterable[str]:
    return ["num_tokens"] if "num_tokens" in layout(of) else []


@functools.cache
def tokenizer(name: str, **options: bool) -> IceTokenizer:
    told = layout(golden(name))
    offset = {"image_offset": told["image_token_offset"]} if "image_token_offset" in told else {}
    return IceTokenizer(golden(name).path / told["file"], **offset, **options)


@for_each(["glm130b"], cases_of)
def test_golden_glm130b_tokenizer(name: str, case: str) -> None:
    told = recorded(golden(name))[int(case)]
    options = {key: told[key] for key in ("ignore_linebreak",) if key in told}
    ours, ids = tokenizer(name, **options), told["ids"]
    if told.get("text") is not None:
        assert ours.encode(told["text"]) == ids
    if "pieces" in told:
        assert ours.tokens(ids) == told["pieces"]
    stream = TextStream(ours)
    text = "".join(map(stream.feed, ids)) + stream.finish()
    assert text == ours.decode(ids) == told.get("detokenized", told.get("decoded", text))


@for_each(["glm130b"], specials_of)
def test_golden_glm130b_tokenizer_has_the_special_token(name: str, case: str) -> None:
    ours, number = tokenizer(name), layout(golden(name))["special_tokens"][case]
    assert ours.token_id(case) == number
    own = {"sop": ours.sop_id, "eop": ours.eop_id, "eos": ours.eos_id, **ours.masks}
    assert own.get(case, number) == number
    assert (number in ours.unspoken_ids) == (case not in ("eop", "eos"))


@for_each(["glm130b"], sizes_of)
def test_golden_glm130b_tokenizer_has_its_special_tokens_last(name: str, case: str) -> None:
    specials = layout(golden(name)).get("special_tokens", {})
    behind = [number for number in specials.values() if number >= layout(golden(name))[case]]
    ours = tokenizer(name)
    assert ours.vocab_size == layout(golden(name))[case] + 8 > max(behind, default=0)
    with pytest.raises(ValueError, match=f"id {ours.vocab_size} is not one of"):
        ours.decode([ours.vocab_size])
