"""bminf/tokenizers/base.py, text as it comes: all pieces together are the decoded text, and nothing
waits without need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import GLM_KINDS, KINDS, ODD, ODD_KINDS, make, stream, tokens_of

from bminf.errors import ArgumentError
from bminf.tokenizers import TextStream


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


EVERY_KIND = [*KINDS, *ODD_KINDS, *GLM_KINDS]
BILINGUAL_KINDS = ["cpm2_bilingual", *ODD_KINDS]


def interesting_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Often of those that change the text of others."""
    ours = make(kind)
    if kind in GLM_KINDS:
        usable = text_ids(ours)
        often = [ours.eos_id, ours.eop_id, *ours.masks.values(), *usable[:6], *usable[-14:]]
    else:
        odd, usable = {*ODD, "", "▂", "中", "b", "##b"}, [*range(ours.vocab_size)]
        often = [number for number, token in enumerate(tokens_of(kind)) if token in odd]
    return st.lists(st.sampled_from(often) | st.sampled_from(usable), max_size=12)


def text_ids(ours: Any) -> list[int]:
    """The ids that a GLM's `decode` takes: no image tokens, no unused rows."""

    def has_text(number: int) -> bool:
        try:
            ours.tokens([number])
        except ArgumentError:
            return False
        return True

    return [number for number in range(ours.vocab_size) if has_text(number)]


@pytest.mark.parametrize("kind", EVERY_KIND)
@settings(max_examples=150)
@given(data=st.data())
def test_all_pieces_together_are_the_decoded_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(interesting_ids(kind))
    assert "".join(stream(make(kind), ids)) == make(kind).decode(ids)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_not_text_and_ids_out_of_range_are_refused(kind: str) -> None:
    ours = make(kind)
    for wrong in (None, b"abc", 1, ["a"]):
        with pytest.raises(ArgumentError, match=r"text=.* is a .*; give a str"):
            ours.encode(wrong)
    with pytest.raises(ArgumentError, match=r"half a surrogate pair, '\\ud83d', at 2"):
        ours.encode("ab\ud83d")
    for call in (ours.decode, ours.tokens, lambda ids: TextStream(ours).feed(ids[0])):
        for number in (-1, ours.vocab_size):
            words = rf"id {number} is not .* 0 to {ours.vocab_size - 1}"
            with pytest.raises(ArgumentError, match=words):
                call([number])


@pytest.mark.parametrize("kind", BILINGUAL_KINDS)
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
    assert pieces_of("cpm2_bilingual", "a", "##b", "b", "中", "c") == [
        "a",
        "b",
        " b",
        "中",
        "c",
        "",
    ]
    assert pieces_of("cpm2_bilingual", "中", "▂", "##b") == ["中", " ", "b", ""]


def test_a_space_alone_waits_for_what_follows_it() -> None:
    assert pieces_of("cpm2_bilingual", "a", "▂", "b") == ["a", "", " b", ""]
    assert pieces_of("cpm2_bilingual", "a", "▂", "##b", "c") == ["a", "", "  b", " c", ""]
    assert pieces_of("cpm2_bilingual", "a", "▂") == ["a", "", " "]


def test_an_empty_word_waits_for_what_it_becomes() -> None:
    ours = make("bilingual_empty")
    a, empty, space = (
        ours.token_id("a"),
        tokens_of("bilingual_empty").index(""),
        ours.token_id("##▂"),
    )
    assert stream(ours, [a, empty, space, a]) == ["a", "", "", " a", ""]
    assert stream(ours, [a, empty, a]) == ["a", "", "  a", ""]


def test_a_word_that_may_turn_chinese_waits_for_its_end() -> None:
    assert pieces_of("bilingual_odd", "a", "b", "##中", "c") == ["a", "", "b中", "c", ""]
    assert pieces_of("bilingual_odd", "a", "b", "c") == ["a", "", " b", " c"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fed_but_ids_nor_after_the_end(kind: str) -> None:
    ours = make(kind)
    stream = TextStream(ours)
    for wrong in ("1", None):
        with pytest.raises(ArgumentError, match="id "):
            stream.feed(wrong)  # type: ignore[arg-type]
    given = stream.feed(11) + stream.finish()
    assert given == ours.decode([11]) and stream.finish() == ""
    with pytest.raises(ArgumentError, match="the stream is finished"):
        stream.feed(11)


def test_two_streams_of_one_tokenizer_do_not_mix() -> None:
    ours = make("cpm2_bilingual")
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
        own = TextStream(foreign)
    assert [*map(own.feed, [1, 2, 3]), own.finish()] == ["", "", "", "321"]
    assert [warning.filename for warning in caught] == [__file__]
