"""CPM-2's encoder and decoder: as BMInf's published table measured them, and as text is generated.

The sizes are those of CPM-2 and the weights random, packed, under any limit. Beside what is
measured here stands what the simulated backend predicts for a GTX 1060 6 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from benchmarks import zoo_table
from benchmarks.card import Card
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
from benchmarks.zoo_model import PUBLISHED, TITLE, Sizes
from benchmarks.zoo_prediction import predictions
from benchmarks.zoo_run import Run
from bminf.arch.t5 import T5Config
from bminf.quantization.packed import FORMATS

_SIZES = {
    "layers": ("num_encoder_layers", "num_decoder_layers"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "head_size": ("head_dim",),
    "vocabulary": ("vocab_size",),
}
"""Options and the fields of the configuration that they set."""

_CARD = Card("GTX 1060 6 GB", 6 * 10**9, 12 * 10**9, 150 * 10**9)
"""PCIe 3.0 x16 carries about 12 GB/s out of page-locked memory. The card's data sheet says 192
GB/s, of which about 150 can be had. Both are what `bminf plan` takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add_run_options(parser)
    add = parser.add_argument
    add("--quantization", nargs="+", choices=FORMATS, default=["int8"], help="default: int8")
    add("--prompt-length", type=count, default=256, metavar="N", help="default: 256 tokens")
    add("--steps", type=count, default=255, metavar="N", help="of the decoder; default: 255")
    add("--max-length", type=count, default=512, metavar="N",
        help="tokens of prompt and answer each, reserved for; default: 512")  # fmt: skip
    parser.set_defaults(rounds=1)
    texts = {"layers": "of each stack; "}
    defaults = {
        option: (vars(PUBLISHED)[field], texts.get(option, ""))
        for option, (field, *_) in _SIZES.items()
    }
    add_sizes(parser, TITLE, defaults)
    add_card(parser, _CARD)


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Iterator[Group]]]:
    """The parameters of the run; the predictions, and then each model when its turn comes."""
    if max(arguments.prompt_length, arguments.steps) > arguments.max_length:
        raise SystemExit("--prompt-length and --steps are at most --max-length")
    end = time.monotonic() + arguments.seconds
    with usage_checked(arguments):
        predicted, runs = list(predictions(card_of(arguments), list(FORMATS))), _runs(arguments)
        parameters = _parameters(arguments)
        yield parameters, groups(predicted, runs, parameters["left_out"], end)


def parts(group: Group, settings: Settings) -> Iterator[Sequence[Measured]]:
    """The results of one model, as they come, or the predictions."""
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
    names = ("prompt_length", "steps", "max_length", "quantization")
    config = config_of(arguments)
    own = {"model": title(config), "config": asdict(config)}
    return {name: vars(arguments)[name] for name in names} | own | run_parameters(arguments)


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """Each kind of weights under each limit; none with --predict-only."""
    if arguments.predict_only:
        return []
    config, dtype, kind = config_of(arguments), dtype_of(arguments), device_of(arguments)
    runs = []
    for quantization in arguments.quantization:
        sizes = Sizes(config, dtype, quantization, arguments.activations, arguments.max_length)
        for limit in limits_of(arguments):
            length, num_steps = arguments.prompt_length, arguments.steps
            run = Run(sizes, limit, kind, arguments.offload_dir, length, num_steps)
            run.check()
            runs.append(run)
    return runs
