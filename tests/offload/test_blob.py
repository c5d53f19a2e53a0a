"""Which bytes are of a block and which lie outside: tied weights, views of one storage.

Modules that stand in several places are in test_blob_places.py, what to do about a limit that is
too small in test_blob_remedies.py.
"""

from __future__ import annotations

import pytest
import torch
from streaming import Stack, make_stack, stream
from tiny_models import inputs_of, make, output_of

import bminf


def test_a_tied_head_stays_tied_and_is_counted_once() -> None:
    model, given = make("gpt2"), inputs_of("gpt2")
    expected = output_of(model, given)
    assert model.lm_head.weight is model.transformer.wte.weight
    embedding_bytes = model.transformer.wte.weight.nbytes
    stream(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    tensors = [*model.named_parameters(), *model.named_buffers()]
    outside = sum(t.nbytes for name, t in tensors if not name.startswith("transformer.h."))
    plan = bminf.plan_of(model)
    assert plan.tables == ("transformer.wpe.weight",)  # which is not tied
    counted = plan.outside_bytes + plan.table_bytes
    assert embedding_bytes < outside <= counted < outside + 512
    model.tie_weights()
    assert torch.equal(output_of(model, given), expected)


@pytest.mark.parametrize("quantization", [False, True])
def test_a_block_that_shares_a_weight_or_buffer_with_the_outside(quantization: bool) -> None:
    def tied() -> Stack:
        model = make_stack(width=16)
        model.head = torch.nn.Linear(16, 32)
        model.head.weight = model.layers[2].up.weight
        model.layers[4].up.weight = model.layers[1].up.weight
        model.register_buffer("also", model.layers[3].shift)
        return model

    model, x = tied(), torch.randn(3, 16)
    resident = bminf.wrapper(tied(), quantization=quantization, memory_limit="1GB", device="cpu")
    expected = resident(x)
    assert quantization or torch.equal(expected, model(x))
    stream(model, quantization=quantization)
    assert {"layers.2", "layers.3"} & set(bminf.plan_of(model).streamed)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert model.head.weight is model.layers[2].up.weight
    assert model.layers[4].up.weight is model.layers[1].up.weight
    with torch.no_grad():
        model.head.weight.zero_()
        model.also.zero_()
    assert model.layers[2].up.weight.abs().max() == 0 and model.layers[3].shift.abs().max() == 0


def test_tensors_of_one_storage_are_not_tied_and_their_blocks_of_one_size() -> None:
    """As in a mapped checkpoint: one after another, at any multiple of 4 bytes."""
    model, x = make_stack(num_blocks=8, width=15), torch.randn(3, 15)
    tensors = [*model.parameters(), *model.buffers()]
    flat = torch.cat([t.detach().flatten() for t in tensors])
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.data = part.view_as(tensor)
    expected = model(x)
    plan = bminf.plan_of(stream(model))
    assert len(plan.streamed) == 8 and len({block.nbytes for block in plan.blocks}) == 1
    assert torch.equal(model(x), expected)
