"""One model in all that it is to do: loaded once, each part checked, warmed up and timed by the
harness."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, TypeVar

import torch

from benchmarks import harness
from benchmarks.card import plan_entries
from benchmarks.harness import Measured, Result, Settings, Variant
from benchmarks.model_options import Group
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.offload.hooks import Scheduler


class Opened(Protocol):
    """A model that can run."""

    @property
    def scheduler(self) -> Scheduler: ...


Model = TypeVar("Model", bound=Opened)

Facts = dict[str, Any]


def parts(
    opening: AbstractContextManager[Model],
    variants: Callable[[Model, Facts], Iterable[list[Variant]]],
    settings: Settings,
) -> Iterator[list[Result]]:
    """A result for each variant of a model, group by group as they are measured.

    variants: the model, and what was found while it was loaded -> what is to be done with it, in
    groups that have to give the same.
    """
    gc.collect()
    before, began = rss_anon_bytes(), time.perf_counter()
    with ExitStack() as stack:
        with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
            opened = stack.enter_context(opening)
        facts = {
            "load_s": time.perf_counter() - began,
            "loading_peak_rss_anon_bytes": peak.peak_bytes,
        } | plan_entries(opened.scheduler.plan)
        held = _difference(rss_anon_bytes(), before)
        for group in variants(opened, facts):
            results = harness.measure(group, settings)
            for result in results:
                _complete(result, held)
            yield results


def _complete(result: Result, held_bytes: int | None) -> None:
    """The speed, and the weights' memory: the harness sees what a run adds to them."""
    wall_s = statistics.fmean(sample.wall_s for sample in result.samples)
    result.details["tokens_per_s"] = result.details["tokens"] / wall_s
    if result.peak_rss_anon_bytes is not None and held_bytes is not None:
        result.peak_rss_anon_bytes += held_bytes


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


class Copies:
    """What is copied from now on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._before = scheduler, scheduler.stats()

    def details(self, num_steps: int) -> dict[str, float | None]:
        """What was copied in each of so many steps, and how fast."""
        after = self._scheduler.stats()
        nbytes = after.bytes_copied - self._before.bytes_copied
        seconds = after.copied_s - self._before.copied_s
        gbps = nbytes / seconds / 1e9 if nbytes and seconds else None
        return {"copied_bytes_per_step": nbytes / num_steps, "link_gbps": gbps}


def digest(x: torch.Tensor) -> str:
    """Of (..., n) numbers, all of which are computed when this returns."""
    values = x.float().cpu()
    if not values.isfinite().all():
        raise ArithmeticError(
            "the random model gives NaN or infinity; its times would mean nothing"
        )
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


class Run(Protocol):
    """A model that is measured when its turn comes."""

    @property
    def name(self) -> str: ...

    def parts(self, settings: Settings) -> Iterator[Sequence[Measured]]: ...


def groups(
    predicted: Sequence[Measured], runs: Sequence[Run], left_out: list[str], end: float
) -> Iterator[Group]:
    """The predictions, and then each model. `left_out` gets the names of all, and keeps those that
    would begin after `end`, a time of time.monotonic(), or that a stopped run does not come to."""
    left_out += [run.name for run in runs]
    return _in_time(predicted, runs, left_out, end)


def _in_time(
    predicted: Sequence[Measured], runs: Sequence[Run], left_out: list[str], end: float
) -> Iterator[Group]:
    yield lambda _: iter([predicted])
    for run in runs:
        if time.monotonic() <= end:
            yield run.parts
            left_out.remove(run.name)
