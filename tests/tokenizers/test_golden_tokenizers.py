"""Ids and text of the authors' own tokenizers, with the published vocabularies.

What a set does not hold makes no test here. BMINF_GOLDEN and BMINF_VOCAB say where they lie; beside
the repository, unless told.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import ROOT, GoldenSet, for_each, golden

from bminf.tokenizers import (
    CPM1Tokenizer,
    CPM1WordTokenizer,
    TextStream,
    Tokenizer,
    tokenizer_from,
)

VOCAB = Path(os.environ.get("BMINF_VOCAB", ROOT.parent / "shared" / "vocab"))
NAMES = ("tokenizers",)

VOCAB_FILES = {
    "cpm1_original": "cpm1/chinese_vocab.model",
    "cpm1_bminf1": "cpm1/chinese_vocab.model",  # its pieces, one a line
    "cpm2_original": "cpm2/vocab.txt",
    "cpm2_bminf1": "cpm2/vocab.txt",
    "cpm2_encn_original": "cpm2_encn/vocab.txt",
    "eva_original": "eva/vocab.txt",
    "eva_bminf1_with_repo_vocab": "eva/vocab.txt",
}
WRONG = "eva_bminf1_with_repo_vocab"  # recorded with the bug that empty lines are skipped


def read(of: GoldenSet, file: str) -> dict[str, Any]:
    path = of.path / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.cache
def records(of: GoldenSet) -> dict[str, Any]:
    """name -> {"vocab_size", "cases": [{"text", "ids", "decoded"}], and maybe "vocab"}."""
    return read(of, "tokenizer_golden.json")


def right(of: GoldenSet) -> list[str]:
    return [name for name in records(of) if name in VOCAB_FILES and name != WRONG]


def wrong(of: GoldenSet) -> list[str]:
    return [WRONG] if WRONG in records(of) else []


def texts(of: GoldenSet) -> Iterator[tuple[str, str]]:
    for name in right(of):
        yield from ((name, str(n)) for n in range(len(records(of)[name]["cases"])))


def digests(of: GoldenSet) -> Iterator[tuple[str, str]]:
    """Of the files that the set was made with, where it tells them."""
    for name in right(of):
        for file in records(of)[name].get("vocab", []):
            if Path(file["file"]).name == vocab_file(name).name:
                yield name, file["sha256"]


def jieba_versions(of: GoldenSet) -> Iterable[str]:
    return filter(None, [read(of, "meta.json").get("jieba")])


def vocab_file(name: str) -> Path:
    return VOCAB / VOCAB_FILES[name]


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    path = vocab_file(name)
    if not path.parent.is_dir():
        pytest.skip(f"there is no folder {path.parent}")
    if name == "cpm1_bminf1":
        return lines_of(CPM1Tokenizer(path))
    return tokenizer_from(name.split("_")[0], path)


def lines_of(model: CPM1Tokenizer) -> CPM1WordTokenizer:
    """The tokenizer of a vocab.txt with the pieces of a sentencepiece model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(model.tokens(range(model.vocab_size))), encoding="utf-8")
        return CPM1WordTokenizer(path)


@for_each(NAMES, lambda of: ["all"])
def test_golden_tokenizers_of_the_set_are_all_known(name: str, case: str) -> None:
    assert records(golden(name)) and set(records(golden(name))) <= set(VOCAB_FILES)


@for_each(NAMES, texts)
def test_golden_tokenizer(name: str, case: tuple[str, str]) -> None:
    ours, told = tokenizer(case[0]), records(golden(name))[case[0]]["cases"][int(case[1])]
    assert ours.encode(told["text"]) == told["ids"]
    assert ours.decode(told["ids"]) == told["decoded"]
    stream = TextStream(ours)
    assert "".join(map(stream.feed, told["ids"])) + stream.finish() == told["decoded"]


@for_each(NAMES, right)
def test_golden_tokenizer_has_the_recorded_number_of_ids(name: str, case: str) -> None:
    assert tokenizer(case).vocab_size == records(golden(name))[case]["vocab_size"]


@for_each(NAMES, digests)
def test_golden_tokenizer_reads_the_recorded_vocabulary(name: str, case: tuple[str, str]) -> None:
    tokenizer(case[0])
    assert hashlib.sha256(vocab_file(case[0]).read_bytes()).hexdigest() == case[1]


@for_each(NAMES, jieba_versions)
def test_golden_tokenizers_were_recorded_with_this_jieba(name: str, case: str) -> None:
    assert importlib.metadata.version("jieba") == case


@for_each(NAMES, wrong)
def test_golden_tokenizer_of_eva_counts_the_empty_line(name: str, case: str) -> None:
    """The record skips the empty ninth line: its ids from 8 on are one too small."""
    ours, record = tokenizer(case), records(golden(name))[case]
    assert ours.vocab_size == record["vocab_size"] + 1
    for told in record["cases"]:
        if any(number >= 8 for number in told["ids"]):
            assert ours.encode(told["text"]) != told["ids"], told["text"]
