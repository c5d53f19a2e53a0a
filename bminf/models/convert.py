"""One on-disk layout into ours: packed, each block one run of bytes, ready to be read. And a GLM's
into that of its authors, for another number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bminf.arch.glm import GLMConfig
from bminf.checkpoint.appearing import appearing, free
from bminf.checkpoint.folder import open_checkpoint
from bminf.checkpoint.reshard import reshard
from bminf.checkpoint.safetensors_file import write_safetensors
from bminf.checkpoint.stored import pieces
from bminf.errors import ArgumentError, CheckpointError
from bminf.generation.arguments import check_positive
from bminf.keywords import known_keywords
from bminf.layout import Filling, Layout, TensorSpec
from bminf.models.arguments import form_for
from bminf.models.config import find_config
from bminf.models.family import FAMILIES, GLM_FORMATS, INT4_ROW, Family
from bminf.models.glm_head import own_packing, with_head
from bminf.models.load import DTYPES, Packing, lay_out, skeleton, tensors_of_block
from bminf.models.source import (
    FORMAT_VERSION,
    HEAD,
    Source,
    config_of,
    family_of,
    open_source,
    skeleton_of,
)
from bminf.quantization.packed import INT4, INT8, Format

WEIGHTS_FILE = "model.safetensors"

_AUTO = "auto"
_TABLE = "embed_tokens"


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
) -> Path:
    """Write a checkpoint of any layout as a folder of ours, which loads without further work.

    source: a folder, or, without tp, a hub id.
    destination: a folder that does not exist yet, or is empty.
    quantization: "int8", "int4", "int4-row" (see GLM), a bminf.Format, or None. "auto" keeps what
        is packed already as it is, and is "int4" for a GLM, "int8" for the others.
    model: one of "cpm1", "cpm2", "eva", "glm130b", "glm10b"; None tells it from the files, where
        they do.   dtype: of what is not packed; None is that of the source.
    config, tokenizer: see bminf.models.LanguageModel.   head_quantization: see bminf.models.GLM.
    tp: writes the files of a GLM's own authors instead, for so many ranks; quantization is then
        None (as "auto"), "int8" or "int4", and these are the formats of GLM-130B's code.
    Some rows of one tensor are in memory at a time. The folder appears under its name when it is
    complete; a run that is killed leaves at most a folder whose name ends in ".partial".
    Returns the folder.   Raises ArgumentError or CheckpointError.
    """
    form = form_for(None if quantization == _AUTO else quantization, GLM_FORMATS)
    head_form = form_for(head_quantization, GLM_FORMATS, "head_quantization")
    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, DTYPES))}, or None")
    for name, path in (("source", source), ("destination", destination)):
        if not isinstance(path, str | Path):
            raise ArgumentError(f"{name} is a {type(path).__name__}; give a path")
    target = free(Path(destination).expanduser())
    if tp is not None:
        check_positive("tp", tp)
        _check_only_cut(dtype=dtype, tokenizer=tokenizer, head_quantization=head_quantization)
        _check_model(source, model)
        reshard(Path(source), target, tp, _bits(form), _num_heads(source, config))
        return target
    opened = open_source([_family(source, model)], source, config, tokenizer)
    if opened.weights.packing is not None:
        raise CheckpointError(
            f"{opened.weights.path} is packed already, as {opened.weights.packing.usual}; convert "
            "the checkpoint that it was made from"
        )
    _check_vocabulary(opened)
    dtype = dtype or (opened.dtype if opened.dtype in DTYPES else torch.float32)
    opened, packing = _packed(opened, form, quantization == _AUTO, head_form, dtype)
    try:
        with appearing(target) as folder:
            _write(opened, folder, packing, dtype)
    except OSError as error:
        raise ArgumentError(
            f"{target} cannot be written: {error}; name a folder on a disk with room for it"
        ) from error
    return target


def _packed(
    source: Source,
    form: Format | None,
    is_auto: bool,
    head_form: Format | None,
    dtype: torch.dtype,
) -> tuple[Source, Packing]:
    if not isinstance(source.config, GLMConfig):
        if head_form is not None:
            raise ArgumentError("head_quantization is for a GLM; leave it out")
        return source, Packing(INT8 if is_auto else form)
    wanted = INT4 if is_auto else form
    own = None if wanted is None else own_packing(source, wanted, INT4 if is_auto else None)
    return with_head(source, own or Packing(wanted), head_form, dtype)


def _write(source: Source, folder: Path, packing: Packing, dtype: torch.dtype) -> None:
    model, blocks = skeleton(skeleton_of(source.family, source.config), dtype, packing, "auto")
    blobs = lay_out(model, blocks)
    layouts = {"": blobs.outside, **blobs.blocks, **_layout_of_table(source, packing)}
    total = sum(layout.nbytes for layout in layouts.values())
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, delay=1) as bar:

        def tensors(block: str) -> Iterator[Filling]:
            for filling in _fillings(source, model, block, blobs):
                yield filling
                bar.update(filling[1].nbytes)

        write_safetensors(folder / WEIGHTS_FILE, layouts, tensors, {"format": "pt"})
    for name, path in _vocabulary(source).items():
        shutil.copyfile(path, folder / name)
    written = {
        "format": "bminf",
        "format_version": FORMAT_VERSION,
        "model": source.family.name,
        "config": asdict(source.config),
        "quantization": _as_json(packing.form),
        "exceptions": {name: _as_json(form) for name, form in packing.exceptions.items()},
    }
    if settings := getattr(source.tokenizer, "settings", None):
        written["tokenizer"] = dict(settings)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _fillings(source: Source, model: torch.nn.Module, block: str, blobs: Any) -> Iterator[Filling]:
    if block == _TABLE:
        assert source.weights.table is not None
        for first_row, tensor in pieces(source.weights.table):
            yield "weight", tensor, first_row
        return
    yield from tensors_of_block(model, block, blobs, source.weights)


def _layout_of_table(source: Source, packing: Packing) -> dict[str, Layout]:
    """That of an embedding beside a head that is packed; any other head stands for both."""
    table = source.weights.table
    if table is None or packing.of(f"{HEAD}0") is None:
        return {}
    spec = TensorSpec(table.shape, (table.shape[1], 1), table.dtype)
    return {_TABLE: Layout.of({"weight": spec}, keep_addresses=False)}


def _as_json(form: Format | None) -> dict[str, Any] | None:
    return None if form is None else asdict(form)


def _check_only_cut(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"tp=... writes the files of a GLM's authors; leave {name} out")


def _check_model(source: str | Path, model: str | None) -> None:
    """Raise CheckpointError where it is another model than was said."""
    if model is None:
        return
    wanted = _family(source, model)
    told = family_of(open_checkpoint(Path(source).expanduser()))
    if told is not wanted:
        held = "another model" if told is None else told.title
        raise CheckpointError(f"{source} holds {held}, not {wanted.title}")


def _bits(form: Format | None) -> int | None:
    """Of the authors' own formats, which have a scale a row; "int4" can only mean theirs here.

    Raises ArgumentError.
    """
    if form is None or form in (INT8, INT4, INT4_ROW):
        return None if form is None else form.bits
    raise ArgumentError(
        f"quantization is {form}, which GLM-130B's own code cannot read; accepted with tp: "
        '"int8", "int4" (theirs, a scale a row), or None'
    )


def _num_heads(source: str | Path, config: Any) -> int | None:
    """As a configuration tells it; None where there is none, and perhaps no need to know."""
    opened = open_checkpoint(Path(source).expanduser())
    family = family_of(opened)
    if family is None or opened.kind == "bminf":
        return None
    is_told = config is not None or find_config(opened.path) is not None
    try:
        parsed, _ = config_of(family, opened, family.tensors(opened), config)
    except CheckpointError:
        if is_told:
            raise
        return None
    return parsed.num_attention_heads


def _check_vocabulary(source: Source) -> None:
    """Raise ArgumentError for a tokenizer that was not made of files."""
    if not source.tokenizer.files:
        raise ArgumentError(
            f"tokenizer is a {type(source.tokenizer).__name__} of no files, and the folder needs "
            "them to load by itself; give the path of a vocabulary"
        )


def _vocabulary(source: Source) -> dict[str, Path]:
    """The files of the tokenizer, by what find_tokenizer() looks for, whatever they are called
    where they come from."""
    files: Sequence[Path] = source.tokenizer.files
    if len(files) == 2:
        return dict(zip(("vocab.json", "merges.txt"), files, strict=True))
    name = _VOCABULARIES.get(source.family.name, "vocab.txt")
    if source.family.name == "cpm1" and files[0].suffix == ".txt":
        name = "vocab.txt"
    return {name: files[0]}


_VOCABULARIES = {
    "cpm1": "chinese_vocab.model",
    "glm130b": "ice_text.model",
    "glm10b": "cog-pretrain.model",
}


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
