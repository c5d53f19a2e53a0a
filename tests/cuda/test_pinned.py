"""Page-locked memory, over a runtime that locks nothing: whose it is, and what errors leave."""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bminf import pages
from bminf.cli.measure import rss_anon_bytes
from bminf.cuda import pinned
from bminf.cuda.pinned import PinnedMemory
from bminf.errors import OffloadError
from bminf.offload import memory

MIB = 2**20


class FakeRuntime:
    """CuPy's binding: a call that fails is raised, and asked for, so that no error is left."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.flags: list[int] = []
        self.most = 2**40

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:
        if sum(self.locked.values()) + nbytes > self.most:
            raise self.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.locked[address] = nbytes
        self.flags.append(flags)

    def hostUnregister(self, address: int) -> None:
        if address not in self.locked:
            raise self.CUDARuntimeError("cudaErrorHostMemoryNotRegistered")
        del self.locked[address]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """In CuPy's place; torch's own runtime, which would keep an error, may not be asked."""

    def refuse() -> Any:
        raise AssertionError("torch's runtime keeps the error of a call that fails")

    fake = FakeRuntime()
    monkeypatch.setattr(pinned, "_runtime", lambda: fake)
    monkeypatch.setattr(torch.cuda, "cudart", refuse)
    return fake


def mapping_of(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that holds `address`, by the name of the line."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        first, last = (int(part, 16) for part in lines[start].split()[0].split("-"))
        if first <= address < last:
            return {name: text for name, _, text in (x.partition(":") for x in lines[start:end])}
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, 2 * MIB, 5 * MIB + 1, 40 * MIB])
def test_it_is_anonymous_memory_of_exactly_its_size(runtime: FakeRuntime, nbytes: int) -> None:
    before = rss_anon_bytes()
    home = PinnedMemory(nbytes)
    after = rss_anon_bytes()  # before what is looked at below takes memory of its own
    assert home.tensor.shape == (nbytes,) and home.tensor.dtype == torch.uint8
    address = home.tensor.data_ptr()
    assert runtime.locked == {address: nbytes}
    mapping = mapping_of(address)
    whole_pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    for line in ("Rss", "Anonymous", "Size"):  # all of it, before a driver looks at it
        assert int(mapping[line].split()[0]) * 1024 == whole_pages, line
    assert before is not None and abs(after - before - whole_pages) < MIB
    flags = mapping["VmFlags"].split()
    assert "dc" in flags  # a fork does not get it
    assert ("hg" in flags) == (nbytes >= 2 * MIB)
    assert not memory.mapped_files()(address)
    home.close()
    assert runtime.locked == {} and "dc" not in mapping_of(address)["VmFlags"].split()


def test_every_gpu_may_copy_from_it(runtime: FakeRuntime) -> None:
    PinnedMemory(10)
    assert runtime.flags == [1]  # cudaHostRegisterPortable


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_a_refused_lock_is_told_once_and_leaves_nothing(runtime: FakeRuntime) -> None:
    runtime.most = 100 * MIB
    before = rss_anon_bytes()
    homes = [PinnedMemory(40 * MIB), PinnedMemory(40 * MIB)]
    with pytest.raises(OffloadError, match=r"40.0 MiB of host memory cannot be page-locked.*WSL"):
        PinnedMemory(40 * MIB)
    assert before is not None and abs(rss_anon_bytes() - before - 80 * MIB) < MIB
    assert len(runtime.locked) == 2
    for home in homes:
        home.close()
    assert PinnedMemory(90 * MIB).tensor.numel() == 90 * MIB


def test_memory_that_cannot_be_mapped_or_had_is_the_same_error(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OffloadError, match="cannot be page-locked"):
        PinnedMemory(2**62)

    def refuse(region: mmap.mmap) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned, "populate", refuse)
    with pytest.raises(OffloadError, match="Cannot allocate memory"):
        PinnedMemory(10)
    assert runtime.locked == {}


def test_closing_behind_an_error_that_ended_the_context_is_quiet(runtime: FakeRuntime) -> None:
    home = PinnedMemory(10)
    runtime.locked.clear()
    home.close()
    home.tensor.fill_(3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_can_let_go_of_it(runtime: FakeRuntime) -> None:
    """It has no such pages, and must not need them."""
    home = PinnedMemory(4 * MIB)
    child = os.fork()
    if child == 0:
        home.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    home.close()


def test_an_old_kernel_gets_its_pages_touched(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_POPULATE_WRITE", 12345)  # as one that does not know the number
    home = PinnedMemory(3 * MIB + 5)
    if Path("/proc/self/smaps").exists():
        resident = int(mapping_of(home.tensor.data_ptr())["Rss"].split()[0]) * 1024
        assert resident >= home.tensor.numel()
    assert not home.tensor.any()
    home.close()


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy", "cupy.cuda"):  # another test may have imported both
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OffloadError, match=r"pip install cupy-cuda12x"):
        PinnedMemory(10)
