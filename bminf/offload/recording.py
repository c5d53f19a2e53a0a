"""Copies and computation of a model, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.keywords import known_keywords
from bminf.offload.hooks import ATTRIBUTE, Scheduler
from bminf.offload.trace import Span, Trace


class Recording:
    """A context manager; `trace` is what the model has done in its body.

    Blocks are timed where they are called as modules, those that are called otherwise are not. On a
    GPU the times are those of its streams. Recording makes a call of a block some microseconds
    slower.
    Raises ArgumentError for a model that bminf does not run, or that is closed; when it is entered,
    for one that is being recorded.
    """

    @known_keywords
    def __init__(self, model: Any) -> None:
        # One of the zoo holds its network.
        network = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
        scheduler = getattr(network, "__dict__", {}).get(ATTRIBUTE)
        if not isinstance(network, torch.nn.Module) or scheduler is None:
            raise ArgumentError(
                f"this {type(model).__name__} is not run by bminf; give what bminf.wrapper(), "
                "bminf.load() or a class of bminf.models has returned"
            )
        self.trace = Trace((), ())
        self._network, self._scheduler = network, scheduler
        self._names: list[str] = []  # of the backend's blobs
        self._began: Any = None
        self._computed: list[tuple[str, Any, Any]] = []
        self._open: list[Any] = []  # when the blocks that run now were called
        self._hooks = ExitStack()

    def __enter__(self) -> Recording:
        backend = self._scheduler.backend
        if backend.copy_log is not None:
            raise ArgumentError("this model is being recorded; leave the other Recording first")
        self._names, self._computed, self._open = [*_names(self._scheduler)], [], []
        with ExitStack() as hooks:
            for block in self._scheduler.plan.blocks:
                module = self._network.get_submodule(block.name)
                end = partial(self._end, block.name)
                hooks.callback(module.register_forward_pre_hook(self._begin).remove)
                hooks.callback(module.register_forward_hook(end, always_call=True).remove)
            backend.copy_log, self._began = [], backend.now()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.close()
        backend = self._scheduler.backend
        computed = [Span(name, *self._times(start, end)) for name, start, end in self._computed]
        backend.counters()  # which looks for copies that have ended, now that all was computed
        log, backend.copy_log = backend.copy_log or [], None
        copies = [Span(self._names[c.block], *self._times(c.start, c.end), c.slot) for c in log]
        self.trace = Trace(tuple(copies), tuple(_without_waits(computed, copies)))

    def _begin(self, module: torch.nn.Module, args: Any) -> None:
        self._open.append(self._scheduler.backend.now())

    def _end(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._computed.append((name, self._open.pop(), self._scheduler.backend.now()))

    def _times(self, start: Any, end: Any) -> tuple[float, float]:
        elapsed_s = self._scheduler.backend.elapsed_s
        return elapsed_s(self._began, start), elapsed_s(self._began, end)


def _names(scheduler: Scheduler) -> Iterator[str]:
    """Of the backend's blobs: blocks, and experts behind them."""
    yield from (block.name for block in scheduler.blocks)
    for experts in scheduler.experts:
        yield from (f"{experts.name}[{index}]" for index in range(len(experts.numbers)))


def _without_waits(computed: list[Span], copies: list[Span]) -> Iterator[Span]:
    """A streamed block is called, and then waits until its copy has ended."""
    for span in computed:
        ends = [copy.end_s for copy in copies if copy.name == span.name]
        arrived = max((end_s for end_s in ends if end_s < span.end_s), default=span.start_s)
        yield Span(span.name, max(span.start_s, arrived), span.end_s)
