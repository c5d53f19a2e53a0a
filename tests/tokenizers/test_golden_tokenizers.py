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
from pathlib import Path
from typing import Any

import pytest

from bminf.tokenizers import (
    CPM1Tokenizer,
    CPM1WordTokenizer,
    TextStream,
    Tokenizer,
    tokenizer_from,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("BMINF_GOLDEN", ROOT.parent / "shared" / "golden")) / "tokenizers"
VOCAB = Path(os.environ.get("BMINF_VOCAB", ROOT.parent / "shared" / "vocab"))

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


def golden_set() -> dict[str, Any]:
    """name -> {"vocab_size", "cases": [{"text", "ids", "decoded"}], and maybe "vocab"}."""
    path = GOLDEN / "tokenizer_golden.json"
    return json.loads(path.read_text(encoding="utf-8")) if GOLDEN.is_dir() else {}


def vocab_file(name: str) -> Path:
    return VOCAB / VOCAB_FILES[name]


def sha256_recorded(name: str, record: dict[str, Any]) -> str | None:
    """The digest of the file that the set was made with; None where the set does not tell."""
    digests = [
        file["sha256"]
        for file in record.get("vocab", [])
        if Path(file["file"]).name == vocab_file(name).name
    ]
    return digests[0] if digests else None


if not GOLDEN.is_dir():
    pytest.skip(f"there is no folder {GOLDEN}", allow_module_level=True)

SET = golden_set()
RIGHT = {name: record for name, record in SET.items() if name in VOCAB_FILES and name != WRONG}
CASES = [
    pytest.param(name, case, id=f"{name}-{number}")
    for name, record in RIGHT.items()
    for number, case in enumerate(record["cases"])
]
DIGESTS = {name: digest for name in RIGHT if (digest := sha256_recorded(name, SET[name]))}
META = GOLDEN / "meta.json"
JIEBA = json.loads(META.read_text(encoding="utf-8")).get("jieba") if META.is_file() else None


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


def test_golden_tokenizers_of_the_set_are_all_known() -> None:
    assert SET and set(SET) <= set(VOCAB_FILES)


if CASES:

    @pytest.mark.parametrize(("name", "case"), CASES)
    def test_golden_tokenizer(name: str, case: dict[str, Any]) -> None:
        ours = tokenizer(name)
        assert ours.encode(case["text"]) == case["ids"]
        assert ours.decode(case["ids"]) == case["decoded"]
        stream = TextStream(ours)
        assert "".join(map(stream.feed, case["ids"])) + stream.finish() == case["decoded"]


if RIGHT:

    @pytest.mark.parametrize("name", RIGHT)
    def test_golden_tokenizer_has_the_recorded_number_of_ids(name: str) -> None:
        assert tokenizer(name).vocab_size == SET[name]["vocab_size"]


if DIGESTS:

    @pytest.mark.parametrize("name", DIGESTS)
    def test_golden_tokenizer_reads_the_recorded_vocabulary(name: str) -> None:
        tokenizer(name)
        assert hashlib.sha256(vocab_file(name).read_bytes()).hexdigest() == DIGESTS[name]


if JIEBA:

    def test_golden_tokenizers_were_recorded_with_this_jieba() -> None:
        assert importlib.metadata.version("jieba") == JIEBA


if WRONG in SET:

    def test_golden_tokenizer_of_eva_counts_the_empty_line() -> None:
        """The record skips the empty ninth line: its ids from 8 on are one too small."""
        ours, record = tokenizer(WRONG), SET[WRONG]
        assert ours.vocab_size == record["vocab_size"] + 1
        for case in record["cases"]:
            if any(number >= 8 for number in case["ids"]):
                assert ours.encode(case["text"]) != case["ids"], case["text"]
