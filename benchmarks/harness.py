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
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import Any

import torch

from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.progress import progress_bar

Result = dict[str, Any]
"""What the JSON file has of one variant, call or prediction: a name, details and numbers."""
Sample = dict[str, float]
"""A timed run: `round`, `wall_s`, `cpu_s`."""


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
    details: what there is to know besides the times; asked once, of the timed runs.
    """

    run: Callable[[], Any]
    details: Callable[[list[Sample]], dict[str, Any]] = lambda samples: {}


@dataclass(frozen=True)
class Variant:
    """One way to do the work. open: builds it, and lets go of everything at the end.

    is_cuda: peak memory is the GPU's, besides that of the process.
    held_bytes: anonymous memory of the process before all of it; None is what it has before open.
    """

    name: str
    open: Callable[[], AbstractContextManager[Work]]
    is_cuda: bool = False
    held_bytes: int | None = None


def measure(variants: Sequence[Variant], settings: Settings) -> list[Result]:
    """A result for each variant; what the first variant gives is the reference of all.

    Raises WrongResultError for a variant whose result is not equal to the reference.
    """
    empty = {"peak_rss_anon_bytes": None, "peak_cuda_bytes": None}
    results: list[Result] = [
        {"name": variant.name, "samples": [], **empty, "details": {}} for variant in variants
    ]
    turns = [*product(range(settings.rounds), zip(variants, results, strict=True))]
    values: list[Any] = []
    for index, (variant, result) in progress_bar(turns, desc="measuring"):
        _measure_round(variant, result, index, settings, values)
    for result in results:
        for name in ("wall_s", "cpu_s"):
            result[name] = summary([sample[name] for sample in result["samples"]])
    return results


def _measure_round(
    variant: Variant, result: Result, index: int, settings: Settings, values: list[Any]
) -> None:
    """Adds to `result` what was measured, and to `values` what came out of the run that is checked.

    That one is under the eye of the memory meters, which would disturb a timed run.
    """
    gc.collect()
    before = rss_anon_bytes() if variant.held_bytes is None else variant.held_bytes
    with variant.open() as work:
        with PeakMemory(False, before) as host, PeakMemory(variant.is_cuda, None) as device:
            values.append(work.run())
        if values[-1] != values[0]:
            raise WrongResultError(
                f"{variant.name} gives {values[-1]!r}, the reference {values[0]!r}; not timed"
            )
        for name, peak in (("peak_rss_anon_bytes", host), ("peak_cuda_bytes", device)):
            if peak.peak_bytes is not None:
                result[name] = max(peak.peak_bytes, result[name] or 0)
        for _ in range(settings.warmup):
            work.run()
        samples = [_timed_run(work, index) for _ in range(settings.repeats)]
        result["samples"] += samples
        result["details"] |= work.details(samples)


def _timed_run(work: Work, index: int) -> Sample:
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

    run: does it with set number i of the inputs; on a GPU it only queues it.
    error: of a result, the relative norm error.
    details: `num_sets` of inputs, the `bound` above which an error makes the call wrong, so that it
    is not timed, `num_bytes` moved if each input is read and each output written once, `num_ops`
    (multiplications and additions), and what else there is to know.
    around: within it all this is done; on the CPU each sample, with no time of its own.
    """

    name: str
    run: Callable[[int], Any]
    error: Callable[[Any], float]
    details: dict[str, Any]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """|given - expected| / |expected| in float64; infinite where anything is NaN."""
    difference = given.double().sub_(expected.double()).norm()
    error = float(difference / expected.double().norm())
    return math.inf if math.isnan(error) else error


_SAMPLES = {"time_s": "samples_s", "cpu_s": "samples_cpu_s"}


def measure_calls(calls: Sequence[Call], settings: Settings, device: torch.device) -> list[Result]:
    """A result for each call. What fails, or is wrong, says so in its result and is not timed."""
    empty = dict.fromkeys(("calls_per_sample", "error", "failure", *_SAMPLES, "gbps", "tops"))
    results: list[Result] = [
        {"name": call.name, "details": call.details.copy(), "samples_s": [], "samples_cpu_s": []}
        | empty
        for call in calls
    ]
    clocks: list[_HostClock | _DeviceClock] = []
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for call, result in zip(calls, results, strict=True):
        with _noted(result):
            _check(call, result)
            clocks.append(_HostClock(call) if pool is None else _DeviceClock(call, pool))
            result["calls_per_sample"] = clocks[-1].num_calls
    timed = [result for result in results if result["failure"] is None]
    for _ in range(settings.rounds):
        for sample, result in zip(clocks, timed, strict=True):
            with _noted(result):
                for _ in range(settings.warmup):
                    sample()
                taken = [sample() for _ in range(settings.repeats)]
                for key, times in zip(_SAMPLES.values(), zip(*taken, strict=True), strict=False):
                    result[key].append([*times])
    for result in (result for result in timed if result["failure"] is None):
        for key, samples in _SAMPLES.items():
            if result[samples]:
                result[key] = summary([*chain.from_iterable(result[samples])])
        for rate, count, unit in (("gbps", "num_bytes", 1e9), ("tops", "num_ops", 1e12)):
            result[rate] = result["details"][count] / result["time_s"]["median"] / unit
    return results


@contextmanager
def _noted(result: Result) -> Iterator[None]:
    """An error goes into the result: one broken kernel does not cost the numbers of the others."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        result["failure"] = f"{type(error).__name__}: {error}"


def _check(call: Call, result: Result) -> None:
    with poisoned(), call.around():
        value = call.run(0)
    error, bound = call.error(value), call.details["bound"]
    result["error"] = error
    if not error <= bound:
        raise ArithmeticError(f"relative error {error:.3g}, at most {bound:.3g}")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, or the largest integer: what is not written shows."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # This mode is what makes torch fill them; it warns of operations that have no such form.
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


def _rounded(seconds: float) -> float:
    """No clock here knows more digits, and a file has thousands of them."""
    return float(f"{seconds:.4g}")


class _HostClock:
    """A sample is the time of as many calls as take 2 ms, over their number: on the wall, and of
    the CPU: of the process, or of this thread where it is the only one that computes. Those of
    OpenMP wait busily for some milliseconds after a call before it."""

    def __init__(self, call: Call) -> None:
        self._call, self._sets = call, cycle(range(call.details["num_sets"]))
        self.num_calls = 1
        shortest_s = min(self()[0], self()[0])  # the first one may find nothing ready
        self.num_calls = max(1, math.ceil(_LEAST_SAMPLE_S / shortest_s))

    def __call__(self) -> tuple[float, float]:
        run, is_alone = self._call.run, self._call.details.get("threads") == 1
        cpu_time = time.thread_time if is_alone else time.process_time
        with self._call.around():
            wall_s, cpu_s = time.perf_counter(), cpu_time()
            for index in islice(self._sets, self.num_calls):
                run(index)
            wall_s, cpu_s = time.perf_counter() - wall_s, cpu_time() - cpu_s
        return _rounded(wall_s / self.num_calls), _rounded(cpu_s / self.num_calls)


class _DeviceClock:
    """A sample is one replay of a graph of many calls, by device events, over their number.

    In a graph the host's share of a launch, far longer than a small kernel, does not count. It has
    all sets, and those again until it takes about a millisecond.
    """

    def __init__(self, call: Call, pool: Any) -> None:
        own, num_sets = call.details, call.details["num_sets"]
        shortest_s = max(own["num_bytes"] / _BYTES_PER_S, own["num_ops"] / _OPS_PER_S)
        wanted = min(_MOST_GRAPH_CALLS, math.ceil(_GRAPH_S / shortest_s))
        self.num_calls = num_sets * max(1, wanted // num_sets)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up for a stream is no part of a graph
            call.run(0)
        capture = torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local")
        gc.disable()  # a tensor that is collected during a capture would end it
        try:
            with capture:
                for i in range(self.num_calls):
                    call.run(i % num_sets)
        finally:
            gc.enable()

    def __call__(self) -> tuple[float]:
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        ms: float = self._start.elapsed_time(self._end)
        return (_rounded(ms / 1e3 / self.num_calls),)


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: torch keeps a workspace for each stream that a product ran on."""
    return torch.cuda.Stream()


# ---- the file ------------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Under another name, which is then changed: `path` is whole at any moment."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
    os.replace(unfinished, path)
