"""Folders that are written under another name, and get their own when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bminf.errors import ArgumentError


def free(path: Path) -> Path:
    """`path`, if a folder can appear there.   Raises ArgumentError where there is anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError(f"{path} exists already; name a folder that does not, or is empty")
    return path


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
