"""Streamed equals unwrapped, bit for bit, on 21 architectures."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, greedy, half_layer_names, inputs_of, make, output_of

import bminf
from bminf.wrapping import plan_for


def stream(model: torch.nn.Module, blocks: list[str] | None = None) -> bminf.Plan:
    """Wrap `model` so that fewer than half of its blocks stay; the plan."""
    whole = plan_for(model, quantization=False, blocks=blocks)
    sizes = sorted((block.nbytes for block in whole.blocks), reverse=True)
    limit = whole.outside_bytes + 2 * sizes[0] + sum(sizes) // 6
    bminf.wrapper(model, quantization=False, memory_limit=limit, device="cpu", blocks=blocks)
    plan = bminf.plan_of(model)
    assert plan is not None and plan.total_bytes <= limit
    return plan


def check_streamed(name: str, by_half_layers: bool) -> None:
    model, given = make(name), inputs_of(name)
    expected = output_of(model, given)
    expected_ids = greedy(model, given) if TINY[name].generates else None
    plan = stream(model, half_layer_names(name, model) if by_half_layers else None)
    assert len(plan.resident) < len(plan.blocks) / 2
    streamed_bytes = sum(b.nbytes for b in plan.blocks if b.name in plan.streamed)
    for num_passes in (1, 2):
        assert torch.equal(output_of(model, given), expected)
        stats = bminf.stats_of(model)
        assert stats.passes == num_passes
        assert stats.bytes_copied >= num_passes * streamed_bytes
        assert stats.copies >= num_passes * len(plan.streamed)
    if expected_ids is not None:
        assert torch.equal(greedy(model, given), expected_ids)
        assert bminf.stats_of(model).bytes_copied > 3 * streamed_bytes


@pytest.mark.parametrize("name", TINY)
def test_streamed_layers_equal_the_unwrapped_model(name: str) -> None:
    check_streamed(name, by_half_layers=False)


@pytest.mark.parametrize("name", TINY)
def test_streamed_half_layers_equal_the_unwrapped_model(name: str) -> None:
    check_streamed(name, by_half_layers=True)
