"""bminf/tokenizers/gpt2.py: GLM-10B's byte pairs, with a tiny vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import make, stream
from tiny_vocabularies import GPT2_ENTRIES, GPT2_MERGES, LINES, ODD_TEXTS, write_gpt2

from bminf.errors import CheckpointError
from bminf.tokenizers.find import tokenizer_from
from bminf.tokenizers.gpt2 import GPT2Tokenizer


def transformers_twin(folder: Path) -> Any:
    from transformers import GPT2Tokenizer as Theirs

    return Theirs.from_pretrained(folder, local_files_only=True)


def test_gpt2_ids_and_text_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = transformers_twin(write_gpt2(tmp_path)), make("gpt2")
    texts = ["the  thin 's the12\n\nA in", " the", "中中", "it's \u00a0x", "١٢ 中a"]
    for text in [*texts, *ODD_TEXTS, *LINES]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == text == "".join(stream(ours, ids))
        assert ours.tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert len(ours.encode(" the")) == 1 and len(ours.encode("中")) == 1


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_gives_any_text_back(text: str) -> None:
    assert make("gpt2").decode(make("gpt2").encode(text)) == text


def test_special_ids_of_gpt2() -> None:
    ours, count = make("gpt2"), len(GPT2_ENTRIES)
    names = ["<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]"]
    names += ["[UNK]", "[gMASK]", "[sMASK]"]
    assert [ours.token_id(name) - count for name in names] == [*range(-1, 8)]
    assert ours.vocab_size == count + 8 and ours.prefix_ids == (count + 2,)
    assert (ours.eos_id, ours.pad_id, ours.sop_id, ours.eop_id) == (
        count - 1, count - 1, count, count + 1,
    )  # fmt: skip
    assert ours.masks == {"[MASK]": count + 3, "[sMASK]": count + 7, "[gMASK]": count + 6}
    assert ours.unspoken_ids == (count, *range(count + 2, count + 8))
    assert ours.strips_before_masks is True
    assert ours.decode([ours.encode("a")[0], *range(count - 1, count + 8)]) == "a" + "".join(names)


def test_gpt2_holds_a_character_back_until_it_is_whole() -> None:
    ours = make("gpt2")
    first, second, third, fourth = (ours.token_id(c) for c in ("ð", "Ł", "ĺ", "Ģ"))
    assert stream(ours, [first, second, third, fourth]) == ["", "", "", "😀", ""]
    assert stream(ours, [first, second, ours.token_id("a")]) == ["", "", "\ufffda", ""]
    assert stream(ours, [first, second]) == ["", "", "\ufffd"]
    assert stream(ours, [first, ours.eop_id, fourth]) == ["", "\ufffd<|endofpiece|>", "\ufffd", ""]


@pytest.mark.parametrize("prefix", ["", "gpt2-", "own-"])
def test_gpt2_has_two_files_that_name_each_other(prefix: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path, prefix)
    files = (tmp_path / f"{prefix}vocab.json", tmp_path / f"{prefix}merges.txt")
    given: list[Any] = [files[0], str(files[1]), *([] if prefix == "own-" else [tmp_path])]
    for path in given:
        assert GPT2Tokenizer(path).files == tokenizer_from("glm10b", path).files == files


def test_gpt2_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it needs vocab\.json and merges\.txt or gpt2-voca"):
        GPT2Tokenizer(tmp_path)
    path = write_gpt2(tmp_path / "a") / "merges.txt"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
        GPT2Tokenizer(path.with_name("vocab.json"))
    with pytest.raises(CheckpointError, match=r"other\.txt is no file of a GPT-2 vocabulary"):
        GPT2Tokenizer(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"\xff": 0}', "is not JSON"),
        (b"[]", "is no vocabulary"),
        (b"{}", "is no vocabulary"),
        (b'{"a": 0, "b": 2}', "without gaps"),
        (b'{"a": 0, "b": 0}', "without gaps"),
        (b'{"a": "0"}', "is no vocabulary"),
        (b'{"a": true}', "is no vocabulary"),
        (b'{"a": 0}', r"the last entry is 'a', and GPT-2's is '<\|endoftext\|>'"),
        (b'{"a": 0, "<|endoftext|>": 1}', "no entry for 255 of the 256 bytes"),
    ],
)
def test_a_file_that_is_no_gpt2_vocabulary_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = write_gpt2(tmp_path) / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"vocab\.json.*{message}"):
        GPT2Tokenizer(tmp_path)


def test_an_entry_that_is_no_bytes_is_refused(tmp_path: Path) -> None:
    write_gpt2(tmp_path, entries=[*GPT2_ENTRIES[:-1], "中", GPT2_ENTRIES[-1]])
    with pytest.raises(CheckpointError, match=r"entry '中' has '中', which stands for no byte"):
        GPT2Tokenizer(tmp_path)


@pytest.mark.parametrize("line", ["t", "t h e", "x y", "th the", "中 中", "t  h"])
def test_a_line_that_is_no_merge_is_refused(line: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path, merges=f"#version: 0.2\nt h\n{line}\n")
    with pytest.raises(CheckpointError, match=rf"merges\.txt, line 3: '{line}' is not two entries"):
        GPT2Tokenizer(tmp_path)


def test_merges_may_lack_their_first_line_and_end_in_any_way(tmp_path: Path) -> None:
    write_gpt2(tmp_path, merges="\r\n".join(GPT2_MERGES))
    assert GPT2Tokenizer(tmp_path).encode("the in") == make("gpt2").encode("the in")
    (tmp_path / "merges.txt").write_bytes(b"\xff \xff\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not UTF-8"):
        GPT2Tokenizer(tmp_path)
