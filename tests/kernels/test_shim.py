"""The checker is checked: it must see seeded bugs, and compute what a GPU computes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import pytest
import recording
import replay
import torch
from host_build import Build
from host_memory import HostKernelError, Memory, Pointer
from host_run import Launch, Library, load
from seeded_bugs import BLOCKS, BUGS, SHARED_BYTES, SOURCE, THREADS, UNSEEN, WRONG, Bug, N

ORDERS: tuple[str | int, ...] = ("forward", "reverse", 1, 2)
NAMES = tuple(bug.name for bug in BUGS)
BUG_IDS = [bug.name for bug in BUGS]


# ---- Seeded bugs ----


def build_of(is_buggy: bool, sanitizer: str | None = None) -> Build:
    return Build(SOURCE, NAMES, (("BUG", int(is_buggy)),), sanitizer=sanitizer)


@pytest.fixture(scope="module")
def libraries() -> dict[tuple[bool, str | None], Library]:
    """The kernels with and without their bugs; all other builds are made at the same time."""
    kinds = [(bug, sanitizer) for bug in (True, False) for sanitizer in (None, "undefined")]
    builds = [build_of(*kind) for kind in kinds]
    replayed = [build_of(bug, s) for bug in (True, False) for s in ("address", "thread")]
    paths = host_build.build_all([*builds, *replayed])
    return {kind: load(path) for kind, path in zip(kinds, paths, strict=False)}


def inputs() -> torch.Tensor:
    return torch.arange(1, N + 1, dtype=torch.float32)


def launch_of(bug: Bug) -> Launch:
    arguments = (Pointer(0), Pointer(1), N)
    return Launch(bug.name, (BLOCKS, 1, 1), (THREADS, 1, 1), arguments, SHARED_BYTES)


def memory_of(*tensors: torch.Tensor) -> list[Memory]:
    return [Memory(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


def run(library: Library, bug: Bug, order: str | int) -> torch.Tensor:
    x, y = inputs(), torch.full((N,), float("nan"))
    library.run(launch_of(bug), memory_of(x, y), order)
    return y


def is_right(library: Library, bug: Bug, order: str | int) -> bool:
    return torch.equal(run(library, bug, order), bug.expected(inputs()))


@pytest.mark.parametrize("bug", BUGS, ids=BUG_IDS)
def test_right_kernels_pass(libraries: dict[tuple[bool, str | None], Library], bug: Bug) -> None:
    for sanitizer in (None, "undefined"):
        assert all(is_right(libraries[False, sanitizer], bug, order) for order in ORDERS)


@pytest.mark.parametrize("bug", BUGS, ids=BUG_IDS)
def test_bugs_are_seen_without_a_sanitizer(
    libraries: dict[tuple[bool, str | None], Library], bug: Bug
) -> None:
    library = libraries[True, None]
    if bug.fast in (WRONG, UNSEEN):
        results = [is_right(library, bug, order) for order in ORDERS]
        assert all(results) == (bug.fast == UNSEEN), results
        return
    with pytest.raises(HostKernelError, match=bug.fast):
        run(library, bug, "forward")
    # The next launch finds nothing left of the last one.
    right = next(bug for bug in BUGS if bug.fast == UNSEEN)
    assert is_right(library, right, "forward")


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.undefined], ids=lambda bug: bug.name)
def test_bugs_are_seen_as_undefined_behaviour(
    libraries: dict[tuple[bool, str | None], Library], bug: Bug
) -> None:
    with pytest.raises(HostKernelError, match=bug.undefined):
        run(libraries[True, "undefined"], bug, "forward")


def record(folder: Path, bug: Bug, is_buggy: bool) -> None:
    """What a launch of `bug` should have given."""
    before = (inputs(), torch.full((N,), float("nan")))
    after = (inputs(), bug.expected(inputs()))
    held = [recording.bytes_of(memory_of(*tensors)) for tensors in (before, after)]
    build = build_of(is_buggy)
    recording.write(folder, recording.Record(bug.name, build, launch_of(bug), (0, 0), *held))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_pass_right_kernels(sanitizer: str, tmp_path: Path) -> None:
    for bug in BUGS:
        record(tmp_path, bug, is_buggy=False)
    done = replay.run(tmp_path, "--sanitizer", sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(BUGS)} launches, 0 wrong" in done.stdout


def test_thread_sanitizer_sees_races(tmp_path: Path) -> None:
    racy = [bug for bug in BUGS if bug.thread]
    for bug in racy:
        record(tmp_path, bug, is_buggy=True)
    done = replay.run(tmp_path, "--sanitizer", "thread")
    assert done.returncode == 66, done.stdout + done.stderr
    reports = re.split(r"^--- ", done.stderr, flags=re.MULTILINE)[1:]
    for bug, report in zip(racy, reports, strict=True):
        assert report.startswith(bug.name) and re.search(bug.thread, report), report
        assert re.search(rf"{bug.name}.cu:\d+", report), report


def test_address_sanitizer_names_the_line(tmp_path: Path) -> None:
    found = [bug for bug in BUGS if bug.address]

    def replayed(bug: Bug) -> str:
        record(tmp_path / bug.name, bug, is_buggy=True)
        done = replay.run(tmp_path / bug.name, "--sanitizer", "address")
        assert done.returncode != 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        for bug, report in zip(found, pool.map(replayed, found), strict=True):
            assert re.search(bug.address, report), report
            assert re.search(rf"{bug.name}.cu:\d+", report) and "thread (" in report, report
