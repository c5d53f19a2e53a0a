"""The kernels for the CPU, kernels/cpu/, which `pip install` compiles where it finds a compiler.

They are one shared object with plain C functions, called through ctypes: no version of Python or
torch is built into it. What is compiled several times, for the instructions of several processors,
is called a level; the best that this processor has is chosen at the first use.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bminf.errors import ArgumentError, KernelError

PRODUCT = struct.Struct("=18q")
"""The fields of Product in kernels/cpu/product.h, in its order."""

MAX_ROWS = 16
"""Rows of activations in one product."""

_LIBRARY = Path(__file__).with_name("_kernels.so")
_LEVEL_VARIABLE = "BMINF_CPU_LEVEL"
_NO_LEVEL = "none"
_NO_MEMORY = "there is no memory for the activations of a product"
_REMEDY = (
    "products with packed weights on the CPU take torch's operations, which are several times "
    "slower; install a C++ compiler (g++ or clang) and then bminf again"
)

_INDEX, _PRODUCT = ctypes.c_int64, ctypes.c_char_p
_ARGUMENTS = {
    "bminf_cpu_product_bytes": [],
    "bminf_cpu_level_name": [_INDEX],
    "bminf_cpu_can_run": [_INDEX],
    "bminf_cpu_multiply": [_PRODUCT, _INDEX],
    "bminf_cpu_multiply_many": [_PRODUCT, _INDEX, _INDEX],
    "bminf_cpu_multiply_gated": [_PRODUCT, _PRODUCT, _INDEX, _INDEX],
    "bminf_cpu_unpack": [_PRODUCT, _INDEX],
}

logger = logging.getLogger("bminf")


@dataclass(frozen=True)
class CpuInfo:
    """What multiplies packed weights on this CPU.

    level: "avx512", "avx2" or "portable", how the kernels are compiled; "none" for torch's own
        operations.   num_threads: as torch.get_num_threads() says.
    library: the file of the kernels.   reason: why there is no level; None where there is one.
    """

    level: str
    num_threads: int
    library: str | None
    reason: str | None


@dataclass(frozen=True)
class Kernels:
    """The functions of one level. Each takes a PRODUCT, whose tensors the caller keeps alive;
    multiply_many some of them, of any sizes; multiply_gated those of gate and up, and the
    activation's place in ACTIVATION_FUNCTIONS."""

    level: str
    path: Path
    multiply: Callable[[bytes], None]
    multiply_many: Callable[[Sequence[bytes]], None]
    multiply_gated: Callable[[bytes, bytes, int], None]
    unpack: Callable[[bytes], None]


def cpu_info() -> CpuInfo:
    """The level of the CPU kernels, their threads and their file, or why they are not used."""
    found, reason = _found()
    return CpuInfo(
        level=_NO_LEVEL if found is None else found.level,
        num_threads=torch.get_num_threads(),
        library=None if found is None else str(found.path),
        reason=reason,
    )


@cache
def kernels() -> Kernels | None:
    """The kernels, or None where torch's operations are to be taken; says so once if they are
    missing.

    The environment variable BMINF_CPU_LEVEL names a level, or "none".
    Raises ArgumentError for a level that this processor, or this build, does not have.
    """
    found, reason = _found()
    if found is None and os.environ.get(_LEVEL_VARIABLE) != _NO_LEVEL:
        logger.warning("%s: %s", reason, _REMEDY)
    return found


@cache
def _found() -> tuple[Kernels | None, str | None]:
    """The kernels, or why there are none."""
    asked = os.environ.get(_LEVEL_VARIABLE) or None
    if asked == _NO_LEVEL:
        return None, f"{_LEVEL_VARIABLE}={_NO_LEVEL}"
    library, reason = _load(_LIBRARY)
    if library is None:
        if asked is not None:
            raise ArgumentError(f"{_LEVEL_VARIABLE}={asked!r}, but {reason}; accepted: none")
        return None, reason
    levels = levels_of(library)
    level = asked or next(iter(levels))
    if level not in levels:
        known = ", ".join([*levels, _NO_LEVEL])
        raise ArgumentError(f"{_LEVEL_VARIABLE}={asked!r}; this processor has: {known}")
    return at_level(library, level), None


def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library in `path`, or why there is none."""
    if not path.exists():
        return None, f"there is no {path}, the compiled kernels"
    try:
        return open_library(path), None
    except OSError as error:
        return None, f"{path} cannot be loaded ({error})"
    except KernelError as error:
        return None, str(error)


def open_library(path: Path) -> ctypes.CDLL:
    """The shared object of kernels/cpu/. Raises OSError, and KernelError for another version's."""
    library = ctypes.CDLL(str(path))
    has_functions = all(hasattr(library, name) for name in _ARGUMENTS)
    if not has_functions or library.bminf_cpu_product_bytes() != PRODUCT.size:
        raise KernelError(f"{path} is of another version of bminf; install bminf again")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int64
    library.bminf_cpu_level_name.restype = ctypes.c_char_p
    return library


def levels_of(library: ctypes.CDLL) -> dict[str, int]:
    """The levels that this processor can run, the best first, with their places in the library."""
    names: list[str] = []
    while (name := library.bminf_cpu_level_name(len(names))) is not None:
        names.append(name.decode())
    return {name: i for i, name in enumerate(names) if library.bminf_cpu_can_run(i)}


def at_level(library: ctypes.CDLL, level: str) -> Kernels:
    index = levels_of(library)[level]

    def multiply(product: bytes) -> None:
        if library_multiply(product, index):
            raise KernelError(_NO_MEMORY)

    def multiply_many(products: Sequence[bytes]) -> None:
        if library.bminf_cpu_multiply_many(b"".join(products), len(products), index):
            raise KernelError(_NO_MEMORY)

    def multiply_gated(gate: bytes, up: bytes, activation: int) -> None:
        if library_multiply_gated(gate, up, activation, index):
            raise KernelError(_NO_MEMORY)

    def unpack(product: bytes) -> None:
        if library_unpack(product, index):
            raise KernelError(f"the library has no level {level}")

    library_multiply, library_unpack = library.bminf_cpu_multiply, library.bminf_cpu_unpack
    library_multiply_gated = library.bminf_cpu_multiply_gated
    path = Path(library._name)
    return Kernels(level, path, multiply, multiply_many, multiply_gated, unpack)
