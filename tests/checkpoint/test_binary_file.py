"""A file is opened once, kept open while it is needed, and read by threads and forked processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_files import read_all
from tiny_zoo import bminf1_bytes, save

from bminf.checkpoint import binary_file
from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.bminf1_file import read_bminf1
from bminf.checkpoint.checksum import Span, checksum
from bminf.checkpoint.safetensors_file import read_safetensors
from bminf.checkpoint.torch_file import read_torch_file
from bminf.errors import CheckpointError

WEIGHTS = {f"w{n}": torch.full((3, 5), float(n), dtype=torch.float16) for n in range(20)}
FORMATS: dict[str, tuple[Callable[[Path], object], Callable[[Path], Any]]] = {
    "zip": (lambda path: save(WEIGHTS, path, "zip"), read_torch_file),
    "old": (lambda path: save(WEIGHTS, path, "old"), read_torch_file),
    "safetensors": (lambda path: safetensors.torch.save_file(WEIGHTS, path), read_safetensors),
    "bminf1": (lambda path: path.write_bytes(bminf1_bytes(WEIGHTS)), read_bminf1),
}
OPENED: list[str] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(note)  # it cannot be taken off again


def opens_of(path: Path) -> int:
    return OPENED.count(str(path))


def is_open(path: Path) -> bool:
    links = Path("/proc/self/fd").iterdir()
    return str(path) in [os.readlink(link) for link in links if link.is_symlink()]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_opened_once_and_closed_with_its_last_tensor(form: str, tmp_path: Path) -> None:
    path, (write, read) = tmp_path / "a.pt", FORMATS[form]
    write(path)
    before = opens_of(path)
    found = read(path)
    read_all(found)
    assert all(torch.equal(found[name].read(), WEIGHTS[name]) for name in WEIGHTS)
    assert opens_of(path) == before + 1
    last = found["w7"].rows(1, 2)
    del found
    assert is_open(path)
    assert last.read().tolist() == [[7] * 5]
    del last
    assert not is_open(path)


def test_a_file_that_is_taken_away_after_it_was_opened_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    found = read_safetensors(path)
    path.unlink()
    assert torch.equal(found["w3"].read(), WEIGHTS["w3"])


def test_few_of_many_files_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary_file, "_MAX_OPEN", 3)
    paths = [tmp_path / f"{n}" for n in range(10)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n]) * 4)
    files = [BinaryFile(path) for path in paths]
    for _ in range(2):
        assert [file.at(1, 2, "two bytes") for file in files] == [bytes([n, n]) for n in range(10)]
        assert [is_open(path) for path in paths] == [False] * 7 + [True] * 3
    os.truncate(paths[0], 2)
    with pytest.raises(CheckpointError, match="two bytes should lie at bytes 1 to 3"):
        files[0].at(1, 2, "two bytes")
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        files[1].at(1, 2, "two bytes")


def test_threads_read_many_files_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary_file, "_MAX_OPEN", 2)
    files = []
    for n in range(8):
        (tmp_path / f"{n}").write_bytes(bytes([n]) * 100)
        files.append(BinaryFile(tmp_path / f"{n}"))

    def read(k: int) -> bool:
        return files[k % 8].at(k % 90, 10, "ten bytes") == bytes([k % 8]) * 10

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(4000)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    found = read_safetensors(path)

    def read_one() -> None:
        os._exit(found["w1"].read().tolist() == [[1] * 5] * 3)

    child = multiprocessing.get_context("fork").Process(target=read_one)
    child.start()
    child.join()
    assert child.exitcode == 1
    assert torch.equal(found["w2"].read(), WEIGHTS["w2"])


def test_a_pickled_file_still_expects_its_checksums(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    file = BinaryFile(tmp_path / "a")
    file.expect([Span(10, 20, checksum(torch.zeros(10, dtype=torch.uint8))), Span(50, 90, "other")])
    for one in (file, pickle.loads(pickle.dumps(file))):
        assert one.mapped(0, 50, "what is as it was").sum() == 0
        with pytest.raises(CheckpointError, match="between bytes 50 and 90, where this lies, some"):
            one.mapped(49, 2, "this")
        assert one.mapped(90, 10, "what has no checksum").sum() == 0


def test_a_pickled_tensor_opens_its_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    pickled = pickle.dumps(read_safetensors(path)["w1"])
    assert not is_open(path)
    assert torch.equal(pickle.loads(pickled).read(), WEIGHTS["w1"])


@pytest.mark.parametrize("has_preadv", [True, False])
def test_bytes_are_read_straight_into_a_buffer(
    has_preadv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_preadv:
        monkeypatch.delattr(os, "preadv")
    (tmp_path / "file").write_bytes(bytes(range(200)))
    file, buffer = BinaryFile(tmp_path / "file"), torch.zeros(60, dtype=torch.uint8)
    file.read_into(130, buffer[:50], "some bytes")
    assert buffer.tolist() == [*range(130, 180), *[0] * 10]
    file.read_into(200, buffer[:0], "no bytes")
    with pytest.raises(CheckpointError, match="some bytes should lie at bytes 150 to 210, but"):
        file.read_into(150, buffer, "some bytes")


def test_short_reads_go_on_and_those_that_fail_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    file, buffer, whole = BinaryFile(tmp_path / "file"), torch.zeros(200).byte(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, start: whole(fd, [to[0][:7]], start))
    file.read_into(0, buffer, "all bytes")
    assert buffer.tolist() == list(range(200))

    def failing(*_: object) -> int:
        raise OSError("the disk is gone")

    for answer, words in (
        (failing, "all bytes cannot be read: the disk"),
        (lambda *_: 0, "trunca"),
    ):
        monkeypatch.setattr(os, "preadv", answer)
        with pytest.raises(CheckpointError, match=words):
            file.read_into(0, buffer, "all bytes")
