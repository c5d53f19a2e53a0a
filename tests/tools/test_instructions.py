"""tools.instructions counts what is in the loops that hold the products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bminf.quantization.packed import INT8, Format
from tools.instructions import (
    Count,
    Instruction,
    _products,
    code_of,
    count,
    disassembler,
    few_rows,
    innermost,
    loops,
    main,
    tensor_core,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMINF_CACHE_DIR", str(tmp_path))


def code(text: str) -> list[Instruction]:
    """Words; a number is a branch to that instruction."""
    return [
        Instruction("BRA", f"P0,{16 * int(word):#x}") if word.isdigit() else Instruction(word)
        for word in text.split()
    ]


def test_a_loop_goes_from_where_a_branch_goes_back_to_the_branch() -> None:
    assert loops(code("A 3 B C 5 D")) == []  # forward, to itself
    assert loops(code("A B C 1 D")) == [range(1, 4)]
    assert loops(code("A B 1 C 1 D 6")) == [range(1, 5)]
    nested = loops(code("A B C 2 D 1 E F 7 G"))
    assert nested == [range(1, 6), range(2, 4), range(7, 9)]
    assert innermost(nested) == [range(2, 4), range(7, 9)]


def test_products_are_multiply_adds_without_those_of_scales_and_tensor_cores() -> None:
    assert _products(code("FFMA FADD FFMA.FTZ IMAD FFMA"), 2) == 2
    assert _products(code("FFMA"), 2) == 0
    assert _products(code("HMMA.16816.F32 FFMA HMMA.16816.F32"), 0) == 16
    assert Count(48, 32, rows=2).per_weight == 3


@pytest.mark.parametrize("form", [INT8, Format(4, 16), Format(4)], ids=str)
def test_each_weight_that_a_step_reads_is_one_product_for_each_row(form: Format) -> None:
    """A thread of the kernel for few rows reads 16 bytes of each weight row in a step; a lane of
    the other those of two rows for each tile of 16."""
    for num_rows in (1, 2):
        kernel = few_rows(torch.float16, form, num_rows)
        found = count(kernel, 90)
        step = 128 // form.bits * int(dict(kernel.macros)["ROWS_OF_W"])
        assert found.products % (step * num_rows) == 0 and found.rows == num_rows
    kernel = tensor_core(torch.float16, form, 16)
    found = count(kernel, 90)
    step = 128 // form.bits * 2 * int(dict(kernel.macros)["W_TILES"])
    assert (found.products, found.rows) == (step * 2, 2)
    assert found.instructions < len(code_of(kernel, 90))


def test_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.instructions.NAMES", {"int8": INT8})
    assert main(["--capability", "75"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 4 + 1 and "few rows, M=4, int8 bfloat16" in lines[6]
    found = count(few_rows(torch.bfloat16, INT8, 4), 75).per_weight
    assert float(lines[6].split()[-1]) == pytest.approx(found, abs=0.01)


def test_a_missing_disassembler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert disassembler().is_file()
    monkeypatch.setattr("tools.instructions.files", lambda _: [])
    with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvdisasm"):
        disassembler()
