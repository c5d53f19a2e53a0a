"""What the error of a limit that is too small advises: what helps this call, and only that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

import bminf
from bminf.errors import BudgetError
from bminf.offload import plan as plan_module
from bminf.offload.plan import Block, Remedy, plan


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
            num_attention_heads=4,
        )
    )  # fmt: skip


def said(limit: int | str, **given: Any) -> str:
    with pytest.raises(BudgetError) as error:
        bminf.plan_for(make(), memory_limit=limit, **given)
    return str(error.value)


def least(**given: Any) -> int:
    return bminf.plan_for(make(), **given).least_limit


def test_what_suffices_is_named() -> None:
    int8, int4 = least(quantization="int8"), least(quantization="int4")
    both = said(int8, quantization=False)
    assert '"int8"' in both and '"int4"' in both and "blocks=" in both
    one = said(int4, quantization=False)
    assert '"int4"' in one and '"int8"' not in one
    assert '"int4"' in said(int4, quantization="int8")


def test_what_is_done_already_is_not() -> None:
    for form in ("int4", bminf.Format(4)):
        assert "quantiz" not in said(1000, quantization=form)
        assert "quantiz" not in said(least(quantization=form) - 1, quantization=form)
    assert "reserve" not in said(1000, quantization=False)
    linear = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    with pytest.raises(BudgetError) as error:  # its blocks are single linears
        bminf.plan_for(torch.nn.Sequential(linear), False, memory_limit=10)
    assert "blocks=" not in str(error.value)


def test_each_part_of_the_sum_is_named() -> None:
    text = said("1MB", quantization=False, reserve="5MB")
    assert "limit of 1 MB (1000000 bytes)" in text
    for part in ("two slots of", "outside all blocks", "4.8 MiB reserved", "or lower reserve"):
        assert part in text
    assert "quantiz" not in text and "blocks=" not in text  # the reserve alone is too much
    assert "0 B" not in said("1KB", quantization=False)


def test_a_context_is_lowered_by_its_own_arguments() -> None:
    text = said("1MB", quantization=False, max_length=10000)
    assert "lower max_length or max_batch_size" in text and "reserve," not in text


def test_remedies_that_help_only_together_are_named_together() -> None:
    blocks = [Block("a", 50), Block("b", 50), Block("c", 50)]
    some = [Remedy("one", 40, True), Remedy("two", 30, False)]
    with pytest.raises(BudgetError, match=r"or do all of these: one and two$"):
        plan(blocks, 40, remedies=lambda: some)
    with pytest.raises(BudgetError, match=r"\); raise memory_limit$"):
        plan(blocks, 20, remedies=lambda: some)
    with pytest.raises(BudgetError, match=r"\); raise memory_limit, or one$"):
        plan(blocks, 65, remedies=lambda: some)


def test_host_memory_is_not_saved_by_a_lower_reserve() -> None:
    blocks = [Block("a", 50), Block("b", 50), Block("c", 50)]
    some = [Remedy("one", 100, True), Remedy("two", 100, False)]
    with pytest.raises(BudgetError, match=r"free host memory, raise memory_limit, or one$"):
        plan(blocks, 110, host_bytes=60, remedies=lambda: some)


def test_of_one_argument_only_the_best_value_is_named() -> None:
    blocks = [Block("a", 50), Block("b", 50), Block("c", 50)]
    some = [Remedy("one", 20, True, "x"), Remedy("two", 30, True, "x"), Remedy("three", 40, False)]
    with pytest.raises(BudgetError, match=r"or do all of these: two and three$"):
        plan(blocks, 40, remedies=lambda: some)
    with pytest.raises(BudgetError, match=r"\); raise memory_limit$"):
        plan(blocks, 15, remedies=lambda: some)  # 90 would only be saved by both values of x


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_packing_would_save_is_counted_as_the_plan_counts(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer has 11.3 MiB, for which a GPU's allocator keeps 12, and 2.8 packed."""
    with torch.device("meta"):
        layers = [torch.nn.Linear(1024, 2887, bias=False) for _ in range(5)]
        model = torch.nn.Sequential(torch.nn.ModuleList(layers))
    plain, packed = (
        bminf.plan_for(model, form, device=device).least_limit for form in (False, "int8")
    )
    assert plain == 2 * (12 * 2**20 if device == "cuda" else 2887 * 4096)
    found: list[Remedy] = []
    joined = plan_module._joined

    def noting(always: list[str], remedies: Sequence[Remedy], lack: int) -> str:
        found.extend(remedies)
        return joined(always, remedies, lack)

    monkeypatch.setattr(plan_module, "_joined", noting)
    with pytest.raises(BudgetError, match=str(plain)):
        bminf.plan_for(model, False, plain - 1, device=device)
    saved = {remedy.advice: remedy.saved_bytes for remedy in found}
    assert saved['quantize with quantization="int8"'] == plain - packed
