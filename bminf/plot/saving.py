"""A figure as a file, the same each time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bminf.errors import ArgumentError, OffloadError
from bminf.plot.theme import check_matplotlib

SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 200


def check_file(file: str | Path, argument: str = "file") -> Path:
    """`file` as a path that save() can write.

    Raises ArgumentError for a suffix that is none of pictures, or a folder that does not exist;
    BMInfError where matplotlib is missing.
    """
    if not isinstance(file, str | os.PathLike):
        raise ArgumentError(f"{argument} is a {type(file).__name__}; give a path")
    path = Path(file).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"{argument}={str(file)!r} does not end in {', '.join(SUFFIXES)}, which says the "
            "format of the picture"
        )
    if not path.absolute().parent.is_dir():
        raise ArgumentError(
            f"{argument}={str(file)!r}: there is no folder {path.parent}; make it first"
        )
    check_matplotlib()
    return path


def save(figure: Any, file: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, with the same bytes each time.

    Raises ArgumentError as check_file(), and for what is no figure; OffloadError for a file that
    cannot be written.
    """
    path = check_file(file)
    if not hasattr(figure, "savefig"):
        raise ArgumentError(f"figure is a {type(figure).__name__}; give a Figure of matplotlib")
    import matplotlib

    # Dates and random names of elements would make two files of one figure differ.
    dates: dict[str, Any] = {
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
        ".png": {"Software": None},
    }
    try:
        with matplotlib.rc_context({"svg.hashsalt": "bminf"}):
            figure.savefig(path, dpi=_DPI, metadata=dates[path.suffix.lower()])
    except OSError as error:
        raise OffloadError(f"{path} cannot be written ({error.strerror})") from error
