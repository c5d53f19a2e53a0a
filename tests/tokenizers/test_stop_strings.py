"""bminf/tokenizers/stop_strings.py: the text before a stop string, whatever pieces it comes in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bminf.errors import ArgumentError
from bminf.tokenizers.stop_strings import MAX_STOP, StopStrings, check_stop


def pieces_of(stop: Any, *pieces: str) -> list[str]:
    """What each piece lets through, and what comes at the end."""
    stops = StopStrings(stop)
    return [*(stops.feed(piece) for piece in pieces), stops.finish()]


def before_stop(stop: list[str], text: str) -> tuple[str, bool]:
    """By the definition, character by character."""
    for end in range(1, len(text) + 1):
        ends = [one for one in stop if text[:end].endswith(one)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.text("ab", max_size=3))
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    stop: list[str], pieces: list[str]
) -> None:
    stops = StopStrings(stop)
    given_out = [stops.feed(piece) for piece in pieces]
    whole, is_found = before_stop(stop, "".join(pieces))
    assert ("".join(given_out) + stops.finish(), stops.is_found) == (whole, is_found)
    assert stops.finish() == ""
    if is_found:
        assert stops.feed("a") + stops.finish() == ""


def test_what_may_begin_a_stop_string_is_held_back_and_no_more() -> None:
    assert pieces_of("\n\nQ:", "one\n", "two\n\n", "Q", "R:", "\n") == [
        *("one", "\ntwo", "", "\n\nQR:", ""),
        "\n",
    ]
    assert pieces_of("\n\nQ:", "one\n", "\nQ:two") == ["one", "", ""]
    assert pieces_of(["aab"], "aaa", "a", "b") == ["a", "a", "", ""]
    assert pieces_of(None, "a", "b") == ["a", "b", ""]


def test_of_stop_strings_that_end_together_the_longest_counts() -> None:
    assert pieces_of(["b", "ab"], "xa", "b") == ["x", "", ""]
    assert pieces_of(["abc", "b"], "xabc") == ["xa", ""], "b is complete before abc"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["x"] * (MAX_STOP + 1), "stop has 65 texts; accepted: at most 64"),
        ("", "stop holds ''"),
        (["a", ""], "stop holds ''"),
        (["a", 3], "stop holds 3"),
        (5, "stop is a int; give a text"),
        ({"a": 1}, "stop is a dict"),
        (["\ud83d"], "half a surrogate pair"),
    ],
)
def test_what_is_no_stop_string_is_refused(stop: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check_stop(stop)


def test_one_text_and_lists_of_texts_are_taken() -> None:
    assert check_stop("ab") == ("ab",) and check_stop(None) == check_stop([]) == ()
    assert len(check_stop([str(number) for number in range(MAX_STOP)])) == 64
