"""Ids by line: what a vocabulary file may look like, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_vocabularies import CHINESE, write_lines

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.line_tokenizer import sentinel_ids
from bminf.tokenizers.vocabulary import Vocabulary


def read(path: Path, content: bytes) -> Vocabulary:
    path.write_bytes(content)
    return Vocabulary.read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a\n\nb\nc\n",
        b"a\n\nb\nc",  # the last line without an end
        b"a\r\n\r\nb\r\nc\r\n",
        b"a\r\rb\rc",
        b"\xef\xbb\xbfa\n\nb\nc\n",  # a byte order mark
        " a \n\t\n\u3000b\nc\xa0\n".encode(),
    ],
)
def test_ids_are_numbers_of_lines_and_an_empty_line_counts(tmp_path: Path, content: bytes) -> None:
    vocabulary = read(tmp_path / "vocab.txt", content)
    assert vocabulary.tokens == ("a", "", "b", "c") and len(vocabulary) == 4
    assert [vocabulary.token_id(token) for token in "abc"] == [0, 2, 3]


def test_only_ends_of_lines_end_a_line(tmp_path: Path) -> None:
    content = "a\x0bb\nc\u2028d\ne\x85f\ng\x1ch\n"
    assert read(tmp_path / "vocab.txt", content.encode()).tokens == tuple(content.split("\n")[:-1])


def test_empty_lines_are_ids_without_a_token_and_may_be_many(tmp_path: Path) -> None:
    vocabulary = read(tmp_path / "vocab.txt", b"\n\na\n\n")
    assert vocabulary.tokens == ("", "", "a", "")
    with pytest.raises(ArgumentError, match="token='' is not one of"):
        vocabulary.token_id("")


def test_a_token_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.txt, line 4: 'b' stands in line 2 already"):
        read(tmp_path / "vocab.txt", b"a\nb\n\nb\n")


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.txt, line 3: not UTF-8 .* at byte 1"):
        read(tmp_path / "vocab.txt", b"a\n\nx\xff\n")


def test_a_missing_token_is_named_with_what_stands_there(tmp_path: Path) -> None:
    vocabulary = read(tmp_path / "vocab.txt", b"a\nb\n\n")
    vocabulary.require({"b": 1, "a": 2})  # its usual place is only told, not asked for
    with pytest.raises(CheckpointError, match=r"vocab\.txt, line 2: 'b' where '<eod>' is expected"):
        vocabulary.require({"<eod>": 1})
    with pytest.raises(CheckpointError, match="line 10: nothing where '<eod>'"):
        vocabulary.require({"<eod>": 9})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "\0"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Vocabulary.read(path)


def test_an_unknown_token_is_refused_with_near_ones(tmp_path: Path) -> None:
    vocabulary = Vocabulary.read(write_lines(tmp_path / "vocab.txt", CHINESE))
    with pytest.raises(ArgumentError, match=r"token='<eos>' is not one of .*near ones: '<eod>'"):
        vocabulary.token_id("<eos>")
    with pytest.raises(ArgumentError, match=r"'龘' is not one of [^;]*$"):
        vocabulary.token_id("龘")
    with pytest.raises(ArgumentError, match="token=7 is a int; give a str"):
        vocabulary.token_id(7)  # type: ignore[arg-type]


def test_ids_are_integers_in_range(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["a", "b", "c"], tmp_path)
    assert vocabulary.check_ids([0, np.int64(2)]) == [0, 2]
    assert vocabulary.check_ids(torch.tensor([1, 2])) == [1, 2]  # type: ignore[arg-type]
    for number in (-1, 3, 10**30):
        with pytest.raises(ArgumentError, match=rf"id {number} is not one of .* are 0 to 2"):
            vocabulary.check_ids([0, number])
    for wrong in ([1.0], ["1"], [None], [[1]]):
        with pytest.raises(ArgumentError, match="give integers"):
            vocabulary.check_ids(wrong)  # type: ignore[arg-type]
    for wrong in (1, None, "12", b"12"):
        with pytest.raises(ArgumentError, match="give a sequence of int"):
            vocabulary.check_ids(wrong)  # type: ignore[arg-type]


def test_sentinels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tokens = ["a", "<s_10>", *[f"<s_{k}>" for k in range(10)], "<s_01>", "<s_>", "<s_٣>"]
    assert sentinel_ids(Vocabulary(tokens, tmp_path)) == (*range(2, 12), 1)


def test_a_vocabulary_without_sentinels_or_with_a_gap_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"v\.txt has no line '<s_0>'; it has no sentinel"):
        sentinel_ids(Vocabulary(["a", "<s_x>"], Path("v.txt")))
    with pytest.raises(CheckpointError, match=r"no line '<s_1>', but <s_2> in line 3"):
        sentinel_ids(Vocabulary(["a", "<s_0>", "<s_2>"], Path("v.txt")))
