"""Launches on file: all that it takes to run one again, and what it gave. Needs only Python.

A file is a line of JSON, then for each piece of memory its bytes before and its bytes after. The
text of the kernel is beside it, once for all launches that share it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from host_build import Build
from host_memory import Memory, Pointer
from host_run import Launch

SUFFIX = ".launch"


@dataclass(frozen=True)
class Record:
    """One launch. `before` and `after` hold the bytes of each piece of memory."""

    file: str  # the .cu file, for people
    build: Build
    launch: Launch
    modulo_16: tuple[int, ...]  # of each piece's address
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]


def bytes_of(memory: Sequence[Memory]) -> tuple[bytes, ...]:
    """Copies of all pieces."""
    return tuple(ctypes.string_at(piece.address, piece.num_bytes) for piece in memory)


def write(folder: Path, record: Record) -> Path:
    """A new file in `folder`; names sort in the order of the launches of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _write_source(folder, record.build.source)
    launch = record.launch
    header = {
        "file": record.file,
        "source": source,
        "build": asdict(replace(record.build, source="")),
        "launch": asdict(launch),  # a Pointer is a dict
        "modulo_16": record.modulo_16,
        "num_bytes": [len(piece) for piece in record.before],
    }
    path = folder / f"{os.getpid()}-{next(_counter):06d}-{launch.kernel}{SUFFIX}"
    content = [json.dumps(header).encode() + b"\n", *record.before, *record.after]
    path.write_bytes(b"".join(content))
    return path


def read(path: Path) -> Record:
    """The launch that `write` wrote."""
    content = path.read_bytes()
    end = content.index(b"\n") + 1
    header = json.loads(content[:end])
    build, launch = header["build"], header["launch"]
    build["source"] = (path.parent / header["source"]).read_text()
    build["entries"] = tuple(build["entries"])
    build["macros"] = tuple((name, value) for name, value in build["macros"])
    launch["grid"], launch["block"] = tuple(launch["grid"]), tuple(launch["block"])
    launch["arguments"] = tuple(
        Pointer(**argument) if isinstance(argument, dict) else argument
        for argument in launch["arguments"]
    )
    pieces = _cut(content[end:], header["num_bytes"] * 2)
    half = len(pieces) // 2
    modulo_16 = tuple(header["modulo_16"])
    before, after = tuple(pieces[:half]), tuple(pieces[half:])
    return Record(header["file"], Build(**build), Launch(**launch), modulo_16, before, after)


def read_all(folder: Path) -> Iterator[Record]:
    """All launches in `folder`, one at a time, in the order of their names."""
    return (read(path) for path in sorted(folder.glob(f"*{SUFFIX}")))


_counter = itertools.count()


def _write_source(folder: Path, source: str) -> str:
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cu"
    if not (folder / name).exists():
        (folder / name).write_text(source)
    return name


def _cut(content: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes))
    return [content[end - size : end] for end, size in zip(ends, sizes, strict=True)]
