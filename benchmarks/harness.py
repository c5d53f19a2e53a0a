"""How everything here is measured: check first, warm up, repeat in rounds, keep every sample.

A case gives variants of one piece of work. In each round each variant is opened, checked, warmed
up, timed and closed again, so that a stretch of noise on the machine hits all and not one.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.progress import progress_bar

SCHEMA_VERSION = 1
PACKAGES = (
    "torch", "transformers", "accelerate", "numpy", "safetensors", "cupy-cuda12x", "cupy-cuda13x",
    "bitsandbytes", "torchao",
)  # fmt: skip


class WrongResultError(Exception):
    """A variant gives another result than the reference, so its time says nothing."""


@dataclass(frozen=True)
class Work:
    """An opened variant.

    run: does the work once and returns its result, all of it computed.
    details: what there is to know besides the times; asked once, after the last run.
    """

    run: Callable[[], Any]
    details: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Variant:
    """One way to do the work. open: builds it, and lets go of everything at the end.

    is_cuda: peak memory is the GPU's, besides that of the process.
    """

    name: str
    open: Callable[[], AbstractContextManager[Work]]
    is_cuda: bool = False


@dataclass(frozen=True)
class Settings:
    """How often everything is done. `warmup` and `repeats` count runs, in each round."""

    warmup: int = 1
    repeats: int = 3
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.repeats < 1 or self.rounds < 1:
            raise ValueError(f"{self}: at least 0 warm-ups, 1 repeat and 1 round are needed")


@dataclass(frozen=True)
class Sample:
    """One timed run. cpu_s: of all threads of the process."""

    round: int
    wall_s: float
    cpu_s: float


@dataclass
class Result:
    """All that was measured of one variant."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    peak_rss_anon_bytes: int | None = None
    peak_cuda_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields, with the summary of wall and CPU time beside the samples."""
        times = {
            name: summary([getattr(sample, name) for sample in self.samples])
            for name in ("wall_s", "cpu_s")
        }
        return asdict(self) | times


class Measured(Protocol):
    """A result of any kind: what it puts into the JSON file."""

    def as_json(self) -> dict[str, Any]: ...


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most of `values`; spread: (most - least) / median."""
    least, median, most = min(values), statistics.median(values), max(values)
    spread = (most - least) / median if median else 0.0
    return {"min": least, "median": median, "max": most, "spread": spread}


def measure(variants: Sequence[Variant], settings: Settings) -> list[Result]:
    """A result for each variant; the first variant's result is the reference of all.

    Raises WrongResultError for a variant whose result is not equal to the reference.
    """
    results = [Result(variant.name) for variant in variants]
    reference: Any = None
    with progress_bar(total=settings.rounds * len(variants)) as bar:
        for number in range(settings.rounds):
            for variant, result in zip(variants, results, strict=True):
                bar.set_description(f"round {number + 1}, {variant.name}")
                value = _measure_round(variant, result, number, settings, reference)
                reference = value if reference is None else reference
                bar.update()
    return results


def _measure_round(
    variant: Variant, result: Result, number: int, settings: Settings, reference: Any
) -> Any:
    """The variant's value, after it was checked; adds what was measured to `result`."""
    gc.collect()
    baseline_bytes = rss_anon_bytes()
    with variant.open() as work:
        value = _checked_run(variant, result, work, baseline_bytes, reference)
        for _ in range(settings.warmup):
            work.run()
        result.samples += [_timed_run(work, number) for _ in range(settings.repeats)]
        result.details |= work.details()
    return value


def _checked_run(
    variant: Variant, result: Result, work: Work, baseline_bytes: int | None, reference: Any
) -> Any:
    """One run under the eye of the memory meters, which would disturb a timed run."""
    with (
        PeakMemory(is_cuda=False, baseline_bytes=baseline_bytes) as host,
        PeakMemory(is_cuda=variant.is_cuda, baseline_bytes=None) as device,
    ):
        value = work.run()
    if reference is not None and value != reference:
        raise WrongResultError(
            f"{variant.name} gives {value!r}, the reference {reference!r}; nothing was timed"
        )
    result.peak_rss_anon_bytes = _most(result.peak_rss_anon_bytes, host.peak_bytes)
    result.peak_cuda_bytes = _most(result.peak_cuda_bytes, device.peak_bytes)
    return value


def _timed_run(work: Work, number: int) -> Sample:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work.run()
    return Sample(number, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _most(known: int | None, new: int | None) -> int | None:
    return max((value for value in (known, new) if value is not None), default=None)


def document(
    case: str, parameters: dict[str, Any], settings: Settings, results: Sequence[Measured]
) -> dict[str, Any]:
    """What goes into the JSON file of a run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "case": case,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": _versions(),
        "hardware": _hardware(),
        "parameters": parameters,
        "settings": asdict(settings),
        "results": [result.as_json() for result in results],
    }


def _commit() -> str | None:
    """The commit of the source tree, marked if files differ from it; None outside a repository."""
    return _output("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "bminf": bminf.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions | {"cuda": torch.version.cuda}


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": _ram_bytes(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return hardware


def _cpu_name() -> str:
    """The model's name from /proc/cpuinfo where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _output(*command: str) -> str | None:
    """What `command` prints, run in the source tree; None if it fails or is not there."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
