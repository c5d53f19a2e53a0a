"""bminf/cli/system.py: what files of a system say, and where there are none."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import bminf
from bminf.cli import system


def test_versions_are_those_that_run() -> None:
    found = system.versions()
    assert found["bminf"] == bminf.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert system._version("no-such-package") is None


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert system._driver(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    assert system._driver(file) == "535.104.05"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release\n")
    assert system._driver(file) == "570.86.10"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_processors_of_a_container(
    files: dict[str, str], limit: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert system.cpu_limit(tmp_path) == limit
    assert system.processors(tmp_path)["container_limit"] == limit


def test_processors_are_those_of_torch_and_of_the_kernels() -> None:
    found = system.processors()
    assert found["threads"] == torch.get_num_threads()
    assert found["level"] == bminf.cpu_info().level
    assert 1 <= found["usable"] <= found["number"] and found["name"]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "4294967296\n", "memory.high": "max\n"}, 2**32),
        ({"memory.max": "4294967296\n", "memory.high": "2147483648\n"}, 2**31),
        ({"memory/memory.limit_in_bytes": "1073741824\n"}, 2**30),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({"memory.max": "max\n"}, None),
    ],
)
def test_memory_of_a_container(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert system.memory(tmp_path)["container_limit_bytes"] == limit


def test_memory_that_may_be_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    status, privileged = tmp_path / "of a user", tmp_path / "of root"
    status.write_text("Name:\tpython\nCapEff:\t0000000000000400\nCapBnd:\t000001ffffffffff\n")
    privileged.write_text("Name:\tpython\nCapEff:\t000001ffffffffff\n")
    for soft, shown in ((65536, 65536), (resource.RLIM_INFINITY, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert system._lockable_bytes(status) == system._lockable_bytes(tmp_path / "none") == shown
        assert system._lockable_bytes(privileged) is None
    assert system.memory()["free_bytes"] > 0


def test_a_gpu_is_told_where_there_is_one() -> None:
    found = system.gpu()
    assert (found is not None) == torch.cuda.is_available()
    if found is not None:
        assert found["free_bytes"] <= found["total_bytes"]
