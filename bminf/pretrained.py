"""A model of transformers in a folder: its modules, and where each of its weights is to be read.

transformers itself builds the model, renames, merges and casts the weights, ties them and computes
the buffers that no file holds, as from_pretrained() does for everybody. But it is given tensors
that are not read yet, and so its results are not, either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.folder import open_checkpoint
from bminf.checkpoint.names import listed
from bminf.checkpoint.recorded import InMemory, Recorded
from bminf.checkpoint.stored import Stored
from bminf.description import (
    Description,
    PackedLinear,
    is_saved,
    read_description,
    saved_tensors,
)
from bminf.errors import ArgumentError, CheckpointError
from bminf.layout import tensors_of
from bminf.quantization.packed import PACKED_FIELDS, Format

CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Pretrained:
    """model: on the meta device, for inference, nothing packed.

    tensors: what each of its parameters and buffers reads as, by every name that it has in the
    model.   packed: formats of the linears and stacks of experts that are packed on disk, whose
    tensors are those of a QuantizedLinear or PackedStack instead; None in a folder that save() has
    not written.
    """

    path: Path
    model: Any
    tensors: Mapping[str, Stored]
    packed: Mapping[str, Format] | None = None


def is_pretrained(folder: Path) -> bool:
    """Whether a folder says which class of transformers it is of."""
    config = folder / CONFIG_FILE
    return config.is_file() and isinstance(read_json(config).get("architectures"), list)


def open_pretrained(
    folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Pretrained:
    """Build the model of a folder; nothing is read but names, shapes and configurations.

    dtype: of the weights; None is that of the configuration, or of the first weight.
    trust_remote_code: whether code in the folder may be run, as for from_pretrained().
    Raises ArgumentError where transformers is not installed, CheckpointError for a folder that
    does not hold all of a model that it knows.
    """
    transformers = _transformers()
    with torch.device("cpu"), torch.inference_mode(False), _without_progress(transformers):
        description = read_description(folder) if is_saved(folder) else None
        config = _config_of(transformers, folder, trust_remote_code)
        kind = _class_of(transformers, config, folder, trust_remote_code)
        if description is not None:
            return _open_saved(transformers, kind, config, folder, description, dtype)
        given = open_checkpoint(folder, []).tensors
        model = _built(transformers, kind, config, folder, given, dtype)
        return Pretrained(folder, model, _emptied(model, folder))


def _open_saved(
    transformers: Any,
    kind: Any,
    config: Any,
    folder: Path,
    description: Description,
    dtype: torch.dtype | None,
) -> Pretrained:
    """A folder that save() has written. Its tensors are taken as they are: what transformers would
    convert is converted already."""
    packed, held = description.packed, saved_tensors(folder)
    fields = {f"{name}.{key}" for name in packed for key in PACKED_FIELDS}
    weights = {linear.weight_name(name): linear for name, linear in packed.items()}
    given: dict[str, Stored] = {n: one for n, one in held.items() if n not in fields}
    given |= _instead(kind, weights, held)
    model = _built(transformers, kind, config, folder, given, dtype)
    if unexpected := sorted(given.keys() - {name for name, _, _ in tensors_of(model)}):
        raise CheckpointError(
            f"{folder} has unexpected tensors: {listed(unexpected)}; they are not of a "
            f"{kind.__name__} of this configuration"
        )
    read = _emptied(model, folder, given, keeps_dtype=dtype is None)
    tensors = {name: one for name, one in read.items() if name not in weights}
    tensors |= {name: held[name] for name in fields & held.keys()}
    return Pretrained(folder, model, tensors, {name: one.form for name, one in packed.items()})


def _instead(
    kind: Any, weights: Mapping[str, PackedLinear], held: Mapping[str, Stored]
) -> dict[str, Stored]:
    """What transformers is given in place of packed weights.

    Of a head that is tied where nothing is packed that is the embedding: it compares the two, and
    ties them; what is packed takes the head's place afterwards.
    """
    tied = getattr(kind, "_tied_weights_keys", None)
    sources = tied if isinstance(tied, Mapping) else {}
    found: dict[str, Stored] = dict(weights)
    for name, linear in weights.items():
        source = held.get(sources.get(name, ""))
        if source is not None and source.shape == linear.shape:
            found[name] = source
    return found


def tokenizer_in(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, None where it has none.   Raises CheckpointError for a bad one."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with _as_checkpoint_error(f"the tokenizer in {folder} cannot be loaded"):
        return _transformers().AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            "the folder holds a model of transformers, which is not installed; "
            "pip install transformers"
        ) from error
    return transformers


def _config_of(transformers: Any, folder: Path, trust_remote_code: bool) -> Any:
    fields = read_json(folder / CONFIG_FILE)  # whose errors name the file
    what = (
        f"{folder / CONFIG_FILE} is of no model that transformers {transformers.__version__} knows"
    )
    has_code = "auto_map" in fields and not trust_remote_code
    with _as_checkpoint_error(what, _TRUST if has_code else _COMPLETE):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise CheckpointError(
            f"the weights in {folder} are quantized already ({method}), which bminf.load() "
            "does not read; load the original, or load this one with transformers"
        )
    return config


def _class_of(transformers: Any, config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The class that a configuration names: of transformers, or of the folder if it is trusted."""
    name = next(iter(getattr(config, "architectures", None) or []), None)
    if trust_remote_code:
        references = (getattr(config, "auto_map", None) or {}).values()
        for reference in (one for one in references if isinstance(one, str)):
            if reference.rpartition(".")[2] == name:
                from transformers.dynamic_module_utils import get_class_from_dynamic_module

                with _as_checkpoint_error(f"the code of {name} in {folder} cannot be used"):
                    return get_class_from_dynamic_module(reference, folder)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: architectures is {getattr(config, 'architectures', None)!r}, "
            f"no class of transformers {transformers.__version__}; name the class that the weights "
            "were saved from, or give trust_remote_code=True if its code is in the folder"
        )
    return kind


def _built(
    transformers: Any,
    kind: Any,
    config: Any,
    folder: Path,
    given: Mapping[str, Stored],
    dtype: torch.dtype | None,
) -> Any:
    with _as_checkpoint_error(f"the weights in {folder} do not fit a {kind.__name__}"):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: Recorded(stored) for name, stored in given.items()},
            dtype="auto" if dtype is None else dtype,
            generation_config=_generation_config(transformers, kind, folder),
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"for a {kind.__name__}, {folder} lacks {listed(missing)}; see whether the checkpoint "
            "is complete, and whether the configuration is that of the checkpoint"
        )
    model.config.name_or_path = str(folder)
    return model


def _generation_config(transformers: Any, kind: Any, folder: Path) -> Any:
    """That of the folder; without a file of its own, what the configuration says of it."""
    if not kind.can_generate():
        return None
    if (folder / _GENERATION_FILE).is_file():
        return transformers.GenerationConfig.from_pretrained(folder)
    return transformers.GenerationConfig.from_pretrained(
        folder, config_file_name=CONFIG_FILE, _from_model_config=True
    )


def _emptied(
    model: torch.nn.Module,
    folder: Path,
    saved: Mapping[str, Stored] | None = None,
    keeps_dtype: bool = False,
) -> dict[str, Stored]:
    """Put all tensors of `model` on the meta device; what they read as, by name.

    saved: in place of what transformers made of them.   keeps_dtype: whether in their own dtype.
    """
    tensors: dict[str, Stored] = {}
    made: dict[int, tuple[Stored, torch.Tensor]] = {}  # tied ones stay one object
    for name, place, tensor in tensors_of(model):
        if id(tensor) not in made:
            stored = (saved or {}).get(name) or _stored_of(name, tensor, folder)
            if not keeps_dtype:
                stored = Recorded(stored).to(tensor.dtype).stored  # type: ignore[attr-defined]
            meta: Any = torch.empty(tensor.shape, dtype=stored.dtype, device="meta")
            if place.is_parameter:
                meta = torch.nn.Parameter(meta, requires_grad=tensor.requires_grad)
            made[id(tensor)] = stored, meta
        tensors[name], renewed = made[id(tensor)]
        place.set(renewed)
    return tensors


def _stored_of(name: str, tensor: torch.Tensor, folder: Path) -> Stored:
    if isinstance(tensor, Recorded):
        return tensor.stored
    if tensor.is_meta:
        raise CheckpointError(f"{folder} has no values for {name!r}; fetch it again")
    return InMemory(tensor.detach(), repr(name))  # a buffer that transformers has computed


_COMPLETE = (
    "see whether the folder is complete, and whether this version of transformers is the one that "
    "it was made for"
)
_TRUST = "give trust_remote_code=True to run the code that the folder brings, if you trust it"


@contextmanager
def _as_checkpoint_error(what: str, remedy: str = _COMPLETE) -> Iterator[None]:
    """Errors of transformers say what is wrong in a folder, by whatever class."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {_reason(error)}; {remedy}") from error


def _reason(error: Exception) -> str:
    """The line that says what is wrong, of several."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "ignore_mismatched_sizes" in lines[0]:  # advice about an option that load() has not
        return "some of them have other shapes than config.json says"
    return " ".join(map(str.strip, lines[: 2 if lines[0].endswith(":") else 1]))


@contextmanager
def _without_progress(transformers: Any) -> Iterator[None]:
    """Its bar would show weights as loaded before any is read."""
    logging = transformers.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
