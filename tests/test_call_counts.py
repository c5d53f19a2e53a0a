"""How many Python calls a streamed token and a load may take: as many as tests/snapshots has, which
is what they took when that was written, and 2% more."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from programs import told_by
from snapshot_files import recorded
from traced import Trace

FILE = "call_counts.json"
SLACK = 1.02
PROGRAM = Path(__file__).parent / "call_counts.py"


pytestmark = pytest.mark.slow  # the fixture takes ten seconds


@pytest.fixture(scope="module")
def now() -> dict[str, float]:
    counts: dict[str, float] = told_by(PROGRAM)
    return counts


def test_nothing_takes_more_calls_than_before(now: dict[str, float]) -> None:
    before = recorded(FILE, now)
    assert before.keys() == now.keys()
    more = {name: (before[name], n) for name, n in now.items() if n > SLACK * before[name]}
    assert not more, f"(before, now): {more}"


def test_the_parts_of_a_streamed_token_add_up(now: dict[str, float]) -> None:
    """A step of 30 blocks is 30 times a block, and what the modules around them take."""
    blocks = 30 * now["one more streamed block of a Llama"]
    around = now["token of a streamed Llama of 30 blocks"] - blocks
    assert now["token of a resident Llama"] == 0 < around < blocks / 30


FIRST = """
from traced_second import inner, numbers

def outer():
    return [inner(), inner()] + [number for number in numbers()]
"""
SECOND = """
def inner():
    return 1

def numbers():
    yield 2
    yield 3
"""


def test_calls_and_moves_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traced_first.py").write_text(FIRST)
    (tmp_path / "traced_second.py").write_text(SECOND)
    monkeypatch.syspath_prepend(tmp_path)
    outer = import_module("traced_first").outer
    with Trace(f"{tmp_path}/") as trace:
        assert outer() == [1, 1, 2, 3]
        sorted([2, 1])
    first, second = "traced_first.py", "traced_second.py"
    # The generator is gone to three times, the last time to find that it is at its end.
    assert +trace.calls == {(first, "outer"): 1, (second, "inner"): 2, (second, "numbers"): 3}
    assert trace.entries == {first: 1 + 5, second: 5}
