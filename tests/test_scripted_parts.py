"""Parts of a model that torch.jit made: those without tensors are like any other module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from streaming import Residual, make_stack, stream

import bminf
from bminf.errors import UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Swish(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def scripted() -> torch.nn.Module:
    return torch.jit.script(Swish())


def traced() -> torch.nn.Module:
    return torch.jit.trace(Swish(), torch.randn(2, 3))


class Activated(Residual):
    def __init__(self, width: int, make: Callable[[], torch.nn.Module]) -> None:
        super().__init__(width)
        self.act = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("quantization", [False, True])
def test_a_scripted_part_without_tensors_is_in_nobodys_way(
    make: Callable[[], torch.nn.Module], quantization: bool
) -> None:
    def made() -> torch.nn.Module:
        model = make_stack(block=lambda width: Activated(width, make))
        model.act = make()
        return model

    model, x = made(), torch.randn(3, 16)
    expected = bminf.wrapper(made(), quantization, "1GB", device="cpu")(x)
    stream(model, quantization=quantization)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    bminf.unwrap(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("place", ["layers.3", "head"])
def test_a_scripted_part_with_tensors_is_refused_by_name(place: str) -> None:
    model = make_stack()
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.jit.script(model.get_submodule(place)))
    with pytest.raises(UnsupportedModelError, match=f"'{place}' is a TorchScript module"):
        bminf.wrapper(model, False, "1GB", device="cpu")
