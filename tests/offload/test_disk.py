"""The file that streamed blobs wait in, and the thread that reads it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bminf.checkpoint.safetensors_file import read_safetensors, run_of, write_safetensors
from bminf.checkpoint.stored import InFile
from bminf.errors import CheckpointError, OffloadError
from bminf.layout import Layout, TensorSpec
from bminf.offload import disk, memory
from bminf.offload.disk import FileStore, Outcome, Reader, bytes_of

SOON_S = 60.0  # what is waited for takes milliseconds
SIZES = [5, 4096, 100_001, 64, 0]


def blob(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def check_round_trip(homes: FileStore) -> None:
    for number, nbytes in reversed(list(enumerate(SIZES))):
        homes.write(number, blob(nbytes, number))
    for number, nbytes in enumerate(SIZES):
        given = memory.allocate(nbytes)
        homes.read_into(number, given)
        assert torch.equal(given, blob(nbytes, number))


def test_blobs_come_back(tmp_path: Path) -> None:
    homes = FileStore(SIZES, tmp_path)
    check_round_trip(homes)
    homes.close()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_share_a_folder(tmp_path: Path) -> None:
    first, second = FileStore(SIZES, tmp_path), FileStore(SIZES, tmp_path)
    check_round_trip(first)
    second.write(1, blob(4096, 77))
    check_round_trip(first)


def test_systems_without_preadv_use_readinto(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy of the module, as it is where os has neither preadv nor posix_fallocate."""
    for name in ("preadv", "pwrite", "posix_fallocate", "RWF_NOWAIT"):
        monkeypatch.delattr(os, name, raising=False)  # or is missing anyway
    spec = importlib.util.spec_from_file_location("store_without_preadv", disk.__file__)
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, other)  # where dataclasses look for annotations
    spec.loader.exec_module(other)
    homes = other.FileStore(SIZES)
    check_round_trip(homes)
    assert not homes.read_cached(2, bytes_of(memory.allocate(SIZES[2])))


def test_a_mapped_blob_is_a_private_copy_and_outlives_the_store() -> None:
    homes = FileStore(SIZES)
    check_round_trip(homes)
    mapped = homes.map(2)
    mapped[:10] = 0
    given = memory.allocate(100_001)
    homes.read_into(2, given)
    assert torch.equal(given, blob(100_001, 2))
    homes.close()
    assert torch.equal(mapped[10:], blob(100_001, 2)[10:])
    check_round_trip(FileStore(SIZES))


def lying_in(path: Path, damaged: bool = False) -> dict[int, InFile]:
    """Blobs 1 and 2 of SIZES, in a file of ours.   damaged: a bit of blob 2 was changed."""
    layouts = {str(n): Layout.of({"x": TensorSpec((SIZES[n],), (1,), torch.uint8)}, False)
               for n in (1, 2)}  # fmt: skip
    write_safetensors(path, layouts, lambda n: [("x", blob(SIZES[int(n)], int(n)))], {})
    tensors = read_safetensors(path)
    runs = {int(n): run_of(tensors, n, layout) for n, layout in layouts.items()}
    if damaged:
        content = bytearray(path.read_bytes())
        content[runs[2].offset + 777] ^= 16
        path.write_bytes(content)
    return runs


def test_blobs_that_lie_in_a_file_are_read_there(tmp_path: Path) -> None:
    homes = FileStore(SIZES, tmp_path, lying_in(tmp_path / "model.safetensors"))
    assert [homes.is_lying(n) for n in range(len(SIZES))] == [False, True, True, False, False]
    given, room = memory.allocate(SIZES[2]), memory.allocate(SIZES[2])
    assert not homes.read_cached(2, bytes_of(room))  # which would compare nothing
    for _ in range(2):
        homes.read_into(2, given)
        assert torch.equal(given, blob(SIZES[2], 2))
    if hasattr(os, "RWF_NOWAIT"):
        assert homes.read_cached(2, bytes_of(room)) and torch.equal(room, given)
    assert torch.equal(homes.map(1), blob(SIZES[1], 1))
    (tmp_path / "model.safetensors").unlink()  # it is open
    homes.read_into(2, given.zero_())
    assert torch.equal(given, blob(SIZES[2], 2))


def test_what_is_written_to_leaves_the_file_where_it_lay(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    homes = FileStore(SIZES, tmp_path, lying_in(path))
    before = path.read_bytes()
    homes.write(2, torch.zeros(10, dtype=torch.uint8), 500)
    assert not homes.is_lying(2) and path.read_bytes() == before
    given, expected = memory.allocate(SIZES[2]), blob(SIZES[2], 2)
    expected[500:510] = 0
    homes.read_into(2, given)
    assert torch.equal(given, expected)
    check_round_trip(homes)
    assert path.read_bytes() == before


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    homes = FileStore(SIZES, tmp_path, lying_in(path))
    given = memory.allocate(SIZES[2])
    homes.read_into(2, given)
    os.truncate(path, 10)
    with pytest.raises(OffloadError, match=r"from .*model\.safetensors failed: .* shorter than it"):
        homes.read_into(2, given)


@pytest.mark.parametrize("use", ["read_into", "map", "write"])
def test_damage_is_found_by_the_first_use(use: str, tmp_path: Path) -> None:
    homes = FileStore(SIZES, tmp_path, lying_in(tmp_path / "model.safetensors", damaged=True))
    given = memory.allocate(SIZES[2])
    arguments = {"read_into": [given], "map": [], "write": [given[:3]]}[use]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            getattr(homes, use)(2, *arguments)


def test_unwritable_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file", Path("/proc/self")):
        with pytest.raises(OffloadError, match=r"offload_dir=\.\.\.") as caught:
            FileStore(SIZES, folder)
        assert str(folder) in str(caught.value)


def test_a_disk_without_room_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="are free there"):
        FileStore([10**18], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_quota_is_found_at_once(tmp_path: Path) -> None:
    """The disk has room, but the process may not use it: an own process, for the limit stays."""
    program = (
        "import resource, sys\n"
        "from bminf.errors import OffloadError\n"
        "from bminf.offload.disk import FileStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "FileStore([10**5], sys.argv[1])\n"
        "try:\n    FileStore([10**7], sys.argv[1])\n"
        "except OffloadError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "9.5 MiB of streamed blocks cannot be kept" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_is_an_error_not_wrong_bytes() -> None:
    homes = FileStore(SIZES)
    check_round_trip(homes)
    os.ftruncate(homes._descriptor, 5000)
    with pytest.raises(OffloadError, match="shorter"):
        homes.read_into(2, memory.allocate(SIZES[2]))


def test_a_closed_or_cut_file_is_not_read_as_cached() -> None:
    """What it is called from copies ahead, where no error is to be raised."""
    homes = FileStore(SIZES)
    check_round_trip(homes)
    blob_bytes = bytes_of(memory.allocate(SIZES[2]))
    os.ftruncate(homes._descriptor, 5000)
    assert not homes.read_cached(2, blob_bytes)
    homes.close()
    assert not homes.read_cached(2, blob_bytes)


def test_short_reads_and_writes_are_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call may move less than was asked: 2 GiB at most on Linux."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda f, parts, at: read(f, [parts[0][:1000]], at))
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: write(f, data[:700], at))
    check_round_trip(FileStore(SIZES, tmp_path))


def test_folders_in_memory_are_avoided_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "none / ext4 rw 0 0\nnone /tmp tmpfs rw 0 0\nnone /tmp/with\\040space xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: mounts)
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: "/tmp")
    assert disk._file_system(Path("/tmp/deep/er")) == "tmpfs"
    assert disk._file_system(Path("/tmp/with space/er")) == "xfs"
    assert disk.offload_folder(None) == Path("/var/tmp")
    with pytest.warns(UserWarning, match="lies in memory"):
        assert disk.offload_folder("/tmp") == Path("/tmp")
    assert disk.offload_folder("/home") == Path("/home")


# The reader


def test_a_job_is_waited_for_by_all_who_ask() -> None:
    reader, may_end = Reader("test-reader"), threading.Event()
    outcome = reader.submit(lambda: may_end.wait(SOON_S))
    with pytest.raises(TimeoutError):
        outcome.wait(0.001)
    assert not outcome.done()
    waiting = [threading.Thread(target=outcome.result, args=(SOON_S,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    may_end.set()
    for thread in waiting:
        thread.join(SOON_S)
    assert outcome.done() and not any(thread.is_alive() for thread in waiting)
    outcome.wait()
    reader.stop()
    reader.join()


def test_a_reader_is_idle_once_all_jobs_have_ended() -> None:
    reader, may_end = Reader("test-reader"), threading.Event()
    assert reader.is_idle()
    for job in (lambda: may_end.wait(SOON_S), lambda: None):
        outcome = reader.submit(job)
    assert not reader.is_idle()
    may_end.set()
    outcome.result(SOON_S)
    assert reader.is_idle()
    reader.stop()
    reader.join()


def test_a_reader_is_not_idle_where_handing_over_was_interrupted() -> None:
    """The job may have been put; whoever asks is not to do another one before it."""

    class Interrupted:
        def put(self, job: object) -> None:
            raise KeyboardInterrupt

    reader = Reader("test-reader")
    jobs, reader._jobs = reader._jobs, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        reader.submit(lambda: None)
    assert not reader.is_idle()
    reader._jobs = jobs
    reader.submit(lambda: None).result(SOON_S)
    assert reader.is_idle()
    reader.stop()
    reader.join()


def test_the_error_of_a_job_is_raised_each_time_it_is_asked_for() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    reader = Reader("test-reader")
    failed, after = reader.submit(fail), reader.submit(lambda: None)
    after.result(SOON_S)  # the thread goes on
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            failed.result()
    reader.stop()
    reader.join()


def test_a_wait_that_is_interrupted_leaves_nobody_waiting() -> None:
    """Between taking the lock and giving it back: whoever asks later must not wait for it."""

    class Interrupted:
        def acquire(self, timeout: float) -> bool:
            outcome.end()
            raise KeyboardInterrupt

        def release(self) -> None:
            """The job's, which has ended."""

    outcome = Outcome()
    outcome._in_progress = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        outcome.wait()
    outcome.result()
    assert outcome.done()
