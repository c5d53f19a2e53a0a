"""Short calls, measured by repeating them: a product on the CPU, a kernel on a GPU.

A call has several equal sets of inputs and takes them in turn, so many that no cache holds a set
when its turn comes again. Calls of one group are timed by turns, round after round, so that a
stretch of noise on the machine hits all of them and not one.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.harness import Settings, summary

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


@dataclass
class CallResult:
    """All that was measured of one call.

    samples_s: of each round, mean times of `calls_per_sample` calls in a row, by device events on a
    GPU and by the wall clock on the CPU.   error: relative, of the norm.   failure: why it was not
    measured, or None.
    """

    name: str
    details: dict[str, Any]
    samples_s: list[list[float]] = field(default_factory=list)
    calls_per_sample: int = 0
    error: float | None = None
    failure: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields, with what follows from the median beside the samples."""
        fields = asdict(self)
        if self.failure is not None or not self.samples_s:
            return fields | {"time_s": None, "gbps": None, "tops": None}
        time_s = self.time_s()
        rates = {"gbps": self.gbps(), "tops": self.details["num_ops"] / time_s["median"] / 1e12}
        return fields | {"time_s": time_s} | rates

    def time_s(self) -> dict[str, float]:
        return summary([time_s for times in self.samples_s for time_s in times])

    def gbps(self) -> float:
        rate: float = self.details["num_bytes"] / self.time_s()["median"] / 1e9
        return rate


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """|given - expected| / |expected| in float64; infinite where anything is NaN."""
    difference = given.double().sub_(expected.double()).norm()
    error = float(difference / expected.double().norm())
    return math.inf if math.isnan(error) else error


def num_sets(num_bytes: int, rotate_bytes: int) -> int:
    """Sets of inputs so that, between two uses of one, `rotate_bytes` of others are read."""
    return 1 + -(-rotate_bytes // max(1, num_bytes))


def measure_calls(
    calls: Sequence[Call], settings: Settings, device: torch.device
) -> list[CallResult]:
    """A result for each call. What fails, or is wrong, says so in its result and is not timed."""
    results = [_result(call) for call in calls]
    clocks: list[Callable[[], float]] = []
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for call, result in zip(calls, results, strict=True):
        with _noted(result), torch.no_grad():
            _check(call, result)
            clock = _HostClock(call) if pool is None else _DeviceClock(call, pool)
            result.calls_per_sample = clock.num_calls
            clocks.append(clock)
    timed = [result for result in results if result.failure is None]
    for _ in range(settings.rounds):
        for sample, result in zip(clocks, timed, strict=True):
            with _noted(result), torch.no_grad():
                for _ in range(settings.warmup):
                    sample()
                result.samples_s.append([_rounded(sample()) for _ in range(settings.repeats)])
    return results


def _rounded(time_s: float) -> float:
    """No clock here knows more digits, and a file has thousands of them."""
    return float(f"{time_s:.4g}")


def _result(call: Call) -> CallResult:
    counts = {"num_bytes": call.num_bytes, "num_ops": call.num_ops, "num_sets": call.num_sets}
    return CallResult(call.name, call.details | counts | {"bound": call.bound})


@contextmanager
def _noted(result: CallResult) -> Iterator[None]:
    """An error goes into the result: one broken kernel does not cost the numbers of the others."""
    try:
        yield
    except Exception as error:
        result.failure = f"{type(error).__name__}: {error}"


def _check(call: Call, result: CallResult) -> None:
    with poisoned():
        value = call.run(0)
    result.error = call.error(value)
    if not result.error <= call.bound:
        raise ArithmeticError(f"relative error {result.error:.3g}, at most {call.bound:.3g}")


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
        began = time.perf_counter()
        for _ in range(self.num_calls):
            self._run(self._set)
            self._set = (self._set + 1) % self._num_sets
        return (time.perf_counter() - began) / self.num_calls


class _DeviceClock:
    """A sample is one replay of a graph of many calls, by device events, over their number.

    In a graph the host's share of a launch, far longer than a small kernel, does not count.
    """

    def __init__(self, call: Call, pool: Any) -> None:
        self.num_calls = _graph_calls(call)
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
        self._began.record()
        self._graph.replay()
        self._ended.record()
        self._ended.synchronize()
        ms: float = self._began.elapsed_time(self._ended)
        return ms / 1e3 / self.num_calls


_streams: list[torch.cuda.Stream] = []


def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: torch keeps a workspace for each stream that a product ran on."""
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def _graph_calls(call: Call) -> int:
    """All sets, and those again until the graph takes about a millisecond."""
    shortest_s = max(call.num_bytes / _BYTES_PER_S, call.num_ops / _OPS_PER_S)
    wanted = min(_MOST_GRAPH_CALLS, math.ceil(_GRAPH_S / shortest_s))
    return call.num_sets * max(1, wanted // call.num_sets)
