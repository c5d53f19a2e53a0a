"""One on-disk layout into ours: packed, each block one run of bytes, ready to be read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bminf.checkpoint.folder import open_checkpoint
from bminf.checkpoint.safetensors_file import write_safetensors
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.quantized_linear import format_for
from bminf.models.family import FAMILIES, Family
from bminf.models.load import DTYPES, lay_out, skeleton, tensors_of_block
from bminf.models.source import FORMAT_VERSION, Source, family_of, open_source, skeleton_of
from bminf.quantization.packed import Format

WEIGHTS_FILE = "model.safetensors"


def convert(
    source: str | Path,
    destination: str | Path,
    quantization: str | Format | None = "int8",
    model: str | None = None,
    dtype: torch.dtype | None = None,
    config: Any = None,
    tokenizer: Any = None,
) -> Path:
    """Write a checkpoint of any layout as a folder of ours, which loads without further work.

    source: a folder, or a hub id.   destination: a folder that does not exist yet, or is empty.
    quantization: "int8", "int4", a bminf.Format, or None.   model: "cpm1", "cpm2" or "eva"; None
    tells it from the files, where they do.   dtype: of what is not packed; None is that of the
    source.   config, tokenizer: see bminf.models.LanguageModel.
    One tensor at a time is in memory. The folder appears under its name when it is complete; a run
    that is killed leaves at most a folder whose name ends in ".partial".
    Returns the folder.   Raises ArgumentError or CheckpointError.
    """
    form = None if quantization is None else format_for(quantization)
    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, DTYPES))}, or None")
    for name, path in (("source", source), ("destination", destination)):
        if not isinstance(path, str | Path):
            raise ArgumentError(f"{name} is a {type(path).__name__}; give a path")
    target = _free(Path(destination).expanduser())
    family = _family(source, model)
    opened = open_source(family, source, config, tokenizer)
    if opened.weights.form is not None:
        raise CheckpointError(
            f"{opened.weights.path} is packed already, as {opened.weights.form}; convert the "
            "checkpoint that it was made from"
        )
    _vocabulary(opened)
    own = opened.dtype if opened.dtype in DTYPES else torch.float32
    try:
        with _appearing(target) as folder:
            _write(opened, folder, form, dtype or own)
    except OSError as error:
        raise ArgumentError(
            f"{target} cannot be written: {error}; name a folder on a disk with room for it"
        ) from error
    return target


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(source: Source, folder: Path, form: Format | None, dtype: torch.dtype) -> None:
    model, blocks = skeleton(skeleton_of(source.family, source.config), dtype, form, "auto")
    blobs = lay_out(model, blocks)
    layouts = {"": blobs.outside, **blobs.blocks}
    with tqdm(total=blobs.nbytes, desc="converting", unit="B", unit_scale=True, delay=1) as bar:

        def tensors(block: str) -> Any:
            for name, tensor in tensors_of_block(model, block, blobs, source.weights):
                yield name, tensor
                bar.update(tensor.nbytes)

        write_safetensors(folder / WEIGHTS_FILE, layouts, tensors, {"format": "pt"})
    shutil.copyfile(_vocabulary(source), folder / _vocabulary_name(source))
    written = {
        "format": "bminf",
        "format_version": FORMAT_VERSION,
        "model": source.family.name,
        "config": asdict(source.config),
        "quantization": None if form is None else asdict(form),
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _vocabulary(source: Source) -> Path:
    """The file of the tokenizer.   Raises ArgumentError where it was not made of one."""
    files = source.tokenizer.files
    if len(files) != 1:
        raise ArgumentError(
            f"tokenizer is a {type(source.tokenizer).__name__} of {len(files)} files, and the "
            "folder needs one to load by itself; give the path of a vocabulary"
        )
    return files[0]


def _vocabulary_name(source: Source) -> str:
    """What find_tokenizer() looks for, whatever the file is called where it comes from."""
    is_piece_model = source.family.name == "cpm1" and _vocabulary(source).suffix != ".txt"
    return "chinese_vocab.model" if is_piece_model else "vocab.txt"


def _free(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError(f"{path} exists already; name a folder that does not, or is empty")
    return path


def _family(source: str | Path, model: str | None) -> Family:
    """The family that is named, or the only one whose names, shapes and vocabulary go together."""
    if model is not None:
        if not isinstance(model, str) or model not in FAMILIES:
            raise ArgumentError(f"model={model!r}; accepted: {', '.join(FAMILIES)}")
        return FAMILIES[model]
    known = {hub_id: family for family in FAMILIES.values() for hub_id in family.hub_ids}
    if str(source) in known:
        return known[str(source)]
    path = Path(source).expanduser()
    if not path.exists():
        raise ArgumentError(f"there is no {str(source)!r}; for a hub id, say which model= it is")
    opened = open_checkpoint(path)
    family = family_of(opened)
    if family is not None:
        return family
    raise ArgumentError(
        f"{path} may hold CPM-2 or EVA, whose tensors have the same names; "
        'say model="cpm2" or model="eva" (bminf convert: --model)'
    )
