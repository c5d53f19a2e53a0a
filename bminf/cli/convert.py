"""`bminf convert`: quantizes a checkpoint of any layout into a folder that loads faster."""

from __future__ import annotations

import argparse

from bminf.cli import sources
from bminf.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder with a checkpoint, or a hub id")
    add("destination", metavar="DST", help="the folder to write; it must not exist yet")
    add(
        "--quantization", choices=("auto", "int8", "int4", "int4-row", "none"), default="auto",
        help=sources.QUANTIZATION_HELP,
    )  # fmt: skip
    add("--head-quantization", choices=("int8", "int4"), help="format of a GLM's output head")
    add("--tp", type=int, metavar="N", help="write the layout of GLM's authors, for N ranks")
    add(
        "--model", choices=("cpm1", "cpm2", "eva", "glm130b", "glm10b"),
        help="the model, where the files do not determine it",
    )  # fmt: skip
    add("--config", metavar="FILE", help="configuration, if not beside the weights")
    add("--tokenizer", metavar="PATH", help="vocabulary, if not beside the weights")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder; returns 0."""
    from bminf.models.convert import WEIGHTS_FILE, convert

    folder = convert(
        arguments.source,
        arguments.destination,
        None if arguments.quantization == "none" else arguments.quantization,
        model=arguments.model,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        head_quantization=arguments.head_quantization,
        tp=arguments.tp,
    )
    if arguments.tp is not None:
        print(f"{folder}: {arguments.tp} rank{'s' if arguments.tp > 1 else ''}")
        return 0
    size = format_bytes((folder / WEIGHTS_FILE).stat().st_size)
    print(f"{folder}: {size} of weights")
    return 0
