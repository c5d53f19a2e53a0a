"""What this machine is, as it says itself: versions, processors, memory, and limits on them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bminf import __version__

_PACKAGES = ("torch", "cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "transformers", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")
_GROUPS = Path("/sys/fs/cgroup")
_CAP_IPC_LOCK = 1 << 14  # capabilities(7)


def versions() -> dict[str, str | None]:
    """By name; None for what is not installed, or does not say."""
    return {
        "bminf": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "driver": _driver(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver(file: Path = _DRIVER) -> str | None:
    """Of NVIDIA, where it is loaded (Linux)."""
    try:
        found = re.search(r"Kernel Module\s.*?(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def processors(root: Path = _GROUPS) -> dict[str, Any]:
    """Of the machine, those this process may run on, and how many of them its group leaves it; the
    threads of torch, and the instructions of the CPU kernels."""
    import bminf

    info = bminf.cpu_info()
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "name": _processor_name(),
        "number": os.cpu_count(),
        "usable": os.cpu_count() if usable is None else len(usable(0)),
        "container_limit": cpu_limit(root),
        "threads": info.num_threads,
        "level": info.level,
        "level_reason": info.reason,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_limit(root: Path) -> float | None:
    """Processors that the control group of this process may use; None where it has no limit.

    root: where control groups are mounted, /sys/fs/cgroup: version 2, or 1.
    """
    quota, _, period = _text(root / "cpu.max").partition(" ")
    if not quota:
        quota = _text(root / "cpu" / "cpu.cfs_quota_us")
        period = _text(root / "cpu" / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def memory(root: Path = _GROUPS) -> dict[str, Any]:
    """Bytes that are free to this process, that its container may have in all, and that it may lock
    into memory; None is no limit, or none that is known."""
    from bminf.offload.memory import free_bytes, limits_of_groups

    return {
        "free_bytes": free_bytes(),
        "container_limit_bytes": min(limits_of_groups(root), default=None),
        "lockable_bytes": _lockable_bytes(),
    }


def _lockable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """status: of the process; one that may lock anything, as those of root do, has no limit."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text(status), re.MULTILINE)
    if found is not None and int(found[1], 16) & _CAP_IPC_LOCK:
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def gpu() -> Mapping[str, Any] | None:
    """The first one that torch sees, None where there is none. Sizes in bytes."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "name": torch.cuda.get_device_name(0),
        "capability": f"{major}.{minor}",
        "free_bytes": free,
        "total_bytes": total,
    }
