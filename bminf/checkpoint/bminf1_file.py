"""The checkpoint.pt of BMInf 1.x: a tree of layers with their parameters, little-endian.

    layer     := u32 number of parameters, u32 number of layers in it,
                 as many (string, parameter), as many (string, layer)
    string    := u32 bytes, UTF-8
    parameter := u8 dimensions, u32 each, u32 bytes, u8 dtype (0 int8, 1 float16), the data

There is no magic number: whether a file is one shows only where every length fits.

Source: BMInf 1.0.2, bminf/core/layer.py.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.stored import InFile, contiguous
from bminf.checkpoint.torch_file import STARTS
from bminf.errors import CheckpointError

_DTYPES = (torch.int8, torch.float16)
_MAX_DEPTH = 16
_MAX_DIMENSIONS = 8
_MAX_NAME_BYTES = 1024
_MIN_PARAMETER_BYTES = 4 + 1 + 4 + 1  # with an empty name and no dimension
_MIN_LAYER_BYTES = 4 + 8


def read_bminf1(path: Path) -> dict[str, InFile]:
    """Dotted name -> tensor, in the order of the file.

    Raises CheckpointError, at the first length that does not fit, for a file that is anything else.
    """
    file = BinaryFile(path)
    if file.at(0, min(4, file.nbytes), "its beginning").startswith(STARTS):
        raise CheckpointError(
            f"{path} was written by torch.save, not by BMInf 1.x; name it pytorch_model.bin "
            "if its names are Hugging Face's, pytorch_model.pt if they are ModelCenter's"
        )
    tree = _Tree(file)
    tree.read_layer("", 0)
    if tree.position != tree.file.nbytes or not tree.found:
        raise tree.damaged(f"its tree of layers ends at byte {tree.position}")
    return tree.found


class _Tree:
    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.position = 0
        self.found: dict[str, InFile] = {}

    def read_layer(self, prefix: str, depth: int) -> None:
        num_parameters, num_layers = self._numbers("<2I")
        left = self.file.nbytes - self.position
        min_bytes = num_parameters * _MIN_PARAMETER_BYTES + num_layers * _MIN_LAYER_BYTES
        if min_bytes > left or depth > _MAX_DEPTH:
            raise self.damaged(
                f"layer {prefix!r} has {num_parameters} parameters and {num_layers} layers "
                f"at depth {depth} in {left} bytes"
            )
        for _ in range(num_parameters):
            self._read_parameter(f"{prefix}{self._name()}")
        for _ in range(num_layers):
            self.read_layer(f"{prefix}{self._name()}.", depth + 1)

    def _read_parameter(self, name: str) -> None:
        (num_dimensions,) = self._numbers("<B")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self.damaged(f"{name!r} has {num_dimensions} dimensions")
        *shape, nbytes, code = self._numbers(f"<{num_dimensions}IIB")
        if code >= len(_DTYPES) or math.prod(shape) * _DTYPES[code].itemsize != nbytes:
            raise self.damaged(f"{name!r} has shape {shape}, dtype {code} and {nbytes} bytes")
        if name in self.found:
            raise self.damaged(f"{name!r} comes twice")
        self.file.check(self.position, nbytes, f"the tensor {name!r}")
        self.found[name] = contiguous(self.file, self.position, shape, _DTYPES[code], name)
        self.position += nbytes

    def _name(self) -> str:
        (nbytes,) = self._numbers("<I")
        if not 0 < nbytes <= _MAX_NAME_BYTES:
            raise self.damaged(f"a name has {nbytes} bytes")
        try:
            return self._take(nbytes).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a name is not UTF-8") from error

    def _numbers(self, format_: str) -> tuple[int, ...]:
        return struct.unpack(format_, self._take(struct.calcsize(format_)))

    def _take(self, count: int) -> bytes:
        data = self.file.at(self.position, count, "a layer of BMInf 1.x")
        self.position += count
        return data

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path} is no checkpoint of BMInf 1.x, or is damaged: {why} "
            f"(file of {self.file.nbytes} bytes); fetch it again"
        )
