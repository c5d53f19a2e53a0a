"""The text of a kernel as the compiler gets it: macros, common.cuh and the file, in one piece."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from bminf.errors import KernelError

if TYPE_CHECKING:  # sources are compiled where there is no torch, too
    import torch

Argument: TypeAlias = "torch.Tensor | int | float | None"
"""A tensor is passed as its address, None as a null pointer, numbers as 32 bits."""

Grid = tuple[int, int, int]

_PACKAGE = Path(__file__).resolve().parents[1]
_COMMON = "common.cuh"
_INCLUDE = f'#include "{_COMMON}"\n'


@dataclass(frozen=True)
class Kernel:
    """One entry function of a source file, as it is compiled.

    file: name in kernels/.   name: the `extern "C"` function.
    macros: (name, value) pairs, defined before the first line.
    """

    file: str
    name: str
    macros: tuple[tuple[str, str | int], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.file, self.name, self.macros)))

    def __hash__(self) -> int:
        return self._hash  # a launcher asks at each launch

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.macros)
        return f"{self.name} ({settings})" if settings else self.name


@dataclass(frozen=True)
class LaunchPlan:
    """All of a launch but its tensors: what is the same each time for sizes that recur.

    numbers: the arguments behind the tensors.   cells: the same as they are handed to the driver.
    """

    kernel: Kernel
    grid: Grid
    block: Grid
    numbers: tuple[int | float, ...]
    cells: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", _same(self.kernel))
        object.__setattr__(self, "cells", [*map(cell_of, self.numbers)])


@cache
def _same(kernel: Kernel) -> Kernel:
    """The one of equal kernels that was made first: a launcher finds that without comparing."""
    return kernel


def cell_of(number: int | float) -> int:
    """The 4 bytes of an argument, as one number."""
    if isinstance(number, int):
        return number & 0xFFFFFFFF
    return int.from_bytes(struct.pack("=f", number), sys.byteorder)


def kernel_folder() -> Path:
    """Where the sources lie: inside the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / _COMMON).is_file():
            return folder
    raise KernelError(
        f"the CUDA sources are neither in {_PACKAGE / 'kernels'} nor in "
        f"{_PACKAGE.parent / 'kernels'}; install bminf anew"
    )


def source_of(kernel: Kernel) -> str:
    """The whole text: a cache keyed by it cannot miss an edit of the header.

    Messages of the compiler name the files and lines of kernels/. Raises KernelError for a file
    that is not there.
    """
    folder = kernel_folder()
    try:
        text = (folder / kernel.file).read_text(encoding="utf-8")
        common = (folder / _COMMON).read_text(encoding="utf-8")
    except OSError as error:
        raise KernelError(f"a CUDA source cannot be read: {error}; install bminf anew") from error
    before, include, after = text.partition(_INCLUDE)
    assert include, f"{kernel.file} does not include {_COMMON}"
    defines = "".join(f"#define {name} {value}\n" for name, value in kernel.macros)
    return "".join(
        [
            defines,
            f'#line 1 "kernels/{kernel.file}"\n{before}',
            f'#line 1 "kernels/{_COMMON}"\n{common}',
            f'#line {before.count(chr(10)) + 2} "kernels/{kernel.file}"\n{after}',
        ]
    )
