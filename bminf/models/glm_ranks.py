"""Re-sharding: checkpoints of GLM-130B and GLM-10B, in their authors' layout, for another degree of
model parallelism, with the configuration and the vocabulary that loading needs.

Sources: GLM-130B, tools/convert_tp.py; GLM, change_mp.py. As there, ranks are split first and
quantized then, so that each rank has scales of its own columns. Unlike there, no tensor is held
whole: each tensor of a new file is assembled from the old ones some rows at a time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bminf.arch.architecture import Architecture
from bminf.arch.glm import GLM10B, GLM130B, INT4_ROW, is_glm10b, is_glm130b, is_quantized
from bminf.arch.registry import checkpoint_in, config_in, detect, split_tables
from bminf.checkpoint.config import CONFIG_FILES
from bminf.checkpoint.folder import Checkpoint, Progress, atomic_folder
from bminf.checkpoint.model_parallel import (
    DEEPSPEED_TRACKER,
    FILE_IN_RANK_FOLDER,
    RELEASE,
    TRACKERS,
    Split,
    rank_files,
    table_for,
)
from bminf.checkpoint.names import MEGATRON_LINEARS
from bminf.checkpoint.stored import Sliced, Stored, nbytes_of, pieces
from bminf.checkpoint.torch_file import read_torch_file
from bminf.checkpoint.torch_writer import Saved, write_torch_file
from bminf.checks import check_positive
from bminf.errors import ArgumentError, CheckpointError
from bminf.models.recognition import architectures_for
from bminf.models.source import config_of, tokenizer_of, vocabulary_files
from bminf.quantization.glm_rows import quantize_rows, row_scales
from bminf.quantization.packed import INT4, INT8, Format
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.find import ICETK

_ITERATION = re.compile(r"(?:iter_0*)?(\d+)")
_LINEAR = re.compile(
    rf"transformer\.layers\.\d+\.({'|'.join(map(re.escape, MEGATRON_LINEARS))})\.weight"
)
# What the size along the split axis counts.
_SIZES = {
    "word_embeddings.weight": "vocabulary rows",
    "attention.dense.weight": "hidden columns",
    "mlp.dense_h_to_4h.weight": "inner columns of the feed-forward",
}


def write_for_ranks(
    source: str | Path,
    target: Path,
    tp: int,
    weight_format: Format | None,
    model: str | None,
    config: Any,
    tokenizer: Any,
) -> None:
    """Write `source`, a GLM, to the folder `target` for `tp` ranks; see convert().

    weight_format: as given to convert().
    Warns where the source has no configuration or no vocabulary to copy.
    Raises ArgumentError or CheckpointError.
    """
    check_positive("tp", tp)
    wanted = None if model is None else architectures_for(source, model)
    bits, opened = _bits(weight_format), checkpoint_in(Path(source).expanduser())
    detected = detect(opened)
    if wanted is not None and detected not in wanted:
        held = "another model" if detected is None else detected.title
        raise CheckpointError(f"{source} holds {held}, not {wanted[0].title}")
    extra = _ExtraFiles.of(opened, detected, config, tokenizer)
    heads = None if extra.config is None else extra.config.num_attention_heads
    reshard(opened, target, tp, bits, heads, extra.write)
    extra.warn_of_missing(target)


@dataclass(frozen=True)
class _ExtraFiles:
    """The files beside the weights.   files: name in the new folder -> path to copy.

    config: None where it is unknown.   missing_vocabulary: why there is no vocabulary, if so.
    """

    files: Mapping[str, Path]
    config: Any
    missing_vocabulary: str = ""

    @classmethod
    def of(
        cls, opened: Checkpoint, architecture: Architecture | None, config: Any, tokenizer: Any
    ) -> _ExtraFiles:
        if architecture not in (GLM130B, GLM10B) or opened.kind == "bminf":
            return cls({}, None)  # which reshard() refuses
        parsed = _config(architecture, opened, config)
        found = config_in(opened.path) if config is None else None
        files = {} if found is None else {CONFIG_FILES[0]: found}
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

    def warn_of_missing(self, target: Path) -> None:
        if self.missing_vocabulary:
            warnings.warn(
                f"{target} has no vocabulary and does not load by itself "
                f"({self.missing_vocabulary})",
                stacklevel=5,
            )
        if self.config is None:
            warnings.warn(
                f"{target} has no configuration, because the number of attention heads is unknown; "
                "it does not load by itself: give config=...",
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
    return tokenizer_of(architecture, opened, given, config)


def _bits(weight_format: Format | None) -> int | None:
    """Of the authors' own formats, which have a scale per row; "int4" stands for theirs here.

    Raises ArgumentError.
    """
    if weight_format is None or weight_format in (INT8, INT4, INT4_ROW):
        return None if weight_format is None else weight_format.bits
    raise ArgumentError(
        f"quantization is {weight_format}, which GLM-130B's own code cannot read; accepted with "
        'tp: "int8", "int4" (in the authors\' format, a scale per row), or None'
    )


def _config(architecture: Architecture, opened: Checkpoint, given: Any) -> Any:
    """The configuration that is given or found, or that follows from the shapes; else None."""
    try:
        return config_of(architecture, opened, architecture.tensors(opened), given)[0]
    except CheckpointError:
        if given is not None or config_in(opened.path) is not None:
            raise
        return None


# ---- weights -------------------------------------------------------------------------------------


def reshard(
    opened: Checkpoint,
    target: Path,
    degree: int,
    bits: int | None = None,
    num_attention_heads: int | None = None,
    write_beside: Callable[[Path], object] = str,
) -> None:
    """Write a checkpoint of GLM-130B or GLM-10B as its authors' own files, for `degree` ranks.

    opened: a folder in the authors' layout, of any degree; of GLM-10B also a Hugging Face one.
    target: a folder that does not exist yet, or is empty.   degree: an int of at least 1.
    bits: 8 or 4 to quantize the linears of GLM-130B, each rank by itself; None leaves them.
    num_attention_heads: of the model; needed where `degree` does not divide the degree of the
        source and the source has no inv_freq to compute it from.
    write_beside: called with the folder before it is renamed, to write other files.
    Names keep their order and dtypes are kept; the iteration is that of the source, "release" where
    it has none. Of what lies beside the weights only GLM-10B's iteration and degree are written.
    A piece of one tensor is in memory at a time. The folder appears when it is complete; a run that
    is killed leaves at most a folder whose name ends in ".partial".
    Raises ArgumentError, before anything is written, for a degree that does not divide the heads,
    the hidden and inner sizes and the vocabulary rows, for 4 bits of an odd number of columns and
    for bits of another model; CheckpointError for a source that is quantized already, incomplete,
    damaged, or of another model.
    """
    given = _open(opened)
    _check(given, degree, bits, num_attention_heads)
    ranks = [dict(_rank_tensors(given, rank, degree, bits)) for rank in range(degree)]
    total = sum(nbytes_of(stored) for rank in ranks for stored in rank.values())
    with atomic_folder(target, total, "re-sharding") as (folder, progress):
        _write(given, folder, ranks, progress)
        write_beside(folder)


@dataclass(frozen=True)
class _Source:
    """num_ranks: that its files were written for.   iteration: its folder's name.

    step: the iteration as GLM-10B's files hold it, if it is known.
    """

    path: Path
    tensors: Mapping[str, Stored]
    num_ranks: int
    iteration: str
    step: int | None

    @property
    def splits(self) -> dict[str, Split]:
        table = table_for(self.tensors.keys(), split_tables())
        return {name: table.split(name) for name in self.tensors}

    @property
    def is_own_glm10b(self) -> bool:
        """Whether it is GLM-10B by its own code, which has more in its files than the weights."""
        return "word_embeddings.weight" in self.tensors


def _open(opened: Checkpoint) -> _Source:
    path = opened.path
    tensors = {name.removeprefix("glm."): stored for name, stored in opened.tensors.items()}
    is_known = is_glm10b(tensors) or (opened.kind == "original" and is_glm130b(tensors))
    if not is_known or opened.kind not in ("original", "huggingface"):
        raise CheckpointError(
            f"{opened.path} is no checkpoint of GLM-130B or GLM-10B in a layout of its authors "
            f"(it is a {opened.kind} folder); only those have model-parallel files"
        )
    if is_quantized(tensors):
        raise CheckpointError(
            f"{path} is quantized, each rank with scales of its own, and cannot be re-sharded; "
            "give the float16 checkpoint that it was made from"
        )
    num_ranks, iteration, step = _ranks_and_iteration(opened)
    return _Source(path, tensors, num_ranks, iteration, step)


def _ranks_and_iteration(opened: Checkpoint) -> tuple[int, str, int | None]:
    if opened.kind != "original":
        return 1, RELEASE, None
    files = rank_files(opened.path)
    folder = files[0].parent
    if files[0].name == FILE_IN_RANK_FOLDER:
        folder = folder.parent
    saved = read_torch_file(files[0])
    step = saved.get("iteration") if isinstance(saved, dict) else None
    if match := _ITERATION.fullmatch(folder.resolve().name):
        return len(files), match[1], int(match[1])
    if type(step) is int and step >= 0 and folder.name != RELEASE:
        return len(files), str(step), step
    return len(files), RELEASE, step if type(step) is int else None


def _check(given: _Source, degree: int, bits: int | None, heads: int | None) -> None:
    if bits is not None and not is_glm130b(given.tensors):
        raise ArgumentError(
            f"bits={bits}, but {given.path} holds GLM-10B, whose code has no quantized files; "
            "leave the quantization out"
        )
    sizes = _sizes(given)
    heads = _heads(given, heads, sizes["hidden columns"])
    if heads is not None:
        sizes["attention heads"] = heads
    elif given.num_ranks % degree:  # otherwise whole ranks are merged, and every size divides
        raise ArgumentError(
            f"the number of heads of {given.path}, which degree={degree} has to divide, is "
            "unknown; give a configuration with num_attention_heads"
        )
    wrong = [f"{size} {what}" for what, size in sizes.items() if size % degree]
    if wrong:
        common = math.gcd(*sizes.values())
        accepted = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ArgumentError(
            f"degree={degree} does not divide the {' and the '.join(wrong)} of {given.path}; "
            f"accepted: {', '.join(accepted)}"
        )


def _sizes(given: _Source) -> dict[str, int]:
    """The sizes that are split across ranks, by what they count."""
    splits, sizes = given.splits, dict[str, int]()
    for name, stored in given.tensors.items():
        what = next((word for ending, word in _SIZES.items() if name.endswith(ending)), None)
        axis = splits[name].axis
        if what is not None and axis is not None:
            if len(stored.shape) != 2:
                raise CheckpointError(
                    f"{stored.where} has shape {stored.shape}; it should be a matrix"
                )
            sizes.setdefault(what, stored.shape[axis] // splits[name].num_fused)
    missing = [ending for ending, what in _SIZES.items() if what not in sizes]
    if missing:
        raise CheckpointError(f"{given.path} holds no {missing[0]!r}; fetch it again")
    return sizes


def _heads(given: _Source, heads: int | None, hidden_size: int) -> int | None:
    """The number of heads, as given or as inv_freq has it: half as many numbers as a head."""
    found = None
    for name, stored in given.tensors.items():
        if name.endswith(".inv_freq") and len(stored.shape) == 1 and stored.shape[0]:
            found = hidden_size // (2 * stored.shape[0]) or None
    if heads is None:
        return found
    if hidden_size % heads or heads != (found or heads):
        accepted = str(found) if found is not None else f"a divisor of {hidden_size}"
        raise ArgumentError(
            f"num_attention_heads={heads!r}; accepted for {given.path}: {accepted}, or None"
        )
    return heads


def _rank_tensors(
    given: _Source, rank: int, degree: int, bits: int | None
) -> Iterator[tuple[str, Stored]]:
    """(name, tensor) of all that the file of one rank will hold, none of them read."""
    splits = given.splits
    for name, whole in given.tensors.items():
        part = splits[name].part(whole, rank, degree)
        if bits is None or not _LINEAR.fullmatch(name):
            yield name, part
            continue
        if bits == 4 and part.shape[1] % 2:
            raise ArgumentError(
                f"{name!r} has {part.shape[1]} columns a rank with degree={degree}, and in 4 bits "
                "two columns share a byte; use another degree, or 8 bits"
            )
        yield name, _QuantizedRows(part, bits)
        yield f"{name}_scale", _QuantizedRows(part, bits, is_scale=True)


def _write(
    given: _Source, folder: Path, ranks: list[dict[str, Stored]], progress: Progress
) -> None:
    extra = {"mp_world_size": len(ranks)} if given.is_own_glm10b else {}
    if given.is_own_glm10b and given.step is not None:
        extra["iteration"] = given.step
    (folder / given.iteration).mkdir()
    for rank, tensors in enumerate(ranks):
        module = {name: Saved(stored) for name, stored in tensors.items()}
        path = folder / given.iteration / f"mp_rank_{rank:02d}_model_states.pt"
        write_torch_file(path, {"module": module, **extra}, progress)
    for tracker in TRACKERS if given.is_own_glm10b else [DEEPSPEED_TRACKER]:
        (folder / tracker).write_text(given.iteration)


@dataclass(frozen=True)
class _QuantizedRows(Sliced):
    """The codes, or the scales, of a matrix; it is quantized as it is read."""

    part: Stored
    bits: int
    is_scale: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        num_rows, num_columns = self.part.shape
        return (num_rows,) if self.is_scale else (num_rows, num_columns * self.bits // 8)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.is_scale else torch.int8

    @property
    def where(self) -> str:
        return self.part.where

    def read(self) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        make = row_scales if self.is_scale else _row_codes
        try:
            for start, rows in pieces(self.part):
                out[start : start + len(rows)] = make(rows, self.bits)
        except ArgumentError as error:
            raise CheckpointError(f"{self.where} cannot be quantized: {error}") from error
        return out

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        if axis != 0:
            raise ArgumentError(f"{self.where} is quantized by rows; ask for rows")
        return replace(self, part=self.part.rows(start, end))


def _row_codes(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize_rows(weight, bits)[0]
