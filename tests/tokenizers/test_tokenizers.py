"""The rules of each tokenizer of the CPM models, with tiny vocabularies.

bminf/tokenizers/cpm1.py, bminf/tokenizers/cpm2.py, bminf/tokenizers/eva.py,
bminf/tokenizers/line_tokenizer.py.
"""

# ruff: noqa: RUF001 - marks of full width are what many rules are about

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, make, stream, write
from tiny_vocabularies import BILINGUAL, CHINESE, PIECES, write_lines, write_piece_model
from work import executed_lines

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers import (
    CPM1Tokenizer,
    CPM2BilingualTokenizer,
    CPM2Tokenizer,
)
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.icetk import IceTokenizer
from bminf.tokenizers.line_tokenizer import has_chinese

T5_KINDS = ["cpm2", "cpm2_bilingual", "eva"]
LINE_KINDS = [kind for kind in KINDS if kind != "cpm1"]

ANY_TEXT = st.text(
    st.sampled_from(" \n\r\t▁▂▃##") | st.sampled_from("".join(CHINESE)) | st.characters()
)
KNOWN = sorted(token for token in CHINESE if len(token) == 1 and token not in "▁▂▃")
WORDS_OF_KNOWN = st.lists(st.sampled_from([*KNOWN, "北京大学", "abc", "12"]), max_size=40).map(
    "".join
)
KNOWN_TEXT = st.lists(st.sampled_from([" ", "\n"]) | WORDS_OF_KNOWN, max_size=6).map("".join)


def pieces(kind: str, text: str) -> list[str]:
    ours = make(kind)
    return ours.tokens(ours.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_tokenizer_tells(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    ours, tokens = KINDS[kind][0](str(path)), KINDS[kind][1]
    assert ours.files == (path,) and ours.vocab_size == len(tokens)
    assert ours.tokens(range(len(tokens))) == tokens
    for number, token in enumerate(tokens):
        assert not token or ours.token_id(token) == number
    assert ours.encode("") == [] and ours.decode([]) == "" and ours.tokens([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_relative_path_is_kept_as_an_absolute_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert KINDS[kind][0](path.name).files == (path,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", ["<unk>", "▃", "<eod>", "▂"])
def test_a_file_without_a_special_token_is_refused(kind: str, missing: str, tmp_path: Path) -> None:
    tokens: list[str] = KINDS[kind][1]
    at = tokens.index(missing)
    path = write(kind, tmp_path, [*tokens[:at], "other", *tokens[at + 1 :]])
    entry = "piece" if kind == "cpm1" else "line"
    expected = rf"{path.name}.*(, {entry} {at + 1}: 'other' where '{missing}'|unk)"
    with pytest.raises(CheckpointError, match=expected):
        KINDS[kind][0](path)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [*[(kind, "<s>") for kind in T5_KINDS], ("eva", "<sep>"), ("cpm2_bilingual", "<go>")],
)
def test_special_tokens_of_the_t5_family(kind: str, missing: str, tmp_path: Path) -> None:
    tokens: list[str] = KINDS[kind][1]
    path = write(kind, tmp_path, [token.replace(missing, "other") for token in tokens])
    with pytest.raises(CheckpointError, match=f"line {tokens.index(missing) + 1}: .*'{missing}'"):
        KINDS[kind][0](path)


@pytest.mark.parametrize("kind", T5_KINDS)
def test_sentinels(kind: str, tmp_path: Path) -> None:
    ours, tokens = make(kind), KINDS[kind][1]
    count = sum(token.startswith("<s_") for token in tokens)
    assert ours.num_sentinels == len(ours.sentinel_ids) == count
    assert ours.tokens(ours.sentinel_ids) == [f"<s_{k}>" for k in range(count)]
    assert ours.sentinel(count - 1) == ours.sentinel_ids[-1] == ours.vocab_size - 1
    assert [ours.sentinel(k) for k in range(count)] == list(ours.sentinel_ids)
    for k in (-1, count, "0", 1.0, True):
        with pytest.raises(ArgumentError, match=rf"k={k!r}; .* <s_0> to <s_{count - 1}>"):
            ours.sentinel(k)
    with pytest.raises(CheckpointError, match="no sentinel at all"):
        KINDS[kind][0](write(kind, tmp_path, tokens[:-count]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["<eod>", "<s>", "<s_0>", "<unk>", "<sep>", "<pad>", "a<eod>b"])
def test_special_tokens_in_a_text_are_ordinary_characters(kind: str, text: str) -> None:
    given = pieces(kind, text)
    special = set(KINDS[kind][1][:8]) - {"▃", ""} | {"<s_0>", "<go>"}
    assert len(given) > 1 and special.isdisjoint(piece for piece in given if piece != "<unk>")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_any_text_has_ids_in_range(kind: str, text: str) -> None:
    ours = make(kind)
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        with pytest.raises(ArgumentError, match="surrogate"):
            ours.encode(text)
        return
    ids = ours.encode(text)
    assert all(type(number) is int and 0 <= number < ours.vocab_size for number in ids)
    assert isinstance(ours.decode(ids), str)
    assert ours.encode(text) == ids


@pytest.mark.parametrize("kind", ["cpm1", "cpm1_word", "cpm2", "eva"])
@settings(deadline=None, max_examples=150)
@given(text=KNOWN_TEXT)
def test_text_of_known_characters_comes_back(kind: str, text: str) -> None:
    assert make(kind).decode(make(kind).encode(text)) == text


@settings(deadline=None, max_examples=150)
@given(text=KNOWN_TEXT)
def test_bilingual_text_of_known_characters_comes_back_but_for_spaces(text: str) -> None:
    ours = make("cpm2_bilingual")
    ids = ours.encode(text)
    given = "".join(ours.decode(ids).split(" "))
    plain = "".join(text.split(" "))
    # Newlines after other characters of a word have no token; a single token comes twice; and a
    # text with ## reads as the mark of pieces inside a word, which the vocabulary spells so.
    if "\n" not in text and len(ids) > 2 and "##" not in text:
        assert given == plain


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_the_longest_token_is_taken_from_left_to_right(kind: str) -> None:
    start = "▁" if kind == "cpm1_word" else ""
    assert pieces(kind, "北京大学中国") == [f"{start}北京大学", f"{start}中国"]
    assert pieces(kind, "abcb中")[:2] == [f"{start}abc", "##b" if "bilingual" in kind else "b"]


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_the_longest_token_of_all_is_taken_at_the_start_of_a_word_and_inside_it(
    kind: str, tmp_path: Path
) -> None:
    start, inside = "▁" if kind == "cpm1_word" else "", "##" if "bilingual" in kind else ""
    for at_start, behind in ((30, 20), (20, 30)):
        longest = [f"{start}{'c' * at_start}", f"{inside}{'d' * behind}"]
        ours = KINDS[kind][0](write(kind, tmp_path, [*KINDS[kind][1], *longest]))
        assert ours.tokens(ours.encode("c" * at_start + "d" * behind)) == longest


def test_which_characters_are_chinese() -> None:
    """One block of Unicode: no extension of it, no punctuation, no kana."""
    assert all(map(has_chinese, ["一", "\u9fff", "a的b"]))
    assert not any(map(has_chinese, ["", "abc", "\u4dff", "\ua000", "㐀", "𠀀", "。，", "ナ", "▂"]))


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_a_word_of_more_than_200_characters_is_unknown_as_a_whole(kind: str) -> None:
    most = 199 if kind == "cpm1_word" else 200  # it begins with U+2581
    given = pieces(kind, "a" * most + "。")
    assert "<unk>" not in given and "".join(given).count("a") == most
    assert pieces(kind, "a" * (most + 1) + "。")[0] == "<unk>"
    assert "a" not in "".join(pieces(kind, "a" * (most + 1) + "。"))


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_each_unknown_character_is_unknown_alone(kind: str) -> None:
    given = [piece for piece in pieces(kind, "龘龘b𠀀") if piece not in ("▁", "▁b", "b", "##b")]
    assert given == ["<unk>"] * 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpm1", ["▁", "▂", "▁", "▃", "▁", "▂"]),
        ("cpm1_word", ["▁", "▂", "▁", "▃", "▁", "▂"]),
        ("cpm2", ["▂", "▃", "▂"]),
        ("eva", ["▂", "▃", "▂"]),
        ("cpm2_bilingual", ["▂", "▃", "▂"]),
    ],
)
def test_spaces_and_newlines_are_tokens(kind: str, expected: list[str]) -> None:
    assert pieces(kind, " \n ") == expected
    assert make(kind).decode(make(kind).encode(" \n ")) == " \n "


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpm1_word", ["▁", "<unk>", "▃", "▁", "<unk>", "▁", "<unk>"]),
        ("cpm2", ["<unk>", "▃", "<unk>", "<unk>"]),
        ("eva", ["<unk>", "▃", "<unk>", "<unk>"]),
        ("cpm2_bilingual", ["<unk>", "<unk>", "<unk>", "<unk>"]),
    ],
)
def test_a_carriage_return_and_a_tab_are_unknown(kind: str, expected: list[str]) -> None:
    """jieba keeps \\r\\n together, so the bilingual tokenizer looks for ##▃, which there is not."""
    assert pieces(kind, "\r\n\t\r") == expected


@pytest.mark.parametrize(
    ("kind", "folded", "kept"),
    [
        ("cpm1_word", "ａＡ０！？，（）＂～　…\uff00", "。、“‘《—￥"),
        ("cpm2", "ａＡ０～＂＃％＋　－．／＜＞＿\uff00", "。、，！（）？；：“‘…"),
        ("eva", "！？～＂＃％＇（）＋，－／：；＜＞＿“”‟〝〞‘’‛…", "。、ａＡ０．　\uff00"),
        ("cpm2_bilingual", "", "ａＡ０！？，（）＂　…。、“"),
    ],
)
def test_what_stands_for_ascii(kind: str, folded: str, kept: str) -> None:
    half = {"　": " ", "\uff00": " ", "…": "..."}
    half |= dict.fromkeys("“”‟〝〞", '"') | dict.fromkeys("‘’‛", "'")
    for character in folded:
        ascii_form = half.get(character) or chr(ord(character) - 0xFEE0)
        assert pieces(kind, f"中{character}国") == pieces(kind, f"中{ascii_form}国"), character
    for character in kept:
        expected = character if character in CHINESE else "<unk>"
        assert expected in pieces(kind, f"中{character}国"), character


def test_punctuation_of_full_width_that_cpm2_keeps_may_be_a_token(tmp_path: Path) -> None:
    marks = "，！（）？；："
    ours = CPM2Tokenizer(write_lines(tmp_path / "vocab.txt", [*CHINESE, *marks]))
    assert ours.tokens(ours.encode(marks)) == list(marks)


def test_a_word_of_cpm1_begins_with_its_mark() -> None:
    assert pieces("cpm1_word", "中国是") == ["▁中国", "▁", "是"]
    assert make("cpm1_word").decode(make("cpm1_word").encode("中国是")) == "中国是"


def test_words_are_cut_before_sentencepiece_sees_them() -> None:
    assert pieces("cpm1", "中国智能") == ["▁中国", "▁智能"]  # not ["▁中国", "智能"]
    assert pieces("cpm1", "中国 是") == ["▁中国", "▁", "▂", "▁", "是"]


def test_text_of_cpm1_leaves_out_control_pieces_and_spells_the_end() -> None:
    ours = make("cpm1")
    ids = [ours.token_id(token) for token in ("<s>", "▁中国", "<sep>", "<pad>", "▂", "<mask>", "▃")]
    assert ours.decode([*ids, ours.token_id("</s>"), ours.token_id("<eod>")]) == "中国 \n<eod>"
    assert ours.decode([0, ours.token_id("▁"), 0]) == "⁇⁇"


@pytest.mark.parametrize("kind", [CPM1Tokenizer, IceTokenizer, CogPretrainTokenizer])
@pytest.mark.parametrize("content", [b"", b"\0", b"<unk>\n<s>\n", b"\x0a\xff\xff", None])
def test_a_file_that_is_no_sentencepiece_model_is_refused(
    kind: Any, content: bytes | None, tmp_path: Path
) -> None:
    """None: one that was cut off."""
    path = tmp_path / "any.model"
    whole = write_piece_model(path).read_bytes()
    path.write_bytes(whole[:-40] if content is None else content)
    with pytest.raises(CheckpointError, match=r"any\.model"):
        kind(path)
    with pytest.raises(CheckpointError, match=r"none\.model cannot be read"):
        kind(tmp_path / "none.model")


def test_a_sentencepiece_model_with_bytes_is_not_cpm1_s(tmp_path: Path) -> None:
    path = write_piece_model(tmp_path / "spiece.model", has_bytes=True)
    with pytest.raises(CheckpointError, match=rf"piece {len(PIECES) + 1}: '<0x00>' is a byte"):
        CPM1Tokenizer(path)


def test_the_chinese_tokenizer_refuses_the_bilingual_vocabulary(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "vocab.txt", BILINGUAL)
    with pytest.raises(CheckpointError, match=r"line 8: '<go>'.*CPM2BilingualTokenizer"):
        CPM2Tokenizer(path)


def test_only_pieces_inside_a_word_and_not_chinese_are_marked() -> None:
    assert pieces("cpm2_bilingual", "abcab") == ["abc", "##ab"]
    assert pieces("cpm2_bilingual", "中12") == ["中", "12"]  # two words
    assert pieces("cpm2_bilingual", "天安门中") == ["天安门", "中"]


def test_chinese_inside_a_word_is_not_marked(tmp_path: Path) -> None:
    tokens = ["人", "##人", "大代", "##大代"]
    path = write_lines(tmp_path / "vocab.txt", [*BILINGUAL[:12], *tokens, "<s_0>"])
    ours = CPM2BilingualTokenizer(path)
    assert ours.tokens(ours.encode("人大代表")) == ["人", "大代", "<unk>"]  # one word of jieba's


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", ["a", "b"]),
        ("a  b", ["a", "▂", "▂", "b"]),  # a space beside a space is not between words
        ("中 b", ["中", "▂", "b"]),
        ("a 中", ["a", "▂", "中"]),
        (" a b", ["▂", "a", "b"]),
        ("a b ", ["a", "b", "▂"]),
        ("a 。", ["a", "。"]),  # punctuation is not Chinese here
        ("龘 a", ["<unk>", "a"]),
        ("a", ["a", "a"]),  # as the authors: first and last are kept
        (" ", ["▂", "▂"]),
        ("中国", ["中国", "中国"]),
        ("ab", ["ab", "ab"]),
        ("a b c d", ["a", "b", "c", "d"]),
    ],
)
def test_spaces_between_words_that_are_not_chinese_have_no_token(
    text: str, expected: list[str]
) -> None:
    assert pieces("cpm2_bilingual", text) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a", "b"], "a b"),
        (["a", "##b", "c"], "ab c"),
        (["a", "中", "b"], "a中b"),
        (["a", "▂", "b"], "a b"),
        (["a", "▂", "▂", "b"], "a  b"),
        (["▂", "##b", "c"], " b c"),  # with more after it U+2582 is a word like others
        (["c", "▂", "##b"], "c  b"),
        (["##b", "##a", "a"], "##ba a"),  # nothing before it that it could go on with
        (["a", "▃", "b"], "a \n b"),
        (["<unk>", "<eod>", "中"], "<unk> <eod>中"),
    ],
)
def test_bilingual_decoding_puts_spaces_back(tokens: list[str], expected: str) -> None:
    ours = make("cpm2_bilingual")
    assert ours.decode([ours.token_id(token) for token in tokens]) == expected


def test_the_empty_line_of_eva_is_an_id_without_text() -> None:
    ours = make("eva")
    assert ours.tokens([8]) == [""] and ours.decode([11, 8, 12]) == ours.decode([11, 12])
    assert ours.token_id(",") == 9
    assert pieces("eva", "▁") == ["<unk>"]


@pytest.mark.parametrize(
    ("kind", "unit"),
    # jieba itself is slow where nothing ever ends a run of Chinese characters.
    [*[(kind, "中国是 ab\n") for kind in KINDS], ("cpm1", "的" * 20 + "。"), ("cpm1_word", "a")]
    + [("cpm2_bilingual", unit) for unit in ("a", "的" * 20 + "。", " ", "\0", "1")],
)
def test_long_text_takes_work_that_grows_with_its_length(kind: str, unit: str) -> None:
    """A square of 30,000 would be many minutes."""
    ours = make(kind)
    there_and_back(ours, unit)  # what is read and kept at the first text
    texts = [unit * (length // len(unit)) for length in (1_000, 4_000)]
    short, long = (executed_lines(functools.partial(there_and_back, ours, t)) for t in texts)
    assert long < 4.4 * short
    there_and_back(ours, unit * (30_000 // len(unit)))


def there_and_back(ours: Any, text: str) -> None:
    ids = ours.encode(text)
    decoded = ours.decode(ids)
    assert "".join(stream(ours, ids)) == decoded
