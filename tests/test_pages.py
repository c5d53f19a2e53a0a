"""Memory that goes back to the system as soon as it is let go."""

from __future__ import annotations

from bminf.cli.measure import rss_anon_bytes
from bminf.offload import memory


def test_buffers_are_anonymous_exact_and_given_back_at_once() -> None:
    before = rss_anon_bytes()
    buffer = memory.allocate(30_000_001).fill_(1)
    assert buffer.numel() == 30_000_001 and buffer.data_ptr() % 4096 == 0
    assert 30e6 <= rss_anon_bytes() - before < 33e6
    del buffer
    assert rss_anon_bytes() - before < 2e6
