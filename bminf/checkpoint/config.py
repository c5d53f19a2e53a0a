"""Configurations beside the weights: where they are found, and their fields, read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.stored import Stored
from bminf.checks import is_number
from bminf.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILES = ("config.json", "model_config.json")

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


def find_config(folder: Path, model_types: Collection[str | None]) -> Path | None:
    """The file of a configuration in the folder of a checkpoint, or in its parent.

    model_types: of models that it may be of; one of another model in the parent just happens to lie
    there.
    """
    beside = [folder.parent / name for name in CONFIG_FILES]
    for path in [*(folder / name for name in CONFIG_FILES), *beside]:
        if not path.is_file():
            continue
        if path not in beside or read_json(path).get("model_type") in (None, *model_types):
            return path
    return None


def as_mapping(config: Any) -> Mapping[str, Any] | None:
    """A configuration object as a mapping of its fields; None where it is not one."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)  # transformers' configurations
    return to_dict() if callable(to_dict) else None


_Config = TypeVar("_Config", bound="DataclassInstance")


class ConfigReader:
    """Reads fields of a configuration by any of their names, and says where one is wrong."""

    def __init__(self, source: Mapping[str, Any], where: str) -> None:
        self.source, self.where = source, where

    def native(self, kind: type[_Config]) -> _Config | None:
        """A configuration in our own dialect, every field of which is named; otherwise None."""
        names = {field.name for field in fields(kind)}
        return self.made(kind, **self.source) if set(self.source) == names else None

    def made(self, kind: type[_Config], **values: Any) -> _Config:
        try:
            return kind(**values)
        except ArgumentError as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def optional(self, *names: str) -> int | None:
        """A whole number above 0; None where none of the names is there, or it is null."""
        found: int | None = self._first(
            names, lambda n: type(n) is int and n > 0, "a whole number above 0 is needed"
        )
        return found

    def integer(self, *names: str) -> int:
        value = self.optional(*names)
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {' or '.join(names)}; give the configuration of this model "
                "as config=..."
            )
        return value

    def number(self, default: float, *names: str) -> float:
        found = self._first(
            names, lambda x: is_number(x) and 0 < x < 1, "a number between 0 and 1 is needed"
        )
        return default if found is None else float(found)

    def flag(self, *names: str) -> bool:
        return bool(
            self._first(names, lambda value: type(value) is bool, "true or false is needed")
        )

    def activation(self, default: str, *names: str) -> str:
        known = list(_ACTIVATIONS)
        found = [
            self._first([n], known.__contains__, f"accepted: {', '.join(known)}") for n in names
        ]
        return _ACTIVATIONS[next(filter(None, found), default)]

    def _first(self, names: Iterable[str], accepts: Callable[[Any], bool], needed: str) -> Any:
        """The first value of these names that is there and not null."""
        for name in names:
            value = self.source.get(name)
            if value is None:
                continue
            if not accepts(value):
                raise CheckpointError(f"{self.where}: {name} is {value!r}; {needed}")
            return value
        return None

    def must_be(self, name: str, *accepted: Any) -> Any:
        """The field's value. Raises CheckpointError for one that would need another model."""
        value = self.source.get(name)
        if value not in accepted:
            raise CheckpointError(
                f"{self.where}: {name} is {value!r}, which this library does not compute; "
                f"accepted: {', '.join(repr(choice) for choice in accepted)}"
            )
        return value


def num_layers_of(tensors: Mapping[str, Stored], list_name: str) -> int:
    """How many layers `tensors` has in a list such as "decoder.layers"."""
    pattern = re.compile(re.escape(list_name) + r"\.(\d+)\.")
    found = (pattern.match(name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match is not None), default=-1)


def rows_of(tensors: Mapping[str, Stored], name: str, default: int) -> int:
    """Where the tensor is missing, `default`: that it is will be said with all that is missing."""
    return tensors[name].shape[0] if name in tensors else default
