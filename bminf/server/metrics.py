"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from bminf.engine.request import Request
from bminf.offload.phase import Phase
from bminf.server.texts import Texts

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Of one server, in a registry of its own: a process may have several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._replies = Counter(
            "bminf_requests", "Replies, by their status.", ["status"], registry=self.registry
        )
        self._prompt_tokens = Counter(
            "bminf_prompt_tokens", "Tokens of prompts read.", registry=self.registry
        )
        self._generated = Counter(
            "bminf_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self._first_token = Histogram(
            "bminf_time_to_first_token_seconds", "From the request to its first token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def count_reply(self, status: int) -> None:
        self._replies.labels(str(status)).inc()

    def count(self, request: Request) -> None:
        """A request that has ended."""
        if request.tokens or request.prompt_logprobs:
            self._prompt_tokens.inc(request.usage.prompt_tokens)
            self._generated.inc(request.usage.completion_tokens)
        if request.stats.first_token_s is not None:
            self._first_token.observe(request.stats.first_token_s)

    def watch(self, worker: Any) -> None:
        """worker: a Worker, whose numbers are read when they are asked for."""
        self.registry.register(_Read(worker))

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))


class _Read:
    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def describe(self) -> list[Any]:
        return []  # so that registering it reads nothing

    def collect(self) -> Iterator[Any]:
        worker = self._worker
        yield _gauge("bminf_requests_running", "Answers that have a row.", worker.num_running)
        yield _gauge("bminf_requests_waiting", "Answers without a row.", worker.num_waiting)
        if worker.texts is not None:
            yield from _of_model(worker.texts)


def _of_model(texts: Texts) -> Iterator[Any]:
    engine, plan = texts.engine.stats, texts.plan
    yield _counter("bminf_sweeps", "Passes over the weights.", engine.num_sweeps)
    yield _counter("bminf_sweep_seconds", "Time that they took.", engine.busy_s)
    yield _counter("bminf_sweep_rows", "Rows of all of them.", engine.num_rows)
    yield _gauge("bminf_rows_per_sweep", "On average.", engine.rows_per_sweep)
    yield _counter("bminf_bytes_copied", "For streamed blocks.", texts.stats.bytes_copied)
    yield from _of_phases({"prefill": engine.prefill, "decode": engine.decode})
    memory = GaugeMetricFamily("bminf_memory_bytes", "As planned.", labels=["kind"])
    sizes = {"resident": plan.resident_bytes, "slots": plan.slot_bytes,
             "reserved": plan.reserved_bytes, "limit": plan.budget}  # fmt: skip
    for kind, nbytes in sizes.items():
        memory.add_metric([kind], nbytes)
    yield memory


def _of_phases(phases: Mapping[str, Phase]) -> Iterator[Any]:
    """Of sweeps that read prompts, and of those that decoded: copying bound a phase where it waited
    for more than a tenth of its time."""
    seconds = CounterMetricFamily("bminf_phase_seconds", "In sweeps.", labels=["phase"])
    waited = CounterMetricFamily(
        "bminf_phase_waited_seconds", "Of these, for copies.", labels=["phase"]
    )
    for name, phase in phases.items():
        seconds.add_metric([name], phase.seconds)
        waited.add_metric([name], phase.waited_s)
    yield from (seconds, waited)


def _gauge(name: str, text: str, value: float) -> Any:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Any:
    return CounterMetricFamily(name, text, value=value)
