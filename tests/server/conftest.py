from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "engine"), str(TESTS / "cli")]  # for fake_rows and tiny_llama

from fake_texts import FakeTexts  # noqa: E402
from running_server import Running, Serve, running  # noqa: E402


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(texts, ...): a server of them, stopped at the end of the test."""
    with ExitStack() as stack:

        def start(texts: Any = None, **settings: Any) -> Running:
            own = FakeTexts() if texts is None else texts
            return stack.enter_context(running(lambda: own, **settings))

        yield start
