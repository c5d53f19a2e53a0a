from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bminf.errors import OffloadError
from bminf.offload import disk, memory
from bminf.offload.disk import FileStore, bytes_of

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


def test_folders_in_memory_are_avoided_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "none / ext4 rw 0 0\nnone /tmp tmpfs rw 0 0\nnone /tmp/with\\040space xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: mounts)
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: "/tmp")
    assert disk._file_system(Path("/tmp/deep/er")) == "tmpfs"
    assert disk._file_system(Path("/tmp/with space/er")) == "xfs"
    assert disk._folder(None) == Path("/var/tmp")
    with pytest.warns(UserWarning, match="lies in memory"):
        assert disk._folder("/tmp") == Path("/tmp")
    assert disk._folder("/home") == Path("/home")


# Memory


def rss_anon() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_buffers_are_anonymous_exact_and_given_back_at_once() -> None:
    before = rss_anon()
    buffer = memory.allocate(30_000_001).fill_(1)
    assert buffer.numel() == 30_000_001 and buffer.data_ptr() % 4096 == 0
    assert 30e6 <= rss_anon() - before < 33e6
    del buffer
    assert rss_anon() - before < 2e6


def test_the_limit_of_a_container_counts_as_free_memory(tmp_path: Path) -> None:
    assert memory.free_below_limits(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory.free_below_limits(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_below_limits(tmp_path) == [450]
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("950\n")
    (old / "memory.stat").write_text("total_inactive_file 0\n")
    assert memory.free_below_limits(tmp_path) == [450, 0]
    assert 0 < memory.free_bytes() < 2**50


def test_mapped_files_are_told_from_anonymous_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * 8192)
    mapped = torch.from_file(str(path), size=8192, dtype=torch.uint8, shared=True)
    is_mapped = memory.mapped_files()
    assert is_mapped(mapped.data_ptr()) and is_mapped(mapped.data_ptr() + 8191)
    assert not is_mapped(memory.allocate(8192).data_ptr())
    assert not is_mapped(8)
