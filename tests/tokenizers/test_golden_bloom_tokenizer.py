"""Pieces, ids and text of BLOOM's own tokenizer, with the tokenizer.json of the set."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from golden import GoldenSet, for_each, golden

from bminf.tokenizers import BloomTokenizer, TextStream
from bminf.tokenizers.gpt2 import BYTES


@functools.cache
def recorded(of: GoldenSet) -> dict[str, Any]:
    path = of.path / "tokenizer_golden.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def cases_of(of: GoldenSet) -> Iterable[str]:
    return [str(number) for number in range(len(recorded(of).get("cases", [])))]


def greedy_rows(of: GoldenSet) -> Iterable[str]:
    return [str(number) for number in range(len(recorded(of).get("greedy_text", [])))]


def batches(of: GoldenSet) -> Iterable[str]:
    return ["batch"] if "batch" in recorded(of) else []


def sizes(of: GoldenSet) -> Iterable[str]:
    return ["tokenizer_size"] if "tokenizer_size" in of.info else []


@functools.cache
def tokenizer(name: str) -> BloomTokenizer:
    return BloomTokenizer(golden(name).path)


@for_each(["bloom"], cases_of)
def test_golden_bloom_tokenizer(name: str, case: str) -> None:
    ours, told = tokenizer(name), recorded(golden(name))["cases"][int(case)]
    ids = told["ids"]
    assert ours.encode(told["text"]) == ids
    stream = TextStream(ours)
    text = "".join(map(stream.feed, ids)) + stream.finish()
    assert text == ours.decode(ids) == told["decoded"]
    spoken = [token_id for token_id in ids if token_id > ours.pad_id]
    assert ours.decode(spoken) == told["decoded_skip_special"]


@for_each(["bloom"], cases_of)
def test_golden_bloom_tokens_lie_within_the_pieces(name: str, case: str) -> None:
    """A piece is some tokens, in order, from their first byte to their last."""
    ours, told = tokenizer(name), recorded(golden(name))["cases"][int(case)]
    rest = [bytes(map(BYTES.__getitem__, token)) for token in ours.tokens(told["ids"])]
    for piece in told["pieces"]:
        whole = b""
        while len(whole) < len(piece.encode()):
            whole += rest.pop(0)
        assert whole == piece.encode()
    assert not rest


@for_each(["bloom"], greedy_rows)
def test_golden_bloom_text_of_answers_with_ids_that_are_no_tokens(name: str, case: str) -> None:
    given, ours = golden(name), tokenizer(name)
    ids = given.tensors["greedy_ids"][int(case)].tolist()
    stream = TextStream(ours)
    text = recorded(given)["greedy_text"][int(case)]
    assert "".join(map(stream.feed, ids)) + stream.finish() == ours.decode(ids) == text


@for_each(["bloom"], batches)
def test_golden_bloom_batch_is_padded_on_the_left(name: str, case: str) -> None:
    ours, told = tokenizer(name), recorded(golden(name))[case]
    rows = [ours.encode(text) for text in told["texts"]]
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    assert told["input_ids"] == [
        [ours.pad_id] * gap + row for gap, row in zip(gaps, rows, strict=True)
    ]
    assert told["attention_mask"] == [
        [0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)
    ]


@for_each(["bloom"], sizes)
def test_golden_bloom_sizes_and_special_ids(name: str, case: str) -> None:
    told, ours = golden(name).info, tokenizer(name)
    assert ours.vocab_size == told[case]
    spelled = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    assert {key: ours.token_id(spelled[key]) for key in told["special_ids"]} == told["special_ids"]
    assert (ours.eos_id, ours.pad_id) == (told["special_ids"]["eos"], told["special_ids"]["pad"])
    assert [file.name for file in ours.files][1:] == [
        name
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if (golden("bloom").path / name).is_file()
    ]
