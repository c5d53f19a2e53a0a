"""`python -m tools.instructions [--capability 90]`: machine instructions that a weight costs.

A kernel is compiled as the library does it, disassembled, and its loops are found: what lies
between a branch that goes back and where it goes. Counted are the loops that hold the products of
codes with activations, all that is in them, divided by the products: multiply-adds of codes, and 8
for each instruction of a tensor core, which is what a lane has of its 16 x 16 weights. No GPU is
needed, but `pip install nvidia-cuda-nvdisasm`, which reads compute capability 7.5 and later.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

from bminf.cuda.compile import compile_kernel
from bminf.cuda.source import Kernel
from bminf.ops import dequantize
from bminf.ops.grouped_linear import grouped_kernel
from bminf.ops.linear_weight_only import few_rows_kernel, tensor_core_kernel
from bminf.quantization.packed import INT4, INT8, Format, empty

_BYTES = 16  # of an instruction, from sm_70 on
_PER_TENSOR_CORE = 8

NAMES = {
    "int8": INT8,
    "int4": INT4,
    "int4-g16": Format(4, 16),
    "int4-g32": Format(4, 32),
    "int4-g32-integers": Format(4, 32, scale_bits=8),
    "int4-g32-minimum": Format(4, 32, has_minimum=True),
    "int4-row": Format(4),
}


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers, such as "LDG.E.128".   operands: as they are printed."""

    opcode: str
    operands: str = ""

    @property
    def target(self) -> int | None:
        """The index of the instruction that a branch goes to; None for all others."""
        if self.opcode.split(".")[0] != "BRA":
            return None
        return int(self.operands.rpartition(",")[2], 16) // _BYTES


@dataclass(frozen=True)
class Count:
    """Of the loops that hold the products.   rows: of activations that share a weight."""

    instructions: int
    products: int
    rows: int

    @property
    def per_weight(self) -> float:
        return self.instructions * self.rows / self.products


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the table was printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args(argv).capability
    for title, kernel in table_kernels(capability):
        print(f"{title:45}{count(kernel, capability).per_weight:6.2f}", flush=True)
    for name, form in NAMES.items():
        code = code_of(dequantize_kernel(torch.float16, form), capability)
        print(f"{f'dequantize {name}, of 8 weights':45}{len(code):6}")
    return 0


def table_kernels(capability: int) -> Iterator[tuple[str, Kernel]]:
    """What is printed, by its title."""
    for dtype in (torch.float16, torch.bfloat16):
        for name, form in NAMES.items():
            words = f"{name} {str(dtype).removeprefix('torch.')}"
            for rows in (1, 2, 4):
                yield f"few rows, M={rows}, {words}", few_rows(dtype, form, rows)
            yield f"grouped, {words}", grouped(dtype, form)
            for rows in (8, 16, 64) if capability >= 80 else ():
                yield f"tensor core, M={rows}, {words}", tensor_core(dtype, form, rows)


def few_rows(dtype: torch.dtype, form: Format, num_rows: int) -> Kernel:
    return few_rows_kernel(dtype, empty(4096, 4096, form, "meta"), num_rows)


def grouped(dtype: torch.dtype, form: Format) -> Kernel:
    """For one of many weights."""
    return grouped_kernel(dtype, empty(4096, 4096, form, "meta"))


def tensor_core(dtype: torch.dtype, form: Format, num_rows: int) -> Kernel:
    """For a matrix that is not narrow."""
    return tensor_core_kernel(dtype, empty(4096, 4096, form, "meta"), num_rows, num_processors=1)


def dequantize_kernel(dtype: torch.dtype, form: Format) -> Kernel:
    return dequantize.kernel(dtype, form, 4096)


def count(kernel: Kernel, capability: int) -> Count:
    """For a kernel of a weight-only product.   Raises RuntimeError where it has no such loop."""
    code = code_of(kernel, capability)
    found = [code[loop.start : loop.stop] for loop in innermost(loops(code))]
    chunk, rows = _shape(kernel)
    products = [_products(loop, chunk * rows) for loop in found]
    if not any(products):
        raise RuntimeError(f"{kernel} for sm_{capability} has no loop with products")
    length = sum(len(loop) for loop, in_it in zip(found, products, strict=True) if in_it)
    return Count(length, sum(products), rows)


def _shape(kernel: Kernel) -> tuple[int, int]:
    """Weights that a thread reads at once, of all its rows; and rows that share them."""
    macros = {name: int(value) for name, value in kernel.macros}
    if "X_TILES" in macros:
        return 0, macros["X_TILES"]
    return 128 // macros["BITS"] * macros["ROWS_OF_W"], macros["ROWS_OF_X"]


def _products(code: Sequence[Instruction], whole: int) -> int:
    """Products of codes in a loop; of the multiply-adds those of scales, too few for a whole step
    of `whole` products, are left out."""
    names = [instruction.opcode.split(".")[0] for instruction in code]
    if "HMMA" in names:
        return _PER_TENSOR_CORE * names.count("HMMA")
    return names.count("FFMA") // whole * whole if whole else 0


# ---- machine code --------------------------------------------------------------------------------


def loops(code: Sequence[Instruction]) -> list[range]:
    """From where each branch back goes to the branch; of those to one place the longest."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        target = instruction.target
        if target is not None and target < i:  # one to itself is the end of the code
            ends[target] = max(i, ends.get(target, i))
    return [range(begin, end + 1) for begin, end in sorted(ends.items())]


def innermost(found: Sequence[range]) -> list[range]:
    """Those with no other inside."""
    return [
        loop
        for loop in found
        if not any(other is not loop and other[0] in loop and other[-1] in loop for other in found)
    ]


def code_of(kernel: Kernel, capability: int) -> list[Instruction]:
    """The instructions of `kernel`, without what fills the end."""
    (function,) = _disassembled(compile_kernel(kernel, capability))
    code = [
        Instruction(instruction["opcode"], instruction.get("operands", ""))
        for instruction in function["sass-instructions"]
    ]
    end = next(i for i, instruction in enumerate(code) if instruction.target == i)
    return code[: end + 1]


def _disassembled(cubin: bytes) -> list[dict[str, list[dict[str, str]]]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin + b"\0")  # CuPy drops the last byte, a zero, as if of a string
        command = [str(disassembler()), "-json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr}")
    functions: list[dict[str, list[dict[str, str]]]] = json.loads(done.stdout)[1]
    return functions


def disassembler() -> Path:
    """The program of the wheel.   Raises RuntimeError where it is not installed."""
    try:
        found = files("nvidia-cuda-nvdisasm") or []
    except PackageNotFoundError:
        found = []
    for file in found:
        if file.stem == "nvdisasm" and file.parent.name == "bin":
            return Path(str(file.locate()))
    raise RuntimeError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


if __name__ == "__main__":
    raise SystemExit(main())
