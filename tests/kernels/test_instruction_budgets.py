"""Instructions that a weight costs, on sm_90, where memory is fast enough to make them the limit.

A budget is a few percent above what was reached. That a count notices is shown with what kernels
did before they were made cheap: it is put back, and each budget must fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_kernels_compile import check

from bminf.cuda.source import Kernel, kernel_folder
from tools.instructions import (
    NAMES,
    code_of,
    count,
    dequantize_kernel,
    few_rows,
    grouped,
    tensor_core,
)

HALF, BFLOAT16 = torch.float16, torch.bfloat16
CAPABILITY = 90

FEW_ROWS = {  # one row of activations, of either type
    "int8": 4.4,
    "int4-g16": 4.6,
    "int4-g32": 4.3,
    "int4-row": 4.3,
    "int4": 4.6 + 0.4,
    "int4-g32-integers": 4.3 + 0.4,
}
TENSOR_CORE = {  # eight rows
    HALF: {"int8": 2.4, "int4-g16": 2.9, "int4-row": 2.1},
    BFLOAT16: {"int8": 3.7, "int4-g16": 4.1, "int4-row": 2.4},
}
BUDGETS = [
    (few_rows(dtype, NAMES[name], 1), budget)
    for dtype in (HALF, BFLOAT16)
    for name, budget in FEW_ROWS.items()
] + [
    (tensor_core(dtype, NAMES[name], 8), budget)
    for dtype, budgets in TENSOR_CORE.items()
    for name, budget in budgets.items()
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each text is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMINF_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(("kernel", "budget"), BUDGETS, ids=str)
def test_a_weight_costs_no_more_than(kernel: Kernel, budget: float) -> None:
    assert count(kernel, CAPABILITY).per_weight <= budget


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_a_weight_is_written_back_in_few_instructions_and_one_store(
    dtype: torch.dtype, name: str
) -> None:
    """All that a thread does, for 8 weights."""
    code = code_of(dequantize_kernel(dtype, NAMES[name]), CAPABILITY)
    stores = [i.opcode for i in code if i.opcode.startswith("ST")]
    assert len(code) <= 90 and stores == ["STG.E.128"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16, torch.float32])
def test_a_weight_out_of_a_table_costs_what_another_does(dtype: torch.dtype, name: str) -> None:
    own = count(grouped(dtype, NAMES[name]), CAPABILITY).per_weight
    assert own <= 1.1 * count(few_rows(dtype, NAMES[name], 1), CAPABILITY).per_weight


@pytest.mark.parametrize("name", NAMES)
def test_what_a_table_points_to_is_read_as_what_lies_in_the_memory_of_the_device(name: str) -> None:
    """Loads that may be of shared memory, too, wait longer."""
    opcodes = [i.opcode.split(".")[0] for i in code_of(grouped(HALF, NAMES[name]), CAPABILITY)]
    assert "LDG" in opcodes and "LD" not in opcodes


# ---- what kernels did before ---------------------------------------------------------------------

NIBBLES = (  # a mask and a power of two one after the other, both constants
    "const u32 digits = masked_xor(word, 0xFu << shift, exponent | u32(CODE_OFFSET) << shift);",
    "const u32 digits = ((word ^ 8u << shift) & 0xFu << shift) | exponent;",
)
BYTES = (  # shifts and masks
    "__byte_perm(word, 0x4B000000u, 0x7440 + index)",
    "((word >> 8 * index & 0xFF) | 0x4B000000u)",
)
DIVISIONS = ("__umulhi(u32(column), multiplier) >> shift", "u32(column) / multiplier")
SCALES_IN_FRONT = ("SCALES_AT_END = SPAN < 0 && !HAS_MINIMUM", "SCALES_AT_END = false")
FLOATS = (
    "NIBBLE_PAIRS = BITS == 4 && SPAN != 0 && (ELEMENT == 16 || SCALES_AT_END)",
    "NIBBLE_PAIRS = false",
)
SUBTRACTIONS = (
    "constexpr bool IS_SCALED = SPAN != 0 && !HAS_MINIMUM",
    "constexpr bool IS_SCALED = false",
)


def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *replacements: tuple[str, str]) -> None:
    """Let kernels be compiled with these replacements, each of which must be found once."""
    texts = {path.name: path.read_text() for path in kernel_folder().glob("*.cu*")}
    for old, new in replacements:
        (name,) = (name for name, text in texts.items() if old in text)
        assert texts[name].count(old) == 1
        texts[name] = texts[name].replace(old, new)
    folder = tmp_path / "before"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    monkeypatch.setattr("bminf.cuda.source.kernel_folder", lambda: folder)


@pytest.mark.parametrize(("kernel", "budget"), BUDGETS, ids=str)
def test_each_budget_notices_what_kernels_did_before(
    kernel: Kernel, budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacements = {
        "linear_few_rows": [NIBBLES, BYTES],
        "linear_tensor_core": [NIBBLES, BYTES, SCALES_IN_FRONT, FLOATS, SUBTRACTIONS],
    }[kernel.name]
    before(tmp_path, monkeypatch, *replacements)
    assert count(kernel, CAPABILITY).per_weight > budget


def test_a_store_for_each_weight_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(tmp_path, monkeypatch, ("if (IS_ALIGNED) {", "if (false) {"))
    with pytest.raises(AssertionError):
        test_a_weight_is_written_back_in_few_instructions_and_one_store(HALF, "int8")


def test_a_division_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = few_rows(HALF, NAMES["int4-g16"], 1)
    assert not check(kernel, CAPABILITY)
    before(tmp_path, monkeypatch, DIVISIONS)
    assert "division" in check(kernel, CAPABILITY)
