"""Bugs that are put into the kernels of norms and appends, one at a time: the cases see each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from case import Case
from fused_cases import DEEP, append_case, norm_case
from host_launcher import HostLauncher, served_by
from host_memory import HostKernelError

from bminf.cuda.source import Kernel, source_of

HALF, SINGLE = torch.float16, torch.float32
ORDERS = ("forward", "reverse", 1)
RMS, LAYER = norm_case("rms", HALF, 2, 4104, 1.0), norm_case("layer", SINGLE, 3, 1000)
DEEP_NORM = norm_case("layer", HALF, 2, 70, DEEP)
ROTATED = append_case(HALF, HALF, "by_head", (1, 3, 5, 32), drops=True)
PLAIN = append_case(HALF, None, "fused", (2, 3, 5, 6))


@dataclass(frozen=True)
class Bug:
    """In the text of a kernel `old`, which is there once, becomes `new`; `case` has to fail."""

    name: str
    old: str
    new: str
    case: Case

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug("no barrier before sums are read", "    __syncthreads();\n    float sum = of_warps[0];",
        "    float sum = of_warps[0];", RMS),
    Bug("one warp is left out", "for (int warp = 1; warp < blockDim.x / WARP; ++warp) sum",
        "for (int warp = 1; warp + 1 < blockDim.x / WARP; ++warp) sum", RMS),
    Bug("a quotient is not rounded", "weights[i] *= rounded(values[chunk][i] * factor)",
        "weights[i] *= values[chunk][i] * factor", norm_case("rms", HALF, 2, 1000)),
    Bug("a product is not rounded before the sum", "rounded(__fmul_rn(own[i], scale))",
        "__fmul_rn(own[i], scale)", DEEP_NORM),
    Bug("the sum is not rounded before the norm",
        "own[i] = rounded(__fadd_rn(rounded(__fmul_rn(own[i], scale)), more[i]))",
        "own[i] = __fadd_rn(rounded(__fmul_rn(own[i], scale)), more[i])",
        norm_case("layer", HALF, 2, 1000, DEEP)),
    Bug("the scale is forgotten", "__fmul_rn(own[i], scale)", "own[i]", DEEP_NORM),
    Bug("the sum is not written", "store8_of(sum + first,", "if (scale < 0) store8_of(sum + first,",
        RMS),
    Bug("padding counts in the variance", "if (column_of(chunk) + i < K) squares", "squares",
        norm_case("layer", SINGLE, 3, 70, mean=100.0)),
    Bug("the variance about zero", "values[chunk][i] -= mean;", "", LAYER),
    Bug("no bias", "* weights[i] + biases[i]", "* weights[i]", LAYER),
    Bug("chunks of a thread lie side by side", "8 * (threadIdx.x + chunk * blockDim.x)",
        "8 * (threadIdx.x + chunk * 32)", RMS),
    Bug("wide reads of rows that are not", "load_row(values, x, delta, sum, K, WIDE, scale)",
        "load_row(values, x, delta, sum, K, true, scale)", DEEP_NORM),
    Bug("the other half turns the other way",
        "__fadd_rn(promoted(__fmul_rn(b, cos[i])), promoted(__fmul_rn(a, sin[i])))",
        "__fsub_rn(promoted(__fmul_rn(b, cos[i])), promoted(__fmul_rn(a, sin[i])))", ROTATED),
    Bug("products of halves are kept exact", "return ELEMENT == 16 && ANGLE == 16 ?",
        "return false ?", ROTATED),
    Bug("angles of the first token", "cos + token * half + column", "cos + column", ROTATED),
    Bug("half of the values", "    copy_columns(value + source + half, values + target + half);\n",
        "", ROTATED),
    Bug("tokens of no row are kept", "    if (cell < 0) return;\n    rotate_columns(key",
        "    rotate_columns(key", ROTATED),
    Bug("all heads to the first", "(size_t(head) * num_cells + cell)", "size_t(cell)", PLAIN),
    Bug("heads beyond the last", "    if (head >= num_heads) return;\n", "",
        append_case(HALF, None, "fused", (1, 5, 70, 8))),
    Bug("the token is its cell", "const i64 cell = cells[token];",
        "const i64 cell = cells[token] < 0 ? -1 : i64(token);", PLAIN),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_bug_of_a_kernel_is_seen(bug: Bug) -> None:
    seen = []
    for order in ORDERS:
        torch.manual_seed(0)
        with served_by(HostLauncher(order=order, source_of=lambda kernel: planted(bug, kernel))):
            try:
                bug.case.run("cpu")
            except (AssertionError, HostKernelError):
                seen.append(order)
                break
    assert seen


def planted(bug: Bug, kernel: Kernel) -> str:
    text = source_of(kernel)
    assert text.count(bug.old) == 1, text.count(bug.old)
    return text.replace(bug.old, bug.new)
