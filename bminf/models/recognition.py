"""Which model of the zoo is in a folder, if it was not named, and what it is if none of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bminf.arch import registry
from bminf.arch.architecture import Architecture
from bminf.arch.gpt import CPM1
from bminf.arch.t5 import is_t5
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import listed
from bminf.errors import ArgumentError, CheckpointError

_CPM1_VOCABULARIES = ("*.model", "vocab.txt")


def architectures_for(source: str | Path, model: str | None) -> list[Architecture] | None:
    """Those that a folder or hub id may be of; None where only its files can tell.

    model: the name of one.   Raises ArgumentError for a name or a hub id that is not known.
    """
    if model is not None:
        named = registry.named(model)
        if named is None:
            names = ", ".join(one.name for one in registry.ARCHITECTURES)
            raise ArgumentError(f"model={model!r}; accepted: {names}")
        return [named]
    downloaded = [one for one in registry.ARCHITECTURES if str(source) in one.hub_ids]
    if not downloaded and not Path(source).expanduser().exists():
        raise ArgumentError(f"there is no {str(source)!r}; for a hub id, say which model= it is")
    return downloaded or None


def recognized(opened: Checkpoint, has_tokenizer: bool = False) -> Architecture:
    """The only architecture that names, shapes and vocabulary of a checkpoint match.

    has_tokenizer: whether one is given that is not in the folder.
    Raises ArgumentError where the user has to say it, CheckpointError for another model than these.
    """
    architecture = registry.detect(opened)
    _check_in_zoo(opened, architecture)
    if architecture is None:
        raise ArgumentError(
            f"{opened.path} may hold CPM-2 or EVA, whose tensors have the same names; "
            'say model="cpm2" or model="eva"'
        )
    if architecture is CPM1 and opened.kind == "huggingface" and not has_tokenizer:
        _check_vocabulary_of_cpm1(opened)
    return architecture


def _check_in_zoo(opened: Checkpoint, architecture: Architecture | None) -> None:
    """Raise CheckpointError, saying what it is, for a model that the zoo does not have."""
    titles = ", ".join(known.title for known in registry.ARCHITECTURES)
    if opened.kind == "bminf":
        if architecture is None:
            name = read_json(opened.path / "config.json").get("model")
            raise CheckpointError(
                f"{opened.path} holds {name!r}, none of the models here ({titles})"
            )
        return
    config = _config(opened)
    model_type = config.get("model_type")
    has_names = architecture is not None or is_t5(opened)
    if has_names and (model_type is None or _goes_with(config, architecture)):
        return
    made = ""
    if architecture is None and has_names:
        made = '; if it was made from CPM-2 or EVA, say which: model="cpm2" or "eva"'
    raise CheckpointError(
        f"{opened.path} holds {_described(config, opened)}, which is none of the models here "
        f"({titles}). {_ADVICE}{made}"
    )


def _goes_with(config: Mapping[str, Any], architecture: Architecture | None) -> bool:
    if architecture is None:
        return False
    named = config.get("architectures")
    if architecture.classes and named and not {*architecture.classes} & {*named}:
        return False  # one with the same names, and another head
    return not architecture.has_generic_names or config["model_type"] == architecture.model_type


_ADVICE = (
    "A model of transformers is known by a config.json that names its class under "
    '"architectures": bminf.load(folder, memory_limit=...) runs it under a limit then, and '
    "bminf.wrapper(model, memory_limit=...) one that is loaded already"
)


def _check_vocabulary_of_cpm1(opened: Checkpoint) -> None:
    """Raise CheckpointError where nothing tells CPM-1 from any other GPT-2."""
    folders = (opened.path, opened.path.parent)
    if any(next(folder.glob(name), None) for folder in folders for name in _CPM1_VOCABULARIES):
        return
    raise CheckpointError(
        f"{opened.path} holds {_described(_config(opened), opened)}, and there is no tokenizer for "
        "cpm1: looked for spiece.model, chinese_vocab.model, *.model, vocab.txt in it and in its "
        "parent. If it is CPM-1, put the file there, or give tokenizer=..., its path. If it is "
        f"another GPT-2, it is none of the models here. {_ADVICE}"
    )


def _config(opened: Checkpoint) -> Mapping[str, Any]:
    path = registry.config_in(opened.path) if opened.kind == "huggingface" else None
    return {} if path is None else read_json(path)


def _described(config: Mapping[str, Any], opened: Checkpoint) -> str:
    """The class and the model_type of a configuration; without any, what tensors are called."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else config.get("_class_name")
    if name is not None and model_type is not None:
        return f"a {name} (model_type {model_type!r})"
    if name is not None or model_type is not None:
        return f"a {name}" if name is not None else f"a model of the model_type {model_type!r}"
    return f"a model with tensors called {listed(opened.tensors)}"
