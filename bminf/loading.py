"""load(folder, memory_limit=...): a model from its files straight to where the plan wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bminf import models
from bminf.arch import registry
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.stored import Stored, Transposed
from bminf.checks import check_bool
from bminf.description import is_saved, read_description
from bminf.errors import ArgumentError, CheckpointError
from bminf.keywords import known_keywords
from bminf.layers.quantize import (
    HEAD_FORMAT,
    Predicate,
    Replacements,
    install,
    warn_of_unquantized,
)
from bminf.layers.quantized_linear import is_conv1d
from bminf.layers.saving import refuse_to_save
from bminf.layout import tensors_of
from bminf.models import LanguageModel
from bminf.models.assemble import dtype_for
from bminf.models.recognition import architectures_for, recognized
from bminf.models.source import HUB_ID, download
from bminf.offload.backends import backend_for, free_budget, host_budget
from bminf.offload.hooks import Scheduler
from bminf.offload.reading import Contents
from bminf.offload.start import start_from_files
from bminf.offload.unregistered import warn_of_unregistered
from bminf.pretrained import CONFIG_FILE, Pretrained, is_pretrained, open_pretrained, tokenizer_in
from bminf.quantization.packed import INT8, PACKED_FIELDS, Format, is_asked_for, parse_format
from bminf.units import parse_bytes
from bminf.wrapping import Options, Request

_AUTO = "auto"
_ACCEPTED = "a folder with a checkpoint, or a hub id"
_PARTS = (".json", ".safetensors", ".bin")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@known_keywords
def load(
    checkpoint: str | Path,
    memory_limit: int | float | str | None = None,
    quantization: bool | str | Format | None = _AUTO,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    max_length: int | None = None,
    max_batch_size: int = 1,
    offload_dir: str | Path | None = None,
    *,
    model: str | None = None,
    config: Any = None,
    tokenizer: Any = None,
    reserve: int | float | str = 0,
    blocks: Iterable[str] | None = None,
    uses: Mapping[str, float] | None = None,
    quantize: Predicate | None = None,
    prefetch_experts: bool = False,
    deterministic: bool = False,
    fused_kernels: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """The model in a folder, within `memory_limit`, without ever holding all of it as it was saved.

    A model of transformers comes back as wrapper() would return it, with `tokenizer`, that of the
    folder or None; one of the zoo as its class in bminf.models, which has more settings.

    checkpoint: a folder that bminf.save() has written; one of transformers, of save_pretrained() or
        from the hub; one in any layout of a model of the zoo; or a hub id, which is downloaded.
    memory_limit, device, max_length, max_batch_size, offload_dir: as for wrapper(); for a model of
        the zoo, as for its class.
    quantization: as for wrapper(); "auto" is "int8", for a model of the zoo the default of its
        class, and for a folder of bminf.save() or convert() as it was written. Packed weights stay
        as they are.
    dtype: of what is not packed; None is that of the checkpoint, or for a model of the zoo float16
        on a GPU and float32 on the CPU.
    model: which one of the zoo, where files do not tell: "cpm2" or "eva"; "bloom" for that of the
        zoo where a folder would give that of transformers.
    config: for a model of the zoo, see bminf.models.LanguageModel.
    tokenizer: in place of that of the folder; for a model of the zoo, as for its class.
    reserve, blocks, uses, quantize, prefetch_experts: as for wrapper(); not for models of the zoo.
    deterministic: for a model of the zoo, see bminf.models.LanguageModel; for one of transformers
        give it to bminf.Engine.
    fused_kernels: for a model of the zoo, see bminf.models.LanguageModel.
    trust_remote_code: True lets transformers run the code that a folder brings with it.

    Some rows of one tensor are in memory at a time, beside what is loaded; where transformers
    merges tensors, as it does with experts, those of one are.
    Raises ArgumentError, BudgetError, CheckpointError, OffloadError or UnsupportedModelError, and
    nothing stays loaded.
    """
    check_bool("prefetch_experts", prefetch_experts)
    kind, path = zoo_class(checkpoint, model, tokenizer is not None, trust_remote_code)
    folder = path.parent if path.is_file() else path
    if kind is models.BLOOM and model is None and is_pretrained(folder):
        kind, path = None, folder  # which transformers has, too
    if kind is not None:
        _check_not_given(
            f"models of transformers, and {path} holds one of {kind.__name__}",
            reserve=reserve, blocks=blocks, uses=uses, quantize=quantize,
            prefetch_experts=prefetch_experts,
        )  # fmt: skip
        is_default = quantization is True or (quantization == _AUTO and not _is_unpacked(path))
        asked = None if quantization == _AUTO else quantization
        more: dict[str, Any] = {} if is_default else {"quantization": asked}
        return kind(
            path, memory_limit, dtype=dtype, device=device, max_length=max_length,  # type: ignore
            max_batch_size=max_batch_size, config=config, tokenizer=tokenizer,
            offload_dir=offload_dir, deterministic=deterministic, fused_kernels=fused_kernels,
            **more,
        )  # fmt: skip
    _check_not_given(
        f"models of bminf.models, and {path} holds one of transformers",
        config=config, deterministic=deterministic, fused_kernels=not fused_kernels or None,
    )  # fmt: skip
    if is_saved(path):
        read_description(path)  # which compares all small files, before any is used
    found = tokenizer_in(path, trust_remote_code) if tokenizer is None else None
    options = Options(quantization, blocks, uses, quantize, reserve, max_length, max_batch_size)
    weights_dtype = None if dtype is None else dtype_for(dtype, "cpu")
    loaded = _load_pretrained(
        path, options, memory_limit, weights_dtype, device, offload_dir, trust_remote_code,
        prefetch_experts,
    )  # fmt: skip
    loaded.tokenizer = found if tokenizer is None else tokenizer
    return loaded


def zoo_class(
    checkpoint: str | Path,
    model: str | None = None,
    has_tokenizer: bool = False,
    trust_remote_code: bool = False,
) -> tuple[type[LanguageModel] | None, Path]:
    """The class of a checkpoint of the zoo, None of a model of transformers; and its folder.

    model, trust_remote_code: see load().   has_tokenizer: whether one is given.
    Raises as load().
    """
    published = [one for one in registry.ARCHITECTURES if str(checkpoint) in one.hub_ids]
    path = _folder(checkpoint, trust_remote_code)
    if is_saved(path):
        return None, path
    try:
        named = published if model is None else architectures_for(path, model)
        found = named[0] if named else recognized(registry.checkpoint_in(path), has_tokenizer)
    except CheckpointError:
        # A file of a folder of transformers stands for it, as for models of the zoo.
        folder = path.parent if path.suffix in _PARTS and path.is_file() else path
        if is_pretrained(folder):
            return None, folder
        raise
    return next(kind for kind in _zoo() if found in kind._architectures), path


def _zoo() -> list[type[LanguageModel]]:
    """The classes of the built-in models."""
    public = (getattr(models, name) for name in models.__all__)
    kinds = [one for one in public if isinstance(one, type) and issubclass(one, LanguageModel)]
    return [kind for kind in kinds if kind is not LanguageModel]


def _load_pretrained(
    folder: Path,
    options: Options,
    memory_limit: int | float | str | None,
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    offload_dir: str | Path | None,
    trust_remote_code: bool,
    prefetch_experts: bool,
) -> Any:
    limit = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
    backend = backend_for(device)
    opened = open_pretrained(folder, dtype, trust_remote_code)
    options, model = _with_packing(options, opened), opened.model
    request = Request(model, options, backend.device.type, keep_addresses=False)
    budget = free_budget(backend.device) if limit is None else limit
    the_plan = request.plan(budget, host_budget(backend.device), backend.device, limit is None)
    warn_of_unregistered(request.unregistered, request.blobs.nbytes, stacklevel=4)
    if request.format is not None and options.packed is None:
        warn_of_unquantized(model, request.blocks, request.choice, stacklevel=4)
    tensors = _with_replacements(model, opened.tensors, request.choice.replacements)
    _check_shapes(model, tensors, folder)
    # Where unwrap() brings the weights, as if the model had been loaded before it was wrapped.
    scheduler = Scheduler(the_plan, backend, torch.device("cpu"), prefetch_experts)
    start_from_files(Contents(model, request.blobs, tensors), scheduler, offload_dir)
    if request.choice.replacements:
        refuse_to_save(model)
    return model


def _with_packing(options: Options, opened: Pretrained) -> Options:
    """`options` with what is packed on disk, which is taken as it is.

    Raises ArgumentError where something else was asked for.
    """
    is_auto = isinstance(options.quantization, str) and options.quantization == _AUTO
    if not opened.packed:  # nothing is
        default = True if opened.packed is None else None
        return replace(options, quantization=default) if is_auto else options
    found = Counter(opened.packed.values())
    (usual, _), *_ = found.most_common()
    asked = None if is_auto else parse_format(options.quantization, default=INT8)
    in_4_bits = asked is not None and asked.bits < HEAD_FORMAT.bits
    of_blocks = [one for one in found if not (in_4_bits and one == HEAD_FORMAT)] or list(found)
    if not is_auto and not all(is_asked_for(one, asked) for one in of_blocks):
        raise ArgumentError(
            f"quantization is {options.quantization!r}, but {opened.path} is packed as "
            f"{' and '.join(sorted(map(str, found)))}; leave quantization out, or load the original"
        )
    if options.quantize is not None:
        raise ArgumentError(
            f"quantize= chooses what is packed, and {opened.path} is packed already; leave it out"
        )
    return replace(options, quantization=usual, packed=opened.packed)


def _check_shapes(model: torch.nn.Module, tensors: Mapping[str, Stored], folder: Path) -> None:
    """Raise CheckpointError where what is read is of other shapes, or of another kind, than what
    kernels will take it for."""
    for name, _, tensor in tensors_of(model):
        linear, _, key = name.rpartition(".")
        is_packed = key in PACKED_FIELDS
        if is_packed and (f"{linear}.weight" in tensors or linear in tensors):
            continue  # it is packed as it is read
        stored = tensors.get(name)
        is_alike = stored is not None and stored.shape == tuple(tensor.shape)
        if stored is None or not is_alike or (is_packed and stored.dtype != tensor.dtype):
            found = "missing" if stored is None else f"{stored.dtype} {stored.shape}"
            raise CheckpointError(
                f"{name!r} in {folder} is {found}; a {type(model).__name__} of this configuration "
                f"has {tensor.dtype} {tuple(tensor.shape)}: it is of another model, or damaged"
            )


def _with_replacements(
    model: torch.nn.Module, tensors: Mapping[str, Stored], replacements: Replacements
) -> Mapping[str, Stored]:
    """`tensors` of the model with packed linears in place of others."""
    replaced = install(model, replacements)
    weights = {f"{name}.weight": module for name, module in replaced.items()}
    is_packed = {name: name not in tensors for name in weights}  # on disk
    transposed = [n for n, module in weights.items() if is_conv1d(module) and not is_packed[n]]
    return {**tensors, **{name: Transposed(tensors[name]) for name in transposed}}


def _folder(checkpoint: str | Path, trust_remote_code: bool) -> Path:
    if not isinstance(checkpoint, str | Path):
        raise ArgumentError(f"checkpoint is a {type(checkpoint).__name__}; give {_ACCEPTED}")
    path = Path(checkpoint).expanduser().absolute()
    if str(checkpoint) and path.exists():
        return path
    if not isinstance(checkpoint, str) or not HUB_ID.fullmatch(checkpoint):
        raise CheckpointError(f"there is no {str(checkpoint)!r}; give {_ACCEPTED}")
    patterns = (*_HUB_FILES, "*.py") if trust_remote_code else _HUB_FILES
    found = download(checkpoint, _ACCEPTED, patterns)
    if any(found.glob("*.safetensors")):
        return found
    return download(checkpoint, _ACCEPTED, (*patterns, "*.bin"))


def _is_unpacked(path: Path) -> bool:
    """Whether a folder that save() or convert() wrote of a model of the zoo has nothing packed."""
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    fields = read_json(config) if config.is_file() else {}
    is_packed = fields.get("quantization") is not None or bool(fields.get("exceptions"))
    return fields.get("format") == "bminf" and not is_packed


def _check_not_given(others: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and value != 0:
            raise ArgumentError(f"{name} is for {others}; leave it out")
