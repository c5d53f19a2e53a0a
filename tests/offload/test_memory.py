"""How much memory is free, in the control groups of the process: trees as the kernel shows them.

Buffers of exact sizes are those of test_pages.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bminf.offload import memory
from bminf.offload.memory import free_below_limits

MIB = 2**20


class Machine:
    """A /sys/fs/cgroup and a /proc/self in a folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.process = folder / "sys/fs/cgroup", folder / "proc"
        self.root.mkdir(parents=True)
        self.process.mkdir()
        self.mounts: list[str] = []

    def in_group(self, *lines: str) -> None:
        (self.process / "cgroup").write_text("\n".join(lines) + "\n")

    def mount(self, kind: str, below: str = "", top: str = "/", options: str = "rw") -> None:
        at = str(self.root / below).replace(" ", r"\040")
        self.mounts.append(f"31 23 0:28 {top} {at} rw,nosuid shared:9 - {kind} cgroup {options}\n")
        (self.process / "mountinfo").write_text("22 1 0:21 / /proc rw - proc proc rw\n")
        with open(self.process / "mountinfo", "a") as file:
            file.writelines(self.mounts)

    def group(self, path: str, limit: int | str, used: int, cached: int = 0, **more: int) -> None:
        """Of version 2, in MiB."""
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {"max": limit, "current": used, **more}
        for name, value in numbers.items():
            text = value if isinstance(value, str) else str(value * MIB)
            (folder / f"memory.{name}").write_text(f"{text}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached * MIB}\nslab 2\n")

    def old_group(self, path: str, limit: int, used: int, cached: int = 0) -> None:
        """Of version 1, in MiB."""
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit * MIB}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used * MIB}\n")
        (folder / "memory.stat").write_text(
            f"inactive_file 0\ntotal_inactive_file {cached * MIB}\n"
        )

    def free(self) -> list[float]:
        return [free / MIB for free in free_below_limits(self.root, self.process)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_service_has_what_its_own_group_leaves(machine: Machine) -> None:
    """systemd-run -p MemoryMax=...: the limit is far below the root, which has none."""
    machine.mount("cgroup2")
    machine.in_group("0::/system.slice/run-u5.service")
    (machine.root / "memory.stat").write_text("inactive_file 0\n")  # the root has no limit files
    machine.group("system.slice", "max", 3000)
    machine.group("system.slice/run-u5.service", 500, 200, cached=50)
    assert machine.free() == [350]


def test_every_group_up_to_the_root_bounds(machine: Machine) -> None:
    machine.mount("cgroup2")
    machine.in_group("0::/user.slice/user-1000.slice/session-3.scope")
    machine.group("user.slice", 4000, 3900)
    machine.group("user.slice/user-1000.slice", 1000, 400)
    machine.group("user.slice/user-1000.slice/session-3.scope", "max", 300)
    machine.group("user.slice/user-1001.slice", 10, 10)  # somebody else's
    assert sorted(machine.free()) == [100, 600]


def test_memory_high_bounds_too(machine: Machine) -> None:
    machine.mount("cgroup2")
    machine.in_group("0::/a")
    machine.group("a", 1000, 300, high=700)
    assert sorted(machine.free()) == [400, 700]
    machine.group("a", "max", 300, high=200)
    assert machine.free() == [0]


def test_a_container_with_a_namespace_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.mount("cgroup2")
    machine.in_group("0::/")
    machine.group("", 800, 100)
    assert machine.free() == [700]


def test_a_group_outside_of_what_is_mounted_leaves_the_mount(machine: Machine) -> None:
    """A process that was moved, or looks in from another namespace."""
    machine.mount("cgroup2")
    machine.in_group("0::/../other")
    machine.group("", 800, 100)
    machine.group("other", 10, 10)
    assert machine.free() == [700]


def test_a_container_without_a_namespace_has_its_group_mounted(machine: Machine) -> None:
    machine.mount("cgroup2", top="/docker/0a5e")
    machine.in_group("0::/docker/0a5e/inner")
    machine.group("", 800, 100)
    machine.group("inner", 500, 450)
    machine.group("docker/0a5e/inner", 10, 10)  # a container's own, that happens to be called so
    assert sorted(machine.free()) == [50, 700]


def test_version_1(machine: Machine) -> None:
    machine.mount("tmpfs")
    machine.mount("cgroup", "cpu", options="rw,cpu")
    machine.mount("cgroup", "memory", options="rw,memory")
    machine.mount("cgroup2", "unified")
    machine.in_group("4:memory:/batch/job 7", "3:cpu,cpuacct:/", "0::/batch")
    machine.old_group("memory", 2**43, 5000)
    machine.old_group("memory/batch", 2000, 1500, cached=100)
    machine.old_group("memory/batch/job 7", 900, 950, cached=150)
    (machine.root / "unified/batch").mkdir(parents=True)  # counts no memory
    assert sorted(machine.free())[:2] == [100, 600] and len(machine.free()) == 3


def test_version_1_in_a_container_without_a_namespace(machine: Machine) -> None:
    machine.mount("cgroup", "memory", top="/docker/0a5e", options="rw,memory")
    machine.in_group("4:memory:/docker/0a5e")
    machine.old_group("memory", 300, 100)
    assert machine.free() == [200]


def test_several_controllers_at_one_mount(machine: Machine) -> None:
    machine.mount("cgroup", "all of them", options="rw,cpu,memory")
    machine.in_group("4:cpu,memory:/a")
    machine.old_group("all of them/a", 300, 100)
    assert machine.free() == [200]


@pytest.mark.parametrize("lines", [[], ["nonsense"], ["0"], ["0::"], ["0::a"], [":::"]])
def test_a_process_that_does_not_tell_its_group(machine: Machine, lines: list[str]) -> None:
    machine.group("", 800, 100)
    machine.in_group(*lines)
    assert machine.free() == [700]
    machine.mount("cgroup2")
    assert machine.free() == [700]
    (machine.process / "mountinfo").write_text("short\n1 2 3 - cgroup2\n\n")
    assert machine.free() == [700]


def test_files_that_are_gone_or_odd_are_no_limits(machine: Machine) -> None:
    assert machine.free() == []
    machine.mount("cgroup2")
    machine.in_group("0::/gone/already")
    machine.group("", "odd", 100)
    assert machine.free() == []
    machine.group("", 800, 100)
    (machine.root / "memory.stat").unlink()
    assert machine.free() == [700]


def test_the_default_limit_follows_the_group(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.mount("cgroup2")
    machine.in_group("0::/a")
    machine.group("a", 500, 100)
    read = memory.free_below_limits
    monkeypatch.setattr(
        memory, "free_below_limits", lambda root: read(machine.root, machine.process)
    )
    assert memory.free_bytes() == 400 * MIB


def test_the_groups_of_this_process_are_read() -> None:
    assert 0 < memory.free_bytes() < 2**50


def test_mapped_files_are_told_from_anonymous_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * 8192)
    mapped = torch.from_file(str(path), size=8192, dtype=torch.uint8, shared=True)
    is_mapped = memory.mapped_files()
    assert is_mapped(mapped.data_ptr()) and is_mapped(mapped.data_ptr() + 8191)
    assert not is_mapped(memory.allocate(8192).data_ptr())
    assert not is_mapped(8)
