"""What a file of measurements says beside its numbers: versions, commit, hardware, the plan."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bminf
from bminf.offload.plan import Plan

PACKAGES = (
    "torch", "transformers", "accelerate", "numpy", "safetensors", "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip

_ROOT = Path(bminf.__file__).resolve().parents[1]  # of a checkout


def plan_entries(plan: Plan) -> dict[str, Any]:
    """The plan in numbers, for a JSON file."""
    names = ("reserved_bytes", "resident_bytes", "streamed_bytes")
    entries = {"memory_limit": plan.budget, "planned_bytes": plan.total_bytes}
    entries |= {name: getattr(plan, name) for name in names}
    return entries | {
        name: len(getattr(plan, name)) for name in ("resident", "streamed", "on_disk")
    }


def document(
    case: str, parameters: dict[str, Any], settings: dict[str, Any], root: Path = _ROOT
) -> dict[str, Any]:
    """What the JSON file of a run holds, before its results.

    root: the checkout whose commit it names, if it is one.
    """
    versions = {"bminf": bminf.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "schema_version": 1,
        "case": case,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(root),
        "versions": versions
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "hardware": _hardware(),
        "parameters": parameters,
        "settings": settings,
        "results": [],
    }


def _hardware() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8", errors="replace") if cpu_info.is_file() else ""
    cpu = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    has_sysconf = hasattr(os, "sysconf")  # not on Windows
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_sysconf else None
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "ram_bytes": pages,
        "gpu": gpu
        and {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
    }


def _commit(root: Path) -> str | None:
    """Marked if files differ from it; None outside a repository of ours."""
    if not (root / ".git").exists():  # an environment may lie in somebody else's
        return None
    return _output("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*", at=root)


def _output(*command: str, at: Path | None = None) -> str | None:
    """What `command` prints, run in the folder `at`; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=at, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
