"""`bminf convert`: quantizes a checkpoint of any layout into a folder that loads faster: of the
built-in models, or of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bminf.cli import flags, sources
from bminf.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="a folder or hub id of CPM-1, CPM-2, EVA, GLM, BLOOM or of transformers",
    )
    add("destination", metavar="DST", help="the folder to write; it must not exist yet")
    add(
        "--quantization", choices=("auto", "int8", "int4", "int4-row", "none"), default="auto",
        help=sources.QUANTIZATION_HELP,
    )  # fmt: skip
    add("--head-quantization", choices=("int8", "int4"), help="format of a GLM's output head")
    add("--tp", type=int, metavar="N", help="write the layout of GLM's authors, for N ranks")
    add(
        "--model", choices=sources.BUILT_IN,
        help="the model, where the files do not determine it",
    )  # fmt: skip
    add("--config", metavar="FILE", help="configuration, if not beside the weights")
    add("--tokenizer", metavar="PATH", help="vocabulary, if not beside the weights")
    add("--max-shard-size", type=flags.size, metavar="SIZE",
        help="above this the weights are several files, of whole blocks; default: 5GB")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write the folder; returns 0."""
    from bminf.models.convert import convert

    if arguments.tp is None and _is_of_transformers(arguments):
        return _convert_pretrained(arguments)
    folder = convert(
        arguments.source,
        arguments.destination,
        None if arguments.quantization == "none" else arguments.quantization,
        model=arguments.model,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        head_quantization=arguments.head_quantization,
        tp=arguments.tp,
        **_shards(arguments),
    )
    if arguments.tp is not None:
        print(f"{folder}: {arguments.tp} rank{'s' if arguments.tp > 1 else ''}")
        return 0
    _report(folder)
    return 0


def _is_of_transformers(arguments: argparse.Namespace) -> bool:
    from bminf.loading import zoo_class
    from bminf.models.source import HUB_ID

    source = arguments.source
    if not Path(source).expanduser().exists() and not HUB_ID.fullmatch(source):
        return False  # nor is it anything else
    return zoo_class(source, arguments.model, arguments.tokenizer is not None)[0] is None


def _convert_pretrained(arguments: argparse.Namespace) -> int:
    """Load a model of transformers, in the memory that there is, and save it as it is then."""
    import bminf
    from bminf.checkpoint.folder import require_empty
    from bminf.errors import ArgumentError

    require_empty(Path(arguments.destination).expanduser())  # before minutes of loading
    for name in ("model", "config", "tokenizer", "head_quantization"):
        if getattr(arguments, name) is not None:
            raise ArgumentError(
                f"--{name.replace('_', '-')} is for the built-in models, and {arguments.source} "
                "holds one of transformers; leave it out"
            )
    sources.check_format(arguments.quantization, is_glm=False)
    quantization = None if arguments.quantization == "none" else arguments.quantization
    model = bminf.load(arguments.source, quantization=quantization, device="cpu")
    _report(bminf.save(model, arguments.destination, **_shards(arguments)))
    return 0


def _shards(arguments: argparse.Namespace) -> dict[str, Any]:
    given = arguments.max_shard_size
    return {} if given is None else {"max_shard_size": given}


def _report(folder: Path) -> None:
    """The size of the weights, which are several files where they are large."""
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {format_bytes(nbytes)} of weights")
