"""`bminf bench --table`: what was asked for, the cells, and how they are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bminf.cli.bench import OF_TABLES, Default
from bminf.cli.tables import binds, bloom, passes
from bminf.cli.tables.asked import Asked, asked_of
from bminf.cli.tables.cells import Cell
from bminf.cli.tables.document import document
from bminf.cli.tables.text import markdown_of
from bminf.errors import ArgumentError

_MODEL_OPTIONS = {
    *("layers", "gpu", "predict_only", "stream_all"),
    *("memory_limit", "quantization", "device", "runs"),
}
_OPTIONS = {
    "bloom": {*_MODEL_OPTIONS, "size", "batch_sizes", "max_new_tokens"},
    "glm130b": {*_MODEL_OPTIONS, "lengths"},
    "cpm2": {*_MODEL_OPTIONS, "lengths"},
    "binds": {"batch_sizes"},
}
_OF_MODELS = (
    *("memory_limit", "quantization", "device", "offload_dir", "max_length", "built_in"),
    *(
        "trust_remote_code",
        "no_fused_kernels",
        "prompt_tokens",
        "max_new_tokens",
        "runs",
        "verbose",
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    _check(arguments)
    parameters, cells = _asked(arguments)
    content = document("table", parameters, {})
    content["results"] = [asdict(cell) for cell in cells]
    print(json.dumps(content, indent=1) if arguments.json else markdown_of(content), end="")
    print(end="\n" if arguments.json else "")
    return 0


def _asked(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterator[Cell]]:
    """The parameters for a JSON file, and the cells when their turn comes."""
    table = arguments.table
    if table == "binds":
        sizes = tuple(sorted({*(arguments.batch_sizes or bloom.BATCH_SIZES)}))
        own = {"device": None, "numbers": list(sizes), "length": binds.LENGTH}
        return {"table": table, **own}, binds.cells(sizes)
    asked = asked_of(arguments, passes.LENGTHS.get(table, bloom.BATCH_SIZES))
    if asked.is_measured:
        _announce(table, asked)
    cells = bloom.cells(asked) if table == "bloom" else passes.cells(table, asked)
    return {"table": table, **asked.facts()}, cells


def _announce(table: str, asked: Asked) -> None:
    """Say on stderr what will take long, and what takes less."""
    numbers = ", ".join(map(str, asked.numbers))
    fewer = ", --size, --batch-sizes and --max-new-tokens" if table == "bloom" else " and --lengths"
    print(
        f"bminf: measuring {asked.cut.title} on {asked.device}, at {numbers}: large models take "
        f"hours on a CPU. --layers{fewer} make it less; --predict-only measures nothing",
        file=sys.stderr,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for what a table does not look at."""
    for name in (*OF_TABLES, *_OF_MODELS):
        value = getattr(arguments, name)
        is_given = value not in (None, False) and not isinstance(value, Default)
        if is_given and name not in _OPTIONS[arguments.table]:
            option = "--model" if name == "built_in" else f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{option} is not for --table {arguments.table}; leave it out")
    if arguments.stream_all and arguments.memory_limit is not None:
        raise ArgumentError("--stream-all is a limit itself; leave out --memory-limit")
