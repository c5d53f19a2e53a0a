"""Files that are whole at any moment, also when the process is killed while it writes one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` in the place of what `path` held: under another name first, then renamed."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for what is kept as JSON."""
    write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())


UNFINISHED = ".unfinished"
"""What the names of files end with that are being written."""
