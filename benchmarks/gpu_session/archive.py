"""What a session leaves, in one file that is whole at any moment."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from benchmarks.whole_file import UNFINISHED, write_bytes

ARCHIVE = "session.tgz"


def pack(folder: Path, archive: Path) -> None:
    """Put the files of `folder`, not those of folders in it, into `archive`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file != archive and file.suffix != UNFINISHED:
                _add(packed, file)
    write_bytes(archive, content.getvalue())


def _add(archive: tarfile.TarFile, file: Path) -> None:
    """Its bytes of this moment: a step may be writing more of them, or rename it."""
    try:
        content, seconds = file.read_bytes(), file.stat().st_mtime
    except FileNotFoundError:
        return
    entry = tarfile.TarInfo(file.name)
    entry.size, entry.mtime = len(content), int(seconds)
    archive.addfile(entry, io.BytesIO(content))
