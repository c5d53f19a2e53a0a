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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Group, Result, Sample, Settings, Variant, Work, plan_entries
from benchmarks.report import read_result
from bminf.arch.glm import GLM as GLMNetwork
from bminf.arch.registry import all_formats
from bminf.arch.t5 import T5, T5Config
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.errors import ArgumentError, BudgetError
from bminf.models import assemble
from bminf.models.assemble import Assembly, Formats
from bminf.models.fill import fill
from bminf.models.glm_text import blank, pack_choices, position_tensor
from bminf.models.random_weights import random_weights
from bminf.models.source import Source, find_sizes
from bminf.offload.backends import backend_for, free_budget, host_budget
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.offload.predict import predict
from bminf.quantization.packed import parse_format
from bminf.units import format_bytes, parse_bytes

# ---- what a model does ---------------------------------------------------------------------------

_ID = 1  # of all tokens that are read, as in the benchmark of GLM-130B's authors
ENCODER, ANEW, ONCE = "encoder", "decoder, projections anew", "decoder, projections once"
LISTS = {
    ENCODER: ("encoder.layers",),
    ANEW: ("cross_projections.layers", "decoder.layers"),
    ONCE: ("decoder.layers",),
}
"""The blocks that one step of a task of an encoder-decoder goes through, in order."""
_KINDS = {"encoder": ENCODER, "anew": ANEW, "once": ONCE}
_KINDS |= {kind: kind for kind in ("encode", "decode", "cola")}


@dataclass(frozen=True)
class Task:
    """What is timed.

    kind: of an encoder-decoder ENCODER, which reads `length` tokens, and ANEW or ONCE, which take
    `length` steps, a token each, after a prompt of `prompt` tokens, with its keys and values
    projected once more in each step, or not. Nothing is embedded, scored or drawn.
    Of a decoder "encode" reads `length` tokens in one pass, of a GLM with half of the cells of the
    mask hidden, and scores what comes next; "decode" writes `length` tokens, a pass each, from an
    empty text on, the likeliest each time; "cola" reads texts of `length` tokens in one pass, each
    with its blank and two choices for it, and scores the choices.   rows: texts at once.
    """

    kind: str
    length: int
    rows: int = 1
    prompt: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length if self.rows == 1 else f'{self.rows} x {self.length}'}"

    @property
    def num_steps(self) -> int:
        return self.length if self.kind in (ANEW, ONCE, "decode") else 1

    def streamed_bytes(self, plan: Plan) -> int:
        """That come over the link in one step."""
        streamed, lists = set(plan.streamed), LISTS.get(self.kind)
        blocks = [block for block in plan.blocks if block.name in streamed]
        return sum(block.nbytes for block in blocks if lists is None or block.list_name in lists)


def parse_task(text: str) -> Task:
    """encoder=N, anew=PROMPT+N, once=PROMPT+N, encode=N, decode=N or cola=ROWSxN; N is the length.

    Raises ValueError.
    """
    kind, _, sizes = text.partition("=")
    *prompt, sizes = sizes.split("+")
    *rows, length = sizes.split("x")
    task = Task(_KINDS.get(kind, ""), int(length), *map(int, rows or [1]), *map(int, prompt or [1]))
    least = 2 if kind == "cola" else 1  # a text has its blank and one more token
    if not task.kind or task.length < least or min(task.rows, task.prompt) < 1:
        raise ValueError(text)
    return task


_Pass = Callable[[], torch.Tensor]


def _t5_pass(network: T5, task: Task) -> tuple[_Pass, Any]:
    """What does a task of an encoder-decoder, and the cache for it. What it reads is made here,
    which is not timed; the same hidden state goes into the decoder at each step."""
    generator = torch.Generator().manual_seed(0)
    cache = network.new_cache(1, task.prompt, task.length)

    def hidden(num_tokens: int) -> torch.Tensor:
        x = torch.randn(1, num_tokens, network.config.hidden_size, generator=generator)
        return x.to(network.embed_tokens.weight)

    x, encoded = hidden(task.length if task.kind == ENCODER else 1), hidden(task.prompt)

    def decode() -> torch.Tensor:
        y = x
        for step in range(task.length):
            if step == 0 or task.kind == ANEW:
                cache.cross.reset()
                network.cross_projections(encoded, cache.cross)
            y = network.decoder(x, cache)
        return y[:, -1]

    return (lambda: network.encoder(x)[:, -1]) if task.kind == ENCODER else decode, cache


def _decoder_pass(network: Any, task: Task) -> tuple[_Pass, Any]:
    """As _t5_pass(), of the others. The positions and what is hidden are a GLM's."""
    cache, num_tokens, at = network.new_cache(task.rows, task.length), task.length, [-1]
    generator, device = torch.Generator().manual_seed(0), cache.keys.device
    row, positions = [_ID] * num_tokens, [(i, 0) for i in range(num_tokens)]
    is_hidden = torch.rand(num_tokens, num_tokens, generator=generator) < 0.5
    if task.kind == "cola":
        one = blank(row[1:], num_tokens - 2, _ID, is_continued=False)
        row, positions, is_hidden, (at, _) = pack_choices(one, [[0], [_ID]])
    ids, is_hidden = torch.tensor([row] * task.rows).to(device), is_hidden[None].to(device)
    places = None
    if isinstance(network, GLMNetwork):
        own = position_tensor([positions] * task.rows, not network.config.is_rotary)
        places = own.to(device)

    def read(ids: torch.Tensor, part: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        if places is None:
            return network(ids, cache)
        return network(ids, places[..., part], cache, hidden)

    def decode() -> torch.Tensor:
        """The logits of the last token."""
        token, logits = ids[:, :1], torch.empty(0)
        for i in range(num_tokens):
            logits = network.head(read(token, slice(i, i + 1), None)[:, -1])
            token = logits.argmax(-1, keepdim=True)
        return logits

    def encode() -> torch.Tensor:
        """The logits of the last token, or (rows, 2): the log-probability of each choice."""
        logits = network.head(read(ids, slice(None), is_hidden)[:, at[0]])
        return logits.log_softmax(-1)[:, :2] if task.kind == "cola" else logits

    return decode if task.kind == "decode" else encode, cache


# ---- measured ------------------------------------------------------------------------------------

_RESERVED_LENGTH = 512  # tokens of prompt and answer each of an encoder-decoder, or more


@dataclass(frozen=True)
class Run:
    """A model and what it is to do.

    source: its architecture and sizes.   dtype: of what is not packed.   quantization,
    head_quantization: by the names of the architecture's formats; "none" is not packed.
    tasks: memory is reserved for one of them at a time.
    limit: bytes; None is 90% of what is free on `device`, "cpu" or "cuda".
    offload_dir: for streamed blocks in a file.
    """

    source: Source
    dtype: torch.dtype
    quantization: str
    head_quantization: str
    tasks: tuple[Task, ...]
    limit: int | None = None
    device: str = "cpu"
    offload_dir: Path | None = None

    @property
    def formats(self) -> str:
        """For names."""
        is_cut = self.source.architecture.split_head is not None
        return f"{self.quantization}{f', head {self.head_quantization}' if is_cut else ''}"

    @property
    def name(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        return f"{self.device} {self.formats}, {limit}"

    def planned(self, limit: int, host_bytes: int | None = None) -> tuple[Assembly, Plan]:
        """The network on the meta device, and what stays within `limit` bytes, as in the zoo.

        host_bytes: of host memory for streamed blocks; None is as much as it takes.
        Raises ArgumentError or BudgetError, with numbers.
        """
        known = self.source.architecture.formats
        layers, head = (
            None if name == "none" else parse_format(name, formats=known)
            for name in (self.quantization, self.head_quantization)
        )
        made = assemble.assemble(find_sizes(self.source), Formats(layers, head), self.dtype)
        least = _RESERVED_LENGTH if isinstance(made.network, T5) else 1
        length, rows = max(
            ((max(task.length, task.prompt, least), task.rows) for task in self.tasks),
            key=lambda size: assemble.reserved_bytes(made, *size, self.device),
        )
        return made, assemble.plan_within(made, limit, length, rows, self.device, host_bytes)

    @contextmanager
    def loaded(self) -> Iterator[tuple[Any, Scheduler]]:
        """The network with random weights, streaming as planned; let go of at the end."""
        backend = backend_for(self.device)
        limit = free_budget(backend.device) if self.limit is None else self.limit
        made, plan = self.planned(limit, host_budget(backend.device))
        source = replace(made.source, weights=random_weights(made.network))
        scheduler = fill(replace(made, source=source), plan, backend, self.offload_dir)
        try:
            yield made.network, scheduler
        finally:
            scheduler.uninstall()
            backend.close()

    def measure(self, settings: Settings) -> Iterator[list[Result]]:
        """A result for each task, as they come: loaded once, each is checked, warmed up, timed."""
        gc.collect()
        before, start_s = rss_anon_bytes(), time.perf_counter()
        with ExitStack() as stack:
            with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
                loaded = stack.enter_context(self.loaded())
            facts = {
                "load_s": time.perf_counter() - start_s,
                "loading_peak_rss_anon_bytes": peak.peak_bytes,
                "quantization": self.quantization,
                "head_quantization": self.head_quantization,
                **plan_entries(loaded[1].plan),
            }
            for task in self.tasks:
                name, opened = f"{self.name}: {task.name}", partial(_opened, task, *loaded)
                variant = Variant(name, opened, self.device == "cuda", held_bytes=before)
                (result,) = harness.measure([variant], settings)
                result["details"] = facts | result["details"]
                yield [result]


@contextmanager
def _opened(task: Task, network: Any, scheduler: Scheduler) -> Iterator[Work]:
    make = _t5_pass if isinstance(network, T5) else _decoder_pass
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
    published = read_result("published.json")["tokens_per_s"]
    steps = (Task(ENCODER, 256), Task(ANEW, 1), Task(ONCE, 1)) if is_t5 else (Task("decode", 1),)
    for step in steps:
        own = {"task": step.kind, "tokens": step.length}
        own["streamed_bytes_per_step"] = step.streamed_bytes(plan)
        lists = LISTS.get(step.kind)
        found = predict(plan, card.link_bytes_per_s, card.memory_bytes_per_s, lists)
        rates = {"tokens_per_s": step.length / found.pass_s, "bound": found.bound}
        speeds = published.get(run.source.title, {}).get(step.kind.partition(",")[0], {})
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
        measured = [] if arguments.predict_only else [(run.name, run.measure) for run in runs]
        return parameters, [("predictions", lambda _: [found]), *measured]


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


def shortened(whole: Source, num_layers: int | None) -> Source:
    """The model with so many layers in each stack, which its title says; None is all of them."""
    names = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers")
    own = {name: count for name, count in vars(whole.config).items() if name in names}
    if num_layers is None or set(own.values()) == {num_layers}:
        return whole
    counts = " + ".join([str(num_layers)] * len(own))
    title = f"{whole.title}, shortened: {counts} layers of {' + '.join(map(str, own.values()))}"
    config = replace(whole.config, **dict.fromkeys(own, num_layers))
    return replace(whole, config=config, title=title)


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
