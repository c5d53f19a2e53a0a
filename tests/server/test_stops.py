"""bminf/server/stops.py."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import pytest

from bminf.server.stops import StopText


def fed(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    text = StopText(stops)
    found = [text.feed(piece) for piece in pieces]
    return [*found, text.finish()], text.is_stopped


def by_hand(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """Letter by letter: up to the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@hypothesis.given(
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab.", max_size=3), max_size=8),
)
def test_the_text_ends_before_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    found, is_stopped = fed(stops, pieces)
    assert ("".join(found), is_stopped) == by_hand(stops, "".join(pieces))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a\n", "\nb"], ["a", "", ""]),  # over the border of two tokens
        (["a\n", "b"], ["a", "\nb", ""]),  # it was none after all
        (["a\n"], ["a", "\n"]),  # nor at the end
        (["a\n\nb", "c"], ["a", "", ""]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(pieces: list[str], expected: list[str]) -> None:
    assert fed(["\n\n"], pieces)[0] == expected
