"""Models of the zoo with random weights: any of them, any size, any memory limit.

An encoder-decoder is timed as BMInf's published table measured CPM-2, and as text is generated; a
decoder as the tables of GLM-130B's authors have it. Fewer layers are said to be fewer, and nothing
is made more of them: beside what is measured stands what the simulated backend predicts for the
whole model on a card that need not be there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Group, Result, Sample, Settings, Variant, Work
from bminf.arch.registry import all_formats
from bminf.arch.t5 import T5, T5Config
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.cli.tables.document import plan_entries
from bminf.cli.tables.published import published
from bminf.cli.tables.tasks import (
    ANEW,
    ENCODER,
    LISTS,
    ONCE,
    Run,
    Task,
    decoder_pass,
    parse_task,
    shortened,
    t5_pass,
)
from bminf.errors import ArgumentError, BudgetError
from bminf.models import assemble
from bminf.models.source import Source, find_sizes
from bminf.offload.hooks import Scheduler
from bminf.offload.predict import predict
from bminf.units import parse_bytes

# ---- measured ------------------------------------------------------------------------------------


def measured(run: Run, settings: Settings) -> Iterator[list[Result]]:
    """A result for each task, as they come: loaded once, each is checked, warmed up, timed."""
    gc.collect()
    before, start_s = rss_anon_bytes(), time.perf_counter()
    with ExitStack() as stack:
        with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
            loaded = stack.enter_context(run.loaded())
        facts = {
            "load_s": time.perf_counter() - start_s,
            "loading_peak_rss_anon_bytes": peak.peak_bytes,
            "quantization": run.quantization,
            "head_quantization": run.head_quantization,
            **plan_entries(loaded[1].plan),
        }
        for task in run.tasks:
            name, opened = f"{run.name}: {task.name}", partial(_opened, task, *loaded)
            variant = Variant(name, opened, run.device == "cuda", held_bytes=before)
            (result,) = harness.measure([variant], settings)
            result["details"] = facts | result["details"]
            yield [result]


@contextmanager
def _opened(task: Task, network: Any, scheduler: Scheduler) -> Iterator[Work]:
    make = t5_pass if isinstance(network, T5) else decoder_pass
    before, digests, (one_pass, cache) = scheduler.stats(), list[str](), make(network, task)

    def run() -> str:
        """A digest of numbers, all of which are computed when this returns."""
        cache.reset()
        with torch.inference_mode():
            values = one_pass().float().cpu().contiguous()
        if not values.isfinite().all():
            raise ArithmeticError("the random model gives NaN or infinity; its times mean nothing")
        digests.append(hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return digests[-1]

    def details(samples: list[Sample]) -> dict[str, Any]:
        """The bound is what the streamed bytes take at the speed of the link."""
        after, streamed_bytes = scheduler.stats(), task.streamed_bytes(scheduler.plan)
        nbytes = after.bytes_copied - before.bytes_copied
        link = nbytes / (after.copied_s - before.copied_s) if nbytes else None
        step_s = statistics.fmean(sample["wall_s"] for sample in samples) / task.num_steps
        return {
            "task": task.kind,
            "length": task.length,
            "rows": task.rows,
            "steps": task.num_steps,
            "tokens": task.rows * task.length,
            "tokens_per_s": task.rows * task.length / (step_s * task.num_steps),
            "streamed_bytes_per_step": streamed_bytes,
            "copied_bytes_per_step": nbytes / (len(digests) * task.num_steps),
            "link_gbps": link and link / 1e9,
            "bound_s_per_step": link and streamed_bytes / link,
            "fraction_of_bound": link and streamed_bytes / link / step_s,
            "result_sha256": digests[-1],
        }

    yield Work(run, details)


# ---- predicted -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU. memory_limit: bytes.   link_bytes_per_s: from page-locked host memory to the card.
    memory_bytes_per_s: that the card reads of its own memory."""

    name: str
    memory_limit: int
    link_bytes_per_s: int
    memory_bytes_per_s: int


def predictions(run: Run, card: Card) -> Iterator[Result]:
    """The tasks of the zoo's generation, by the plan of `run` on that card.

    is_bound: that a step multiplies many rows, which takes time that bytes do not tell.
    Raises BudgetError for a card that is too small.
    """
    plan = run.planned(card.memory_limit)[1]
    facts = {
        "model": run.source.title,
        "quantization": run.quantization,
        "head_quantization": run.head_quantization,
        "card": asdict(card),
        "max_length": run.tasks[0].length,
        **plan_entries(plan),
    }
    is_t5 = isinstance(run.source.config, T5Config)
    known = published()["tokens_per_s"]
    steps = (Task(ENCODER, 256), Task(ANEW, 1), Task(ONCE, 1)) if is_t5 else (Task("decode", 1),)
    for step in steps:
        own = {"task": step.kind, "tokens": step.length}
        own["streamed_bytes_per_step"] = step.streamed_bytes(plan)
        lists = LISTS.get(step.kind)
        found = predict(plan, card.link_bytes_per_s, card.memory_bytes_per_s, lists)
        rates = {"tokens_per_s": step.length / found.pass_s, "bound": found.bound}
        speeds = known.get(run.source.title, {}).get(step.kind.partition(",")[0], {})
        yield {
            "name": f"{card.name} {run.formats}: {step.kind}",
            "details": facts | own,
            "prediction": asdict(found) | rates,
            "is_bound": step.kind in (ENCODER, ANEW),
            "published_tokens_per_s": speeds,
        }


# ---- the two cases -------------------------------------------------------------------------------

_TASKS_OF_T5 = ("encoder=256", "anew=256+255", "once=256+255")
# Texts of CoLA in the micro-batch of GLM-130B's authors, whose lengths are multiples of 32.
_TASKS = (
    "encode=512", "encode=1024", "encode=2048", "decode=128", "decode=512", "decode=1024",
    "decode=2048", "cola=30x32",
)  # fmt: skip
_LIMIT = "--memory-limit"


@dataclass(frozen=True)
class Case:
    """The model and the card by default, and how often all is run."""

    title: str
    card: Card
    warmup: int = Settings.warmup
    repeats: int = Settings.repeats

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options of this case."""
        add, kinds = parser.add_argument, [*all_formats(), "none"]
        add("--model", default=self.title, metavar="MODEL",
            help=f"a published one, or a folder; default: {self.title}")  # fmt: skip
        add("--layers", type=int, metavar="N", help="of each stack; default: all of the model")
        add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
        add(_LIMIT, nargs="+", metavar="SIZE", default=[None],
            help='one or more, such as "6GB"; default: 90%% of what is free')  # fmt: skip
        add("--quantization", nargs="+", choices=kinds, help="default: int4-row for a GLM, or int8")
        add("--head-quantization", choices=kinds, help="default: int8 for a GLM")
        add("--tasks", nargs="+", type=parse_task, metavar="TASK",
            help=f"default: {' '.join(_TASKS_OF_T5)} of an encoder-decoder, of others "
            f"{' '.join(_TASKS)}")  # fmt: skip
        add("--predict-only", action="store_true", help="measure nothing: this takes seconds")
        parser.set_defaults(threads=None, rounds=1, warmup=self.warmup, repeats=self.repeats)

    def prepare(
        self, arguments: argparse.Namespace
    ) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
        """The parameters of the run; the predictions, and then each model when its turn comes."""
        try:
            whole = find_sizes(arguments.model)
            runs = _runs(arguments, whole)
            for run in runs:
                run.planned(2**60 if run.limit is None else run.limit)
            # In full, as a GPU has it, and with room for 512 tokens.
            full = {"source": whole, "dtype": torch.float16, "device": "cuda"}
            full["tasks"] = (Task("decode", 512),)
            by_kind = {run.quantization: replace(run, **full) for run in runs}
            found = [one for run in by_kind.values() for one in predictions(run, self.card)]
        except (ArgumentError, BudgetError) as error:
            raise SystemExit(str(error)) from error
        parameters = {
            "model": runs[0].source.title,
            "config": asdict(runs[0].source.config),
            "memory_limit": arguments.memory_limit,
            "quantization": [*by_kind],
            "head_quantization": runs[0].head_quantization,
            "tasks": [asdict(task) for task in runs[0].tasks],
            "device": None if arguments.predict_only else runs[0].device,
            "dtype": str(runs[0].dtype).removeprefix("torch."),
        }
        later = [] if arguments.predict_only else [(r.name, partial(measured, r)) for r in runs]
        return parameters, [("predictions", lambda _: [found]), *later]


def _runs(arguments: argparse.Namespace, whole: Source) -> list[Run]:
    """Each kind of weights under each limit.   Raises ArgumentError."""
    source, is_t5 = shortened(whole, arguments.layers), isinstance(whole.config, T5Config)
    tasks = arguments.tasks or [*map(parse_task, _TASKS_OF_T5 if is_t5 else _TASKS)]
    if any((task.kind in LISTS) is not is_t5 for task in tasks):
        raise ArgumentError(f"--tasks: one of them is nothing that {whole.title} can do")
    assemble.max_length_for(max(task.length for task in tasks), source)
    is_cut = whole.architecture.split_head is not None
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    head = arguments.head_quantization or ("int8" if is_cut else "none")
    dtype, tasks = assemble.dtype_for(None, device), tuple(tasks)
    return [
        Run(source, dtype, kind, head, tasks, limit and parse_bytes(limit, _LIMIT), device)
        for kind in arguments.quantization or ["int4-row" if is_cut else "int8"]
        for limit in arguments.memory_limit
    ]


ZOO = Case(
    "CPM-2 (Chinese), CPM-2.1",
    # PCIe 3.0 x16 carries about 12 GB/s out of page-locked memory. The card's data sheet says 192
    # GB/s, of which about 150 can be had. Both are what `bminf plan` takes.
    Card("GTX 1060 6 GB", 6 * 10**9, 12 * 10**9, 150 * 10**9),
)
GLM = Case(
    "GLM-130B",
    # 90% of an RTX 3090's memory, whose data sheet says 936 GB/s; PCIe 4.0 x16 carries about 25
    # GB/s out of page-locked memory.
    Card("24 GB card", int(0.9 * 24 * 2**30), 25 * 10**9, 936 * 10**9),
    warmup=0,  # the run that is checked warms up; at full size each takes minutes
    repeats=1,
)
