"""save(model, folder): a model of transformers or of the zoo, packed as it is."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.folder import Progress, atomic_folder, require_empty, write_weights
from bminf.checkpoint.stored import strides_of
from bminf.description import WEIGHTS_FILE, Description, PackedLinear
from bminf.errors import ArgumentError, BMInfError, UnsupportedModelError
from bminf.keywords import known_keywords
from bminf.layers.embedding import HostEmbedding
from bminf.layers.experts import PackedStack
from bminf.layers.parallel import RowParallel
from bminf.layers.quantized_linear import QuantizedLinear, was_conv1d
from bminf.layers.saving import PART
from bminf.layout import Chunk, Layout, TensorSpec, tensors_of
from bminf.models import LanguageModel
from bminf.models.convert import TABLE, layout_of_table, write_config
from bminf.models.convert import WEIGHTS_FILE as SINGLE_FILE
from bminf.models.source import HEAD, vocabulary_files
from bminf.offload.blocks import find_blocks
from bminf.offload.hooks import ATTRIBUTE, Scheduler
from bminf.pretrained import open_pretrained
from bminf.units import parse_bytes
from bminf.wrapping import plan_of

_METADATA = {"format": "pt"}
_TABLE_ROWS = 1024


@known_keywords
def save(
    model: torch.nn.Module | LanguageModel,
    folder: str | Path,
    tokenizer: Any = None,
    max_shard_size: int | float | str = "5GB",
) -> Path:
    """Write a model of transformers, wrapped or not, or one of the zoo, for bminf.load() to take.

    What is packed stays so, and what is streamed is read from where it waits; some of the model is
    in memory at a time. Configuration and generation settings go along.

    folder: one that does not exist yet, or is empty; it appears when it is complete.
    tokenizer: one of transformers; None is the model's own attribute `tokenizer`, if it has one.
    max_shard_size: bytes, or "5GB": above this the weights are several files, of whole blocks.
    Returns the folder.   Raises ArgumentError, with nothing written, for a model that would not
    load again: one of another library, with adapters, or of other tensors than its configuration.
    """
    if not isinstance(folder, str | Path):
        raise ArgumentError(f"folder is a {type(folder).__name__}; give a path")
    shard_bytes = int(parse_bytes(max_shard_size, "max_shard_size"))
    target = require_empty(Path(folder).expanduser().absolute())
    if isinstance(model, LanguageModel):
        _check_is_whole(getattr(model, "model", None))
        return _save_of_zoo(model, target, tokenizer, shard_bytes)
    _check_model(model)
    _check_is_whole(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tensors, scheduler = _tensors_of(model), model.__dict__.get(ATTRIBUTE)
    plan = plan_of(model)
    blocks = [b.name for b in (find_blocks(model, None) if plan is None else plan.blocks)]
    layouts = _layouts(model, tensors, blocks)
    with atomic_folder(target, sum(x.nbytes for x in layouts.values()), "saving") as (at, progress):
        read = _reader(layouts, tensors, progress, scheduler)
        write_weights(at / WEIGHTS_FILE, layouts, read, _METADATA, shard_bytes)
        _write_settings(model, tokenizer, at)
        _describe(model).write(at)
        try:
            open_pretrained(at)
        except BMInfError as error:
            raise ArgumentError(
                f"this {type(model).__name__} would not load again: {error}; save one as its "
                "class makes it, without adapters and of the sizes of its configuration"
            ) from error
    return target


def _check_is_whole(network: torch.nn.Module | None) -> None:
    """None is that of a model that was closed.   Raises UnsupportedModelError for a rank's part."""
    modules = () if network is None else network.modules()
    if any(isinstance(module, RowParallel) for module in modules):
        raise UnsupportedModelError(PART)


def _save_of_zoo(model: LanguageModel, target: Path, tokenizer: Any, shard_bytes: int) -> Path:
    """In the layout of bminf convert."""
    if tokenizer is not None:
        raise ArgumentError("tokenizer is for models of transformers; leave it out")
    plan, network = model.plan, model.model  # the plan raises for one that is closed
    files = vocabulary_files(model._architecture, model.tokenizer)
    tensors = _tensors_of(network)
    layouts = _layouts(network, tensors, [block.name for block in plan.blocks])
    tables = [one for one in network.modules() if isinstance(one, HostEmbedding)]
    if tables and model._packing.of(f"{HEAD}0") is not None:  # or the head stands for both
        shape = (tables[0].num_rows, tables[0].hidden_size)
        layouts |= layout_of_table(shape, tables[0].table_dtype)
    nbytes = sum(layout.nbytes for layout in layouts.values())
    with atomic_folder(target, nbytes, "saving") as (folder, progress):
        read = _reader(layouts, tensors, progress, network.__dict__.get(ATTRIBUTE))

        def chunks(block: str) -> Iterable[Chunk]:
            if block != TABLE:
                return read(block)
            return (("weight", rows, first) for first, rows in tables[0].pieces(_TABLE_ROWS))

        write_weights(folder / SINGLE_FILE, layouts, chunks, _METADATA, shard_bytes)
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        write_config(
            folder, model._architecture, model.config, model._packing, model.tokenizer, files
        )
    return target


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; give a model of transformers")
    is_known = type(model).__module__.startswith("transformers.") and hasattr(model, "config")
    if not is_known or getattr(model, "hf_quantizer", None) is not None:
        raise ArgumentError(
            f"a {type(model).__name__} of {type(model).__module__} cannot be saved; accepted: a "
            "model whose class is in transformers, with weights that no other library has packed"
        )


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved, in the order of the modules: of tied tensors the first."""
    held = model.state_dict(keep_vars=True)  # streamed ones are read one by one
    first: dict[int, str] = {}
    for name, _, tensor in tensors_of(model):
        first.setdefault(id(tensor), name)
    kept = set(first.values())
    return {name: tensor for name, tensor in held.items() if name in kept}


def _layouts(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, Layout]:
    """That of each block, as load() lays it out, and of what lies outside, "", before them."""
    parts: dict[str, dict[str, TensorSpec]] = {"": {}, **{name: {} for name in names}}
    tied = _tied(model)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        spec = TensorSpec(shape, strides_of(shape), tensor.dtype)
        block = "" if name in tied else next((n for n in names if name.startswith(f"{n}.")), "")
        parts[block][name.removeprefix(f"{block}.") if block else name] = spec
    return {name: Layout.of(part, keep_addresses=False) for name, part in parts.items()}


def _tied(model: torch.nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, _, tensor in tensors_of(model):
        names.setdefault(id(tensor), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _reader(
    layouts: Mapping[str, Layout],
    tensors: Mapping[str, torch.Tensor],
    progress: Progress,
    scheduler: Scheduler | None,
) -> Callable[[str], Iterable[Chunk]]:
    def read(block: str) -> Iterator[Chunk]:
        for name in layouts[block].specs:
            tensor = tensors[_joined(block, name)]
            if scheduler is None:
                yield name, tensor.detach().cpu()
            elif not tensor.dim():
                yield from ((name, value) for _, value in scheduler.pieces(tensor))
            else:
                yield from ((name, rows, at) for at, rows in scheduler.pieces(tensor))
            progress(tensor.nbytes)

    return read


def _describe(model: torch.nn.Module) -> Description:
    packed = {
        name: PackedLinear(module.form, _shape_of(module), module.dtype)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear | PackedStack)
    }
    return Description(packed)


def _shape_of(linear: QuantizedLinear | PackedStack) -> tuple[int, ...]:
    """Of the weight that it was packed from."""
    if isinstance(linear, PackedStack):
        return linear.shape
    shape = (linear.out_features, linear.in_features)
    return shape[::-1] if was_conv1d(linear) else shape


def _write_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    try:
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"the settings of this {type(model).__name__} cannot be saved: {error}; "
            "correct its configuration, generation_config or tokenizer"
        ) from error


def _joined(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name
