"""Thousands of requests leave nothing in an engine, whichever way they end."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import told_by
from tiny_zoo import tiny

from bminf.cli.measure import rss_anon_bytes

MOST_BYTES = 2**20
"""By which RssAnon may differ: what malloc's heap has not settled yet. 30,000 requests took no more
of it than 10,000 did."""


@pytest.mark.slow
@pytest.mark.skipif(rss_anon_bytes() is None, reason="the system does not tell RssAnon")
@pytest.mark.parametrize(("name", "number"), [("llama", 10_000), ("cpm2", 1000)])
def test_nothing_is_left_of_them_in_memory(name: str, number: int, tmp_path: Path) -> None:
    """The first half warms up: of the second, each would leave a block of Python's, be it a number,
    or 350 bytes of torch's."""
    folder = [] if name == "llama" else [tiny(name).write_original(tmp_path)]
    program = Path(__file__).with_name("request_memory.py")
    found = told_by(program, number, name, *folder)
    held, blocks, objects = found["held"], found["blocks"], found["objects"]
    assert len(held) == len(blocks) == len(objects) == 10
    assert blocks[-1] - blocks[4] <= number // 4, blocks
    assert held[-1] - held[0] <= MOST_BYTES, held
    assert objects[-1] - objects[0] <= 100, objects
