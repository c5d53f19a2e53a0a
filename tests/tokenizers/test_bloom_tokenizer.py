"""bminf/tokenizers/bloom.py: byte pairs of a tokenizer.json, with a tiny vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import make, stream
from tiny_vocabularies import BLOOM_SPECIALS, LINES, ODD_TEXTS, bloom_json, write_bloom

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers import BloomTokenizer, TextStream

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def twin() -> Any:
    """The package's own tokenizer on the same file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(bloom_json())


def parts() -> Any:
    return json.loads(bloom_json())


@pytest.mark.parametrize("text", [*ODD_TEXTS, *LINES, "a (b)", "so?\nA:", "a , b", "x</s> y"])
def test_ids_are_those_of_the_package_and_text_comes_back(text: str) -> None:
    ours, ids = make("bloom"), make("bloom").encode(text)
    assert ids == twin().encode(text).ids
    assert ours.decode(ids) == text == "".join(stream(ours, ids))
    assert ours.tokens(ids) == twin().encode(text).tokens


@settings(max_examples=60)
@given(ANY_TEXT)
def test_any_text_comes_back(text: str) -> None:
    assert make("bloom").decode(make("bloom").encode(text)) == text


@settings(max_examples=100)
@given(st.lists(st.integers(0, 330), max_size=12))
def test_any_ids_give_the_text_of_the_package_piece_by_piece(ids: list[int]) -> None:
    ours = make("bloom")
    text = twin().decode(ids, skip_special_tokens=False)
    assert ours.decode(ids) == "".join(stream(ours, ids)) == text


def test_special_tokens_in_a_text_become_their_ids() -> None:
    ours = make("bloom")
    assert [ours.token_id(name) for name in BLOOM_SPECIALS] == [0, 1, 2, 3]
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (2, 3, len(parts()["model"]["vocab"]))
    assert ours.encode("<pad><s>a</s>")[:2] == [3, 1] and ours.encode("a</s>")[-1] == 2
    assert 2 not in ours.encode("</ s>") and ours.decode([3, 1, 0, 2]) == "<pad><s><unk></s>"
    assert ours.encode("") == [] and not set(ours.encode("one two")) & {0, 1, 2, 3}


def test_ids_behind_the_last_token_have_no_text_and_cut_no_character() -> None:
    ours = make("bloom")
    first, *others = ours.encode("é")
    assert others, "the test needs a character of two tokens"
    behind = ours.vocab_size
    assert ours.decode([behind, first, behind + 1, *others, 10**9]) == "é"
    assert stream(ours, [behind, first, behind, *others]) == ["", "", "", "é", ""]
    assert ours.tokens([behind, 3]) == ["", "<pad>"]
    stream_of_text = TextStream(ours)
    for wrong in (-1, 1.5, "a", None):
        for call in (lambda i: ours.decode([i]), lambda i: ours.tokens([i]), stream_of_text.feed):
            with pytest.raises(ArgumentError, match=r"id -1 is not one of|give integers"):
                call(wrong)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    ours = make("bloom")
    first, second, third, fourth = (ours.token_id(c) for c in ("ð", "Ł", "ĺ", "Ģ"))
    assert stream(ours, [first, second, third, fourth]) == ["", "", "", "😀", ""]
    assert stream(ours, [first, second, ours.token_id("a")]) == ["", "", "\ufffda", ""]
    assert stream(ours, [first, second]) == ["", "", "\ufffd"]
    assert stream(ours, [first, ours.eos_id, fourth]) == ["", "\ufffd</s>", "\ufffd", ""]


def test_what_is_not_text_is_refused() -> None:
    for wrong in (None, b"abc", 1, ["a"]):
        with pytest.raises(ArgumentError, match=r"text=.* is a .*; give a str"):
            make("bloom").encode(wrong)
    with pytest.raises(ArgumentError, match=r"half a surrogate pair, '\\ud83d', at 2"):
        make("bloom").encode("ab\ud83d")


def test_a_folder_or_a_file_of_any_name_and_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_bloom(tmp_path)
    assert BloomTokenizer(tmp_path).files == (path,)
    beside = [tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"]
    for file in beside:
        file.write_text("not read")
    monkeypatch.chdir(tmp_path)
    for place in (".", "tokenizer.json", path):
        assert BloomTokenizer(place).files == (path, *beside)
    other = path.rename(tmp_path / "other")
    assert BloomTokenizer(other).files == (other, *beside)


def test_tokens_that_were_added_are_text_as_they_are_spelled(tmp_path: Path) -> None:
    last = len(parts()["model"]["vocab"])
    added = {**parts()["added_tokens"][0], "id": last, "content": "<|é中|>", "special": False}
    ours = BloomTokenizer(write_bloom(tmp_path, added_tokens=[*parts()["added_tokens"], added]))
    assert ours.vocab_size == last + 1 and ours.encode("<|é中|>") == [last]
    assert ours.decode([*ours.encode("é")[:1], last]) == "\ufffd<|é中|>"


def test_lengths_and_padding_of_a_training_do_not_count(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    ours = BloomTokenizer(write_bloom(tmp_path, truncation=cut, padding=fill))
    assert ours.encode(LINES[0]) == make("bloom").encode(LINES[0])


def test_a_byte_order_mark_is_not_read(tmp_path: Path) -> None:
    path = write_bloom(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert BloomTokenizer(path).encode("one") == make("bloom").encode("one")


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**parts()["model"], **changes}}


def vocabulary(**ids: int | None) -> dict[str, Any]:
    """With other ids; of None, without the token."""
    changed = {**parts()["model"]["vocab"], **ids}
    return model(vocab={token: i for token, i in changed.items() if i is not None}, merges=[])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (model(type="Unigram"), "model and decoder are"),
        ({"model": None}, "no tokenizer.json of byte pairs"),
        ({"decoder": {"type": "Metaspace"}}, "model and decoder are"),
        ({"decoder": None}, "no tokenizer.json of byte pairs"),
        ({"pre_tokenizer": None}, "cut into '', which are not its bytes"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cut into 'é中', which are not its bytes"),
        ({"pre_tokenizer": {"type": "Unheard"}}, "no tokenizer.json of byte pairs"),
        (model(merges=[["a", "nothing"]]), "no tokenizer.json of byte pairs"),
        (model(merges="a b"), "no tokenizer.json of byte pairs"),
        (model(continuing_subword_prefix="x"), "its model has a continuing_subword_prefix"),
        (model(end_of_word_suffix="x"), "its model has a end_of_word_suffix"),
        (model(byte_fallback=True), "its model has a byte_fallback"),
        ({"added_tokens": [{"id": 0, "content": 7}]}, "no tokenizer.json of byte pairs"),
        (vocabulary(b=10**6), "the ids from 0 on, without gaps"),
        (vocabulary(b=5), "the ids from 0 on, without gaps"),
        (vocabulary(中=301), "'中' has '中', which stands for no byte"),
        (vocabulary(b=None), r"no entry for 1 of the 256 bytes \('b'\)"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*{message}"):
        BloomTokenizer(write_bloom(tmp_path, **changes))


@pytest.mark.parametrize("special", BLOOM_SPECIALS)
def test_a_vocabulary_without_a_special_token_is_refused(special: str, tmp_path: Path) -> None:
    path = write_bloom(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace(special, "<x>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"'<x>' where '{special}' is expected"):
        BloomTokenizer(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"model": {}}', b"\xff"])
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer\.json of byte pa"):
        BloomTokenizer(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            BloomTokenizer(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bloom(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ArgumentError, match=r"the package tokenizers .*; pip install tokenizers"):
        BloomTokenizer(path)
