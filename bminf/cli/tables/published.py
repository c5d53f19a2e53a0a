"""What the authors of other code have published, in published.json with its sources.

A figure that is null stands for out of memory.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def published() -> dict[str, Any]:
    """The content of the file."""
    text = (files("bminf.cli.tables") / "published.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
