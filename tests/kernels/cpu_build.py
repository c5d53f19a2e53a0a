"""Compiles kernels/cpu/ for the tests, under a sanitizer; kept in a temporary folder by a hash."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from host_build import BuildError, run_compiler

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "cpu"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-pthread"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    "-fno-sanitize-recover=all",
)


def build_library(sanitizers: str) -> Path:
    """The shared object of all sources."""
    return _built([*SOURCES.glob("*.cpp")], ("-shared", "-fPIC", f"-fsanitize={sanitizers}"))


def build_program(main: Path, sources: list[str], sanitizers: str) -> Path:
    """A program of `main` and some of the sources."""
    flags = (f"-I{SOURCES}", f"-fsanitize={sanitizers}")
    return _built([main, *(SOURCES / name for name in sources)], flags)


def _built(sources: list[Path], flags: tuple[str, ...]) -> Path:
    text = b"".join(path.read_bytes() for path in sorted({*sources, *SOURCES.iterdir()}))
    key = hashlib.sha256(repr((FLAGS, flags)).encode() + text).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"bminf-cpu-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder}, for compiled kernels, belongs to another user")
    target = folder / key
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "output"
            run_compiler([*FLAGS, *flags, "-o", str(output), *map(str, sorted(sources))])
            output.replace(target)
    return target
