"""Options of the benchmarks of whole models, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import Card
from benchmarks.harness import Measured, Settings
from bminf.errors import ArgumentError, BudgetError
from bminf.ops.linear import ACTIVATIONS
from bminf.units import parse_bytes

Group = Callable[[Settings], Iterator[Sequence[Measured]]]
"""What is measured together, one model, or predictions: gives results as they come."""


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a model is to run, and how."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--memory-limit", nargs="+", metavar="SIZE", default=[None],
        help='one or more, such as "6GB"; default: 90%% of what is free')  # fmt: skip
    add("--activations", choices=ACTIVATIONS, default="auto", help="default: auto")
    add("--dtype", choices=("float32", "float16", "bfloat16"),
        help="default: float16 on a GPU, float32 on the CPU")  # fmt: skip
    add("--threads", type=count, metavar="N", help="of torch on the CPU; default: torch's own")
    add("--offload-dir", type=Path, metavar="DIR", help="for streamed blocks in a file")
    add("--seconds", type=float, default=float("inf"), metavar="S",
        help="begin no model after so long; what is left out is in the file")  # fmt: skip
    add("--predict-only", action="store_true", help="measure nothing: this takes seconds")


def add_sizes(
    parser: argparse.ArgumentParser, title: str, defaults: Mapping[str, tuple[int, str]]
) -> None:
    """Options of a model's sizes.   defaults: option -> that of `title`, and what it is of."""
    group = parser.add_argument_group("sizes of what is measured", f"default: those of {title}")
    for option, (default, text) in defaults.items():
        flag = f"--{option.replace('_', '-')}"
        group.add_argument(flag, type=count, metavar="N", help=f"{text}default: {default}")


def add_card(parser: argparse.ArgumentParser, card: Card) -> None:
    """Options of the card that the prediction is for."""
    group = parser.add_argument_group("the card of the prediction")
    limit, link, memory = (
        f"{number / 1e9:g}GB"
        for number in (card.memory_limit, card.link_bytes_per_s, card.memory_bytes_per_s)
    )
    add = group.add_argument
    add("--card", default=card.name, metavar="NAME", help=f"default: {card.name}")
    add("--card-limit", default=limit, metavar="SIZE", help=f"memory limit; default: {limit}")
    add("--link", default=link, metavar="SIZE", help=f"bytes a second of the bus; default: {link}")
    add("--memory-bandwidth", default=memory, metavar="SIZE",
        help=f"bytes a second that the device reads of its memory; default: {memory}")  # fmt: skip


def count(text: str) -> int:
    """Raises ValueError for what is no number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def card_of(arguments: argparse.Namespace) -> Card:
    options = ("--card-limit", "--link", "--memory-bandwidth")
    texts = (arguments.card_limit, arguments.link, arguments.memory_bandwidth)
    limit, link, memory = map(parse_bytes, texts, options)
    return Card(arguments.card, int(limit), int(link), int(memory))  # as results say it again


def limits_of(arguments: argparse.Namespace) -> list[int | None]:
    """In bytes; None is what is free."""
    given = arguments.memory_limit
    return [None if text is None else parse_bytes(text, "--memory-limit") for text in given]


def device_of(arguments: argparse.Namespace) -> str:
    device: str = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    default = "float16" if device_of(arguments) == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, arguments.dtype or default)
    return dtype


def run_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of add_run_options(), for the JSON file."""
    return {
        "memory_limit": arguments.memory_limit,
        "activations": arguments.activations,
        "device": None if arguments.predict_only else device_of(arguments),
        "dtype": str(dtype_of(arguments)).removeprefix("torch."),
        "threads": arguments.threads or torch.get_num_threads(),
        "left_out": [],
    }


@contextmanager
def usage_checked(arguments: argparse.Namespace) -> Iterator[None]:
    """With the threads that are asked for; what the library refuses ends the program."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(arguments.threads or threads)
        yield
    except (ArgumentError, BudgetError) as error:
        raise SystemExit(str(error)) from error
    finally:
        torch.set_num_threads(threads)
