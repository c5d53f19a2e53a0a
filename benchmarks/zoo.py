"""CPM-2's encoder and decoder: as BMInf's published table measured them, and as text is generated.

The sizes are those of CPM-2 and the weights random, packed, under any limit. Beside what is
measured here stands what the simulated backend predicts for a GTX 1060 6 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import zoo_table
from benchmarks.harness import Measured, Settings
from benchmarks.zoo_model import PUBLISHED, TITLE, Sizes
from benchmarks.zoo_prediction import Card, Predicted, predictions
from benchmarks.zoo_run import Run
from bminf.arch.t5 import T5Config
from bminf.errors import ArgumentError, BudgetError
from bminf.ops.linear import ACTIVATIONS
from bminf.quantization.packed import FORMATS
from bminf.units import parse_bytes

_SIZES = {
    "layers": ("num_encoder_layers", "num_decoder_layers"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "head_size": ("head_dim",),
    "vocabulary": ("vocab_size",),
}
"""Options and the fields of the configuration that they set."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--memory-limit", nargs="+", metavar="SIZE", default=[None],
        help='one or more, such as "6GB"; default: 90%% of what is free')  # fmt: skip
    add("--quantization", nargs="+", choices=FORMATS, default=["int8"], help="default: int8")
    add("--activations", choices=ACTIVATIONS, default="auto", help="default: auto")
    add("--dtype", choices=("float32", "float16", "bfloat16"),
        help="default: float16 on a GPU, float32 on the CPU")  # fmt: skip
    add("--prompt-length", type=_count, default=256, metavar="N", help="default: 256 tokens")
    add("--steps", type=_count, default=255, metavar="N", help="of the decoder; default: 255")
    add("--max-length", type=_count, default=512, metavar="N",
        help="tokens of prompt and answer each, reserved for; default: 512")  # fmt: skip
    add("--threads", type=_count, metavar="N", help="of torch on the CPU; default: torch's own")
    add("--offload-dir", type=Path, metavar="DIR", help="for streamed blocks on the CPU")
    add("--seconds", type=float, default=float("inf"), metavar="S",
        help="begin no model after so long; what is left out is in the file")  # fmt: skip
    parser.set_defaults(rounds=1)
    _add_sizes(parser)
    _add_card(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes of what is measured", f"default: those of {TITLE}")
    for option, (field, *_) in _SIZES.items():
        text = f"{'of each stack; ' if option == 'layers' else ''}default: {vars(PUBLISHED)[field]}"
        flag = f"--{option.replace('_', '-')}"
        group.add_argument(flag, type=_count, metavar="N", help=text)


def _add_card(parser: argparse.ArgumentParser) -> None:
    """PCIe 3.0 x16 carries about 12 GB/s out of page-locked memory. The card's data sheet says 192
    GB/s, of which about 150 can be had. Both are what `bminf plan` takes."""
    group = parser.add_argument_group("the card of the prediction")
    add = group.add_argument
    add("--card", default="GTX 1060 6 GB", metavar="NAME", help="default: GTX 1060 6 GB")
    add("--card-limit", default="6GB", metavar="SIZE", help="memory limit; default: 6GB")
    add("--link", default="12GB", metavar="SIZE", help="bytes a second of the bus; default: 12GB")
    add("--memory-bandwidth", default="150GB", metavar="SIZE",
        help="bytes a second that the device reads of its memory; default: 150GB")  # fmt: skip
    add("--predict-only", action="store_true", help="measure nothing: this takes seconds")


def _count(text: str) -> int:
    """Raises ValueError for what is no number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


Group = Callable[[Settings], Sequence[Measured]]


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Iterator[Group]]]:
    """The parameters of the run; the predictions, and then each model when its turn comes."""
    if max(arguments.prompt_length, arguments.steps) > arguments.max_length:
        raise SystemExit("--prompt-length and --steps are at most --max-length")
    threads = torch.get_num_threads()
    try:
        predicted, runs = list(predictions(_card(arguments), list(FORMATS))), _runs(arguments)
        parameters = _parameters(arguments)
        torch.set_num_threads(parameters["threads"])
        end = time.monotonic() + arguments.seconds
        yield parameters, _groups(predicted, runs, parameters, end)
    except (ArgumentError, BudgetError) as error:
        raise SystemExit(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def measure(group: Group, settings: Settings) -> Sequence[Measured]:
    """The results of one model, or the predictions."""
    return group(settings)


def table(results: Sequence[Measured]) -> str:
    """The results as lines of text; all of it follows from the JSON file."""
    return "\n".join(zoo_table.lines({"results": [result.as_json() for result in results]}))


def config_of(arguments: argparse.Namespace) -> T5Config:
    """CPM-2's, but for the sizes that were given."""
    changed: dict[str, Any] = {}
    for option, names in _SIZES.items():
        value = vars(arguments)[option]
        changed |= {name: value for name in names if value is not None}
    return replace(PUBLISHED, **changed)


def title(config: T5Config) -> str:
    """What is measured, in words: CPM-2, or how much of it."""
    if config == PUBLISHED:
        return TITLE
    encoder, decoder = PUBLISHED.num_encoder_layers, PUBLISHED.num_decoder_layers
    full = replace(config, num_encoder_layers=encoder, num_decoder_layers=decoder)
    name = f"{TITLE}, shortened" if full == PUBLISHED else "a T5 of other sizes than CPM-2"
    counts = f"{config.num_encoder_layers} + {config.num_decoder_layers}"
    return f"{name}: {counts} layers of {encoder} + {decoder}"


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("prompt_length", "steps", "max_length", "quantization", "memory_limit", "activations")
    config = config_of(arguments)
    return {name: vars(arguments)[name] for name in names} | {
        "model": title(config),
        "config": asdict(config),
        "device": None if arguments.predict_only else _device(arguments),
        "dtype": str(_dtype(arguments)).removeprefix("torch."),
        "threads": arguments.threads or torch.get_num_threads(),
        "left_out": [],
    }


def _device(arguments: argparse.Namespace) -> str:
    device: str = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    default = "float16" if _device(arguments) == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, arguments.dtype or default)
    return dtype


def _card(arguments: argparse.Namespace) -> Card:
    options = ("--card-limit", "--link", "--memory-bandwidth")
    texts = (arguments.card_limit, arguments.link, arguments.memory_bandwidth)
    limit, link, memory = map(parse_bytes, texts, options)
    return Card(arguments.card, limit, link, memory)


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """Each kind of weights under each limit; none with --predict-only."""
    if arguments.predict_only:
        return []
    config, dtype, kind = config_of(arguments), _dtype(arguments), _device(arguments)
    runs = []
    for quantization in arguments.quantization:
        sizes = Sizes(config, dtype, quantization, arguments.activations, arguments.max_length)
        for text in arguments.memory_limit:
            limit = None if text is None else parse_bytes(text, "--memory-limit")
            length, num_steps = arguments.prompt_length, arguments.steps
            run = Run(sizes, limit, kind, arguments.offload_dir, length, num_steps)
            run.check()
            runs.append(run)
    return runs


def _groups(
    predicted: Sequence[Predicted], runs: Sequence[Run], parameters: dict[str, Any], end: float
) -> Iterator[Group]:
    yield lambda _: predicted
    for run in runs:
        if time.monotonic() > end:
            parameters["left_out"].append(run.name)
        else:
            yield run.measure
