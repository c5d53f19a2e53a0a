"""Plans of published models, with no checkpoint at hand."""

from __future__ import annotations

from typing import Any

import pytest

from bminf.arch.glm import PUBLISHED_GLM
from bminf.errors import ArgumentError, BudgetError
from bminf.models import plan_glm

GIB = 2**30


@pytest.mark.parametrize("model", PUBLISHED_GLM)
def test_every_published_model_has_a_plan(model: str) -> None:
    """A third of its matrices on the device: blocks are matrices, never layers."""
    whole = plan_glm(model, 2**50)
    layers = PUBLISHED_GLM[model].num_hidden_layers
    in_layers = [block for block in whole.blocks if block.list_name == "layers"]
    assert len(in_layers) == 4 * layers and not whole.streamed
    largest = max(block.nbytes for block in in_layers)
    assert all(block.nbytes <= largest for block in whole.blocks)  # the head, too
    limit = whole.reserved_bytes + whole.outside_bytes + 2 * largest + whole.resident_bytes // 3
    part = plan_glm(model, limit)
    assert part.streamed and part.total_bytes <= limit and part.slot_bytes <= 2 * largest


def test_sizes_are_those_of_the_paper() -> None:
    """Bytes of a layer of GLM-130B in the authors' 4 bits, without its norms (facts, section 1)."""
    plan = plan_glm("GLM-130B", 2**50, "int4-row")
    first = [block for block in plan.blocks if block.name.startswith("layers.0.")]
    weights, scales, biases = 1_811_939_328 // 2, 253_952, 2 * 126_976
    assert sum(block.nbytes for block in first) == weights + scales + biases


def test_what_host_memory_has_no_room_for_waits_on_the_disk() -> None:
    limit = int(24 * GIB * 0.9)
    free = plan_glm("GLM-130B", limit, "int4-row", max_length=512)
    assert not free.on_disk and free.streamed_bytes > 40 * GIB
    disk_bytes = [free.streamed_bytes]
    for host in (10 * GIB, 20 * GIB, 40 * GIB):
        plan = plan_glm("GLM-130B", limit, "int4-row", max_length=512, host_memory=host)
        assert plan.resident == free.resident and plan.host_bytes <= host
        homes = plan.host_bytes - plan.staging_bytes
        assert homes + plan.disk_bytes == plan.streamed_bytes
        disk_bytes.append(plan.disk_bytes)
    assert disk_bytes == sorted(disk_bytes, reverse=True) and disk_bytes[-1] > 0
    with pytest.raises(BudgetError, match="host memory"):
        plan_glm("GLM-130B", limit, "int4-row", max_length=512, host_memory=2**20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "GLM-4"}, "model='GLM-4'; accepted: GLM-130B, GLM-10B"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"quantization": "int5"}, "quantization='int5'; accepted: .*int4-row"),
        ({"head_quantization": "int5"}, "head_quantization='int5'"),
        ({"max_length": 0}, "max_length=0"),
        ({"memory_limit": "lots"}, "memory_limit"),
        ({"host_memory": "lots"}, "host_memory"),
    ],
)
def test_bad_input(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        plan_glm(**{"model": "GLM-130B", "memory_limit": "20GB", **arguments})
