"""Gradients through streamed blocks, and for them: right through frozen ones, else refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from streaming import Residual, make_stack, stream
from tiny_models import make

import bminf
from bminf.errors import UnsupportedModelError


def test_gradients_through_frozen_streamed_blocks_are_right() -> None:
    model, x = make_stack().requires_grad_(False), torch.randn(3, 16)
    expected = torch.autograd.functional.jacobian(model, x)
    stream(model)
    assert torch.equal(torch.autograd.functional.jacobian(model, x), expected)


def test_gradient_checkpointing_through_frozen_blocks_is_right() -> None:
    model = make("llama").requires_grad_(False)
    embeds = torch.randn(1, 5, 32, requires_grad=True)

    def gradient() -> torch.Tensor:
        model.train()
        loss = model(inputs_embeds=embeds, use_cache=False).logits.float().square().sum()
        return torch.autograd.grad(loss, embeds)[0]

    expected = gradient()
    with pytest.warns(UserWarning, match="nothing in it can be trained"):
        stream(model)
    model.activation_checkpointing_enable()
    assert torch.equal(gradient(), expected)


def test_vmap_over_frozen_blocks_works() -> None:
    model, x = make_stack().requires_grad_(False), torch.randn(4, 3, 16)
    expected = torch.vmap(model)(x)
    stream(model)
    with torch.no_grad():
        assert torch.equal(torch.vmap(model)(x), expected)


def test_freezing_after_wrapping_counts() -> None:
    model, x = stream(make_stack()), torch.randn(3, 16, requires_grad=True)
    model.requires_grad_(False)
    expected = torch.autograd.grad(make_stack()(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], expected)
    model.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="freeze"):
        model(x).sum().backward()


class Shift(torch.nn.Module):
    """A bias, which autograd need not save."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


@pytest.mark.parametrize("block", [Residual, Shift])
def test_training_streamed_weights_is_refused(block: type) -> None:
    model = stream(make_stack(num_blocks=30, width=64, block=block))
    with pytest.raises(UnsupportedModelError, match=r"freeze.*adapters"):
        model(torch.randn(3, 64)).sum().backward()


def test_a_pass_with_grad_leaves_nothing_behind() -> None:
    model = stream(make_stack())
    model(torch.randn(3, 16))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["meta", "sparse", "subclass"])
def test_tensors_of_other_kinds_pass_through_a_block_with_grad(name: str) -> None:
    class Kind(torch.Tensor):
        pass

    values = {
        "meta": torch.randn(16, device="meta"),
        "sparse": torch.eye(16).to_sparse(),
        "subclass": torch.randn(16).as_subclass(Kind),
    }

    class Passing(Residual):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), values[name]

    model = make_stack(block=Passing)
    stream(model)
    assert "layers.5" in bminf.plan_of(model).streamed
    assert model.layers[5](torch.randn(3, 16))[1] is values[name]


class Uneven(Residual):
    """Every other one is larger."""

    made = 0

    def __init__(self, width: int) -> None:
        super().__init__(width)
        Uneven.made += 1
        self.up.more = torch.nn.Parameter(torch.zeros(64 * (1 + Uneven.made % 2)))


def test_only_what_lies_in_its_slot_is_of_a_block() -> None:
    """Not what lies in front of the slot or behind it, nor in the slot behind the blob."""
    scheduler = stream(make_stack(block=Uneven))._bminf_scheduler
    block = min(scheduler.blocks, key=lambda block: block.layout.extent)
    slots, nbytes = scheduler.backend.slots, block.layout.extent
    for bound, other in ((0, 1), (1, 0)):
        block.bind(bound)
        assert nbytes < len(slots[bound])
        assert block.offset_in_slot(slots[bound][nbytes - 4 :]) == nbytes - 4
        assert block.offset_in_slot(slots[bound][nbytes:]) is None
        assert block.offset_in_slot(slots[other]) is None
        block.unbind()
