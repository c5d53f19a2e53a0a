"""How everything here is measured: check first, warm up, repeat in rounds, keep every sample.

A variant is long work, such as a text: in each round it is opened, checked, warmed up, timed and
closed again. A call is short, such as a product: a sample is many of them in a row, through several
equal sets of inputs, so many that no cache holds a set when its turn comes again. Both are measured
by turns, so that a stretch of noise on the machine hits all and not one.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bminf
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload.plan import Plan
from bminf.progress import progress_bar

SCHEMA_VERSION = 1
PACKAGES = (
    "torch", "transformers", "accelerate", "numpy", "safetensors", "cupy-cuda12x", "cupy-cuda13x",
    "bitsandbytes", "torchao",
)  # fmt: skip

Result = dict[str, Any]
"""What the JSON file has of one variant, call or prediction: a name, details and numbers."""


@dataclass(frozen=True)
class Settings:
    """How often everything is done. `warmup` and `repeats` count runs, in each round."""

    warmup: int = 1
    repeats: int = 3
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.repeats < 1 or self.rounds < 1:
            raise ValueError(f"{self}: at least 0 warm-ups, 1 repeat and 1 round are needed")


Group = Callable[[Settings], Iterable[list[Result]]]
"""What is measured together: gives results as they come."""


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch on the CPU, its own number for None, and what it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most of `values`; spread: (most - least) / median."""
    least, median, most = min(values), statistics.median(values), max(values)
    spread = (most - least) / median if median else 0.0
    return {"min": least, "median": median, "max": most, "spread": spread}


# ---- variants ------------------------------------------------------------------------------------


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


def measure(variants: Sequence[Variant], settings: Settings) -> list[Result]:
    """A result for each variant; what the first variant gives is the reference of all.

    Raises WrongResultError for a variant whose result is not equal to the reference.
    """
    memory = ("peak_rss_anon_bytes", "peak_cuda_bytes")
    results: list[Result] = [
        {"name": variant.name, "samples": [], **dict.fromkeys(memory), "details": {}}
        for variant in variants
    ]
    reference: Any = None
    with progress_bar(total=settings.rounds * len(variants)) as bar:
        for index in range(settings.rounds):
            for variant, result in zip(variants, results, strict=True):
                bar.set_description(f"round {index + 1}, {variant.name}")
                value = _measure_round(variant, result, index, settings, reference)
                reference = value if reference is None else reference
                bar.update()
    for result in results:
        for name in ("wall_s", "cpu_s"):
            result[name] = summary([sample[name] for sample in result["samples"]])
    return results


def _measure_round(
    variant: Variant, result: Result, index: int, settings: Settings, reference: Any
) -> Any:
    """The variant's value, after it was checked; adds what was measured to `result`."""
    gc.collect()
    baseline_bytes = rss_anon_bytes()
    with variant.open() as work:
        value = _checked_run(variant, result, work, baseline_bytes, reference)
        for _ in range(settings.warmup):
            work.run()
        result["samples"] += [_timed_run(work, index) for _ in range(settings.repeats)]
        result["details"] |= work.details()
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
    for name, peak in (("peak_rss_anon_bytes", host), ("peak_cuda_bytes", device)):
        known = [number for number in (result[name], peak.peak_bytes) if number is not None]
        result[name] = max(known, default=None)
    return value


def _timed_run(work: Work, index: int) -> dict[str, float]:
    """cpu_s: of all threads of the process."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work.run()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return {"round": index, "wall_s": wall_s, "cpu_s": cpu_s}


# ---- calls ---------------------------------------------------------------------------------------

_LEAST_SAMPLE_S = 2e-3  # on the CPU: far above what a look at the clock costs
_GRAPH_S = 1e-3  # on a GPU: calls that take about so long together are captured into one graph
_MOST_GRAPH_CALLS = 256
_BYTES_PER_S, _OPS_PER_S = 3e12, 5e14  # of a large GPU, to guess how many calls those are


@dataclass(frozen=True)
class Call:
    """One way to do a piece of work.

    run: does it with set number i of the inputs, below `num_sets`; on a GPU it only queues it.
    error: of a result, the relative norm error; above `bound` the call is wrong and not timed.
    num_bytes: moved by one call if each input is read and each output written once.
    num_ops: multiplications and additions.   details: what else there is to know of the call.
    """

    name: str
    run: Callable[[int], Any]
    num_sets: int
    error: Callable[[Any], float]
    bound: float
    num_bytes: int
    num_ops: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def result(self) -> Result:
        """Before anything is measured."""
        counts = ("num_bytes", "num_ops", "num_sets", "bound")
        return {
            "name": self.name,
            "details": self.details | {name: getattr(self, name) for name in counts},
            "samples_s": [],
            **dict.fromkeys(("calls_per_sample", "error", "failure", "time_s", "gbps", "tops")),
        }


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """|given - expected| / |expected| in float64; infinite where anything is NaN."""
    difference = given.double().sub_(expected.double()).norm()
    error = float(difference / expected.double().norm())
    return math.inf if math.isnan(error) else error


def num_sets(num_bytes: int, rotate_bytes: int) -> int:
    """Sets of inputs so that, between two uses of one, `rotate_bytes` of others are read."""
    return 1 + -(-rotate_bytes // max(1, num_bytes))


def measure_calls(calls: Sequence[Call], settings: Settings, device: torch.device) -> list[Result]:
    """A result for each call. What fails, or is wrong, says so in its result and is not timed."""
    results = [call.result() for call in calls]
    clocks: list[_HostClock | _DeviceClock] = []
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for call, result in zip(calls, results, strict=True):
        with _noted(result), torch.no_grad():
            _check(call, result)
            clock = _HostClock(call) if pool is None else _DeviceClock(call, pool)
            result["calls_per_sample"] = clock.num_calls
            clocks.append(clock)
    timed = [result for result in results if result["failure"] is None]
    for _ in range(settings.rounds):
        for sample, result in zip(clocks, timed, strict=True):
            with _noted(result), torch.no_grad():
                for _ in range(settings.warmup):
                    sample()
                result["samples_s"].append([_rounded(sample()) for _ in range(settings.repeats)])
    for result in timed:
        _complete(result)
    return results


def _rounded(time_s: float) -> float:
    """No clock here knows more digits, and a file has thousands of them."""
    return float(f"{time_s:.4g}")


def _complete(result: Result) -> None:
    """What follows from the median, unless a sample failed."""
    if result["failure"] is None:
        details, samples_s = result["details"], result["samples_s"]
        result["time_s"] = summary([time_s for times in samples_s for time_s in times])
        result["gbps"] = details["num_bytes"] / result["time_s"]["median"] / 1e9
        result["tops"] = details["num_ops"] / result["time_s"]["median"] / 1e12


@contextmanager
def _noted(result: Result) -> Iterator[None]:
    """An error goes into the result: one broken kernel does not cost the numbers of the others."""
    try:
        yield
    except Exception as error:
        result["failure"] = f"{type(error).__name__}: {error}"


def _check(call: Call, result: Result) -> None:
    with poisoned():
        value = call.run(0)
    result["error"] = call.error(value)
    if not result["error"] <= call.bound:
        raise ArithmeticError(f"relative error {result['error']:.3g}, at most {call.bound:.3g}")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, or the largest integer: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # This mode is what makes torch fill them; it warns of operations that have no such form.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warns)


class _HostClock:
    """A sample is the wall time of as many calls as take 2 ms, over their number."""

    def __init__(self, call: Call) -> None:
        self._run, self._num_sets = call.run, call.num_sets
        self._set = 0
        self.num_calls = 1
        self.num_calls = max(1, math.ceil(_LEAST_SAMPLE_S / self()))

    def __call__(self) -> float:
        start_s = time.perf_counter()
        for _ in range(self.num_calls):
            self._run(self._set)
            self._set = (self._set + 1) % self._num_sets
        return (time.perf_counter() - start_s) / self.num_calls


class _DeviceClock:
    """A sample is one replay of a graph of many calls, by device events, over their number.

    In a graph the host's share of a launch, far longer than a small kernel, does not count.
    """

    def __init__(self, call: Call, pool: Any) -> None:
        self.num_calls = _graph_calls(call)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        gc.disable()  # a tensor that is collected during a capture would end it
        try:
            with torch.cuda.stream(stream):
                call.run(0)
                torch.cuda.synchronize()
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    for i in range(self.num_calls):
                        call.run(i % call.num_sets)
                finally:
                    self._graph.capture_end()
        finally:
            gc.enable()

    def __call__(self) -> float:
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        ms: float = self._start.elapsed_time(self._end)
        return ms / 1e3 / self.num_calls


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: torch keeps a workspace for each stream that a product ran on."""
    return torch.cuda.Stream()


def _graph_calls(call: Call) -> int:
    """All sets, and those again until the graph takes about a millisecond."""
    shortest_s = max(call.num_bytes / _BYTES_PER_S, call.num_ops / _OPS_PER_S)
    wanted = min(_MOST_GRAPH_CALLS, math.ceil(_GRAPH_S / shortest_s))
    return call.num_sets * max(1, wanted // call.num_sets)


# ---- the file ------------------------------------------------------------------------------------


def plan_entries(plan: Plan) -> dict[str, Any]:
    """The plan in numbers, for a JSON file."""
    names = ("reserved_bytes", "resident_bytes", "streamed_bytes")
    counts = ("resident", "streamed", "on_disk")
    return {
        "memory_limit": plan.budget,
        "planned_bytes": plan.total_bytes,
        **{name: getattr(plan, name) for name in names},
        **{name: len(getattr(plan, name)) for name in counts},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Under another name, which is then changed: `path` is whole at any moment."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
    os.replace(unfinished, path)


def document(case: str, parameters: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What the JSON file of a run holds, before its results."""
    return {
        "schema_version": SCHEMA_VERSION,
        "case": case,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Marked if files differ from the commit; None outside a repository.
        "commit": _output("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"),
        "versions": {
            "bminf": bminf.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "hardware": _hardware(),
        "parameters": parameters,
        "settings": asdict(settings),
        "results": [],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8", errors="replace") if cpu_info.is_file() else ""
    cpu = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    has_sysconf = hasattr(os, "sysconf")  # not on Windows
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_sysconf else None
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "ram_bytes": pages,
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _output(*command: str) -> str | None:
    """What `command` prints, run in the source tree; None if it fails or is not there."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
