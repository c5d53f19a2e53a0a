from __future__ import annotations

import pytest

from bminf.ops import cpu_linear


@pytest.fixture(autouse=True)
def _integers_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of these tests are small, and what they test is the way that large ones go where
    integers are multiplied fast."""
    monkeypatch.setattr(cpu_linear, "_SMALL_ELEMENTS", 0)
    monkeypatch.setattr(cpu_linear, "is_fast", lambda: True)
