"""Module._apply of a streamed model, which .to() and .half() call: carried out, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from streaming import make_stack, stream

from bminf.errors import UnsupportedModelError


class Convolved(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.conv(x))


def convolutions() -> torch.nn.Module:
    return make_stack(block=Convolved, width=4).layers


LAST = torch.channels_last
CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "channels last": lambda model: model.to(memory_format=LAST),
    "channels last and a dtype": lambda model: model.to(torch.float32, memory_format=LAST),
    "around it": lambda model: torch.nn.Sequential(model).to(memory_format=LAST),
    "a block": lambda model: model[2].to(memory_format=LAST),
    "a part of a block": lambda model: model[2].conv.half(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "in place": lambda model: model._apply(lambda t: t.mul_(2)),
    "a copy": lambda model: model._apply(torch.clone),
    # Of some tensors, whatever it depends on: size, values, number of dimensions.
    "of large ones": lambda model: model._apply(lambda t: t.half() if t.numel() > 100 else t),
    "of some values": lambda model: model._apply(lambda t: t.abs() if t.min() < -0.01 else t),
    "through data": lambda model: model._apply(doubled),
    "of the format, one by one": lambda model: torch.nn.utils.convert_conv2d_weight_memory_format(
        model, LAST
    ),
}


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    tensor.data.mul_(2)
    return tensor


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_streamed_model_is_refused(change: str) -> None:
    model = stream(torch.nn.Sequential(*convolutions()))
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    with pytest.raises(UnsupportedModelError, match=r"(moved or converted|become) .*bminf\.unwrap"):
        CHANGES[change](model)
    assert torch.equal(model(x), expected)


def test_what_changes_nothing_is_accepted() -> None:
    plain = torch.nn.Sequential(*convolutions()).to(memory_format=LAST)
    x = torch.randn(1, 4, 6, 6)
    expected = plain(x)
    model = stream(plain)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert model.to(memory_format=LAST).float().to("cpu") is model
    assert all(p.is_contiguous(memory_format=LAST) for p in model.parameters() if p.dim() == 4)
