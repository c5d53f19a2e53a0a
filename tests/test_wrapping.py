"""wrapper(), unwrap(), plan_of() and stats_of() as a user meets them, on the CPU."""

from __future__ import annotations

import pytest
import torch
from streaming import Stack, least_limit, make_stack, stream
from tiny_models import greedy, inputs_of, make

import bminf
from bminf.quantization.packed import Format
from bminf.wrapping import plan_for

# The plan


@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize("num_fitting", [2, 3, 6])
def test_the_plan_counts_every_byte_and_no_other(width: int, num_fitting: int) -> None:
    """Of the n blocks that fit beside the rest, n - 2 stay; alignment costs no residency."""
    model = make_stack(width=width)
    block_bytes = sum(t.nbytes for t in model.layers[0].state_dict().values())
    head_bytes = sum(t.nbytes for t in model.head.state_dict().values())
    limit = head_bytes + num_fitting * block_bytes + 1000
    assert bminf.wrapper(model, False, limit, device="cpu", reserve=1000) is model
    plan = bminf.plan_of(model)
    assert len(plan.resident) == num_fitting - 2 and len(plan.streamed) == 9 - num_fitting
    assert set(plan.resident) | set(plan.streamed) == {f"layers.{i}" for i in range(7)}
    assert plan.resident_bytes == head_bytes + (num_fitting - 2) * block_bytes
    assert plan.slot_bytes == 2 * block_bytes and plan.reserved_bytes == 1000
    assert plan.total_bytes == limit == plan.budget
    model(torch.randn(3, width))
    stats = bminf.stats_of(model)
    assert stats.bytes_copied == stats.copies * block_bytes


def test_what_fits_entirely_is_not_streamed() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    expected = model(x)
    bminf.wrapper(model, quantization=False, memory_limit="1GB", device="cpu")
    plan = bminf.plan_of(model)
    assert plan.streamed == () and plan.slot_bytes == 0
    assert "forward" not in model.__dict__ and "forward" not in model.layers[0].__dict__
    assert torch.equal(model(x), expected) and bminf.stats_of(model) == bminf.Stats()
    model(x).sum().backward()  # an ordinary model still


def test_uses_are_taken_and_shown() -> None:
    model = make_stack()
    uses = {"layers": 3, "layers.2": 1}
    stream(model, uses=uses, extra_bytes=3 * 5000)
    plan = bminf.plan_of(model)
    assert plan.uses["layers.0"] == 3 and plan.uses["layers.2"] == 1
    assert "layers.2" in plan.streamed
    assert "1-3" in str(plan) or "1 to 3" in str(plan)


def test_a_model_that_is_not_wrapped_has_no_plan() -> None:
    model = make_stack()
    assert bminf.plan_of(model) is None and bminf.stats_of(model) is None
    stream(model)
    bminf.unwrap(model)
    assert bminf.plan_of(model) is None and bminf.stats_of(model) is None


def test_a_plan_can_be_had_without_weights() -> None:
    with torch.device("meta"):
        empty = Stack(7, 16)
    for quantization in (True, False):
        for_empty = plan_for(empty, quantization=quantization, memory_limit="30KB")
        assert for_empty == plan_for(make_stack(), quantization=quantization, memory_limit="30KB")
    with torch.device("meta"):
        tied = type(make("gpt2"))(make("gpt2").config)
    assert plan_for(tied).outside_bytes == plan_for(make("gpt2")).outside_bytes


# Quantization


def test_a_quantised_model_needs_less() -> None:
    limit = least_limit(make("llama")) + 4_000
    residents = []
    for quantization in (False, True, "int4"):
        model = bminf.wrapper(make("llama"), quantization, limit, device="cpu")
        residents.append(len(bminf.plan_of(model).resident))
    assert residents[1] > 2 * residents[0] and residents[2] > residents[1]


def test_a_format_may_be_given() -> None:
    form = Format(4, group_size=64)
    model = bminf.wrapper(make("llama"), form, memory_limit="1GB", device="cpu")
    assert model.model.layers[0].mlp.up_proj.form == form


def test_a_single_linear_may_be_a_block() -> None:
    model, x = make_stack(), torch.randn(3, 16)
    names = [f"layers.{i}.{part}" for i in range(7) for part in ("up", "down")]
    expected = bminf.wrapper(make_stack(), memory_limit="1GB", device="cpu", blocks=names)(x)
    stream(model, quantization=True, blocks=names)
    assert torch.equal(model(x), expected)
    assert isinstance(model.layers[6].up, bminf.QuantizedLinear)


# Unwrapping


# State that blocks change or hand out


def test_13_encoder_and_decoder_share_the_slots_and_the_limit() -> None:
    model, given = make("bart"), inputs_of("bart")
    expected = greedy(model, given)
    stream(model)
    plan = bminf.plan_of(model)
    lists = {b.list_name for b in plan.blocks if b.name in plan.streamed}
    assert lists == {"model.encoder.layers", "model.decoder.layers"}
    assert plan.slot_bytes == 2 * max(b.nbytes for b in plan.blocks if b.name in plan.streamed)
    uses = {b.list_name: plan.uses[b.name] for b in plan.blocks}
    assert uses == {"model.encoder.layers": 1, "model.decoder.layers": 128}
    for _ in range(2):
        assert torch.equal(greedy(model, given), expected)
