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
from bminf.scheduler.hooks import Scheduler


class Opened(Protocol):
    """A model that can run."""

    @property
    def scheduler(self) -> Scheduler: ...


Model = TypeVar("Model", bound=Opened)

Facts = dict[str, Any]


def measure(
    opening: AbstractContextManager[Model],
    variants: Callable[[Model, Facts], Iterable[list[Variant]]],
    settings: Settings,
) -> list[Result]:
    """A result for each variant of a model.

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
        held = rss_anon_bytes()
        groups = variants(opened, facts)
        results = [result for group in groups for result in harness.measure(group, settings)]
    for result in results:
        wall_s = statistics.fmean(sample.wall_s for sample in result.samples)
        result.details["tokens_per_s"] = result.details["tokens"] / wall_s
        # The harness sees what a run adds to the weights, which were there before it.
        if result.peak_rss_anon_bytes is not None and held is not None and before is not None:
            result.peak_rss_anon_bytes += held - before
    return results


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

    def measure(self, settings: Settings) -> Sequence[Measured]: ...


def groups(
    predicted: Sequence[Measured], runs: Sequence[Run], left_out: list[str], end: float
) -> Iterator[Group]:
    """The predictions, and then each model; the names of those that would begin after `end`, a time
    of time.monotonic(), go to `left_out`."""
    yield lambda _: predicted
    for run in runs:
        if time.monotonic() > end:
            left_out.append(run.name)
        else:
            yield run.measure
