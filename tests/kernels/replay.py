"""Runs recorded launches again, built with a sanitizer or for coverage, and compares the results.

    python replay.py FOLDER [--sanitizer address|undefined|thread] [--coverage FILE]

HostLauncher(record=FOLDER) writes the launches. Results must be the recorded ones, bit for bit.
Exits with 1 where they are not or a kernel does what it must not; a sanitizer ends the process with
its report and a code of its own. Imports neither torch nor NumPy, which start slowly under
ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import line_coverage
import recording
from host_build import SANITIZERS, Build, build, build_all, sanitizer_runtime
from host_memory import HostKernelError, Memory
from host_run import ORDERS, load

SANITIZER_OPTIONS = {
    # The leaks of Python itself are not of interest.
    "ASAN_OPTIONS": "detect_leaks=0",
    # Small buffers of Python have no bounds of their own otherwise.
    "PYTHONMALLOC": "malloc",
    # All races of a run are reported; the exit code tells that there was one.
    "TSAN_OPTIONS": "halt_on_error=0 exitcode=66 atexit_sleep_ms=0",
}
ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 when every launch gave again what was recorded."""
    options = _parser().parse_args(arguments)
    if not options.folder.is_dir():
        print(f"no folder {options.folder}", file=sys.stderr)
        return 2
    _preload(options.sanitizer)
    if options.coverage and not line_coverage.is_measured():
        command = [sys.executable, *sys.argv]
        return line_coverage.measure(command, options.coverage)
    build_all({record.build for record in _records(options)})
    results = [_replay(record, options) for record in _records(options)]
    failures = [result for result in results if result]
    print(*failures, f"{len(results)} launches, {len(failures)} wrong", sep="\n")
    return 1 if failures or not results else 0


def run(folder: Path, *options: str, timeout_s: float = 1200) -> subprocess.CompletedProcess[str]:
    """This program over `folder`, as a process of its own."""
    command = [sys.executable, __file__, str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Runs recorded launches of kernels again.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitizer", choices=SANITIZERS)
    parser.add_argument("--capability", type=int, help="only launches recorded for this one")
    parser.add_argument("--order", default="forward", help="forward, reverse, or a seed")
    parser.add_argument("--coverage", type=Path, help="write there how often each line ran")
    return parser


def _preload(sanitizer: str | None) -> None:
    """Starts this program anew with the library of `sanitizer`, unless it has it."""
    runtime = sanitizer_runtime(sanitizer) if sanitizer else None
    if runtime is None or os.environ.get("LD_PRELOAD") == str(runtime):
        return
    # ThreadSanitizer refuses the random addresses of newer kernels.
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    environment = {**SANITIZER_OPTIONS, **os.environ, "LD_PRELOAD": str(runtime)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def _records(options: argparse.Namespace) -> Iterator[recording.Record]:
    for record in recording.read_all(options.folder):
        if options.capability in (None, record.build.capability):
            yield replace(record, build=_rebuild(record.build, options))


def _rebuild(recorded: Build, options: argparse.Namespace) -> Build:
    return replace(recorded, sanitizer=options.sanitizer, coverage=options.coverage is not None)


def _replay(record: recording.Record, options: argparse.Namespace) -> str:
    """What went wrong, or nothing."""
    name = f"{record.file}: {record.launch.kernel} {record.launch.grid}"
    if options.sanitizer:
        print(f"--- {name}", file=sys.stderr, flush=True)  # whose report follows
    order = options.order if options.order in ORDERS else int(options.order)
    contents = [*record.before, *record.reached]
    held = [_Held(*piece) for piece in zip(contents, record.modulo_16, strict=True)]
    held, reached = held[: len(record.before)], held[len(record.before) :]
    for link in record.links:
        held[link.piece].put(link.offset, reached[link.target].memory.address + link.target_offset)
    try:
        memory = [piece.memory for piece in held]
        load(build(record.build)).run(record.launch, memory, order)
    except HostKernelError as error:
        return f"{name}: {error}"
    after = recording.without(record.links, recording.bytes_of(memory))
    wrong = [i for i, piece in enumerate(after) if piece != record.after[i]]
    return f"{name}: other results in pieces {wrong} of its memory" if wrong else ""


class _Held:
    """Bytes at an address that is `modulo_16` as asked for."""

    def __init__(self, content: bytes, modulo_16: int) -> None:
        self.buffer = ctypes.create_string_buffer(len(content) + 16)
        address = ctypes.addressof(self.buffer)
        address += (modulo_16 - address) % 16
        ctypes.memmove(address, content, len(content))
        self.memory = Memory(address, len(content))

    def put(self, offset: int, address: int) -> None:
        content = address.to_bytes(recording.ADDRESS_BYTES, sys.byteorder)
        ctypes.memmove(self.memory.address + offset, content, len(content))


if __name__ == "__main__":
    sys.exit(main())
