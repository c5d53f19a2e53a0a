"""What save() writes beside the weights of a model of transformers: bminf.json, and what it means.

The weights lie in bminf.safetensors, or in several files and an index, under the names that they
have in the model; each block is one run of bytes. A packed linear has the buffers of a
QuantizedLinear in place of its weight, a packed stack of experts those of a PackedStack. They are
not called model.safetensors, so that from_pretrained(), which knows no packed weights, finds none
instead of making up random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.folder import read_sharded, read_weights
from bminf.checkpoint.sealed import check_sealed, write_sealed
from bminf.checkpoint.stored import InFile, Sliced, Stored
from bminf.errors import ArgumentError, CheckpointError
from bminf.quantization.packed import Format

DESCRIPTION_FILE = "bminf.json"
WEIGHTS_FILE = "bminf.safetensors"
INDEX_FILE = "bminf.safetensors.index.json"
FORMAT_VERSION = 2  # of folders with packed experts; others are as of version 1

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class PackedLinear(Sliced):
    """A weight that is there packed, in place of which others take its shape.

    shape: of the weight as the model has it, (in_features, out_features) of a Conv1D; of a stack of
    experts it has three dimensions.   dtype: that it computes in.
    """

    form: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str = "a packed weight"

    def weight_name(self, name: str) -> str:
        """What the model calls the weight of what is called `name`: a stack is a parameter."""
        return name if len(self.shape) == 3 else f"{name}.weight"

    def read(self) -> torch.Tensor:
        raise CheckpointError(f"{self.where} is packed; load it as it was saved")

    def _slice(self, axis: int, start: int, end: int) -> Stored:
        raise CheckpointError(f"{self.where} is packed; load it as it was saved")


@dataclass(frozen=True)
class Description:
    """packed: by the names of the linears and stacks of experts."""

    packed: Mapping[str, PackedLinear] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """With hashes of all other files that are in the folder, but of weights."""
        packed = {
            name: {
                **linear.form.to_json(),
                "shape": list(linear.shape),
                "dtype": str(linear.dtype).removeprefix("torch."),
            }
            for name, linear in self.packed.items()
        }
        has_experts = any(len(linear.shape) == 3 for linear in self.packed.values())
        version = FORMAT_VERSION if has_experts else 1
        written = {"format": "bminf", "format_version": version, "packed": packed}
        beside = [path.name for path in folder.iterdir() if path.suffix != ".safetensors"]
        write_sealed(folder / DESCRIPTION_FILE, written, beside)


def is_saved(folder: Path) -> bool:
    """Whether save() has written a folder, of a model of transformers."""
    return (folder / DESCRIPTION_FILE).is_file()


def read_description(folder: Path) -> Description:
    """Raises CheckpointError for another version, for what is none, and for damaged files."""
    path = folder / DESCRIPTION_FILE
    fields = read_json(path)
    version, packed = fields.get("format_version"), fields.get("packed")
    if fields.get("format") != "bminf" or type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is no description of a saved model; save the model anew")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format_version {version}, and this library reads {FORMAT_VERSION}: a "
            "newer one wrote it; update bminf, or save the model anew"
        )
    check_sealed(path, fields)
    if not isinstance(packed, Mapping):
        raise CheckpointError(f'{path} has no object "packed"; save the model anew')
    return Description({name: _packed(name, given, path) for name, given in packed.items()})


def saved_tensors(folder: Path) -> dict[str, InFile]:
    """Name -> tensor of the files that save() has written.   Raises CheckpointError."""
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if index.is_file():
        return read_sharded(index)
    if not single.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; fetch it")
    return read_weights(single)


def _packed(name: str, given: Any, path: Path) -> PackedLinear:
    try:
        scale_bits = given.get("scale_bits", 16)
        form = Format(given["bits"], given["group_size"], given["has_minimum"], scale_bits)
        shape = tuple(given["shape"])
        is_matrix = len(shape) in (2, 3)  # or several
        if not is_matrix or not all(type(size) is int and size > 0 for size in shape):
            raise ArgumentError(f"shape is {given['shape']!r}")
        return PackedLinear(form, shape, _DTYPES[given["dtype"]], f"{name!r} in {path.parent}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: packed[{name!r}] is {given!r}, which says no format, shape and dtype "
            f"({error!r}); save the model anew"
        ) from error
