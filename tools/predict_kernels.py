"""`python -m tools.predict_kernels`: how fast the kernels should be, from counts of instructions.

No GPU is needed, and nothing here was measured on one: it is arithmetic, to be replaced by what
benchmarks/ measures. Two things take time in a kernel: memory, which brings codes and scales at
REACHED of what a copy moves, and the multiprocessors, which issue 128 instructions a clock, as many
for each weight as tools.instructions counts. They overlap, the less the more alike they are: the
fourth powers of both times are added. A launch takes DRAIN_S more, in which a device fills and runs
empty. A step of decoding is all of its matrices and as many small kernels as --launches leaves;
eager, it takes at least what the host needs to launch them.

Prints Markdown tables: the share of a copy for each kernel, and tokens a second; --out keeps them
in a file of benchmarks/results, from which docs/kernels.md has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import write_json
from bminf.cli.tables.document import document
from bminf.quantization.packed import INT8, Format
from tools.instructions import NAMES, count, few_rows, tensor_core

LANES = 128  # of a multiprocessor of these cards
REACHED = 0.93  # of a copy, by kernels that only read: assumed
DRAIN_S = 2e-6  # of a launch, beyond its bytes: assumed
SMALL_S = 2.5e-6  # of a kernel that moves next to nothing: assumed
HEAD_BITS = 16
_OVERLAP = 4  # the exponent of times that overlap: assumed


@dataclass(frozen=True)
class Card:
    """clock_hz: under load.   copy: bytes a second that a copy reads and writes together, seen on
    the H100 and H200, 0.9 of the data sheet for the others.
    counted: the compute capability whose machine code is counted, and what to multiply with where
    that is not the card's own, which the disassembler does not read.
    """

    name: str
    processors: int
    clock_hz: float
    copy: float
    counted: int
    factor: float = 1.0

    @property
    def instructions_s(self) -> float:
        """Instructions of a thread that it issues in a second."""
        return LANES * self.processors * self.clock_hz


CARDS = (
    Card("GTX 1060", 10, 1.7e9, 173e9, 75, 1.2),
    Card("RTX 3090", 82, 1.7e9, 842e9, 86),
    Card("H100", 132, 1.98e9, 3.0e12, 90),
    Card("H200", 132, 1.98e9, 4.3e12, 90),
)


@dataclass(frozen=True)
class Model:
    """matrices: rows and columns of those that a layer multiplies with in one launch each.

    head: rows and columns, in 16 bits.   launches: of a step, of all kernels.
    """

    name: str
    form: Format
    layers: int
    matrices: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    launches: int

    @property
    def weights(self) -> int:
        """In its layers."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices)


MODELS = (
    Model(  # self-attention, the query and the end of cross-attention, feed-forward
        "CPM-2 int8", INT8, 24,
        ((12288, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (20480, 4096), (4096, 10240)),
        (26240, 4096), 317,
    ),
    Model(
        "GLM-130B int4", Format(4), 70,
        ((36864, 12288), (12288, 12288), (65536, 12288), (12288, 32768)), (150528, 12288), 848,
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the tables were printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host-us", type=float, default=12, help="the host's, for each launch")
    parser.add_argument("--launches", type=int, nargs=2, help="of a step: CPM-2, GLM-130B")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    launches = arguments.launches or [model.launches for model in MODELS]
    content = document("predict_kernels", {"host_us": arguments.host_us, "launches": launches}, {})
    tables = {"kernels": kernel_table(), "models": model_table(launches, arguments.host_us * 1e-6)}
    content["results"] = [{"name": name, "lines": lines} for name, lines in tables.items()]
    print("\n".join(table_parts(content)))
    if arguments.out is not None:
        write_json(arguments.out, content)
    return 0


def table_parts(content: dict[str, Any], view: str = "") -> Iterator[str]:
    """Both tables, or the one called `view`."""
    for result in content["results"]:
        if view in ("", result["name"]):
            yield "\n".join(result["lines"]) + "\n"


# ---- kernels -------------------------------------------------------------------------------------


def bytes_of(form: Format) -> float:
    """Of codes, scales and minima of a weight, in rows without an end."""
    numbers = form.scale_dtype.itemsize * (2 if form.has_minimum else 1)
    return form.bits / 8 + (numbers / form.group_size if form.group_size else 0)


def share_of_copy(card: Card, form: Format, instructions: float) -> float:
    """What a kernel that takes so many instructions for a weight reaches of the card's copy."""
    copy_s = bytes_of(form) / card.copy
    memory_s, issue_s = copy_s / REACHED, instructions / card.instructions_s
    both: float = (memory_s**_OVERLAP + issue_s**_OVERLAP) ** (1 / _OVERLAP)
    return copy_s / both


def per_weight(card: Card, form: Format, num_rows: int) -> float:
    """Instructions on that card, in half precision."""
    return _counted(card.counted, form, num_rows) * card.factor


@cache
def _counted(capability: int, form: Format, num_rows: int) -> float:
    kernel = (few_rows if num_rows == 1 else tensor_core)(torch.float16, form, num_rows)
    return count(kernel, capability).per_weight


def kernel_table() -> list[str]:
    """Of large matrices; no tensor cores on the GTX 1060."""
    lines = [_row("kernel", *(card.name for card in CARDS)), _row(*["---"] * (1 + len(CARDS)))]
    for title, num_rows in (("few rows, M=1", 1), ("tensor cores, M=8", 8)):
        for name, form in NAMES.items():
            cells = []
            for card in CARDS:
                has_it = num_rows == 1 or card.counted >= 80
                share = share_of_copy(card, form, per_weight(card, form, num_rows)) if has_it else 0
                cells.append(f"{share:.2f}" if has_it else "")
            lines.append(_row(f"{title}, {name}", *cells))
    return lines


# ---- models --------------------------------------------------------------------------------------


def device_s(card: Card, model: Model, launches: int, instructions: float) -> float:
    """A step's kernels, one behind the other."""
    speed = share_of_copy(card, model.form, instructions) * card.copy
    products = model.layers * len(model.matrices) + 1
    head = model.head[0] * model.head[1] * HEAD_BITS / 8 / (REACHED * card.copy)
    small_s = (launches - products) * SMALL_S
    return model.weights * bytes_of(model.form) / speed + head + products * DRAIN_S + small_s


def bound_s(card: Card, model: Model) -> float:
    """What a copy of all weights would take, counted as reading alone."""
    head = model.head[0] * model.head[1] * HEAD_BITS / 8
    return (model.weights * bytes_of(model.form) + head) / card.copy


def tokens_s(
    card: Card, model: Model, launches: int, host_s: float, instructions: float
) -> tuple[float, float]:
    """Eager, where the host launches one kernel after the other, and captured."""
    device = device_s(card, model, launches, instructions)
    return 1 / max(device, launches * host_s), 1 / device


def model_table(launches: Sequence[int], host_s: float) -> list[str]:
    """With everything resident, whatever the card's memory: GLM-130B's needs several."""
    lines = [_row("model", "card", "eager", "captured", "bound"), _row(*["---"] * 5)]
    for model, number in zip(MODELS, launches, strict=True):
        for card in CARDS:
            instructions = per_weight(card, model.form, 1)
            speeds = tokens_s(card, model, number, host_s, instructions)
            cells = (*speeds, 1 / bound_s(card, model))
            lines.append(_row(model.name, card.name, *(f"{cell:.3g}" for cell in cells)))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
