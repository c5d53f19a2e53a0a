"""One on-disk layout into ours: packed, each block one run of bytes, ready to be read. And a GLM's
into that of its authors, for another number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bminf.arch import registry
from bminf.arch.architecture import Architecture
from bminf.checkpoint.folder import Progress, atomic_folder, require_empty, write_weights
from bminf.checkpoint.sealed import write_sealed
from bminf.checkpoint.stored import pieces
from bminf.errors import ArgumentError, CheckpointError
from bminf.keywords import known_keywords
from bminf.layout import Chunk, Layout, TensorSpec
from bminf.models.assemble import DTYPES, Assembly, Formats, assemble
from bminf.models.fill import contents_of
from bminf.models.glm_ranks import write_for_ranks
from bminf.models.recognition import architectures_for
from bminf.models.source import FORMAT_VERSION, HEAD, open_source, vocabulary_files
from bminf.offload.reading import tensors_of_block
from bminf.quantization.packed import Format, Packing, parse_format
from bminf.units import parse_bytes

WEIGHTS_FILE = "model.safetensors"

_AUTO = "auto"
_SHARD_SIZE = "5GB"
TABLE = "embed_tokens"
"""The block of an embedding that is no parameter of the network."""


@known_keywords
def convert(
    source: str | Path,
    destination: str | Path,
    quantization: str | Format | None = _AUTO,
    model: str | None = None,
    dtype: torch.dtype | None = None,
    config: Any = None,
    tokenizer: Any = None,
    head_quantization: str | Format | None = None,
    tp: int | None = None,
    max_shard_size: int | float | str = _SHARD_SIZE,
) -> Path:
    """Write a checkpoint of any layout as a folder of ours, which loads without further work.

    source: a folder, or, without tp, a hub id.
    destination: a folder that does not exist yet, or is empty.
    quantization: "int8", "int4", "int4-row" (see GLM), a bminf.Format, or None. "auto" keeps what
        is packed already as it is, and is "int4" for a GLM, "int8" for the others.
    model: one of "cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom"; None tells it from the
        files, where they do.   dtype: of what is not packed; None is that of the source.
    config, tokenizer: see bminf.models.LanguageModel.   head_quantization: see bminf.models.GLM.
    tp: writes the files of a GLM's own authors instead, for so many ranks, with configuration and
        vocabulary beside them; quantization is then None (as "auto"), "int8" or "int4", and these
        are the formats of GLM-130B's code.
    max_shard_size: bytes, or "5GB": above this the weights are several files, of whole blocks.
    Some rows of one tensor are in memory at a time. The folder appears under its name when it is
    complete; a run that is killed leaves at most a folder whose name ends in ".partial".
    Returns the folder.   Raises ArgumentError or CheckpointError.
    """
    is_auto = quantization == _AUTO
    layers = parse_format(None if is_auto else quantization, formats=registry.all_formats())
    head = parse_format(head_quantization, "head_quantization", registry.all_formats())
    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, DTYPES))}, or None")
    shard_bytes = int(parse_bytes(max_shard_size, "max_shard_size"))
    for name, path in (("source", source), ("destination", destination)):
        if not isinstance(path, str | Path):
            raise ArgumentError(f"{name} is a {type(path).__name__}; give a path")
    target = require_empty(Path(destination).expanduser())
    if tp is not None:
        given_size = None if max_shard_size == _SHARD_SIZE else max_shard_size
        _check_tp_arguments(
            dtype=dtype, head_quantization=head_quantization, max_shard_size=given_size
        )
        write_for_ranks(source, target, tp, layers, model, config, tokenizer)
        return target
    opened = open_source(architectures_for(source, model), source, config, tokenizer)
    if opened.weights.packing is not None:
        raise CheckpointError(
            f"{opened.weights.path} is packed already, as {opened.weights.packing.of_layers}; "
            "convert the checkpoint that it was made from"
        )
    files = vocabulary_files(opened.architecture, opened.tokenizer)
    dtype = dtype or (opened.dtype if opened.dtype in DTYPES else torch.float32)
    write_assembly(
        assemble(opened, Formats(layers, head, is_auto), dtype), target, files, shard_bytes
    )
    return target


def write_assembly(
    assembly: Assembly, target: Path, files: Mapping[str, Path], shard_bytes: int
) -> None:
    """Write a folder of ours.   files: of the vocabulary, by what they are called there."""
    blobs = assembly.blobs
    layouts = {"": blobs.outside, **blobs.blocks, **_layout_of_table(assembly)}
    nbytes = sum(layout.nbytes for layout in layouts.values())
    with atomic_folder(target, nbytes, "converting") as (folder, progress):
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        _write(assembly, layouts, folder, progress, files, shard_bytes)


def _write(
    assembly: Assembly,
    layouts: Mapping[str, Layout],
    folder: Path,
    progress: Progress,
    files: Iterable[str],
    shard_bytes: int,
) -> None:
    source = assembly.source

    def tensors(block: str) -> Iterator[Chunk]:
        for chunk in _chunks(assembly, block):
            yield chunk
            progress(chunk[1].nbytes)

    write_weights(folder / WEIGHTS_FILE, layouts, tensors, {"format": "pt"}, shard_bytes)
    write_config(
        folder, source.architecture, source.config, assembly.packing, source.tokenizer, files
    )


def write_config(
    folder: Path,
    architecture: Architecture,
    config: Any,
    packing: Packing,
    tokenizer: Any,
    files: Iterable[str],
) -> None:
    """What is to be known of a folder of ours beside its weights and the vocabulary.

    files: names of those of the vocabulary, which are there.
    """
    written = {
        "format": "bminf",
        "format_version": FORMAT_VERSION,
        "model": architecture.name,
        "config": asdict(config),
        "quantization": _as_json(packing.default),
        "exceptions": {name: _as_json(one) for name, one in packing.exceptions.items()},
    }
    if settings := getattr(tokenizer, "settings", None):
        written["tokenizer"] = dict(settings)
    write_sealed(folder / "config.json", written, files)


def _chunks(assembly: Assembly, block: str) -> Iterator[Chunk]:
    if block != TABLE:
        yield from tensors_of_block(contents_of(assembly), block)
        return
    table = assembly.source.weights.table
    assert table is not None
    for first_row, tensor in pieces(table):
        yield "weight", tensor, first_row


def _layout_of_table(assembly: Assembly) -> dict[str, Layout]:
    """That of an embedding beside a head that is packed, or has weights of its own; any other head
    stands for both."""
    weights = assembly.source.weights
    table = weights.table
    if table is None or not (weights.has_own_head or assembly.packing.of(f"{HEAD}0")):
        return {}
    return layout_of_table(table.shape, table.dtype)


def layout_of_table(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Layout]:
    """That of an embedding which is no parameter of the network."""
    spec = TensorSpec(shape, (shape[1], 1), dtype)
    return {TABLE: Layout.of({"weight": spec}, keep_addresses=False)}


def _as_json(weight_format: Format | None) -> dict[str, Any] | None:
    return None if weight_format is None else weight_format.to_json()


def _check_tp_arguments(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"tp=... writes the files of a GLM's authors; leave {name} out")
