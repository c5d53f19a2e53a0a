"""GLM-130B: reading and writing as its authors' tables have them, and choosing as in CoLA.

The sizes are those of GLM-130B and the weights random, packed or not, under any limit. Fewer layers
are said to be fewer, and nothing is made more of them; beside what is measured stands what the
simulated backend predicts for the whole on a card.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from benchmarks import glm_table
from benchmarks.glm_model import GLM_FORMATS, PUBLISHED, TITLE, Sizes
from benchmarks.glm_prediction import CARD, predictions
from benchmarks.glm_run import Run, Task
from benchmarks.harness import Measured, Settings
from benchmarks.model_options import (
    Group,
    add_card,
    add_run_options,
    add_sizes,
    card_of,
    count,
    device_of,
    dtype_of,
    limits_of,
    run_parameters,
    usage_checked,
)
from benchmarks.model_run import groups
from bminf.arch.glm import GLMConfig

_SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
"""Options and the fields of the configuration that they set."""

_ENCODE, _DECODE = (512, 1024, 2048), (128, 512, 1024, 2048)
_COLA = (30, 32)  # the authors' micro-batch; their lengths are multiples of 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add_run_options(parser)
    add = parser.add_argument
    add("--quantization", nargs="+", choices=GLM_FORMATS, default=["int4-row"],
        help="of the layers; default: int4-row")  # fmt: skip
    add("--head-quantization", choices=GLM_FORMATS, default="int8", help="default: int8")
    add("--tasks", nargs="+", choices=("encode", "decode", "cola"),
        default=["encode", "decode", "cola"], help="default: all")  # fmt: skip
    add("--encode", nargs="+", type=count, default=_ENCODE, metavar="N",
        help=f"tokens to read; default: {' '.join(map(str, _ENCODE))}")  # fmt: skip
    add("--decode", nargs="+", type=count, default=_DECODE, metavar="N",
        help=f"tokens to write; default: {' '.join(map(str, _DECODE))}")  # fmt: skip
    add("--cola", nargs=2, type=count, default=_COLA, metavar=("ROWS", "N"),
        help="texts at once, and tokens of each; default: 30 32")  # fmt: skip
    # The run that is checked warms up; at full size each takes minutes.
    parser.set_defaults(rounds=1, warmup=0, repeats=1)
    defaults = {option: (vars(PUBLISHED)[field], "") for option, field in _SIZES.items()}
    add_sizes(parser, TITLE, defaults)
    add_card(parser, CARD)


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Iterator[Group]]]:
    """The parameters of the run; the predictions, and then each model when its turn comes."""
    end = time.monotonic() + arguments.seconds
    with usage_checked(arguments):
        config, tasks = config_of(arguments), tasks_of(arguments)
        if max(task.length for task in tasks) > config.max_position_embeddings:
            raise SystemExit(f"the model has {config.max_position_embeddings} positions")
        if any(task.kind == "cola" and task.length < 2 for task in tasks):
            raise SystemExit("--cola: a text has its blank and one more token at least")
        card, runs, parameters = card_of(arguments), _runs(arguments), _parameters(arguments)
        kinds = arguments.quantization
        predicted = list(predictions(card, kinds, arguments.head_quantization))
        yield parameters, groups(predicted, runs, parameters["left_out"], end)


def parts(group: Group, settings: Settings) -> Iterator[Sequence[Measured]]:
    """The results of one model, as they come, or the predictions."""
    return group(settings)


def table(results: Sequence[Measured]) -> str:
    """The results as lines of text; all of it follows from the JSON file."""
    return "\n".join(glm_table.lines({"results": [result.as_json() for result in results]}))


def config_of(arguments: argparse.Namespace) -> GLMConfig:
    """GLM-130B's, but for the sizes that were given."""
    given = {field: vars(arguments)[option] for option, field in _SIZES.items()}
    return replace(PUBLISHED, **{name: value for name, value in given.items() if value is not None})


def tasks_of(arguments: argparse.Namespace) -> tuple[Task, ...]:
    """In the order of the options."""
    rows, length = arguments.cola
    tasks = [Task("encode", length) for length in arguments.encode]
    tasks += [Task("decode", length) for length in arguments.decode]
    tasks.append(Task("cola", length, rows))
    return tuple(task for task in tasks if task.kind in arguments.tasks)


def title(config: GLMConfig) -> str:
    """What is measured, in words: GLM-130B, or how much of it."""
    if config == PUBLISHED:
        return TITLE
    num_layers = PUBLISHED.num_hidden_layers
    is_shortened = replace(config, num_hidden_layers=num_layers) == PUBLISHED
    name = f"{TITLE}, shortened" if is_shortened else f"a GLM of other sizes than {TITLE}"
    return f"{name}: {config.num_hidden_layers} of {num_layers} layers"


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_of(arguments)
    return {
        "model": title(config),
        "config": asdict(config),
        "quantization": arguments.quantization,
        "head_quantization": arguments.head_quantization,
        "tasks": [asdict(task) for task in tasks_of(arguments)],
    } | run_parameters(arguments)


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """Each kind of weights under each limit; none with --predict-only."""
    if arguments.predict_only:
        return []
    config, tasks, kind = config_of(arguments), tasks_of(arguments), device_of(arguments)
    batches = tuple((task.rows, task.length) for task in tasks)
    runs = []
    for quantization in arguments.quantization:
        sizes = Sizes(
            config, dtype_of(arguments), quantization, arguments.head_quantization,
            arguments.activations, batches,
        )  # fmt: skip
        for limit in limits_of(arguments):
            run = Run(sizes, limit, kind, arguments.offload_dir, tasks)
            run.check()
            runs.append(run)
    return runs
