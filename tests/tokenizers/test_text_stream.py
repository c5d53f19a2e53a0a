"""bminf/tokenizers/base.py, text as it comes: all pieces together are the decoded text, and nothing
waits without need."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import BILINGUAL, CHINESE, DIALOGUE, PIECES, write_lines, write_piece_model

from bminf.errors import ArgumentError
from bminf.tokenizers import (
    CPM1Tokenizer,
    CPM1WordTokenizer,
    CPM2BilingualTokenizer,
    CPM2Tokenizer,
    EVATokenizer,
    TextStream,
)

ODD = ["##", "##▂", "##中", "▂▂", "▂b", "##▃", "中b", "####"]
"""Tokens that no published vocabulary has, and that make a word Chinese, or U+2582 alone, late."""

KINDS: dict[str, Any] = {
    "cpm1": (CPM1Tokenizer, PIECES),
    "cpm1_word": (CPM1WordTokenizer, PIECES),
    "cpm2": (CPM2Tokenizer, CHINESE),
    "eva": (EVATokenizer, DIALOGUE),
    "bilingual": (CPM2BilingualTokenizer, BILINGUAL),
    "bilingual_empty": (CPM2BilingualTokenizer, [*BILINGUAL, "", "##", "##▂", "▂b"]),
    "bilingual_odd": (CPM2BilingualTokenizer, [*BILINGUAL, "", *ODD]),
}


@functools.cache
def make(kind: str) -> Any:
    cls, tokens = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary")
        return cls(write_piece_model(path) if kind == "cpm1" else write_lines(path, tokens))


def stream(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id gives, and then the end."""
    stream = TextStream(tokenizer)
    return [*map(stream.feed, ids), stream.finish()]


def bilingual_text(tokens: list[str]) -> str:
    """The authors' rule, on all tokens at once."""
    words: list[str] = []
    for token in tokens:
        if words and token.startswith("##"):
            words[-1] += token[2:]
        else:
            words.append(token)
    is_chinese = [word == "▂" or any("\u4e00" <= c <= "\u9fff" for c in word) for word in words]
    text = "".join(words[:1])
    for at in range(1, len(words)):
        text += ("" if is_chinese[at - 1] or is_chinese[at] else " ") + words[at]
    return text.replace("▂", " ").replace("▃", "\n")


def interesting_ids(kind: str) -> st.SearchStrategy[list[int]]:
    tokens = KINDS[kind][1]
    often = [
        number for number, token in enumerate(tokens) if token in {*ODD, "", "▂", "中", "b", "##b"}
    ]
    return st.lists(st.sampled_from(often) | st.integers(0, len(tokens) - 1), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_all_pieces_together_are_the_decoded_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(interesting_ids(kind))
    assert "".join(stream(make(kind), ids)) == make(kind).decode(ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("bilingual")])
@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_bilingual_text_is_that_of_the_authors_rule(kind: str, data: st.DataObject) -> None:
    ids = data.draw(interesting_ids(kind))
    assert make(kind).decode(ids) == bilingual_text(make(kind).tokens(ids))


@pytest.mark.parametrize("kind", ["cpm1", "cpm1_word", "cpm2", "eva"])
def test_where_tokens_do_not_change_one_another_text_comes_at_once(kind: str) -> None:
    ours = make(kind)
    ids = ours.encode("中国 是 abc\n")
    assert stream(ours, ids) == [ours.decode([number]) for number in ids] + [""]


def pieces_of(kind: str, *tokens: str) -> list[str]:
    return stream(make(kind), [make(kind).token_id(token) for token in tokens])


def test_bilingual_text_comes_as_soon_as_it_is_certain() -> None:
    assert pieces_of("bilingual", "a", "##b", "b", "中", "c") == ["a", "b", " b", "中", "c", ""]
    assert pieces_of("bilingual", "中", "▂", "##b") == ["中", " ", "b", ""]


def test_a_space_alone_waits_for_what_follows_it() -> None:
    assert pieces_of("bilingual", "a", "▂", "b") == ["a", "", " b", ""]
    assert pieces_of("bilingual", "a", "▂", "##b", "c") == ["a", "", "  b", " c", ""]
    assert pieces_of("bilingual", "a", "▂") == ["a", "", " "]


def test_an_empty_word_waits_for_what_it_becomes() -> None:
    ours = make("bilingual_empty")
    a, empty, space = (
        ours.token_id("a"),
        KINDS["bilingual_empty"][1].index(""),
        ours.token_id("##▂"),
    )
    assert stream(ours, [a, empty, space, a]) == ["a", "", "", " a", ""]
    assert stream(ours, [a, empty, a]) == ["a", "", "  a", ""]


def test_a_word_that_may_turn_chinese_waits_for_its_end() -> None:
    assert pieces_of("bilingual_odd", "a", "b", "##中", "c") == ["a", "", "b中", "c", ""]
    assert pieces_of("bilingual_odd", "a", "b", "c") == ["a", "", " b", " c"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_and_after_the_end_are_refused(kind: str) -> None:
    ours = make(kind)
    stream = TextStream(ours)
    for number in (-1, ours.vocab_size, "1", None):
        with pytest.raises(ArgumentError, match="id "):
            stream.feed(number)  # type: ignore[arg-type]
    given = stream.feed(11) + stream.finish()
    assert given == ours.decode([11]) and stream.finish() == ""
    with pytest.raises(ArgumentError, match="the stream is finished"):
        stream.feed(11)


def test_two_streams_of_one_tokenizer_do_not_mix() -> None:
    ours = make("bilingual")
    one, other = TextStream(ours), TextStream(ours)
    a, inside = ours.token_id("a"), ours.token_id("##b")
    assert [one.feed(a), other.feed(inside), one.feed(inside)] == ["a", "##b", "b"]


class Foreign:
    """A tokenizer of another kind: each id changes the text of those before it."""

    vocab_size = 9
    files = ()
    encode = token_id = None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(str, reversed(ids)))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return list(map(str, ids))


def test_text_of_another_tokenizer_comes_at_the_end_and_a_warning_says_so() -> None:
    foreign: Any = Foreign()
    with pytest.warns(UserWarning, match="a Foreign does not say .*comes at the end") as caught:
        assert stream(foreign, [1, 2, 3]) == ["", "", "", "321"]
    assert [warning.filename for warning in caught] == [__file__]
