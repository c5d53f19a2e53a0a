"""bminf/cli/machine.py: what is measured is what other probes measure; files do not stay behind.

Times of the processor are compared, but for the disk, at which a process waits.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import other_probes
import pytest
import torch
from dispatched import dispatched

from bminf.cli import machine
from bminf.cli.gpus import Speeds, card_of, speeds_of

WITHIN = 0.4  # as much as machines of others' work vary; 0.2 on one of one's own


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with other_probes.written(tmp_path_factory.mktemp("probe")) as opened:
        yield opened


def is_near(ratio: float) -> bool:
    return 1 - WITHIN <= ratio <= 1 + WITHIN


def test_memory_is_as_fast_as_another_probe_finds() -> None:
    ratio = other_probes.alternating(
        lambda: machine.host_memory_speed(time.thread_time), other_probes.memory
    )
    assert is_near(ratio), ratio


def test_the_page_cache_is_as_fast_as_another_probe_finds(file: int) -> None:
    ratio = other_probes.alternating(
        lambda: machine._of_cpu(time.thread_time).link, lambda: other_probes.page_cache(file)
    )
    assert is_near(ratio), ratio


def test_the_disk_is_as_fast_as_another_probe_finds(file: int, tmp_path: Path) -> None:
    """Disks of virtual machines are given out in shares: three times may pass between two pairs."""
    ratios = []
    for _ in range(3):
        ratios.append(
            other_probes.alternating(
                lambda: machine.disk_speed(tmp_path) or 0.0, lambda: other_probes.disk(file)
            )
        )
        if is_near(ratios[-1]):
            return
    pytest.fail(f"{ratios}")


def test_nothing_of_the_file_is_cached_when_it_is_read(tmp_path: Path) -> None:
    """The system says that the first byte of each page would be waited for."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("the system does not tell")
    with machine.probe_file(tmp_path) as file:
        starts = range(0, machine._DISK_BYTES, 2**20)

        def is_cached(start: int) -> bool:
            try:
                return os.preadv(file.fileno(), [bytearray(1)], start, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

        assert all(map(is_cached, starts))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not any(map(is_cached, starts))


def test_the_file_has_no_name_while_it_is_there(tmp_path: Path) -> None:
    """So nothing of it stays, whether Ctrl-C or a kill ends the process."""
    with pytest.raises(KeyboardInterrupt), machine.probe_file(tmp_path) as file:
        assert os.fstat(file.fileno()).st_size == machine._DISK_BYTES
        assert list(tmp_path.iterdir()) == []
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and file.closed


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        machine.disk_speed(tmp_path / "nowhere")


def test_a_disk_that_fills_up_is_told_and_the_page_cache_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes a part of what is written, as Linux does, before it says that it is full."""
    plain = tempfile.TemporaryFile
    monkeypatch.setattr(machine.tempfile, "TemporaryFile", lambda **how: Full(plain(**how)))
    with pytest.raises(OSError, match="No space left"):
        machine.disk_speed(tmp_path)
    with machine._cached_file(memoryview(bytes(2 * Full.ROOM))) as file:
        assert os.fstat(file.fileno()).st_size == 2 * Full.ROOM


class Full:
    """A file on a disk with room for some bytes."""

    ROOM = 2**16

    def __init__(self, file: Any) -> None:
        self._file, self._room = file, self.ROOM

    def write(self, content: memoryview) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._file.write(content[: self._room])
        self._room -= written
        return written

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_system_that_cannot_empty_its_cache_measures_no_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    assert machine.disk_speed(tmp_path) is None


def test_a_slow_disk_is_read_for_a_second_at_most(tmp_path: Path) -> None:
    """A clock that goes on by a fifth of a second each time it is read: five pieces are."""
    now = iter(range(1000))
    with machine.probe_file(tmp_path) as file:
        speed = machine._cold_speed(file, lambda: next(now) / 5)
        num_read = file.tell()
    assert machine._PIECE_BYTES <= num_read <= 5 * machine._PIECE_BYTES
    assert speed < num_read  # it took more than a second


def test_the_clock_is_read_around_each_round_but_the_first() -> None:
    times, done = iter([0.0, 3.0, 10.0, 14.0, 20.0, 25.0, 30.0, 39.0, 40.0, 41.0]), []
    assert machine._median_s(lambda: done.append(1), lambda: next(times)) == 4
    assert len(done) == 6


def test_products_are_measured_for_each_way_to_store_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 2**18)
    monkeypatch.setattr(machine, "SHAPES", ((64, 96), (128, 128)))
    rates = machine.product_rates()
    plain = str(machine.plain_dtype()).removeprefix("torch.")
    assert [rate.form for rate in rates[::2]] == [plain, "float32", "int8", "int4"]
    assert [rate.weights for rate in rates] == 4 * [64 * 96, 128 * 128]
    assert min(rate.bytes_per_s for rate in rates) > 0


def test_calls_are_those_that_torch_dispatches() -> None:
    norm, x = machine.TinyNorm(), torch.ones(1, 1, 64)
    with torch.no_grad():
        assert dispatched(lambda: norm(x)) == norm.NUM_CALLS


def test_plans_are_made_with_the_same_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "speeds_of_machine", lambda: Speeds(1, 2))
    assert speeds_of("this") == card_of("this").speeds == Speeds(1, 2)
