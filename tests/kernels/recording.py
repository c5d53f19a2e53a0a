"""Launches on file: all that it takes to run one again, and what it gave. Needs only Python.

A file is a line of JSON, then for each piece of memory its bytes before and its bytes after, then
those of memory that is reached through addresses in there. The text of the kernel is beside it,
once for all launches that share it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from host_build import Build
from host_memory import Memory, Pointer
from host_run import Launch

SUFFIX = ".launch"


@dataclass(frozen=True)
class Link:
    """An address in the memory of a launch: of a byte of a piece that is reached through it.

    piece, offset: where it stands.   target, target_offset: of what.
    """

    piece: int
    offset: int
    target: int
    target_offset: int


ADDRESS_BYTES = 8


@dataclass(frozen=True)
class Record:
    """One launch. `before` and `after` hold the bytes of each piece of memory, `reached` those that
    no argument points to; in place of an address to these, which `links` has, there are zeros."""

    file: str  # the .cu file, for people
    build: Build
    launch: Launch
    modulo_16: tuple[int, ...]  # of each piece's address
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]
    reached: tuple[bytes, ...] = ()
    links: tuple[Link, ...] = ()


def find_links(pieces: Sequence[bytes], reached: Sequence[Memory]) -> tuple[Link, ...]:
    """Every word of `pieces` that is an address in `reached`."""
    found = []
    for piece, content in enumerate(pieces):
        for offset in range(0, len(content) - ADDRESS_BYTES + 1, ADDRESS_BYTES):
            word = int.from_bytes(content[offset : offset + ADDRESS_BYTES], sys.byteorder)
            for target, memory in enumerate(reached):
                if memory.address <= word < memory.end:
                    found.append(Link(piece, offset, target, word - memory.address))
                    break
    return tuple(found)


def without(links: Sequence[Link], pieces: Sequence[bytes]) -> tuple[bytes, ...]:
    """`pieces` with zeros in place of addresses."""
    contents = [bytearray(piece) for piece in pieces]
    for link in links:
        contents[link.piece][link.offset : link.offset + ADDRESS_BYTES] = bytes(ADDRESS_BYTES)
    return tuple(map(bytes, contents))


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
        "reached_bytes": [len(piece) for piece in record.reached],
        "links": [asdict(link) for link in record.links],
    }
    path = folder / f"{os.getpid()}-{next(_counter):06d}-{launch.kernel}{SUFFIX}"
    content = [json.dumps(header).encode() + b"\n", *record.before, *record.after, *record.reached]
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
    sizes = header["num_bytes"]
    pieces = _cut(content[end:], [*sizes, *sizes, *header["reached_bytes"]])
    before, after = pieces[: len(sizes)], pieces[len(sizes) : 2 * len(sizes)]
    return Record(
        header["file"], Build(**build), Launch(**launch), tuple(header["modulo_16"]),
        tuple(before), tuple(after), tuple(pieces[2 * len(sizes) :]),
        tuple(Link(**link) for link in header["links"]),
    )  # fmt: skip


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
