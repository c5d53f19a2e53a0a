"""A GLM's files in its authors' layout for another number of ranks, with all that they need to
load."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bminf.arch.architecture import Architecture
from bminf.arch.glm import GLM10B, GLM130B, INT4_ROW
from bminf.arch.registry import checkpoint_in, config_in, told_by
from bminf.checkpoint.config import CONFIG_FILES
from bminf.checkpoint.folder import Checkpoint
from bminf.checks import check_positive
from bminf.errors import ArgumentError, CheckpointError
from bminf.models.glm_ranks import reshard
from bminf.models.recognition import architecture_for
from bminf.models.source import config_of, tokenizer_of
from bminf.models.vocabulary_files import check_files, vocabulary_files
from bminf.quantization.packed import INT4, INT8, Format
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.find import ICETK


def cut(
    source: str | Path,
    target: Path,
    tp: int,
    form: Format | None,
    model: str | None,
    config: Any,
    tokenizer: Any,
) -> None:
    """Write `source`, a GLM, to the folder `target` for `tp` ranks; see convert().

    form: as convert() was asked for it.
    Warns where no configuration or no vocabulary is at hand that could go along.
    Raises ArgumentError or CheckpointError.
    """
    check_positive("tp", tp)
    _check_model(source, model)
    bits = _bits(form)
    beside = _Beside.of(checkpoint_in(Path(source).expanduser()), config, tokenizer)
    heads = None if beside.config is None else beside.config.num_attention_heads
    reshard(Path(source), target, tp, bits, heads, beside.write)
    beside.warn_of_what_lacks(target)


@dataclass(frozen=True)
class _Beside:
    """What lies beside the weights: names of files -> where they are copied from.

    config: None where nothing tells it.   is_glm: of another model nothing is written at all.
    """

    files: Mapping[str, Path]
    config: Any
    lacks_vocabulary: str = ""

    @classmethod
    def of(cls, opened: Checkpoint, config: Any, tokenizer: Any) -> _Beside:
        architecture = told_by(opened)
        if architecture is None or opened.kind == "bminf":
            return cls({}, None)
        parsed = _config(architecture, opened, config)
        files = {}
        found = config_in(opened.path) if config is None else None
        if found is not None:
            files[CONFIG_FILES[0]] = found
        if architecture not in (GLM130B, GLM10B):
            return cls(files, parsed)
        try:
            made = _tokenizer(architecture, opened, tokenizer, parsed)
        except CheckpointError as error:
            if tokenizer is not None:
                raise
            return cls(files, parsed, str(error))
        return cls({**files, **vocabulary_files(architecture, made)}, parsed)

    def write(self, folder: Path) -> None:
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)
        if self.config is not None and CONFIG_FILES[0] not in self.files:
            text = json.dumps(asdict(self.config), indent=2)
            (folder / CONFIG_FILES[0]).write_text(f"{text}\n", encoding="utf-8")

    def warn_of_what_lacks(self, target: Path) -> None:
        if self.lacks_vocabulary:
            warnings.warn(
                f"{target} has no vocabulary and does not load by itself ({self.lacks_vocabulary})",
                stacklevel=5,
            )
        if self.config is None:
            warnings.warn(
                f"{target} has no configuration, because nothing tells the number of attention "
                "heads; it does not load by itself: give config=...",
                stacklevel=5,
            )


def _tokenizer(
    architecture: Architecture, opened: Checkpoint, given: Any, config: Any
) -> Tokenizer:
    if given is None:  # as it lies there; whether it is the right one is for whoever loads it
        return tokenizer_of(architecture, opened, None, None)
    if isinstance(given, str | Path) and given != ICETK and not Path(given).exists():
        raise ArgumentError(
            f"tokenizer={str(given)!r}: there is no such file or folder; give one that there is, "
            "or leave tokenizer out, so that the vocabulary beside the weights goes along"
        )
    made = tokenizer_of(architecture, opened, given, config)
    check_files(made)
    return made


def _check_model(source: str | Path, model: str | None) -> None:
    """Raise CheckpointError where it is another model than was said."""
    if model is None:
        return
    wanted = architecture_for(source, model)
    told = told_by(checkpoint_in(Path(source).expanduser()))
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


def _config(architecture: Architecture, opened: Checkpoint, given: Any) -> Any:
    """As a configuration tells it, or the shapes do; None where there is none, and perhaps no need
    to know."""
    is_told = given is not None or config_in(opened.path) is not None
    try:
        parsed, _ = config_of(architecture, opened, architecture.tensors(opened), given)
    except CheckpointError:
        if is_told:
            raise
        return None
    return parsed
