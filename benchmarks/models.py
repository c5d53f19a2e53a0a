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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Group, Result, Settings, Variant, Work, plan_entries
from bminf.arch.glm import GLM as GLMNetwork
from bminf.arch.registry import all_formats
from bminf.arch.t5 import T5, T5Config
from bminf.checkpoint.stored import Sliced, Stored
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.errors import ArgumentError, BudgetError
from bminf.layers.embedding import HostEmbedding
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layout import tensors_of
from bminf.models import assemble
from bminf.models.assemble import Assembly, Formats
from bminf.models.fill import fill
from bminf.models.glm_text import blank, pack_choices, position_tensor
from bminf.models.source import Source, Weights, find_sizes
from bminf.offload.backends import backend_for, free_budget, host_budget
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.offload.predict import predict
from bminf.quantization.packed import PackedWeight, Packing, parse_format
from bminf.units import format_bytes, parse_bytes

# ---- random weights ------------------------------------------------------------------------------

_LENGTH = 2**22 - 3  # of a run of numbers, which all weights of one type are views of


@dataclass(frozen=True)
class Random(Sliced):
    """A tensor that is there already: mostly a view, which takes no memory of its own."""

    where: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        return replace(self, tensor=self.tensor.narrow(axis, start, end - start))


def random_weights(network: torch.nn.Module) -> Weights:
    """What a checkpoint of `network`, on the meta device, would hold.

    Weights have the variance 1 / in_features, all else lies between 0.5 and 1.5. Rows of a matrix
    are windows on a few megabytes of random numbers, each some numbers behind the last one: no two
    are alike, nothing more is held while a model is filled, and filling it is copying.
    """
    tensors: dict[str, torch.Tensor] = {}
    forms, table = {}, None
    for start, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, QuantizedLinear):
            forms[name] = module.form
            parts = _packed(module.packed, start)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        elif type(module) is torch.nn.Linear:
            shape = (module.out_features, module.in_features)
            tensors[f"{name}.weight"] = _matrix(shape, start, module.in_features**-0.5)
        elif isinstance(module, HostEmbedding):
            table = Random(name, _matrix((module.num_rows, module.hidden_size), start, 1.0))
    generator = torch.Generator().manual_seed(0)
    for name, _, like in tensors_of(network):
        if name not in tensors:
            row = torch.rand(like.shape[-1], generator=generator) + 0.5
            tensors[name] = row.to(like.dtype).expand(like.shape)
    stored = {name: Random(name, tensor) for name, tensor in tensors.items()}
    return Weights(stored, Path("random weights"), Packing(None, forms), table=table)


def _packed(like: PackedWeight, start: int) -> dict[str, torch.Tensor]:
    """The parts of a packed weight of the sizes of `like`, which is on the meta device."""
    num_codes = 255 if like.bits == 8 else 16
    factor = (12 / like.in_features) ** 0.5 / num_codes  # a uniform distribution has 1/12
    scale = torch.full((), factor, dtype=like.scale.dtype).expand(like.scale.shape)
    num_columns = like.in_features * like.bits // 8
    num_rows, padded = like.qweight.shape
    codes = _rows(_numbers(like.qweight.dtype), (num_rows, num_columns), start)
    if padded != num_columns:
        codes = F.pad(codes, (0, padded - num_columns))
    parts = {"qweight": codes, "scale": scale}
    if like.minimum is not None:
        parts["minimum"] = scale * -((num_codes - 1) / 2)
    if like.code_sum is not None:  # NumPy makes no wider copy of the codes to add them up
        parts["code_sum"] = torch.from_numpy(np.add.reduce(codes.numpy(), 1, dtype=np.int32))
    return parts


def _matrix(shape: tuple[int, int], start: int, scale: float) -> torch.Tensor:
    """Normal numbers in half precision, times `scale`."""
    return _rows(_numbers(torch.float16, scale), shape, start)


@cache
def _numbers(dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """(_LENGTH,): codes of any value, -128 excepted, or normal numbers times `scale`."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(_LENGTH, generator=generator).mul_(scale).to(dtype)
    least, end = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(least, end, (_LENGTH,), dtype=dtype, generator=generator)


def _rows(run: torch.Tensor, shape: tuple[int, int], start: int) -> torch.Tensor:
    """A view: rows that begin a few numbers behind each other, in each matrix somewhere else."""
    num_rows, num_columns = shape
    step = max(1, (len(run) - num_columns) // (2 * num_rows))
    num_places = len(run) - num_columns - step * (num_rows - 1)
    return run.as_strided(shape, (step, 1), start * 1_000_003 % num_places)


# ---- what a model does ---------------------------------------------------------------------------

_ID = 1  # of all tokens that are read, as in the benchmark of GLM-130B's authors
ENCODER, ANEW, ONCE = "encoder", "decoder, projections anew", "decoder, projections once"
LISTS = {
    ENCODER: ("encoder.layers",),
    ANEW: ("cross_projections.layers", "decoder.layers"),
    ONCE: ("decoder.layers",),
}
"""The blocks that one step of a task goes through, in order; all of them where nothing is said."""


@dataclass(frozen=True)
class Task:
    """What is timed.

    kind: of an encoder-decoder ENCODER, which reads `length` tokens, and ANEW or ONCE, which take
    `length` steps, a token each, after a prompt of `prompt` tokens, with its keys and values
    projected once more in each step, or not. Nothing is embedded, scored or drawn.
    Of a decoder "encode" reads `length` tokens in one pass, of a GLM with half of the cells of the
    mask hidden, and scores what comes next; "decode" writes `length` tokens, a pass each, from an
    empty text on, the likeliest each time; "cola" reads `rows` texts of `length` tokens in one
    pass, each with its blank and two choices for it, and scores the choices.
    """

    kind: str
    length: int
    rows: int = 1
    prompt: int = 1

    @property
    def name(self) -> str:
        if self.kind in LISTS:
            return self.kind
        return f"{self.kind} {self.length if self.rows == 1 else f'{self.rows} x {self.length}'}"

    @property
    def num_steps(self) -> int:
        return self.length if self.kind in (ANEW, ONCE, "decode") else 1

    @property
    def work(self) -> tuple[Any, ...]:
        """Tasks that follow each other and do the same work have to give the same."""
        return self.kind.partition(",")[0], self.length, self.rows

    def new_cache(self, network: Any) -> Any:
        prompt = (self.prompt,) if isinstance(network, T5) else ()
        return network.new_cache(self.rows, *prompt, self.length)

    def streamed_bytes(self, plan: Plan) -> int:
        """That come over the link in one step."""
        streamed, lists = set(plan.streamed), LISTS.get(self.kind)
        blocks = [block for block in plan.blocks if block.name in streamed]
        return sum(block.nbytes for block in blocks if lists is None or block.list_name in lists)


_Pass = Callable[[], torch.Tensor]


def _encoder(network: T5, cache: Any, task: Task) -> _Pass:
    x = _hidden(network, task.length)
    return lambda: network.encoder(x)[:, -1]


def _decoder(network: T5, cache: Any, task: Task) -> _Pass:
    """The same hidden state goes in at each step."""
    encoded, x = _hidden(network, task.prompt), _hidden(network, 1)

    def run() -> torch.Tensor:
        y = x
        for step in range(task.length):
            if step == 0 or task.kind == ANEW:
                cache.cross.reset()
                network.cross_projections(encoded, cache.cross)
            y = network.decoder(x, cache)
        return y[:, -1]

    return run


def _hidden(network: T5, num_tokens: int) -> torch.Tensor:
    """(1, num_tokens, C), the same each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, network.config.hidden_size, generator=generator)
    return x.to(network.embed_tokens.weight)


def _encode(network: Any, cache: Any, task: Task) -> _Pass:
    generator = torch.Generator().manual_seed(0)
    is_hidden = torch.rand(1, task.length, task.length, generator=generator) < 0.5
    is_hidden = is_hidden.to(cache.keys.device)
    ids = torch.full((1, task.length), _ID)
    positions = [(i, 0) for i in range(task.length)]
    return lambda: network.head(_read(network, cache, ids, positions, is_hidden)[:, -1])


def _decode(network: Any, cache: Any, task: Task) -> _Pass:
    """The logits of the last token."""

    def run() -> torch.Tensor:
        token, logits = torch.full((1, 1), _ID), torch.empty(0)
        for i in range(task.length):
            logits = network.head(_read(network, cache, token, [(i, 0)])[:, -1])
            token = logits.argmax(-1, keepdim=True)
        return logits

    return run


def _choose(network: Any, cache: Any, task: Task) -> _Pass:
    """(rows, 2): the log-probability of each choice, both of which are one token."""
    one = blank([_ID] * (task.length - 1), task.length - 2, _ID, is_continued=False)
    ids, positions, is_hidden, (rows, _) = pack_choices(one, [[0], [_ID]])
    texts = torch.tensor([ids]).expand(task.rows, -1)

    def run() -> torch.Tensor:
        x = _read(network, cache, texts, positions, is_hidden.unsqueeze(0))
        return network.head(x[:, rows[0]]).log_softmax(-1)[:, :2]

    return run


_RUNS: dict[str, Callable[[Any, Any, Task], _Pass]] = {
    ENCODER: _encoder, ANEW: _decoder, ONCE: _decoder,
    "encode": _encode, "decode": _decode, "cola": _choose,
}  # fmt: skip
"""Each makes what a task reads, at random, which is not timed, and returns what does the task."""


def _read(
    network: Any,
    cache: Any,
    ids: torch.Tensor,
    positions: list[tuple[int, int]],
    is_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, C). Positions and what is hidden are a GLM's; CPM-1 has its own."""
    device = cache.keys.device
    if not isinstance(network, GLMNetwork):
        return network(ids.to(device), cache)
    own = position_tensor([positions] * len(ids), not network.config.is_rotary).to(device)
    return network(ids.to(device), own, cache, None if is_hidden is None else is_hidden.to(device))


def _digest(x: torch.Tensor) -> str:
    """Of numbers, all of which are computed when this returns."""
    values = x.float().cpu()
    if not values.isfinite().all():
        raise ArithmeticError("the random model gives NaN or infinity, so its times mean nothing")
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


# ---- measured ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A model and what it is to do.

    source: its architecture and sizes.   dtype: of what is not packed.   quantization,
    head_quantization: by the names of the architecture's formats; "none" is not packed.
    batches: (rows, tokens of each) that memory is reserved for, one of them at a time.
    limit: bytes; None is 90% of what is free on `device`, "cpu" or "cuda".
    offload_dir: for streamed blocks in a file.
    """

    source: Source
    dtype: torch.dtype
    quantization: str
    head_quantization: str
    batches: tuple[tuple[int, int], ...]
    limit: int | None = None
    device: str = "cpu"
    tasks: tuple[Task, ...] = ()
    offload_dir: Path | None = None

    @property
    def name(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        formats = _formats_text(self.source, self.quantization, self.head_quantization)
        return f"{self.device} {formats}, {limit}"

    def planned(self, limit: int, host_bytes: int | None = None) -> tuple[Assembly, Plan]:
        """The network on the meta device, and what stays within `limit` bytes, as in the zoo.

        host_bytes: of host memory for streamed blocks; None is as much as it takes.
        Raises ArgumentError or BudgetError, with numbers.
        """
        known = self.source.architecture.formats
        layers = parse_format(_format(self.quantization), formats=known)
        head = parse_format(_format(self.head_quantization), "head_quantization", known)
        source = find_sizes(self.source)
        made = assemble.assemble(source, Formats(layers, head), self.dtype)
        num_rows, length = max(
            self.batches,
            key=lambda own: assemble.reserved_bytes(made, own[1], own[0], self.device),
        )
        plan = assemble.plan_within(made, limit, length, num_rows, self.device, host_bytes)
        return made, plan

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
                network, scheduler = stack.enter_context(self.loaded())
            facts = {
                "load_s": time.perf_counter() - start_s,
                "loading_peak_rss_anon_bytes": peak.peak_bytes,
                "quantization": self.quantization,
                "head_quantization": self.head_quantization,
                **plan_entries(scheduler.plan),
            }
            held_bytes = (rss_anon_bytes() or 0) - (before or 0)
            for _, tasks in groupby(self.tasks, lambda task: task.work):
                variants = [
                    Variant(
                        f"{self.name}: {task.name}",
                        partial(_opened, task, network, scheduler, facts),
                        self.device == "cuda",
                    )
                    for task in tasks
                ]
                results = harness.measure(variants, settings)
                for result in results:
                    _complete(result, held_bytes)
                yield results


@contextmanager
def _opened(
    task: Task, network: Any, scheduler: Scheduler, facts: dict[str, Any]
) -> Iterator[Work]:
    cache, before, runs = task.new_cache(network), scheduler.stats(), list[str]()
    one_run = _RUNS[task.kind](network, cache, task)

    def run() -> str:
        cache.reset()
        with torch.inference_mode():
            runs.append(_digest(one_run()))
        return runs[-1]

    def details() -> dict[str, Any]:
        after = scheduler.stats()
        nbytes = after.bytes_copied - before.bytes_copied
        copied_s = after.copied_s - before.copied_s
        return facts | {
            "task": task.kind,
            "length": task.length,
            "rows": task.rows,
            "steps": task.num_steps,
            "tokens": task.rows * task.length,
            "streamed_bytes_per_step": task.streamed_bytes(scheduler.plan),
            "copied_bytes_per_step": nbytes / (len(runs) * task.num_steps),
            "link_gbps": nbytes / copied_s / 1e9 if nbytes and copied_s else None,
            "result_sha256": runs[-1],
        }

    yield Work(run, details)


def _complete(result: Result, held_bytes: int) -> None:
    """The speed, and what the streamed bytes take at that of the link; and the memory of the
    weights: the harness sees what a run adds to them."""
    details = result["details"]
    wall_s = statistics.fmean(sample["wall_s"] for sample in result["samples"])
    bound_s = None
    if details["link_gbps"] is not None:
        bound_s = details["streamed_bytes_per_step"] / details["link_gbps"] / 1e9
    details["tokens_per_s"] = details["tokens"] / wall_s
    details["bound_s_per_step"] = bound_s
    details["fraction_of_bound"] = bound_s and bound_s / (wall_s / details["steps"])
    if result["peak_rss_anon_bytes"] is not None:
        result["peak_rss_anon_bytes"] += held_bytes


def _formats_text(source: Source, quantization: str, head: str) -> str:
    """For names."""
    return f"{quantization}, head {head}" if source.architecture.split_head else quantization


def _format(name: str) -> str | None:
    return None if name == "none" else name


# ---- predicted -----------------------------------------------------------------------------------

_PREDICTED_LENGTH, _PREDICTED_PROMPT = 512, 256

PUBLISHED_SPEEDS = {
    "CPM-2 (Chinese), CPM-2.1": {
        "encoder": {"BMInf 1.0 to 2.0": 718, "BMInf 0.0.5": 533},
        "decoder": {"BMInf 1.0 to 2.0": 4.4, "BMInf 0.0.5": 1.6},
    }
}
"""Tokens a second of CPM-2 on a GTX 1060 6 GB: the tables in the READMEs of these versions.

Encoder: 256 tokens through 24 layers and the last norm. Decoder: 255 steps through 24 layers and
the last norm, keys and values of the 256 prompt tokens projected anew in each. Batch 1, 8-bit
weights; no embedding, head or sampling. That is benchmark/cpm2 of BMInf 1.0.
"""


@dataclass(frozen=True)
class Card:
    """A GPU. memory_limit: bytes.   link_bytes_per_s: from page-locked host memory to the card.
    memory_bytes_per_s: that the card reads of its own memory."""

    name: str
    memory_limit: int
    link_bytes_per_s: int
    memory_bytes_per_s: int


def predictions(
    source: Source, card: Card, quantizations: Sequence[str], head: str
) -> Iterator[Result]:
    """A model in full, float16 but for what is packed, in each of its tasks.

    Raises BudgetError for a card that is too small.
    """
    tasks = [Task("decode", 1)]
    if isinstance(source.config, T5Config):
        tasks = [Task(ENCODER, _PREDICTED_PROMPT), Task(ANEW, 1), Task(ONCE, 1)]
    for quantization in quantizations:
        plan = assemble.plan_model(
            source, card.memory_limit, _format(quantization), torch.float16, _PREDICTED_LENGTH,
            head_quantization=_format(head),
        )  # fmt: skip
        name = f"{card.name} {_formats_text(source, quantization, head)}"
        facts = {"model": source.title, "quantization": quantization, "head_quantization": head}
        for task in tasks:
            result = _predicted(card, plan, task)
            result["details"] |= facts
            speeds = PUBLISHED_SPEEDS.get(source.title, {}).get(task.work[0], {})
            yield {"name": f"{name}: {task.kind}", **result, "published_tokens_per_s": speeds}


def _predicted(card: Card, plan: Plan, task: Task) -> Result:
    """is_bound: that a step multiplies many rows, which takes time that bytes do not tell."""
    speeds = (card.link_bytes_per_s, card.memory_bytes_per_s)
    found = predict(plan, *speeds, LISTS.get(task.kind))
    rates = {"tokens_per_s": task.length / found.pass_s, "bound": found.bound}
    details = {
        "task": task.kind,
        "card": asdict(card),
        "max_length": _PREDICTED_LENGTH,
        **plan_entries(plan),
        "streamed_bytes_per_step": task.streamed_bytes(plan),
        "tokens": task.length,
    }
    is_bound = task.kind in (ENCODER, ANEW)
    return {"details": details, "prediction": asdict(found) | rates, "is_bound": is_bound}


# ---- the two cases -------------------------------------------------------------------------------

_RESERVED_LENGTH = 512  # tokens of prompt and answer each of an encoder-decoder, or more
_LAYERS = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers")
_LIMIT = "--memory-limit"


@dataclass(frozen=True)
class Case:
    """A kind of models, by default the model `title`, and a card to predict it for."""

    title: str
    card: Card
    is_encoder_decoder: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options of this case."""
        add, kinds = parser.add_argument, [*all_formats(), "none"]
        add("--model", default=self.title, metavar="MODEL",
            help=f"a published one, or a folder; default: {self.title}")  # fmt: skip
        add("--layers", type=count, metavar="N", help="of each stack; default: all of the model")
        add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
        add(_LIMIT, nargs="+", metavar="SIZE", default=[None],
            help='one or more, such as "6GB"; default: 90%% of what is free')  # fmt: skip
        add("--quantization", nargs="+", choices=kinds, help="default: int4-row for a GLM, or int8")
        parser.set_defaults(threads=None, rounds=1)  # torch's own number
        add("--predict-only", action="store_true", help="measure nothing: this takes seconds")
        self._add_tasks(parser)

    def _add_tasks(self, parser: argparse.ArgumentParser) -> None:
        add = partial(parser.add_argument, type=count)
        if self.is_encoder_decoder:
            parser.set_defaults(head_quantization=None)
            add("--prompt-length", default=256, metavar="N", help="default: 256 tokens")
            add("--steps", default=255, metavar="N", help="of the decoder; default: 255")
            return
        # The run that is checked warms up; at full size each takes minutes.
        parser.set_defaults(warmup=0, repeats=1)
        heads, tasks = [*all_formats(), "none"], ("encode", "decode", "cola")
        parser.add_argument("--head-quantization", choices=heads, help="default: int8 for a GLM")
        parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="default: all")
        add("--encode", nargs="+", default=(512, 1024, 2048), metavar="N", help="tokens to read")
        add("--decode", nargs="+", default=(128, 512, 1024, 2048), metavar="N", help="to write")
        # The micro-batch of GLM-130B's authors, whose lengths are multiples of 32.
        add("--cola", nargs=2, default=(30, 32), metavar=("ROWS", "N"), help="default: 30 32")

    def prepare(
        self, arguments: argparse.Namespace
    ) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
        """The parameters of the run; the predictions, and then each model when its turn comes."""
        try:
            whole = find_sizes(arguments.model)
            runs = self._runs(arguments, whole)
            for run in runs:
                run.planned(2**60 if run.limit is None else run.limit)
            kinds = list(dict.fromkeys(run.quantization for run in runs))
            predicted = list(predictions(whole, self.card, kinds, runs[0].head_quantization))
        except (ArgumentError, BudgetError) as error:
            raise SystemExit(str(error)) from error
        parameters = _parameters(arguments, runs[0]) | {"quantization": kinds}
        measured = [] if arguments.predict_only else [(run.name, run.measure) for run in runs]
        return parameters, [("predictions", lambda _: [predicted]), *measured]

    def _runs(self, arguments: argparse.Namespace, whole: Source) -> list[Run]:
        """Each kind of weights under each limit.   Raises ArgumentError."""
        if isinstance(whole.config, T5Config) is not self.is_encoder_decoder:
            raise ArgumentError(f"{arguments.model} is a model for the other of zoo and glm")
        source, tasks = shortened(whole, arguments.layers), self.tasks(arguments)
        assemble.max_length_for(max(task.length for task in tasks), source)
        is_cut = whole.architecture.split_head is not None
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        batches = tuple((task.rows, task.length) for task in tasks)
        if self.is_encoder_decoder:
            batches = ((1, max(_RESERVED_LENGTH, *(length for _, length in batches))),)
        first = Run(
            source,
            assemble.dtype_for(None, device),
            "int4-row" if is_cut else "int8",
            arguments.head_quantization or ("int8" if is_cut else "none"),
            batches,
            device=device,
            tasks=tasks,
        )
        return [
            replace(first, quantization=quantization, limit=limit and parse_bytes(limit, _LIMIT))
            for quantization in arguments.quantization or [first.quantization]
            for limit in arguments.memory_limit
        ]

    def tasks(self, arguments: argparse.Namespace) -> tuple[Task, ...]:
        """In the order of the options.   Raises ArgumentError."""
        if self.is_encoder_decoder:
            prompt, steps = arguments.prompt_length, arguments.steps
            decoding = (Task(kind, steps, prompt=prompt) for kind in (ANEW, ONCE))
            return Task(ENCODER, prompt), *decoding
        rows, length = arguments.cola
        if length < 2:
            raise ArgumentError("--cola: a text has its blank and one more token at least")
        tasks = [Task(kind, n) for kind in ("encode", "decode") for n in vars(arguments)[kind]]
        return tuple(t for t in (*tasks, Task("cola", length, rows)) if t.kind in arguments.tasks)


def _parameters(arguments: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What was asked for, for the JSON file."""
    names = ("prompt_length", "steps", "memory_limit")
    return {name: vars(arguments)[name] for name in names if name in arguments} | {
        "model": run.source.title,
        "config": asdict(run.source.config),
        "head_quantization": run.head_quantization,
        "tasks": [asdict(task) for task in run.tasks],
        "max_length": max(length for _, length in run.batches),
        "device": None if arguments.predict_only else run.device,
        "dtype": str(run.dtype).removeprefix("torch."),
    }


def count(text: str) -> int:
    """Raises ValueError for what is no number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def shortened(whole: Source, num_layers: int | None) -> Source:
    """The model with so many layers in each stack, which its title says; None is all of them."""
    own = {name: count for name, count in vars(whole.config).items() if name in _LAYERS}
    if num_layers is None or set(own.values()) == {num_layers}:
        return whole
    counts, all_counts = (
        " + ".join(map(str, each)) for each in ([num_layers] * len(own), own.values())
    )
    title = f"{whole.title}, shortened: {counts} layers of {all_counts}"
    config = replace(whole.config, **dict.fromkeys(own, num_layers))
    return replace(whole, config=config, title=title)


ZOO = Case(
    "CPM-2 (Chinese), CPM-2.1",
    # PCIe 3.0 x16 carries about 12 GB/s out of page-locked memory. The card's data sheet says 192
    # GB/s, of which about 150 can be had. Both are what `bminf plan` takes.
    Card("GTX 1060 6 GB", 6 * 10**9, 12 * 10**9, 150 * 10**9),
    is_encoder_decoder=True,
)
GLM = Case(
    "GLM-130B",
    # 90% of an RTX 3090's memory, whose data sheet says 936 GB/s; PCIe 4.0 x16 carries about 25
    # GB/s out of page-locked memory.
    Card("24 GB card", int(0.9 * 24 * 2**30), 25 * 10**9, 936 * 10**9),
    is_encoder_decoder=False,
)
